"""The plan of mode ``auto`` for typical masks at 24 megapixels, and a loop over all tiles.

The loop is the usual one for large images: tiles of 512 px that overlap by 64 px. The column
"refinement" has the windows that ``refine_strength`` adds, step by step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.geometry import coarse_to_fine, regions
from shared.params import Params
from tests.benchmarks.side_by_side import measure_seconds

PHOTO, WINDOW, OVERLAP = (6000, 4000), 512, 64
REPEATS = 3
REFINED = Params(refine_strength=0.4)
Mask = NDArray[np.bool_]


def main() -> None:
    line(
        "auto at 24 megapixels",
        "regions",
        "scale",
        "windows",
        "refinement",
        "tile loop",
        "saved",
        "ms",
    )
    for name, mask in masks().items():
        plan = regions.plan(mask, mode="auto", window=(WINDOW, WINDOW))
        duration = min(
            measure_seconds(lambda: regions.plan(mask, mode="auto", window=(WINDOW, WINDOW)))  # noqa: B023
            for _ in range(REPEATS)
        )
        refined = [step.regions for step in coarse_to_fine.plan_refinements(mask, plan, REFINED)]
        windows, tiles = count_windows(plan), count_tiles(mask)
        scales = {f"{region.scale:.4g}" for region in plan}
        line(
            *(f"  {name}", len(plan), ", ".join(sorted(scales)), windows),
            *(
                " + ".join(str(count_windows(regions_of_step)) for regions_of_step in refined),
                tiles,
            ),
            *(f"{1 - windows / tiles:.0%}", f"{duration * 1e3:.0f}"),
        )


def line(name: str, *cells: object) -> None:
    print(f"{name:<44}" + "".join(f"{cell!s:>11}" for cell in cells))


def count_windows(plan: Sequence[regions.Region]) -> int:
    return sum(len(region.windows) for region in plan)


def count_tiles(mask: Mask) -> int:
    height, width = mask.shape
    step = WINDOW - OVERLAP
    return len(range(0, height, step)) * len(range(0, width, step))


def masks() -> dict[str, Mask]:
    return {
        "a logo in a corner, 400x150": boxes((5500, 3750, 5900, 3900)),
        "text tiled over the photograph": text(),
        "60 scratches": scratches(),
        "a patch at the border, 900x400": boxes((0, 1500, 900, 1900)),
        "a border of 300 px to extend the scene": frame(300),
        "a hole of 3000x2000": boxes((1500, 1000, 4500, 3000)),
        "everything but a product": background(),
        "8000 single pixels": specks(),
        "a thumbnail of 200x150 with a mark": boxes((120, 120, 190, 140), size=(200, 150)),
        "a panorama of 20000x1200 with two wires": boxes(
            (0, 400, 20000, 404), (0, 700, 20000, 703), size=(20000, 1200)
        ),
    }


def boxes(*marks: tuple[int, int, int, int], size: tuple[int, int] = PHOTO) -> Mask:
    mask = np.zeros((size[1], size[0]), np.bool_)
    for left, top, right, bottom in marks:
        mask[top:bottom, left:right] = True
    return mask


def text() -> Mask:
    image = Image.new("L", PHOTO)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(80)
    for row, top in enumerate(range(0, PHOTO[1], 500)):
        for left in range(-450 * (row % 2), PHOTO[0], 900):
            draw.text((left, top), "SAMPLE", fill=255, font=font)
    return np.asarray(image) > 127


def scratches() -> Mask:
    image, random = Image.new("1", PHOTO), np.random.default_rng(0)
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = (int(random.integers(side)) for side in PHOTO)
        dx, dy = random.integers(-300, 300, 2).tolist()
        draw.line((x, y, x + dx // 3, y + dy), fill=1, width=int(random.integers(1, 6)))
    return np.array(image)


def frame(px: int) -> Mask:
    mask = np.ones((PHOTO[1], PHOTO[0]), np.bool_)
    mask[px:-px, px:-px] = False
    return mask


def background() -> Mask:
    image = Image.new("1", PHOTO, 1)
    ImageDraw.Draw(image).ellipse((2000, 800, 4000, 3700), fill=0)
    return np.array(image)


def specks() -> Mask:
    mask, random = boxes(), np.random.default_rng(0)
    mask[random.integers(PHOTO[1], size=8000), random.integers(PHOTO[0], size=8000)] = True
    return mask


if __name__ == "__main__":
    sys.exit(main())
