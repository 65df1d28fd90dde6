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
    CancelResult,
    RetryResult,
    Selection,
    cancel,
    owns_output,
    reopen_as_submitted,
    reopen_by_content_key,
    retry,
    supersede,
)
from shared.jobs.dispatcher import discard_stale_messages, dispatch, redeliver
from shared.jobs.identity import content_key, derive_seed
from shared.jobs.leases import (
    LOSSES_BEFORE_QUARANTINE,
    Holder,
    LeasedJob,
    ReapedLease,
    RenewedLease,
    acquire,
    heartbeat,
    reap,
    reap_worker,
    record_blocked_reason,
    renew_lease,
)
from shared.jobs.pruning import PrunableSubmission, find_prunable, prune

__all__ = [
    "LOSSES_BEFORE_QUARANTINE",
    "AttemptRecord",
    "RenewedLease",
    "CancelResult",
    "Holder",
    "LeasedJob",
    "PrunableSubmission",
    "ReapedLease",
    "RetryResult",
    "Selection",
    "acquire",
    "cancel",
    "renew_lease",
    "content_key",
    "derive_seed",
    "dispatch",
    "fail",
    "finish_cancelled",
    "heartbeat",
    "record_blocked_reason",
    "find_prunable",
    "prune",
    "owns_output",
    "reap",
    "reap_worker",
    "redeliver",
    "release",
    "release_orphan",
    "reopen_by_content_key",
    "reopen_as_submitted",
    "retry",
    "succeed",
    "supersede",
    "discard_stale_messages",
]
