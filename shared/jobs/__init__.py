"""The state machine of jobs, and the only code that changes a job's state.

SQL is the truth. A message in Redis is only a hint that a job may be due: messages may be lost,
duplicated or reordered, and ``acquire`` ignores the stale ones. All times are the database's
clock, so that the clocks of the hosts do not matter.

| from            | to        | by, and the condition in its UPDATE                         |
| --------------- | --------- | ----------------------------------------------------------- |
| -               | pending   | record: no job has the row's content key                    |
| pending         | queued    | dispatch: due, and the queue has room                       |
| queued          | queued    | redeliver: queued longer than ``grace_seconds``, no message |
| queued          | running   | acquire: ``attempt`` is the message's; increments it        |
| running         | running   | heartbeat: leased to this worker; renew_lease: *            |
| running         | succeeded | succeed: *                                                  |
| running         | pending   | fail, if a retry can help: *                                |
| running         | failed    | fail, if not: *                                             |
| running         | pending   | release, release_orphan: *                                  |
| running         | cancelled | finish_cancelled: *                                         |
| running         | pending   | reap: the lease expired, and was not renewed while a        |
|                 |           | ``LeaseWatch`` watched it; reap_worker: the process exited  |
| running         | failed    | the same, for the second lost worker (quarantine)           |
| pending, queued | cancelled | cancel, supersede: still pending or queued                  |
| final           | pending   | retry, reopen_*: still final; the output is free, or is     |
|                 |           | taken in the same transaction (``replace``)                 |
| running         | cancelled | reopen_* with ``replace``: superseded and not yet stopped;  |
|                 |           | the same transaction reopens it                             |
| final           | (deleted) | prune: finished long enough ago                             |

* The attempt still holds the lease. A job whose cancellation was requested while it ran becomes
cancelled wherever this table says pending or failed.

Final states are succeeded, failed and cancelled. Why no job is lost or doubled when a process
dies or is suspended at any point:

- A transition is one UPDATE that repeats the state it leaves. Of several processes that try
  the same transition, one matches the row; the others match none and know it.
- "Holds the lease" compares the fencing token (job, ``attempt``), which only grows. An attempt
  whose lease was reaped can therefore change nothing (``LeaseLost``).
- Messages are published after the commit. A crash in between leaves a queued job without a
  message, which ``redeliver`` publishes again; two messages for one job acquire it once.
- At most one job owns an output, by a constraint of the database. ``record``, ``retry`` and the
  reopen functions supersede the owner, or leave the job out, in the transaction that makes a job
  an owner.
- A result is put only by the owner of its output: ``renew_lease`` checks that before each put.
- Statements over several unfinished jobs lock them in ascending order of id, so that no two of
  them deadlock.

Modules: submissions (manifest rows to jobs), identity (content keys), queue (messages in Redis),
dispatcher (which are published), leases (acquire, heartbeat, reap), completion (how an attempt
ends), retry (when a failed job runs again), control (cancel, retry), ownership (of outputs),
pruning (deletion).
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
    reopen_as_submitted,
    reopen_by_content_key,
    retry,
)
from shared.jobs.dispatcher import discard_stale_messages, dispatch, redeliver
from shared.jobs.identity import content_key, derive_seed
from shared.jobs.leases import (
    LOSSES_BEFORE_QUARANTINE,
    FencingToken,
    Holder,
    LeasedJob,
    ReapedLease,
    RenewedLease,
    RunningLease,
    acquire,
    heartbeat,
    reap,
    reap_worker,
    record_blocked_reason,
    renew_lease,
    running_leases,
    wrote_result,
)
from shared.jobs.pruning import PrunableSubmission, find_prunable, prune

__all__ = [
    "LOSSES_BEFORE_QUARANTINE",
    "AttemptRecord",
    "CancelResult",
    "FencingToken",
    "Holder",
    "LeasedJob",
    "PrunableSubmission",
    "ReapedLease",
    "RenewedLease",
    "RetryResult",
    "RunningLease",
    "Selection",
    "acquire",
    "cancel",
    "content_key",
    "derive_seed",
    "discard_stale_messages",
    "dispatch",
    "fail",
    "find_prunable",
    "finish_cancelled",
    "heartbeat",
    "prune",
    "reap",
    "reap_worker",
    "record_blocked_reason",
    "redeliver",
    "release",
    "release_orphan",
    "renew_lease",
    "reopen_as_submitted",
    "reopen_by_content_key",
    "retry",
    "running_leases",
    "succeed",
    "wrote_result",
]
