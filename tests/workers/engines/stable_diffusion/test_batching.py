"""Continuous batching: buckets, admission, choice of rows, and bit-identical results."""

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
    load_tiny,
    open_engine,
    region_work,
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
    """The attributes of a PreparedRegion that scheduling reads."""
    params = SimpleNamespace(cache_interval=cache_interval)
    work = SimpleNamespace(priority=priority, params=params)
    return SimpleNamespace(work=work, rows_per_window=rows, window_size=size)


def admitted(waiting: list[Any], active: list[Any], max_rows: int) -> list[Any]:
    """Wide windows, of twice the pixels, get half the rows."""
    return choose_admissions(
        waiting, active, lambda size: max_rows if size == SMALL else max_rows // 2
    )


def denoising(
    name: str,
    windows: int = 1,
    *,
    kind: ForwardKind = "full",
    is_starting_cached_step: bool = False,
    **values: Any,
) -> Any:
    """The attributes of a DenoisingRegion that scheduling reads; rows are ``a0- a0+ a1- a1+``."""
    own = prepared(**values)
    rows = [
        f"{name}{window}{'-+'[branch]}"
        for window in range(windows)
        for branch in range(own.rows_per_window)
    ]
    return SimpleNamespace(
        prepared=own,
        rows_per_window=own.rows_per_window,
        pending_rows=rows,
        forward_kind=kind,
        is_starting_cached_step=is_starting_cached_step,
    )


def chosen_rows(regions: list[Any], max_rows: int) -> str:
    rows: list[Any] = list(choose_rows(regions, lambda _: max_rows))
    return " ".join(rows)


