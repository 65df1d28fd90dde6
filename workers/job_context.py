"""The context of one attempt of a job: its lease, record, stage timer and interruption."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from shared.jobs import AttemptRecord, LeasedJob
from shared.params import Params
from workers.engines.protocol import Interruption


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """One attempt of a job, from its lease to its record.

    record: filled in while the job runs, stored when the attempt ends.
    interruption: set by other threads to stop the job at its next step.
    apply_gates: False accepts the first result, whatever its scores.
    """

    leased: LeasedJob
    record: AttemptRecord = field(default_factory=AttemptRecord)
    interruption: Interruption = field(default_factory=Interruption)
    apply_gates: bool = True

    @property
    def id(self) -> int:
        return self.leased.id

    @property
    def params(self) -> Params:
        return self.leased.params

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage in the record, in seconds; repeated stages add up.

        Raises the interruption's reason instead of beginning a stage.
        """
        self.interruption.check()
        start = time.perf_counter()
        try:
            yield
        finally:
            earlier = self.record.timings.get(name, 0.0)
            self.record.timings[name] = earlier + time.perf_counter() - start
