"""A worker for tests: real tables, real files, and a small deterministic engine."""

from __future__ import annotations

import io
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy import insert, select
from sqlalchemy.engine import make_url

from shared import jobs
from shared.db import Database, clock, schema
from shared.db.models import Attempt, Job, Submission
from shared.errors import InpaintError
from shared.jobs import Holder, Selection, submissions
from shared.jobs.queue import Message
from shared.jobs.retry import RetryPolicy
from shared.jobs.submissions import NewJob
from shared.params import Params
from shared.settings import Settings
from shared.storage import Storage
from workers.engines.protocol import Pixels, RegionWork
from workers.job_runner import run_job
from workers.pending_writes import PendingWrites
from workers.worker_context import WorkerContext


@dataclass
class SolidColourEngine:
    """Fills a region with one colour that its seed decides; calls ``on_submit`` first."""

    name: str = "sd2"
    revision: str = "painter 1"
    device: str = "cpu"
    on_submit: Callable[[RegionWork], None] = lambda _work: None
    works: list[RegionWork] = field(default_factory=list)

    def submit(self, work: RegionWork) -> Future[Pixels]:
        self.works.append(work)
        future: Future[Pixels] = Future()
        try:
            self.on_submit(work)
            work.interruption.check()
            painted = work.image.copy()
            painted[work.mask > 0] = (work.seed % 251, 20, 220)
            future.set_result(painted)
        except InpaintError as error:
            future.set_exception(error)
        return future

    def close(self) -> None: ...


class WorkerHarness:
    """A WorkerContext, with methods that add jobs, run them and read their records."""

    def __init__(
        self,
        url: str,
        folder: Path,
        engine: Any = None,
        *,
        pending_writes: PendingWrites | None = None,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.db = Database(make_url(url))
        self.maintenance_db = Database(make_url(url), pool_size=2)
        schema.upgrade(self.db)
        engine = engine or SolidColourEngine()
        self.worker = WorkerContext(
            settings=Settings(_env_file=None, home=folder / "home", **settings),
            db=self.db,
            maintenance_db=self.maintenance_db,
            storage=Storage(roots=[folder.resolve()], buckets=()),
            engine=engine,
            holder=Holder(worker="test-1", device="cpu", engine_revision=engine.revision),
            retry_policy=RetryPolicy(max_failures=2, base_seconds=0, cap_seconds=0),
            pending_writes=pending_writes or PendingWrites(),
        )
        self._lines = 0

    def close(self) -> None:
        self.db.close()
        self.maintenance_db.close()

    def add(self, *, image: str, mask: str, output: str, engine: str = "sd2", **params: Any) -> int:
        """Records one job and returns its id."""
        self._lines += 1
        resolved = Params(**{"mask_feather": 0, "seed": 7, "gate": "off", **params})
        key = jobs.content_key(
            image=image,
            mask=mask,
            output=output,
            engine=engine,
            params=resolved.to_json(),
            seed=self._lines,
        )
        with self.db.write() as connection:
            if self._lines == 1:
                connection.execute(
                    insert(Submission).values(created_at=clock()),
                    {"manifest": "m", "digest": "d", "options": "{}", "rows": 1, "invalid": 0},
                )
        row = NewJob(
            line=self._lines,
            key=None,
            content_key=key,
            engine=engine,
            image=str(image),
            mask=str(mask),
            output=str(output),
            params=resolved.to_json(),
            seed=resolved.seed,
            priority=0,
        )
        assert submissions.record(self.db, 1, [row]) == []
        with self.db.read() as connection:
            row = connection.execute(select(Job.id).where(Job.content_key == key))
            return row.scalar_one()

    def dispatch(self, engine: str = "sd2") -> list[Message]:
        """Dispatches what is due; returns the messages instead of sending them."""
        sent = RecordingQueue()
        jobs.dispatch(self.db, sent, engine, bound=1000)  # type: ignore[arg-type]
        return sent.messages

    def run(self, job: int, *, engine: str = "sd2") -> None:
        """Queues and runs one job."""
        messages = [m for m in self.dispatch(engine) if m.job == job]
        assert messages, f"job {job} was not due"
        run_job(self.worker, job=job, seen_attempt=messages[0].attempt)

    def job(self, job: int) -> Any:
        with self.db.read() as connection:
            return connection.execute(select(Job.__table__).where(Job.id == job)).one()

    def attempts(self, job: int) -> list[Any]:
        with self.db.read() as connection:
            rows = connection.execute(
                select(Attempt.__table__).where(Attempt.job_id == job).order_by(Attempt.attempt)
            )
            return list(rows)

    def cancel(self, job: int) -> None:
        jobs.cancel(self.db, Selection(jobs=(job,)))

    def write_image(
        self, name: str, size: tuple[int, int] = (700, 600), *, mode: str = "RGB", seed: int = 0
    ) -> str:
        """Writes noise, so that any changed pixel shows; returns its path."""
        noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
        image = Image.fromarray(noise, "RGBA").convert(mode)
        return self.write(name, _encoded(image, name))

    def write_mask(
        self, name: str, size: tuple[int, int], *boxes: tuple[int, int, int, int]
    ) -> str:
        mask = np.zeros((size[1], size[0]), np.uint8)
        for left, top, right, bottom in boxes:
            mask[top:bottom, left:right] = 255
        return self.write(name, _encoded(Image.fromarray(mask), name))

    def write(self, name: str, data: bytes) -> str:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    def path(self, name: str) -> str:
        return str(self.folder / name)

    def temporary_files(self) -> list[Path]:
        return list(self.folder.rglob("*.tmp"))


@dataclass
class RecordingQueue:
    """Where a queue's messages go when a test wants to hold them."""

    messages: list[Message] = field(default_factory=list)

    def publish(self, messages: list[Message]) -> None:
        self.messages.extend(messages)


def _encoded(image: Image.Image, name: str) -> bytes:
    stream = io.BytesIO()
    format = {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name[-3:].upper())
    image.save(stream, format=format)
    return stream.getvalue()


def pixels(path: str) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)