@pytest.mark.parametrize(
    ("max_rows", "sizes"),
    [
        (1, (1,)),
        (2, (1, 2)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (14, (1, 2, 4, 8, 12, 14)),
        (30, (1, 2, 4, 8, 12, 16, 24, 30)),
    ],
)
def test_bucket_sizes_are_few_and_close_together(max_rows: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(max_rows) == sizes


def test_a_batch_is_padded_to_the_next_bucket_with_its_last_row() -> None:
    rows: Any = ["a", "b", "c"]
    assert pad_to_bucket(rows, bucket_sizes(8)) == ["a", "b", "c", "c"]
    assert pad_to_bucket(rows, (8,)) == ["a", "b"] + ["c"] * 6
    assert pad_to_bucket(rows, ()) == rows


def test_a_canvas_fills_the_rows_that_single_windows_leave() -> None:
    canvas = denoising("canvas", 100)
    regions = [canvas, denoising("a"), denoising("b", rows=1), denoising("c")]
    assert chosen_rows(regions, 9) == "canvas0- canvas0+ a0- a0+ b0- c0- c0+ canvas1- canvas1+"
    assert chosen_rows([canvas], 3) == "canvas0- canvas0+ canvas1-"


def test_rows_are_chosen_by_priority_and_share_a_window_size() -> None:
    low, wide = denoising("low", 2), denoising("wide", size=WIDE)
    high = denoising("high", 2, priority=5)
    assert chosen_rows([low, wide, high], 6) == "high0- high0+ high1- high1+ low0- low0+"
    assert chosen_rows([wide, low], 6) == "wide0- wide0+"
    assert chosen_rows([], 6) == ""


def test_rows_of_different_kinds_never_share_a_forward_pass() -> None:
    writing = denoising("write", kind="cache_write")
    regions = [denoising("a"), writing, denoising("b"), denoising("r", rows=1)]
    assert chosen_rows(regions, 8) == "a0- a0+ b0- b0+ r0-"
    assert chosen_rows(regions[1:], 8) == "write0- write0+"
    urgent = denoising("urgent", kind="cache_read", priority=1)
    assert chosen_rows([*regions, urgent], 8) == "urgent0- urgent0+"


def test_served_regions_go_behind_the_others_unless_a_cached_step_is_next() -> None:
    first, second = denoising("a"), denoising("b")
    cached = denoising("c", kind="cache_read", is_starting_cached_step=True)
    rows: Any = [SimpleNamespace(region=region) for region in (first, cached)]
    assert rotate_served([first, cached, second], rows) == [cached, second, first]
    assert rotate_served([first, cached, second], rows[:1]) == [cached, second, first]


def test_regions_are_admitted_by_priority_then_by_arrival_without_overtaking() -> None:
    first, second, urgent = prepared(), prepared(), prepared(priority=1)
    single = prepared(rows=1)
    assert admitted([first, second, single, urgent], [], 4) == [urgent, first]
    # The single row would fit, but then rows of one could keep the pair out for ever.
    assert admitted([second, single], [denoising("a"), denoising("b", rows=1)], 4) == []
    assert admitted([prepared(size=WIDE)], [denoising("a")], 2) != []
    assert admitted([prepared(size=WIDE)], [denoising("a", size=WIDE)], 4) == []
    assert admitted([prepared(size=WIDE)], [denoising("a", size=WIDE)], 8) != []


def test_regions_with_deepcache_do_not_use_up_the_rows_of_the_others() -> None:
    first, second = prepared(cache_interval=3), prepared(cache_interval=5)
    assert admitted([first], [denoising("a"), denoising("b")], 4) == [first]
    assert admitted([second], [denoising("a", cache_interval=3)], 2) == []


def test_a_window_with_more_rows_than_a_forward_pass_is_admitted_alone() -> None:
    assert len(admitted([prepared(rows=2)], [], 1)) == 1


NEIGHBOURS: tuple[dict[str, Any], ...] = (
    {"scheduler": "unipc", "seed": 5, "strength": 1.0},
    {"scheduler": "ddim", "seed": 6, "guidance_scale": 1.0, "prompt": "blue sky"},
    {"scheduler": "euler", "seed": 7, "num_inference_steps": 9},
    {"windows": (Box(0, 0, 64, 64), Box(40, 0, 104, 64)), "scheduler": "dpmpp_2m"},
)


def run_deterministic(folder: Path, works: list[RegionWork], *, before: int) -> list[Pixels]:
    """Run the regions in a batch of 8; the first ``before`` start a step before the rest."""
    components = load_tiny(folder)
    watch = UNetWatch(components.unet)
    watch.gate.clear()
    with open_engine(components, max_batch=8, deterministic=True) as engine:
        futures = [engine.submit(work) for work in works[:before]]
        assert watch.entered.wait(30)
        futures += [engine.submit(work) for work in works[before:]]
        watch.gate.set()
        results = [future.result(60) for future in futures]
    assert set(watch.rows) == {8}
    return results


@pytest.mark.parametrize("scheduler", get_args(Scheduler))
def test_deterministic_results_are_bit_identical_in_any_batch(
    tiny_model: Path, scheduler: str
) -> None:
    work = region_work(scheduler=scheduler, num_inference_steps=6)
    neighbours = [region_work(image_seed=seed, **values) for seed, values in enumerate(NEIGHBOURS)]
    alone = run_deterministic(tiny_model, [work], before=1)[0]
    assert np.array_equal(run_deterministic(tiny_model, [work, *neighbours], before=1)[0], alone)
    assert np.array_equal(run_deterministic(tiny_model, [*neighbours, work], before=2)[-1], alone)


def test_a_deterministic_canvas_is_bit_identical_in_any_batch(tiny_model: Path) -> None:
    windows = tuple(Box(left, 0, left + 64, 64) for left in range(0, 161, 40))
    canvas = region_work(windows=windows, strength=0.7, guidance_end=0.5)
    neighbours = [region_work(image_seed=seed, **values) for seed, values in enumerate(NEIGHBOURS)]
    alone = run_deterministic(tiny_model, [canvas], before=1)[0]
    assert np.array_equal(run_deterministic(tiny_model, [*neighbours, canvas], before=3)[-1], alone)


def test_regions_of_a_batch_finish_in_the_order_of_their_priorities(tiny_model: Path) -> None:
    components = load_tiny(tiny_model)
    watch = UNetWatch(components.unet)
    watch.gate.clear()
    order: list[int] = []
    with open_engine(components, max_batch=2) as engine:
        futures = [engine.submit(region_work(num_inference_steps=2))]
        assert watch.entered.wait(30)
        for priority in (0, 1, -1, 2):
            future = engine.submit(replace(region_work(num_inference_steps=2), priority=priority))
            future.add_done_callback(lambda _, priority=priority: order.append(priority))
            futures.append(future)
        watch.gate.set()
        for future in futures:
            future.result(60)
    assert order == [2, 1, 0, -1]
