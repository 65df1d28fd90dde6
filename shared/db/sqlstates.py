"""SQLSTATE, PostgreSQL's error codes: which of them mean that the database is unavailable.

Source: PostgreSQL's manual, appendix A. The first two characters of a code are its class.
"""

from __future__ import annotations

READ_ONLY = "25006"  # a standby, or a primary that a failover has demoted

# The server, its resources or its configuration are the cause: a retry can help, once it is
# repaired or another server has taken over.
UNAVAILABLE_CLASSES = {
    "08": "connection lost",
    "28": "login refused",
    "3D": "no such database",
    "40": "deadlock or serialization failure",
    "53": "out of disk, memory or connections",
    "55": "locked by another session",
    "57": "shutdown, restart or a cancelled statement",
    "58": "I/O error of the server",
    "72": "snapshot too old",
    "F0": "the server's configuration file is wrong",
    "XX": "the server's internal error or damaged data",
}
UNAVAILABLE_CODES = {
    READ_ONLY: "read-only: a standby, or demoted by a failover",
    "25P03": "idle too long in a transaction",
    "25P04": "the transaction took too long",
    "42501": "a permission is missing",
}

# The statement or its values are the cause. Integrity violations (23) are part of the normal
# course where a constraint decides a race; all others are bugs, and their traceback is kept.
_STATEMENT = """
    00 01 02 03 09 0A 0B 0F 0L 0P 0Z 10 20 21 22 23 24 25 26 27 2B 2D 2F 34 38 39 3B 3F
    42 44 54 HV P0
"""
STATEMENT_CLASSES = frozenset(_STATEMENT.split())


def is_unavailable(sqlstate: str) -> bool:
    """True if the server, not the statement, is the cause."""
    return sqlstate in UNAVAILABLE_CODES or sqlstate[:2] in UNAVAILABLE_CLASSES
