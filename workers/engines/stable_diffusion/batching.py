"""Scheduling for continuous batching: which regions join, which rows share a forward pass.

Pure functions over the waiting and the active regions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice, zip_longest

from workers.engines.stable_diffusion.region_state import BatchRow, DenoisingRegion, PreparedRegion
from workers.engines.stable_diffusion.schedule_table import StepFormula

LatentSize = tuple[int, int]  # (height, width) of a window in latents
BatchGroup = tuple[LatentSize, bool]  # the bool: whether the region uses DeepCache
RowLimits = Callable[[LatentSize], int]  # the most rows of one UNet forward pass


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that a CUDA graph or compiled code is made for: 1, 2, 4, 8, 12, 16, 24, ...

    Padding to the next one wastes fewer than 4 rows up to 16, and fewer than 8 above.
    """
    sizes = (1, 2, *range(4, 16, 4), *range(16, max_rows, 8))
    return (*(size for size in sizes if size < max_rows), max_rows)


def pad_to_bucket(rows: list[BatchRow], sizes: Iterable[int]) -> list[BatchRow]:
    """Repeat the last row up to the next bucket size; its extra outputs are dropped."""
    bucket = min((size for size in sizes if size >= len(rows)), default=len(rows))
    return rows + rows[-1:] * (bucket - len(rows))


def choose_admissions(
    waiting: Iterable[PreparedRegion], active: Iterable[DenoisingRegion], max_rows: RowLimits
) -> list[PreparedRegion]:
    """Choose the waiting regions that start now: by priority, then in order of arrival.

    A group (window size, with or without DeepCache) admits regions while one window of each of
    its regions fits one forward pass. A canvas counts as one window: it shares every pass with the
    others. More regions than fit one pass would not finish sooner, so they wait.
    """
    rows = Counter[BatchGroup]()
    for region in active:
        rows[_batch_group(region.prepared)] += region.rows_per_window
    admitted, full_groups = [], set[BatchGroup]()
    for prepared in sorted(waiting, key=lambda prepared: -prepared.work.priority):
        group, limit = _batch_group(prepared), max_rows(prepared.window_size)
        exceeds = rows[group] and rows[group] + prepared.rows_per_window > limit
        if group in full_groups or exceeds:
            # Later regions must not overtake: small ones could keep a large one out for ever.
            full_groups.add(group)
            continue
        rows[group] += prepared.rows_per_window
        admitted.append(prepared)
    return admitted


def _batch_group(prepared: PreparedRegion) -> BatchGroup:
    return prepared.window_size, prepared.work.params.cache_interval > 1


def choose_rows(active: Iterable[DenoisingRegion], max_rows: RowLimits) -> list[BatchRow]:
    """Choose the rows of the next forward pass: one window size and kind, by priority.

    Each region contributes one window before any contributes its second. So a region of one
    window takes a step in every pass of its size, and a canvas fills the rows that remain.
    """
    by_priority = sorted(active, key=lambda region: -region.prepared.work.priority)
    if not by_priority:
        return []
    size, kind = by_priority[0].prepared.window_size, by_priority[0].forward_kind
    limit = max_rows(size)
    rows: list[BatchRow] = []
    candidates = [
        region
        for region in by_priority
        if (region.prepared.window_size, region.forward_kind) == (size, kind)
    ]
    for _, equals in groupby(candidates, key=lambda region: region.prepared.work.priority):
        rows += _interleave_windows(list(equals), limit - len(rows))
    return rows


def _interleave_windows(regions: list[DenoisingRegion], limit: int) -> list[BatchRow]:
    """Up to ``limit`` rows: each region's first pending window, then each region's second, ..."""
    windows_by_region = [
        [
            region.pending_rows[start : start + region.rows_per_window]
            for start in range(0, len(region.pending_rows), region.rows_per_window)
        ]
        for region in regions
    ]
    interleaved = zip_longest(*windows_by_region, fillvalue=[])
    rows = (row for windows in interleaved for window in windows for row in window)
    return list(islice(rows, max(limit, 0)))


def rotate_served(
    active: Iterable[DenoisingRegion], rows: Iterable[BatchRow]
) -> list[DenoisingRegion]:
    """Round robin: move the regions that had rows in the last forward pass behind the others.

    Regions about to run a cheap DeepCache step keep their place, so that their next full step
    shares a batch with the rest instead of alternating with it in half-empty batches.
    """
    served = {id(row.region) for row in rows}
    return sorted(
        active,
        key=lambda region: id(region) in served and not region.is_starting_cached_step,
    )


def group_by_formula(regions: Iterable[DenoisingRegion]) -> Iterator[list[DenoisingRegion]]:
    """Group regions whose scheduler steps run as one; a scheduler without a table runs alone."""
    groups: dict[tuple[LatentSize, StepFormula], list[DenoisingRegion]] = {}
    for region in regions:
        formula = region.prepared.sampler.table.formula
        if formula is None:
            yield [region]
        else:
            groups.setdefault((region.prepared.canvas.size, formula), []).append(region)
    yield from groups.values()
