"""``--dry-run``: shows what a submission would do, and records nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice

from producer.manifest import Problem
from producer.validate import ValidatedManifest
from shared import images, masks
from shared.engines import engine_spec
from shared.errors import ImageTruncated, InpaintError, ObjectMissing
from shared.geometry import coarse_to_fine, regions
from shared.jobs.submissions import NewJob
from shared.params import Params
from shared.settings import Settings
from shared.storage import Storage

THREADS = 8
# Rows submitted to the threads at a time: bounds the memory, whatever the manifest's length.
BATCH_ROWS = 64
# Enough for the header of nearly every file; a JPEG's size may lie behind more metadata.
HEADER_BYTES = 128 * 1024
CACHED_MASKS = 4


@dataclass(kw_only=True)
class DryRunReport:
    """Totals. Regions and windows are of the rows that would run.

    empty: rows whose mask repaints nothing. overwritten: rows whose output exists.
    """

    rows: int = 0
    invalid: int = 0
    regions: int = 0
    windows: int = 0
    empty: int = 0
    overwritten: int = 0

    def add(self, plan: _RowPlan) -> None:
        self.regions += len(plan.regions)
        self.windows += sum(len(region.windows) for region in plan.regions)
        self.empty += not plan.regions
        self.overwritten += plan.output_exists

    def to_json(self) -> dict[str, int]:
        return dict(vars(self))


def simulate(
    manifest: ValidatedManifest,
    storage: Storage,
    settings: Settings,
    *,
    report: Callable[[Problem], None],
) -> DryRunReport:
    """Plan every row as a worker would, from its mask and its image's header.

    Nothing is recorded or written. Each row that would fail is reported.
    """
    total = DryRunReport(rows=manifest.rows, invalid=manifest.invalid)
    planner = _RowPlanner(storage, settings)
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in _batches(manifest.jobs()):
            for plan in pool.map(planner.plan, batch):
                if isinstance(plan, Problem):
                    total.invalid += 1
                    report(plan)
                else:
                    total.add(plan)
    return total


def _batches(jobs: Iterable[NewJob]) -> Iterator[list[NewJob]]:
    iterator = iter(jobs)
    while batch := list(islice(iterator, BATCH_ROWS)):
        yield batch


@dataclass(frozen=True, kw_only=True)
class _RowPlan:
    """What one row would do."""

    regions: tuple[regions.Region, ...]
    output_exists: bool


class _RowPlanner:
    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage = storage
        self._settings = settings
        # All rows often share one mask: it is read and decoded once.
        self._cached_mask = lru_cache(CACHED_MASKS)(self._read_mask)

    def plan(self, job: NewJob) -> _RowPlan | Problem:
        try:
            output_exists = self._storage.stat(job.output) is not None
            return _RowPlan(regions=self._plan_regions(job), output_exists=output_exists)
        except InpaintError as error:
            return Problem(line=job.line, text=f"{error.code}: {error}")

    def _plan_regions(self, job: NewJob) -> tuple[regions.Region, ...]:
        passes = Params.from_json(job.params, seed=job.seed).all_passes()
        return tuple(
            region
            for mask, params in passes
            for region in self._plan_pass(job, mask or job.mask, params)
        )

    def _plan_pass(self, job: NewJob, mask: str, params: Params) -> tuple[regions.Region, ...]:
        image = _StoredImage(job.image, self._storage, self._settings)
        repainted = masks.load(mask, image, params, read_file=self._cached_mask)
        plan = regions.plan_pass(repainted, params, any_size=engine_spec(job.engine).any_size)
        refinements = coarse_to_fine.plan_refinements(repainted, plan, params)
        return plan + tuple(region for step in refinements for region in step.regions)

    def _read_mask(self, uri: str) -> masks.Grey:
        data = self._storage.get(uri, max_bytes=self._settings.max_object_bytes).data
        return masks.decode_mask(data, max_pixels=self._settings.max_pixels)


class _StoredImage:
    """An image in storage. Its size is read from the header; its pixels only for its alpha."""

    def __init__(self, uri: str, storage: Storage, settings: Settings) -> None:
        self._uri = uri
        self._storage = storage
        self._settings = settings

    @cached_property
    def size(self) -> tuple[int, int]:
        """(width, height) from the first bytes if they suffice, else from the whole file."""
        if self._storage.stat(self._uri) is None:
            raise ObjectMissing(f"{self._uri!r} does not exist")
        try:
            head = self._storage.head(self._uri, max_bytes=HEADER_BYTES)
            return images.probe(head, max_pixels=self._settings.max_pixels)
        except ImageTruncated:
            return self._decode().size

    def alpha(self) -> images.Pixels | None:
        image = self._decode()
        self.size = image.size
        return image.alpha()

    def _decode(self) -> images.DecodedImage:
        data = self._storage.get(self._uri, max_bytes=self._settings.max_object_bytes).data
        return images.decode(data, max_pixels=self._settings.max_pixels)
