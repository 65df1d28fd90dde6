"""The rules of producers: submit, crash half-way, submit again, take outputs over."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from sqlalchemy import select

from shared import jobs
from shared.db.models import Job
from shared.errors import InputError
from shared.jobs import submissions
from shared.jobs.submissions import NewJob
from tests.job_table import new_job
from tests.shared.job_machine.model import ModelJob
from tests.shared.job_machine.table import ENGINES, IMAGES, MachineState


class ProducerRules(MachineState):
    @initialize()
    def start(self) -> None:
        self.submit("opencv", 0, [1, 2], unrecorded=0, force=False)

    @rule(
        engine=st.sampled_from(ENGINES),
        priority=st.sampled_from([-7, 0, 0, 5, 9]),
        images=st.lists(st.integers(1, IMAGES), min_size=1, max_size=4, unique=True),
        unrecorded=st.sampled_from([0, 0, 0, 1, 2]),
        force=st.booleans(),
    )
    def submit(
        self, engine: str, priority: int, images: list[int], unrecorded: int, force: bool
    ) -> None:
        """A new manifest; its producer crashes before it records the last ``unrecorded`` rows."""
        rows = [
            self._row(line, image, engine, priority) for line, image in enumerate(images, start=2)
        ]
        self.manifests += 1
        submission = self._open(str(self.manifests), resumed=False)
        self.submissions[submission] = rows
        self._record(submission, rows[: len(rows) - unrecorded], force)

    @staticmethod
    def _row(line: int, image: int, engine: str, priority: int) -> NewJob:
        return new_job(
            line,
            image=f"/images/{image}.png",
            mask="alpha",
            output=f"/results/{image}.png",
            engine=engine,
            priority=priority,
        )

    @precondition(lambda self: self.submissions)
    @rule(data=st.data(), force=st.booleans())
    def submit_again(self, data: st.DataObject, force: bool) -> None:
        """A known manifest, of which some or all rows are recorded."""
        submission = data.draw(st.sampled_from(sorted(self.submissions)))
        assert self._open(self.digests[submission], resumed=True) == submission
        self._record(submission, self.submissions[submission], force)

    def _open(self, digest: str, *, resumed: bool) -> int:
        opened = submissions.open_submission(
            self.db, manifest="/m.csv", digest=digest, options="{}", rows=0, invalid=0
        )
        assert opened.resumed == resumed
        self.digests[opened.id] = digest
        return opened.id

    @rule(data=st.data(), images=st.sets(st.integers(1, IMAGES), min_size=1, max_size=3))
    def two_forces(self, data: st.DataObject, images: set[int]) -> None:
        """Two manifests for the same outputs, whose producers' transactions alternate."""
        manifests = []
        for engine in ENGINES:
            rows = [self._row(line, image, engine, 0) for line, image in enumerate(images, start=2)]
            self.manifests += 1
            submission = self._open(str(self.manifests), resumed=False)
            self.submissions[submission] = rows
            manifests.append((submission, rows))
        if data.draw(st.booleans()):
            manifests.reverse()
        existing = [self._insert(*manifest, force=True) for manifest in manifests]
        for (submission, _), rows in zip(manifests, existing, strict=True):
            self._reopen_by_content_key(submission, rows)

    def _record(self, submission: int, rows: list[NewJob], force: bool) -> None:
        if not force and list(self._contested(submission, rows)):
            with pytest.raises(InputError, match="is written by job"):
                submissions.record(self.db, submission, rows)
            return
        existing = self._insert(submission, rows, force=force)
        if force:
            self._reopen_by_content_key(submission, existing)

    def _insert(self, submission: int, rows: list[NewJob], *, force: bool) -> list[NewJob]:
        places = {job.place for job in self.model.values()}
        for row, owner in list(self._contested(submission, rows)):
            if (submission, row.line) not in places:
                owner.supersede()
        added = [row for row in rows if self._add(submission, row)]
        existing = submissions.record(self.db, submission, rows, replace=force)
        assert existing == [row for row in rows if not any(row is new for new in added)]
        self._learn_ids()
        return existing

    def _contested(self, submission: int, rows: list[NewJob]) -> Iterator[tuple[NewJob, ModelJob]]:
        """The rows without a job whose output another job owns, and that job."""
        keys = {job.key for job in self.model.values()}
        for job in self.model.values():
            for row in rows:
                is_own = job.place == (submission, row.line)
                if row.content_key not in keys and job.owns(row.output) and not is_own:
                    yield row, job

    def _add(self, submission: int, row: NewJob) -> bool:
        """Adds the row to the model; False if its content key or its line has a job."""
        for job in self.model.values():
            if job.key == row.content_key or job.place == (submission, row.line):
                return False
        number = -1 - len(self.model)  # replaced in ``_learn_ids``
        self.model[number] = ModelJob(
            id=number,
            row=row,
            submission=submission,
            line=row.line,
            key=row.content_key,
            seed=row.seed,
        )
        return True

    def _learn_ids(self) -> None:
        with self.db.read() as connection:
            ids = {row.content_key: row.id for row in connection.execute(select(Job))}
        for job in list(self.model.values()):
            if job.id < 0:
                del self.model[job.id]
                job.id = ids[job.key]
                assert job.id not in self.model
                self.model[job.id] = job

    def _reopen_by_content_key(self, submission: int, rows: list[NewJob]) -> None:
        lines = {row.content_key: row.line for row in rows}
        reopened = self._reopenable(lambda job: job.key in lines)
        for job in reopened:
            place = (submission, lines[job.key])
            if place not in {other.place for other in self.model.values()}:
                job.submission, job.line = place
            job.reopen()
        actual = jobs.reopen_by_content_key(self.db, submission, lines, replace=True)
        assert actual == len(reopened)
        self._reopen_as_submitted(submission, rows)

    def _reopen_as_submitted(self, submission: int, rows: list[NewJob]) -> None:
        keys = {job.key for job in self.model.values()}
        changed = {(submission, row.line): row for row in rows if row.content_key not in keys}
        reopened = self._reopenable(lambda job: job.place in changed)
        for job in reopened:
            row = changed[job.place]
            job.key, job.seed = row.content_key, row.seed
            job.reopen()
        assert jobs.reopen_as_submitted(self.db, submission, rows) == len(reopened)

    def _reopenable(self, is_wanted: Callable[[ModelJob], bool]) -> list[ModelJob]:
        """The wanted jobs that can be reopened; the other owners of their outputs lose them."""
        chosen = [
            job
            for job in self.model.values()
            if is_wanted(job) and (job.is_final or job.is_stopping)
        ]
        for job in chosen:
            if job.is_stopping:
                job.end("cancelled", "cancelled")
        for other in self.model.values():
            if other not in chosen and any(other.owns(job.row.output) for job in chosen):
                other.supersede()
        return chosen
