"""The model of a job in plain Python, and a queue in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shared.db.models import FINAL_STATES
from shared.errors import BrokerUnavailable
from shared.jobs.queue import Message, MessageId
from shared.jobs.submissions import NewJob


@dataclass(kw_only=True)
class ModelJob:
    """The expected state of one job. outcomes: of its attempts; None while one runs."""

    id: int
    row: NewJob
    submission: int
    line: int
    key: bytes
    seed: int
    state: str = "pending"
    failures: int = 0
    losses: int = 0
    cancel_requested: bool = False
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
        """True if the object at ``output`` is this job's result, or will be."""
        has_result = self.state not in ("failed", "cancelled")
        return self.row.output == output and has_result and self.error != "output_replaced"

    @property
    def is_stopping(self) -> bool:
        """True if the job was superseded while it ran and its worker has not stopped yet."""
        return self.state == "running" and self.error == "output_replaced"

    def supersede(self) -> None:
        self.error = "output_replaced"
        if self.state in ("pending", "queued"):
            self.state = "cancelled"
        if self.state == "running":
            self.cancel_requested = True

    def end(self, outcome: str, state: str, *, due: bool = True) -> None:
        """Ends the running attempt; a job with a cancellation pending becomes cancelled."""
        if self.cancel_requested and state in ("pending", "failed"):
            state = "cancelled"
        if outcome == "retried" and state == "cancelled":
            outcome = "failed"
        self.outcomes[-1] = outcome
        self.state, self.worker, self.expired, self.due = state, None, False, due

    def reopen(self) -> None:
        self.state, self.error, self.cancel_requested, self.due = "pending", None, False, True
        self.failures = self.losses = 0


@dataclass
class FakeQueue:
    """Keeps published messages in a list; raises BrokerUnavailable if ``answers`` is false."""

    messages: list[Message] = field(default_factory=list)
    answers: bool = True

    def publish(self, messages: Sequence[Message]) -> None:
        if messages and not self.answers:
            raise BrokerUnavailable("no answer")
        self.messages.extend(messages)

    def ready_messages(self, engine: str) -> set[MessageId]:
        return {message.id for message in self.messages if message.engine == engine}
