"""Who shares the next forward pass: pure decisions over regions waiting and under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, islice, zip_longest

from workers.engines.stable_diffusion.region_state import BatchRow, DenoisingRegion, PreparedRegion
from workers.engines.stable_diffusion.schedule_table import StepFormula

LatentSize = tuple[int, int]  # (height, width) of a window in latents
BatchGroup = tuple[LatentSize, bool]  # and whether the region reuses features


def bucket_sizes(max_rows: int) -> tuple[int, ...]:
    """Batch sizes worth a graph each: close together where a row more counts for much."""
    sizes = (1, 2, *range(4, 16, 4), *range(16, max_rows, 8))
    return (*(n for n in sizes if n < max_rows), max_rows)


def pad_to_bucket(rows: list[BatchRow], sizes: Iterable[int]) -> list[BatchRow]:
    """As many rows as the next larger size has; what fills it up is thrown away."""
    wanted = min((size for size in sizes if size >= len(rows)), default=len(rows))
    return rows + rows[-1:] * (wanted - len(rows))


def choose_admissions(
    waiting: Iterable[PreparedRegion],
    active: Iterable[DenoisingRegion],
    limit: Callable[[LatentSize], int],
) -> list[PreparedRegion]:
    """By priority, then first come, first served, while one forward has room for all of a group.

    Groups never share a forward: by window size, and those that reuse features by themselves.

    A canvas counts as one window: it shares every forward with the others. Regions beyond
    one forward would finish no sooner together than one after another, so they wait.
    """
    rows = Counter[BatchGroup]()
    for one in active:
        rows[_batch_group(one.prepared)] += one.rows
    joining, full = [], set[BatchGroup]()
    for prepared in sorted(waiting, key=lambda one: -one.work.priority):
        group, most = _batch_group(prepared), limit(prepared.window_size)
        if group in full or (rows[group] and rows[group] + prepared.rows > most):
            full.add(group)
            continue
        rows[group] += prepared.rows
        joining.append(prepared)
    return joining


def _batch_group(prepared: PreparedRegion) -> BatchGroup:
    return prepared.window_size, prepared.work.params.cache_interval > 1


def choose_rows(
    active: Iterable[DenoisingRegion], limit: Callable[[LatentSize], int]
) -> list[BatchRow]:
    """Rows for one forward: of one window size and kind, by priority, a window of each in turn.

    So a region of one window has its step in every forward of its size, whatever canvas is
    beside it, and the canvas takes the room that is left.
    """
    ordered = sorted(active, key=lambda one: -one.prepared.work.priority)
    if not ordered:
        return []
    size, forward_kind = ordered[0].prepared.window_size, ordered[0].forward_kind
    room = limit(size)
    rows: list[BatchRow] = []
    same = [
        one
        for one in ordered
        if (one.prepared.window_size, one.forward_kind) == (size, forward_kind)
    ]
    for _, equals in groupby(same, key=lambda one: one.prepared.work.priority):
        rows += _interleave_windows(list(equals), room - len(rows))
    return rows


def _interleave_windows(active: list[DenoisingRegion], room: int) -> list[BatchRow]:
    """Up to ``room`` rows; each region's first pending window, then each one's second."""
    windows = [
        [one.pending_rows[n : n + one.rows] for n in range(0, len(one.pending_rows), one.rows)]
        for one in active
    ]
    turns = zip_longest(*windows, fillvalue=[])
    return list(islice((row for turn in turns for window in turn for row in window), max(room, 0)))


def rotate_served(
    active: Iterable[DenoisingRegion], rows: Iterable[BatchRow]
) -> list[DenoisingRegion]:
    """Those that had rows in a forward go behind those that had none, else in order.

    Not those that begin a step of kind reusing: they stay in front until their next whole one.
    The others wait next to no time for them, and then have their whole steps in one forward
    with them, instead of turns of half a batch each.
    """
    served = {id(row.region) for row in rows}
    return sorted(active, key=lambda one: id(one) in served and not one.is_starting_cached_step)


def group_by_formula(regions: Iterable[DenoisingRegion]) -> Iterator[list[DenoisingRegion]]:
    """Those whose steps can be taken together; a scheduler without a table goes alone."""
    groups: dict[tuple[LatentSize, StepFormula], list[DenoisingRegion]] = {}
    for one in regions:
        formula = one.prepared.sampler.table.formula
        if formula is None:
            yield [one]
        else:
            groups.setdefault((one.prepared.canvas.size, formula), []).append(one)
    yield from groups.values()
