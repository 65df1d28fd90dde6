"""The SQL database: connections, tables, and the revision of the tables."""

from shared.db.database import Database, clock

__all__ = ["Database", "clock"]
