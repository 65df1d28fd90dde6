"""What a job is, in plain Python, and a Redis that forgets on request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.db.models import FINAL_STATES
from shared.errors import BrokerUnavailable
from shared.jobs.queue import Message
from shared.jobs.submissions import NewJob


@dataclass(kw_only=True)
class Expected:
    """What the model says of one job. outcomes: of its attempts, None while one runs."""

    id: int
    row: NewJob
    submission: int
    line: int
    key: bytes
    seed: int
    state: str = "pending"
    failures: int = 0
    losses: int = 0
    cancelling: bool = False
    due: bool = True
    expired: bool = False
    worker: str | None = None
    error: str | None = None
    outcomes: list[str | None] = field(default_factory=list)
    results: list[str] = field(default_factory=list)

    @property
    def attempt(self) -> int:
        return len(self.outcomes)

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def place(self) -> tuple[int, int]:
        return self.submission, self.line

    def owns(self, output: str) -> bool:
        """Whether what lies at the output is this job's, or will be."""
        lasts = self.state == "succeeded" and self.error != "output_replaced"
        return self.row.output == output and (not self.is_final or lasts)

    def supersede(self) -> None:
        self.error = "output_replaced"
        if self.state in ("pending", "queued"):
            self.state = "cancelled"
        if self.state == "running":
            self.cancelling = True

    def end(self, outcome: str, state: str, *, due: bool = True) -> None:
        """The running attempt ends; a cancelled job does not wait again nor count as failed."""
        if self.cancelling and state in ("pending", "failed"):
            state = "cancelled"
        if outcome == "retried" and state == "cancelled":
            outcome = "failed"
        self.outcomes[-1] = outcome
        self.state, self.worker, self.expired, self.due = state, None, False, due

    def reopen(self) -> None:
        self.state, self.error, self.cancelling, self.due = "pending", None, False, True
        self.failures = self.losses = 0


@dataclass
class Wire:
    """A Redis that keeps what is published, unless it does not answer, and forgets on request."""

    messages: list[Message] = field(default_factory=list)
    answers: bool = True

    def publish(self, messages: Sequence[Message]) -> None:
        if messages and not self.answers:
            raise BrokerUnavailable("nobody answers")
        self.messages.extend(messages)

    def ready_messages(self, engine: str) -> set[tuple[int, int]]:
        return {(one.job, one.attempt) for one in self.messages if one.engine == engine}
