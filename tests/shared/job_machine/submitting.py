"""The rules of producers: submit, crash half-way, submit again, take outputs over."""

from __future__ import annotations

from collections.abc import Iterator

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
            new_job(
                line,
                image=f"/images/{image}.png",
                mask="alpha",
                output=f"/results/{image}.png",
                engine=engine,
                priority=priority,
            )
            for line, image in enumerate(images, start=2)
        ]
        self.manifests += 1
        submission = self._open(str(self.manifests), resumed=False)
        self.submissions[submission] = rows
        self._record(submission, rows[: len(rows) - unrecorded], force)

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

    def _record(self, submission: int, rows: list[NewJob], force: bool) -> None:
        owners = list(self._owners(submission, rows, force))
        if owners and not force:
            with pytest.raises(InputError, match="is written by job"):
                submissions.record(self.db, submission, rows)
            return
        for job in owners:
            job.supersede()
        added = [row for row in rows if self._add(submission, row)]
        existing = submissions.record(self.db, submission, rows, replace=force)
        assert existing == [row for row in rows if not any(row is new for new in added)]
        self._learn_ids()
        if force:
            self._reopen_by_content_key(submission, existing)

    def _owners(self, submission: int, rows: list[NewJob], force: bool) -> Iterator[ModelJob]:
        """The jobs that own the rows' outputs and ask for something else."""
        keys = {job.key for job in self.model.values()}
        for job in self.model.values():
            for row in rows:
                is_known = row.content_key in keys
                is_changed = job.place == (submission, row.line) and not is_known
                own = job.key == row.content_key or is_changed
                if job.owns(row.output) and not own and (force or not is_known):
                    yield job

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
        reopened = 0
        for key, line in sorted(lines.items()):
            place = (submission, line)
            for job in self.model.values():
                if job.key == key and job.is_final:
                    if place not in {other.place for other in self.model.values()}:
                        job.submission, job.line = place
                    job.reopen()
                    reopened += 1
        assert jobs.reopen_by_content_key(self.db, submission, lines, replace=True) == reopened
        self._reopen_as_submitted(submission, rows)

    def _reopen_as_submitted(self, submission: int, rows: list[NewJob]) -> None:
        reopened = 0
        for row in rows:
            keys = {job.key for job in self.model.values()}
            on_line = [job for job in self.model.values() if job.place == (submission, row.line)]
            if row.content_key not in keys and on_line and on_line[0].is_final:
                on_line[0].key, on_line[0].seed = row.content_key, row.seed
                on_line[0].reopen()
                reopened += 1
        assert jobs.reopen_as_submitted(self.db, submission, rows) == reopened
