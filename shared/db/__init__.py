"""The SQL database: connections, tables, and the revision the tables are at."""

from shared.db.database import Database, clock

__all__ = ["Database", "clock"]
