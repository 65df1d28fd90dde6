"""What producers do: submit, die half-way, submit again, take outputs over."""

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
from tests.shared.job_machine.model import Expected
from tests.shared.job_machine.table import ENGINES, PICTURES, Table


class Submitting(Table):
    @initialize()
    def start(self) -> None:
        self.submit("opencv", 0, [1, 2], cut_off=0, force=False)

    @rule(
        engine=st.sampled_from(ENGINES),
        priority=st.sampled_from([-7, 0, 0, 5, 9]),
        pictures=st.lists(st.integers(1, PICTURES), min_size=1, max_size=4, unique=True),
        cut_off=st.sampled_from([0, 0, 0, 1, 2]),
        force=st.booleans(),
    )
    def submit(
        self, engine: str, priority: int, pictures: list[int], cut_off: int, force: bool
    ) -> None:
        """A manifest; its producer dies before the last ``cut_off`` rows."""
        rows = [
            new_job(
                line,
                image=f"/pictures/{picture}.png",
                mask="alpha",
                output=f"/results/{picture}.png",
                engine=engine,
                priority=priority,
            )
            for line, picture in enumerate(pictures, start=2)
        ]
        self.manifests += 1
        submission = self._open(str(self.manifests), resumed=False)
        self.submissions[submission] = rows
        self._record(submission, rows[: len(rows) - cut_off], force)

    @precondition(lambda self: self.submissions)
    @rule(data=st.data(), force=st.booleans())
    def submit_again(self, data: st.DataObject, force: bool) -> None:
        """The same manifest, which knows some rows, or all."""
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
        taken = list(self._taken(submission, rows, force))
        if taken and not force:
            with pytest.raises(InputError, match="is written by job"):
                submissions.record(self.db, submission, rows)
            return
        for one in taken:
            one.supersede()
        added = [row for row in rows if self._add(submission, row)]
        existing = submissions.record(self.db, submission, rows, replace=force)
        assert existing == [row for row in rows if not any(row is one for one in added)]
        self._learn_ids()
        if force:
            self._rerun(submission, existing)

    def _taken(self, submission: int, rows: list[NewJob], force: bool) -> Iterator[Expected]:
        """The jobs that write the rows' outputs and ask for something else."""
        keys = {one.key for one in self.model.values()}
        for one in self.model.values():
            for row in rows:
                is_known = row.content_key in keys
                is_changed = one.place == (submission, row.line) and not is_known
                own = one.key == row.content_key or is_changed
                if one.owns(row.output) and not own and (force or not is_known):
                    yield one

    def _add(self, submission: int, row: NewJob) -> bool:
        """Whether the model takes the row: its work is new, and so is its line."""
        for one in self.model.values():
            if one.key == row.content_key or one.place == (submission, row.line):
                return False
        number = -1 - len(self.model)
        self.model[number] = Expected(
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
        for one in list(self.model.values()):
            if one.id < 0:
                del self.model[one.id]
                one.id = ids[one.key]
                assert one.id not in self.model
                self.model[one.id] = one

    def _rerun(self, submission: int, rows: list[NewJob]) -> None:
        lines = {row.content_key: row.line for row in rows}
        reopened = 0
        for key, line in sorted(lines.items()):
            place = (submission, line)
            for one in self.model.values():
                if one.key == key and one.is_final:
                    if place not in {other.place for other in self.model.values()}:
                        one.submission, one.line = place
                    one.reopen()
                    reopened += 1
        assert jobs.reopen_by_content_key(self.db, submission, lines, replace=True) == reopened
        self._restore(submission, rows)

    def _restore(self, submission: int, rows: list[NewJob]) -> None:
        restored = 0
        for row in rows:
            keys = {one.key for one in self.model.values()}
            here = [one for one in self.model.values() if one.place == (submission, row.line)]
            if row.content_key not in keys and here and here[0].is_final:
                here[0].key, here[0].seed = row.content_key, row.seed
                here[0].reopen()
                restored += 1
        assert jobs.reopen_as_submitted(self.db, submission, rows) == restored
