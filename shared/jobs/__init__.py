"""Job states: the only code that changes them. Each change has its condition in the UPDATE.

SQL is the truth, a message in Redis only a hint that a job may be due: messages may be
lost, doubled or reordered, and ``acquire`` sorts them out. The clock is the database's.
"""

from shared.jobs.completion import (
    AttemptRecord,
    fail,
    finish_cancelled,
    release,
    release_orphan,
    succeed,
)
from shared.jobs.control import (
    Cancellation,
    Reopened,
    Selection,
    cancel,
    owns,
    rerun,
    restore,
    retry,
    supersede,
)
from shared.jobs.dispatcher import dispatch, redeliver, sweep
from shared.jobs.identity import content_key, derived_seed
from shared.jobs.leases import (
    LOSSES_BEFORE_QUARANTINE,
    Beat,
    Holder,
    LeasedJob,
    Reaped,
    acquire,
    confirm,
    heartbeat,
    note,
    reap,
    reap_worker,
)
from shared.jobs.pruning import Prunable, prunable, prune

__all__ = [
    "LOSSES_BEFORE_QUARANTINE",
    "AttemptRecord",
    "Beat",
    "Cancellation",
    "Holder",
    "LeasedJob",
    "Prunable",
    "Reaped",
    "Reopened",
    "Selection",
    "acquire",
    "cancel",
    "confirm",
    "content_key",
    "derived_seed",
    "dispatch",
    "fail",
    "finish_cancelled",
    "heartbeat",
    "note",
    "prunable",
    "prune",
    "owns",
    "reap",
    "reap_worker",
    "redeliver",
    "release",
    "release_orphan",
    "rerun",
    "restore",
    "retry",
    "succeed",
    "supersede",
    "sweep",
]
