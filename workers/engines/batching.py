"""Who shares the next forward pass: pure decisions over regions waiting and under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from workers.engines.sequence import Draft, Row, Sequence

Size = tuple[int, int]  # (height, width) of a window in latents


def choose_joining(
    waiting: Iterable[Draft], active: Iterable[Sequence], max_rows: int
) -> list[Draft]:
    """First come, first served for each window size, while one forward has room for all.

    A canvas counts as one window: it shares every forward with the others. Regions beyond
    one forward would finish no sooner together than one after another, so they wait.
    """
    rows = Counter[Size]()
    for one in active:
        rows[one.draft.window_size] += one.draft.rows
    joining, full = [], set[Size]()
    for draft in waiting:
        size = draft.window_size
        if size in full or (rows[size] and rows[size] + draft.rows > max_rows):
            full.add(size)
            continue
        rows[size] += draft.rows
        joining.append(draft)
    return joining


def pick_rows(active: Iterable[Sequence], limit: Callable[[Size], int]) -> list[Row]:
    """Rows for one forward, of the first sequence's window size, in the sequences' order."""
    rows: list[Row] = []
    for one in active:
        if not rows or one.draft.window_size == rows[0].sequence.draft.window_size:
            rows += one.pending[: limit(one.draft.window_size) - len(rows)]
    return rows


def move_back(active: Iterable[Sequence], rows: Iterable[Row]) -> list[Sequence]:
    """Those that had rows in a forward go behind those that had none, else in order."""
    served = {id(row.sequence) for row in rows}
    return sorted(active, key=lambda one: id(one) in served)
