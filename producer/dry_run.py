"""``--dry-run``: what a submission would do, found out without recording anything."""

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
from shared.errors import ImageError, InpaintError, ObjectMissing
from shared.geometry import coarse_to_fine, regions
from shared.jobs.submissions import NewJob
from shared.params import Params
from shared.settings import Settings
from shared.storage import Storage

THREADS = 8
IN_FLIGHT = 64
HEADER_BYTES = 128 * 1024
KEPT_MASKS = 4


@dataclass(kw_only=True)
class DryRunReport:
    """Totals over the rows that would run. ``empty``: rows whose mask repaints nothing."""

    rows: int = 0
    invalid: int = 0
    regions: int = 0
    windows: int = 0
    empty: int = 0
    overwritten: int = 0

    def to_json(self) -> dict[str, int]:
        return dict(vars(self))


def simulate(
    checked: ValidatedManifest,
    storage: Storage,
    settings: Settings,
    *,
    report: Callable[[Problem], None],
) -> DryRunReport:
    """Looks at every image and mask; reports what would fail, and counts what would run."""
    total = DryRunReport(rows=checked.rows, invalid=checked.invalid)
    stage = _RowPlanner(storage, settings)
    with ThreadPoolExecutor(THREADS) as pool:
        for batch in _batches(checked.jobs()):
            for found in pool.map(stage.look, batch):
                if isinstance(found, Problem):
                    total.invalid += 1
                    report(found)
                else:
                    _add(total, found)
    return total


def _batches(rows: Iterable[NewJob]) -> Iterator[list[NewJob]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, IN_FLIGHT)):
        yield batch


@dataclass(frozen=True, kw_only=True)
class _RowPlan:
    """What one row would do. ``output_exists``: something lies at its output already."""

    plan: tuple[regions.Region, ...]
    output_exists: bool


def _add(total: DryRunReport, found: _RowPlan) -> None:
    total.regions += len(found.plan)
    total.windows += sum(len(region.windows) for region in found.plan)
    total.empty += not found.plan
    total.overwritten += found.output_exists


class _RowPlanner:
    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage = storage
        self._settings = settings
        # One mask for all rows is common; it is read and decoded once.
        self._mask_file = lru_cache(KEPT_MASKS)(self._read_mask)

    def look(self, job: NewJob) -> _RowPlan | Problem:
        try:
            output_exists = self._storage.stat(job.output) is not None
            return _RowPlan(plan=self._plan(job), output_exists=output_exists)
        except InpaintError as error:
            return Problem(line=job.line, text=f"{error.code}: {error}")

    def _plan(self, job: NewJob) -> tuple[regions.Region, ...]:
        rounds = Params.from_json(job.params, seed=job.seed).all_passes()
        return tuple(
            region
            for mask, params in rounds
            for region in self._round(job, mask or job.mask, params)
        )

    def _round(self, job: NewJob, name: str, params: Params) -> tuple[regions.Region, ...]:
        image = _StoredImage(job.image, self._storage, self._settings)
        repainted = masks.load(name, image, params, read_file=self._mask_file)
        plan = regions.plan_for(repainted, params, any_size=engine_spec(job.engine).any_size)
        finer = coarse_to_fine.steps(repainted, plan, params)
        return plan + tuple(region for step in finer for region in step.regions)

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
        except ImageError as error:
            if error.code != "image_truncated":
                raise
            return self._decode().size

    def alpha(self) -> images.Pixels | None:
        image = self._decode()
        self.size = image.size
        return image.alpha()

    def _decode(self) -> images.DecodedImage:
        data = self._storage.get(self._uri, max_bytes=self._settings.max_object_bytes).data
        return images.decode(data, max_pixels=self._settings.max_pixels)
