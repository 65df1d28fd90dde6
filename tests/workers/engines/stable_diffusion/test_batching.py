"""Who shares a forward: batch sizes, admission, turns, and results that company cannot change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from shared.geometry.box import Box
from shared.params import Scheduler
from tests.workers.engines.stable_diffusion.samples import (
    IGNORE_DIFFUSERS_WARNING,
    UNetWatch,
    components,
    engine,
    region,
)
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.batching import (
    bucket_sizes,
    choose_admissions,
    choose_rows,
    pad_to_bucket,
    rotate_served,
)
from workers.engines.stable_diffusion.deepcache import ForwardKind

pytestmark = IGNORE_DIFFUSERS_WARNING

SMALL, WIDE = (8, 8), (8, 16)


def prepared(
    priority: int = 0, rows: int = 2, size: tuple[int, int] = SMALL, cache_interval: int = 1
) -> Any:
    """What batching asks of a region that waits."""
    params = SimpleNamespace(cache_interval=cache_interval)
    work = SimpleNamespace(priority=priority, params=params)
    return SimpleNamespace(work=work, rows=rows, window_size=size)


def joining(waiting: list[Any], regions: list[Any], most: int) -> list[Any]:
    return choose_admissions(waiting, regions, lambda size: most if size == SMALL else most // 2)


def active(
    name: str,
    windows: int = 1,
    *,
    forward_kind: ForwardKind = "full",
    is_starting_cached_step: bool = False,
    **values: Any,
) -> Any:
    """What batching asks of a region under way; its rows are named after it."""
    found = prepared(**values)
    rows = [f"{name}{window}{'-+'[n]}" for window in range(windows) for n in range(found.rows)]
    return SimpleNamespace(
        prepared=found,
        rows=found.rows,
        pending_rows=rows,
        forward_kind=forward_kind,
        is_starting_cached_step=is_starting_cached_step,
    )


def picked(regions: list[Any], limit: int) -> str:
    rows: list[Any] = list(choose_rows(regions, lambda _: limit))
    return " ".join(rows)


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (14, (1, 2, 4, 8, 12, 14)),
        (30, (1, 2, 4, 8, 12, 16, 24, 30)),
    ],
)
def test_batch_sizes_are_few_and_never_far_apart(most: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(most) == sizes


def test_a_batch_is_filled_up_to_the_next_size_with_its_last_row() -> None:
    rows: Any = ["a", "b", "c"]
    assert pad_to_bucket(rows, bucket_sizes(8)) == ["a", "b", "c", "c"]
    assert pad_to_bucket(rows, (8,)) == ["a", "b"] + ["c"] * 6
    assert pad_to_bucket(rows, ()) == rows


def test_a_canvas_takes_the_room_that_single_windows_leave() -> None:
    regions = [active("canvas", 100), active("a"), active("b", rows=1), active("c")]
    assert picked(regions, 9) == "canvas0- canvas0+ a0- a0+ b0- c0- c0+ canvas1- canvas1+"
    assert picked(regions[:1], 3) == "canvas0- canvas0+ canvas1-"


def test_rows_go_by_priority_and_share_a_window_size() -> None:
    regions = [active("low", 2), active("wide", size=WIDE), active("high", 2, priority=5)]
    assert picked(regions, 6) == "high0- high0+ high1- high1+ low0- low0+"
    assert picked(regions[1:2] + regions[:1], 6) == "wide0- wide0+"
    assert picked([], 6) == ""


def test_rows_of_different_kinds_never_share_a_forward() -> None:
    regions = [
        active("a"),
        active("keeps", forward_kind="cache_write"),
        active("b"),
        active("r", rows=1),
    ]
    assert picked(regions, 8) == "a0- a0+ b0- b0+ r0-"
    assert picked(regions[1:], 8) == "keeps0- keeps0+"
    urgent = active("urgent", forward_kind="cache_read", priority=1)
    assert picked([*regions, urgent], 8) == "urgent0- urgent0+"


def test_the_served_go_to_the_back_unless_a_cheap_step_is_next() -> None:
    first, second, cheap = (
        active("a"),
        active("b"),
        active("c", forward_kind="cache_read", is_starting_cached_step=True),
    )
    rows: Any = [SimpleNamespace(region=one) for one in (first, cheap)]
    assert rotate_served([first, cheap, second], rows) == [cheap, second, first]
    assert rotate_served([first, cheap, second], rows[:1]) == [cheap, second, first]


def test_joining_goes_by_priority_then_by_arrival_and_nobody_overtakes() -> None:
    first, second, urgent, single = prepared(), prepared(), prepared(priority=1), prepared(rows=1)
    waiting = [first, second, single, urgent]
    assert joining(waiting, [], 4) == [urgent, first]
    # The single row would fit, but then rows of one could keep the pair out for ever.
    assert joining([second, single], [active("a"), active("b", rows=1)], 4) == []
    assert joining([prepared(size=WIDE)], [active("a")], 2) != []
    assert joining([prepared(size=WIDE)], [active("a", size=WIDE)], 4) == []
    assert joining([prepared(size=WIDE)], [active("a", size=WIDE)], 8) != []


def test_regions_that_reuse_features_take_no_room_from_the_others() -> None:
    reusing, again = prepared(cache_interval=3), prepared(cache_interval=5)
    assert joining([reusing], [active("a"), active("b")], 4) == [reusing]
    assert joining([again], [active("a", cache_interval=3)], 2) == []


def test_a_lone_canvas_larger_than_a_forward_is_let_in() -> None:
    assert len(joining([prepared(rows=2)], [], 1)) == 1


COMPANY: tuple[dict[str, Any], ...] = (
    {"scheduler": "unipc", "seed": 5, "strength": 1.0},
    {"scheduler": "ddim", "seed": 6, "guidance_scale": 1.0, "prompt": "blue sky"},
    {"scheduler": "euler", "seed": 7, "num_inference_steps": 9},
    {"windows": (Box(0, 0, 64, 64), Box(40, 0, 104, 64)), "scheduler": "dpmpp_2m"},
)


def run_in(folder: Path, works: list[RegionWork], *, before: int) -> list[Pixels]:
    """In a deterministic engine of eight rows; ``before`` joined it earlier than the rest."""
    parts = components(folder)
    watch = UNetWatch(parts.unet)
    watch.gate.clear()
    with engine(parts, max_batch=8, deterministic=True) as ours:
        futures = [ours.submit(work) for work in works[:before]]
        assert watch.entered.wait(30)
        futures += [ours.submit(work) for work in works[before:]]
        watch.gate.set()
        results = [future.result(60) for future in futures]
    assert set(watch.rows) == {8}
    return results


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_a_deterministic_engine_gives_the_same_bits_alone_and_in_any_company(
    tiny_model: Path, scheduler: str
) -> None:
    work = region(scheduler=scheduler, num_inference_steps=6)
    company = [region(picture=n, **values) for n, values in enumerate(COMPANY)]
    alone = run_in(tiny_model, [work], before=1)[0]
    assert np.array_equal(run_in(tiny_model, [work, *company], before=1)[0], alone)
    assert np.array_equal(run_in(tiny_model, [*company, work], before=2)[-1], alone)


def test_a_canvas_keeps_its_bits_in_company_too(tiny_model: Path) -> None:
    windows = tuple(Box(left, 0, left + 64, 64) for left in range(0, 161, 40))
    canvas = region(windows=windows, strength=0.7, guidance_end=0.5)
    company = [region(picture=n, **values) for n, values in enumerate(COMPANY)]
    alone = run_in(tiny_model, [canvas], before=1)[0]
    assert np.array_equal(run_in(tiny_model, [*company, canvas], before=3)[-1], alone)


def test_a_mixed_batch_with_priorities_ends_in_their_order(tiny_model: Path) -> None:
    parts = components(tiny_model)
    watch = UNetWatch(parts.unet)
    watch.gate.clear()
    order: list[int] = []
    with engine(parts, max_batch=2) as ours:
        futures = [ours.submit(region(num_inference_steps=2))]
        assert watch.entered.wait(30)
        for priority in (0, 1, -1, 2):
            future = ours.submit(replace(region(num_inference_steps=2), priority=priority))
            future.add_done_callback(lambda _, priority=priority: order.append(priority))
            futures.append(future)
        watch.gate.set()
        for future in futures:
            future.result(60)
    assert order == [2, 1, 0, -1]
