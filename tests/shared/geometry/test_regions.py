from __future__ import annotations

from fractions import Fraction
from math import ceil, floor
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shared.geometry.box import Box
from shared.geometry.regions import Region, plan
from shared.params import Mode

WINDOW = (512, 512)
WHOLE_WINDOW = (Box(0, 0, 512, 512),)
WINDOWS = st.sampled_from([(512, 512), (576, 512), (512, 768)])
MODES: list[Mode] = ["auto", "tile", "full"]


def marked(size: tuple[int, int], *marks: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    """A mask of that (width, height) with boxes in it."""
    mask = np.zeros((size[1], size[0]), np.bool_)
    for left, top, right, bottom in marks:
        mask[top:bottom, left:right] = True
    return mask


PHOTO = (3000, 2000)

ONE_WINDOW = {
    "a mark in the middle gets one window around it": (
        PHOTO,
        [(1490, 990, 1510, 1010)],
        [(1244, 744, 1756, 1256)],
    ),
    "at the left and top border the window shifts inward": (
        PHOTO,
        [(0, 0, 20, 20)],
        [(0, 0, 512, 512)],
    ),
    "at the right and bottom border too": (
        PHOTO,
        [(2990, 1990, 3000, 2000)],
        [(2488, 1488, 3000, 2000)],
    ),
    "two marks close together share a window": (
        PHOTO,
        [(1000, 1000, 1020, 1020), (1200, 1100, 1220, 1120)],
        [(854, 804, 1366, 1316)],
    ),
    "two marks far apart get two": (
        PHOTO,
        [(1000, 1000, 1020, 1020), (2000, 1000, 2020, 1020)],
        [(754, 754, 1266, 1266), (1754, 754, 2266, 1266)],
    ),
    "marks that do not fit a window together with their context stay apart": (
        PHOTO,
        [(1000, 1000, 1020, 1020), (1429, 1000, 1449, 1020)],
        [(754, 754, 1266, 1266), (1183, 754, 1695, 1266)],
    ),
    "one pixel closer they share": (
        PHOTO,
        [(1000, 1000, 1020, 1020), (1428, 1000, 1448, 1020)],
        [(968, 754, 1480, 1266)],
    ),
    "regions come top to bottom, then left to right": (
        PHOTO,
        [(2000, 1500, 2010, 1510), (2000, 600, 2010, 610), (600, 600, 610, 610)],
        [(349, 349, 861, 861), (1749, 349, 2261, 861), (1749, 1249, 2261, 1761)],
    ),
    "a long thin stroke is filled at 1:1": (
        PHOTO,
        [(1000, 1000, 1020, 1448)],
        [(754, 968, 1266, 1480)],
    ),
    "so is the largest square that fits a window with its context": (
        PHOTO,
        [(1000, 1000, 1448, 1448)],
        [(968, 968, 1480, 1480)],
    ),
    "and a larger one in a corner, where it needs less context": (
        PHOTO,
        [(0, 0, 480, 480)],
        [(0, 0, 512, 512)],
    ),
}


@pytest.mark.parametrize("case", ONE_WINDOW)
def test_auto_places_windows(case: str) -> None:
    size, marks, boxes = ONE_WINDOW[case]
    regions = plan(marked(size, *marks), mode="auto", window=WINDOW)
    assert [region.box for region in regions] == boxes
    assert all(region.windows == WHOLE_WINDOW and region.size == WINDOW for region in regions)


CANVASES = {
    "a stroke wider than a window: evenly spread windows": (
        PHOTO,
        [(1000, 1000, 2000, 1020)],
        Region(
            box=Box(956, 754, 2044, 1266),
            size=(1088, 512),
            windows=(Box(0, 0, 512, 512), Box(288, 0, 800, 512), Box(576, 0, 1088, 512)),
        ),
    ),
    "a corner of two strokes: the unmasked quarter has no window": (
        PHOTO,
        [(1000, 1000, 1020, 1700), (1000, 1680, 1700, 1700)],
        Region(
            box=Box(966, 966, 1734, 1734),
            size=(768, 768),
            windows=(Box(0, 0, 512, 512), Box(0, 256, 512, 768), Box(256, 256, 768, 768)),
        ),
    ),
    "two strokes that share their windows": (
        (1500, 1000),
        [(0, 300, 1500, 302), (0, 600, 1500, 602)],
        Region(
            box=Box(0, 195, 1504, 707),
            size=(1504, 512),
            windows=tuple(Box(left, 0, left + 512, 512) for left in (0, 328, 656, 992)),
        ),
    ),
    "the whole width of an image that is no multiple of 64, nor of 8": (
        (1001, 512),
        [(0, 100, 1001, 110)],
        Region(
            box=Box(0, 0, 1008, 512),
            size=(1008, 512),
            windows=(Box(0, 0, 512, 512), Box(248, 0, 760, 512), Box(496, 0, 1008, 512)),
        ),
    ),
}


@pytest.mark.parametrize("case", CANVASES)
def test_a_group_larger_than_a_window_gets_several(case: str) -> None:
    size, marks, region = CANVASES[case]
    assert plan(marked(size, *marks), mode="auto", window=WINDOW) == (region,)


def test_a_mark_that_would_lie_in_two_regions_joins_them() -> None:
    mask = marked((1100, 512), (0, 250, 10, 260), (490, 250, 500, 260))
    assert [region.box for region in plan(mask, mode="auto", window=WINDOW)] == [(0, 0, 576, 512)]


SCALED = {
    "a square one pixel too large for a window is scaled down by an eighth": (
        PHOTO,
        [(1000, 1000, 1449, 1449)],
        (936, 936, 1512, 1512),
        (512, 512),
        1,
    ),
    "the scale of a large hole follows its thickness": (
        (6000, 4000),
        [(1500, 1000, 4500, 3000)],
        (1272, 848, 4728, 3152),
        (768, 512),
        2,
    ),
    "up to that at which a window spans the image": (
        (6000, 4000),
        [(0, 0, 6000, 4000)],
        (0, 0, 6000, 4000),
        (768, 512),
        2,
    ),
    "long holes get several windows": (
        (6000, 4000),
        [(100, 1000, 5900, 1896)],
        (0, 936, 6000, 1960),
        (3000, 512),
        7,
    ),
    "an image smaller than a window is enlarged until its shorter side fills one": (
        (300, 200),
        [(10, 10, 20, 20)],
        (0, 0, 200, 200),
        (512, 512),
        1,
    ),
    "so is one that is only less high": (
        (1000, 200),
        [(500, 9, 510, 20)],
        (405, 0, 605, 200),
        WINDOW,
        1,
    ),
    "or less wide, and a mark larger than a window gets several": (
        (256, 1000),
        [(100, 100, 110, 600)],
        (0, 78, 256, 622),
        (512, 1088),
        3,
    ),
    "by at most four times; smaller images are padded on the right and below": (
        (20000, 64),
        [(9000, 9, 9010, 20)],
        (8941, 0, 9069, 128),
        (512, 512),
        1,
    ),
}


@pytest.mark.parametrize("case", SCALED)
def test_the_scale_follows_the_thickness_of_the_marks_and_the_size_of_the_image(
    case: str,
) -> None:
    image, marks, box, size, windows = SCALED[case]
    (region,) = plan(marked(image, *marks), mode="auto", window=WINDOW)
    assert (region.box, region.size, len(region.windows)) == (box, size, windows)


def test_a_thicker_mark_never_has_a_finer_scale() -> None:
    scales = []
    for side in (1, 300, 448, 449, 500, 700, 1000, 1500, 2000):
        mask = marked((4000, 3000), (1000, 500, 1000 + side, 500 + side))
        (region,) = plan(mask, mode="auto", window=WINDOW)
        scales.append(Fraction(region.box.width, region.size[0]))
    assert scales == sorted(scales)
    assert scales[2] == 1
    assert scales[-1] == Fraction(36, 8)


def test_a_thin_mark_next_to_a_hole_has_its_own_scale() -> None:
    mask = marked((6000, 4000), (1500, 1000, 3500, 3000), (3800, 900, 3803, 3100))
    hole, thin = sorted(plan(mask, mode="auto", window=WINDOW), key=lambda region: region.box.left)
    assert thin.size == thin.box.size
    assert hole.size == (512, 512)


def test_thin_pieces_next_to_each_other_do_not_count_as_thick() -> None:
    comb = marked(
        (6000, 4000), *((left, 1000, left + 200, 2000) for left in range(1000, 3000, 250))
    )
    assert all(region.size == region.box.size for region in plan(comb, mode="auto", window=WINDOW))


def test_a_thin_mark_does_not_share_windows_with_a_hole() -> None:
    mask = marked((6000, 4000), (1000, 1000, 1900, 2000), (2300, 1000, 2303, 2000))
    hole, thin = plan(mask, mode="auto", window=WINDOW)
    assert (hole.size, thin.size) == ((512, 576), thin.box.size)


def test_two_holes_side_by_side_get_a_window_each() -> None:
    mask = marked((6000, 4000), (1000, 1000, 2000, 2000), (2300, 1000, 3300, 2000))
    assert [region.size for region in plan(mask, mode="auto", window=WINDOW)] == [WINDOW, WINDOW]


@pytest.mark.parametrize(
    ("scale", "box"),
    [
        (2.0, (988, 488, 2012, 1512)),
        (1.5, (1116, 616, 1884, 1384)),
        (0.5, (1372, 872, 1628, 1128)),
        (0.01, (1436, 936, 1564, 1064)),  # a quarter
        (99.0, (500, 0, 2500, 2000)),  # the whole height
    ],
)
def test_a_scale_can_be_given(scale: float, box: tuple[int, int, int, int]) -> None:
    mask = marked(PHOTO, (1490, 990, 1510, 1010))
    (region,) = plan(mask, mode="auto", window=WINDOW, scale=scale)
    assert (region.box, region.size) == (box, WINDOW)


def test_a_given_scale_applies_to_thick_marks_too() -> None:
    mask = marked(PHOTO, (1000, 500, 2000, 1500))
    (region,) = plan(mask, mode="auto", window=WINDOW, scale=1)
    assert region.size == region.box.size


TILES = {
    "one masked tile": (
        (1000, 1000),
        [(10, 10, 20, 20)],
        [((0, 0, 512, 512), [(0, 0, 512, 512)])],
    ),
    "the last tile is shifted inward": (
        (1000, 1000),
        [(980, 980, 1000, 1000)],
        [((488, 488, 1000, 1000), [(0, 0, 512, 512)])],
    ),
    "by less than 8 px past the edge, to stay on the latents' grid": (
        (1001, 512),
        [(980, 100, 1001, 200)],
        [((496, 0, 1008, 512), [(0, 0, 512, 512)])],
    ),
    "a mark in four tiles": (
        (1000, 1000),
        [(950, 950, 955, 955)],
        [
            (
                (448, 448, 1000, 1000),
                [(0, 0, 512, 512), (40, 0, 552, 512), (0, 40, 512, 552), (40, 40, 552, 552)],
            )
        ],
    ),
    "tiles that overlap form one region": (
        (960, 512),
        [(450, 10, 460, 20)],
        [((0, 0, 960, 512), [(0, 0, 512, 512), (448, 0, 960, 512)])],
    ),
    "tiles that do not overlap form two": (
        (1408, 512),
        [(10, 10, 20, 20), (1300, 10, 1310, 20)],
        [((0, 0, 512, 512), [(0, 0, 512, 512)]), ((896, 0, 1408, 512), [(0, 0, 512, 512)])],
    ),
}


@pytest.mark.parametrize("case", TILES)
def test_mode_tile_fills_only_masked_tiles(case: str) -> None:
    size, marks, expected = TILES[case]
    regions = plan(marked(size, *marks), mode="tile", window=WINDOW)
    assert [(region.box, list(region.windows)) for region in regions] == expected


FULL = {
    "wide": (PHOTO, (512, 384), (0, 0, 3000, 2250)),
    "wide, not a multiple of 64": ((3001, 1999), (512, 384), (0, 0, 3004, 2253)),
    "square": ((512, 512), (512, 512), (0, 0, 512, 512)),
    "small images are enlarged": ((100, 100), (512, 512), (0, 0, 100, 100)),
    "a ribbon": ((6000, 10), (512, 64), (0, 0, 6000, 750)),
}


@pytest.mark.parametrize("case", FULL)
def test_mode_full_scales_the_image_into_the_window(case: str) -> None:
    image, size, box = FULL[case]
    (region,) = plan(marked(image, (3, 3, 5, 5)), mode="full", window=WINDOW)
    assert (region.box, region.size, region.windows) == (box, size, ((0, 0, *size),))


ANY_SIZE: dict[
    str, tuple[Mode, list[tuple[int, int, int, int]], list[tuple[int, int, int, int]]]
] = {
    "a mark with its context": ("auto", [(500, 400, 520, 410)], [(468, 368, 552, 442)]),
    "clipped to the image": ("auto", [(0, 990, 20, 1000)], [(0, 958, 52, 1000)]),
    "contexts that overlap": (
        "auto",
        [(100, 100, 110, 110), (173, 100, 180, 110)],
        [(68, 68, 212, 142)],
    ),
    "contexts that only touch": (
        "auto",
        [(100, 100, 110, 110), (174, 100, 180, 110)],
        [(68, 68, 142, 142), (142, 68, 212, 142)],
    ),
    "tiles": ("tile", [(10, 10, 20, 20)], [(0, 0, 512, 512)]),
    "full": ("full", [(10, 10, 20, 20)], [(0, 0, 1000, 1000)]),
}


@pytest.mark.parametrize("case", ANY_SIZE)
def test_regions_of_any_size_are_one_window_at_1_to_1(case: str) -> None:
    mode, marks, boxes = ANY_SIZE[case]
    regions = plan(marked((1000, 1000), *marks), mode=mode, window=WINDOW, any_size=True)
    assert [region.box for region in regions] == boxes
    assert all(region.windows == ((0, 0, *region.box.size),) for region in regions)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("any_size", [True, False])
def test_an_empty_mask_has_no_region(mode: Mode, any_size: bool) -> None:
    assert plan(marked(PHOTO), mode=mode, window=WINDOW, any_size=any_size) == ()


def test_every_nonzero_value_of_a_grey_mask_counts() -> None:
    mask = np.zeros((600, 600), np.uint8)
    mask[300, 300] = 1
    assert len(plan(mask, mode="auto", window=WINDOW)) == 1


SIDES = st.sampled_from([1, 64, 200, 301, 511, 512, 700, 1001, 1337, 1700])


@st.composite
def masks(draw: st.DrawFn) -> NDArray[np.bool_]:
    """Up to 1700 px a side, with a few thin and thick boxes, sometimes with single pixels."""
    width, height = draw(SIDES), draw(SIDES)
    marks = []
    for _ in range(draw(st.integers(1, 6))):
        left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
        right = min(width, left + draw(st.sampled_from([1, 60, 500, 1700])))
        bottom = min(height, top + draw(st.sampled_from([1, 10, 300, 900])))
        marks.append((left, top, right, bottom))
    mask = marked((width, height), *marks)
    if draw(st.booleans()):
        mask |= np.random.default_rng(draw(st.integers(0, 99))).random(mask.shape) < 1e-5
    return mask


SCALES = st.sampled_from([None, None, 1.0, 0.7, 2.3])
drawn = settings(max_examples=60, deadline=None, derandomize=True)


def image_box(region: Region, window: Box) -> Box:
    """The image pixels that a window of a region overlaps."""
    scale = Fraction(region.box.width, region.size[0])
    left, top, right, bottom = (edge * scale for edge in window)
    box = Box(floor(left), floor(top), ceil(right), ceil(bottom))
    return box.moved(region.box.left, region.box.top)


def covered(regions: tuple[Region, ...], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """How many regions have a window over each pixel."""
    counts = np.zeros(shape, np.uint8)
    for region in regions:
        inside = np.zeros(shape, np.bool_)
        for window in region.windows:
            left, top, right, bottom = image_box(region, window)
            inside[top:bottom, left:right] = True
        counts += inside
    return counts


@drawn
@given(
    mask=masks(), mode=st.sampled_from(MODES), window=WINDOWS, any_size=st.booleans(), scale=SCALES
)
def test_every_masked_pixel_lies_in_the_windows_of_exactly_one_region(
    mask: NDArray[np.bool_],
    mode: Mode,
    window: tuple[int, int],
    any_size: bool,
    scale: float | None,
) -> None:
    regions = plan(mask, mode=mode, window=window, any_size=any_size, scale=scale)
    assert (covered(regions, mask.shape)[mask] == 1).all()
    assert regions == plan(
        mask * np.uint8(9), mode=mode, window=window, any_size=any_size, scale=scale
    )


@drawn
@given(
    mask=masks(), mode=st.sampled_from(MODES), window=WINDOWS, any_size=st.booleans(), scale=SCALES
)
def test_windows_hold_masked_pixels_and_lie_in_their_region(
    mask: NDArray[np.bool_],
    mode: Mode,
    window: tuple[int, int],
    any_size: bool,
    scale: float | None,
) -> None:
    for region in plan(mask, mode=mode, window=window, any_size=any_size, scale=scale):
        box, size = region.box, region.size
        assert box.width * size[1] == box.height * size[0]
        assert not (any_size and size != box.size)
        assert region.windows
        for tile in region.windows:
            assert tile.size == (size if any_size or mode == "full" else window)
            assert Box(*tile).clipped(size) == tile
            pixels = image_box(region, tile)
            assert mask[pixels.top : pixels.bottom, pixels.left : pixels.right].any()
        if not any_size:
            edges = [*size, *(edge for tile in region.windows for edge in tile)]
            assert not any(edge % 8 for edge in edges)


@drawn
@given(mask=masks(), mode=st.sampled_from(["auto", "tile"]), any_size=st.booleans(), scale=SCALES)
def test_boxes_exceed_the_image_only_if_it_is_small_or_not_a_multiple_of_a_step(
    mask: NDArray[np.bool_], mode: Mode, any_size: bool, scale: float | None
) -> None:
    height, width = mask.shape
    for region in plan(mask, mode=mode, window=WINDOW, any_size=any_size, scale=scale):
        assert min(region.box.left, region.box.top) >= 0
        step = Fraction(region.box.width, region.size[0]) * (64 if mode == "auto" else 8)
        for end, length in ((region.box.right, width), (region.box.bottom, height)):
            if any_size:
                assert end <= length
            else:
                assert end < max(length + step, 129 if mode == "auto" else 513)


@drawn
@given(mask=masks(), thinness=st.integers(1, 40))
def test_thin_marks_in_a_photograph_are_filled_at_1_to_1(
    mask: NDArray[np.bool_], thinness: int
) -> None:
    thin = np.pad(mask, 200)
    thin[:: thinness + 1] = False
    assert all(
        region.size == region.box.size for region in plan(thin, mode="auto", window=(320, 320))
    )


@settings(drawn, max_examples=25)
@given(mask=masks(), right=st.integers(0, 200), down=st.integers(0, 200), any_size=st.booleans())
def test_a_shifted_mask_shifts_the_plan_away_from_borders(
    mask: NDArray[np.bool_], right: int, down: int, any_size: bool
) -> None:
    height, width = mask.shape
    margin = 800
    plans = []
    for dx, dy in ((0, 0), (right, down)):
        canvas = np.zeros((height + 2 * margin + 200, width + 2 * margin + 200), np.bool_)
        top, left = margin + dy, margin + dx
        canvas[top : top + height, left : left + width] = mask
        plans.append(plan(canvas, mode="auto", window=WINDOW, any_size=any_size))
    before, after = plans
    assert [(region.box.moved(right, down), region.size, region.windows) for region in before] == [
        (region.box, region.size, region.windows) for region in after
    ]


def test_a_noisy_mask_of_24_megapixels_is_planned_within_a_second() -> None:
    mask = np.random.default_rng(0).random((4000, 6000)) < 0.01
    start = process_time()
    (region,) = plan(mask, mode="auto", window=WINDOW)
    assert process_time() - start < 1
    assert region.box == (0, 0, 6000, 4000)
