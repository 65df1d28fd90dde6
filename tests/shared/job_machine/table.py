"""The state of the machine: the model, the messages, the leases."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine
from sqlalchemy import delete

from shared.db import Database
from shared.db.models import Attempt, Job, Submission
from shared.jobs import LeasedJob
from shared.jobs.retry import RetryPolicy
from shared.jobs.submissions import NewJob
from tests.job_table import UpperBound
from tests.shared.job_machine.model import FakeQueue, ModelJob

ENGINES = ("opencv", "sd2")
WORKERS = ("w1", "w2", "w3")
IMAGES = 4
LEASE_SECONDS = 3600.0
RETRY_AT_ONCE = RetryPolicy(max_failures=3, base_seconds=0, cap_seconds=0)
RETRY_LATER = RetryPolicy(max_failures=3, base_seconds=3600, cap_seconds=3600, random=UpperBound())
ENDS = st.sampled_from(["succeed", "fail", "retry", "release", "cancel", "renew"])
PAST = datetime(2020, 1, 1, tzinfo=UTC)


class MachineState(RuleBasedStateMachine):
    """Empty tables, and what the rules remember of earlier steps."""

    def __init__(self, db: Database) -> None:
        super().__init__()
        self.db = db
        self.queue = FakeQueue()
        self.model: dict[int, ModelJob] = {}
        self.leases: list[LeasedJob] = []
        self.submissions: dict[int, list[NewJob]] = {}
        self.digests: dict[int, str] = {}
        self.manifests = 0
        self.ended: Counter[tuple[int, int]] = Counter()
        self.attempts_seen: dict[int, int] = {}
        with db.write() as connection:
            for kind in (Attempt, Job, Submission):
                connection.execute(delete(kind))
