"""How well the quality gates separate good fills from broken ones.

Photographs get a mark of each shape at several places. Each mark is replaced by fills that a
person would accept, and by fills that nobody would. The unmarked photograph is the truth.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.geometry import regions
from shared.images import DecodedImage
from shared.masks import Mask, dilate
from tests import sample_images
from tests.benchmarks.side_by_side import print_row
from workers.pipeline import quality_gates

Rgb = NDArray[np.uint8]  # (h, w, 3)
Random = np.random.Generator
Size = tuple[int, int]

PHOTOGRAPHS = (
    *("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg", "ihc.png"),
    *("hubble_deep_field.jpg", "motorcycle_left.png", "camera.png", "moon.png", "coins.png"),
    *("brick.png", "grass.png", "gravel.png", "page.png", "text.png", "cell.png"),
)
PLACES = 10  # of each photograph
WINDOW_PX = 320
PAINTS = ((255, 255, 255), (20, 20, 20), (200, 30, 30))
# An error that nobody overlooks: RMS in levels, and as a share of the contrast around the mask.
GROSS_LEVELS, GROSS_SHARE = 12, 0.5


@dataclass(frozen=True, kw_only=True)
class Case:
    """truth: without the mark; marked: with it, as a user would submit it."""

    photograph: str
    truth: Rgb
    marked: Rgb
    mask: Mask
    feather_px: int
    small: bool


def main() -> None:
    examined: Counter[str] = Counter()
    gross: Counter[str] = Counter()
    caught: Counter[tuple[str, str]] = Counter()
    for number, case in enumerate(_cases()):
        random = np.random.default_rng([number, 1])
        for name, fill in (GOOD | BAD).items():
            if name in THIN_ONLY and not case.small:
                continue
            after = _composite(case, fill(case, random))
            code = _failed_gate(case, after)
            examined[name] += 1
            if name in GOOD or name in ALWAYS_GROSS or _is_gross(case, after):
                gross[name] += 1
                caught[name, code] += 1
    print_row("fill", "judged of all", "refused", "by")
    for name in GOOD | BAD:
        codes = {code: n for (fill, code), n in caught.items() if fill == name and code}
        share = sum(codes.values()) / gross[name]
        by_gate = ", ".join(f"{code.removeprefix('gate_')} {n}" for code, n in codes.items())
        print_row(name, f"{gross[name]} of {examined[name]}", f"{share:.1%}", by_gate)
    _measure_speed()


def _failed_gate(case: Case, after: Rgb) -> str:
    before, result = (
        DecodedImage(pixels=pixels, mode="RGB", format="PNG") for pixels in (case.marked, after)
    )
    size = (WINDOW_PX, WINDOW_PX)
    plan = regions.plan(case.mask, mode="auto", window=size, any_size=True)
    scores = quality_gates.examine(before, result, case.mask, plan, (), feather_px=case.feather_px)
    error = quality_gates.verdict(scores, remedy="try another seed")
    return error.code if error else ""


def _composite(case: Case, fill: Rgb) -> Rgb:
    """Pastes the fill into the mask, and into a feather of ``feather_px`` around it."""
    outside = (~case.mask).astype(np.uint8)
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    weight = np.clip(1 - distance / (case.feather_px + 1), 0, 1)[..., None]
    return _levels(case.marked + weight * (fill.astype(float) - case.marked))


def _is_gross(case: Case, after: Rgb) -> bool:
    error = np.sqrt(np.mean((after[case.mask].astype(float) - case.truth[case.mask]) ** 2))
    around = dilate(case.mask, 12) & ~case.mask
    contrast = case.truth[around].astype(float).std(axis=0).mean()
    return bool(error > max(GROSS_LEVELS, GROSS_SHARE * contrast))


# --- marks -----------------------------------------------------------------------------------


def _cases() -> Iterator[Case]:
    for number, name in enumerate(PHOTOGRAPHS):
        whole = np.asarray(sample_images.read_photograph(name).convert("RGB"))
        for place in range(PLACES):
            random = np.random.default_rng([number, place, 7])
            truth = _window(whole, random)
            for draw in (_text, _box, _disc, _scratch, _dot):
                yield _case(name, truth, draw, random)


def _window(whole: Rgb, random: Random) -> Rgb:
    top, left = (int(random.integers(0, max(side - WINDOW_PX, 0) + 1)) for side in whole.shape[:2])
    return np.ascontiguousarray(whole[top : top + WINDOW_PX, left : left + WINDOW_PX])


def _case(
    name: str, truth: Rgb, draw: Callable[[ImageDraw.ImageDraw, Size, Random], None], random: Random
) -> Case:
    layer = Image.new("L", (truth.shape[1], truth.shape[0]))
    draw(ImageDraw.Draw(layer), layer.size, random)
    strokes = np.asarray(layer, np.float32)[..., None] / 255 * random.uniform(0.5, 1)
    mask = dilate(strokes[..., 0] > 0, int(random.choice([0, 1, 2, 4])))
    paint = np.array(PAINTS[random.integers(len(PAINTS))])
    return Case(
        photograph=name,
        truth=truth,
        marked=_levels(truth + strokes * (paint - truth)),
        mask=mask,
        feather_px=int(random.choice([0, 4])),
        small=draw not in (_box, _disc) or bool(mask.sum() < 1500),
    )


def _corner(size: Size, random: Random, width: float, height: float) -> tuple[int, int]:
    return (
        int(random.integers(0, max(int(size[0] - width), 1))),
        int(random.integers(0, max(int(size[1] - height), 1))),
    )


def _text(draw: ImageDraw.ImageDraw, size: Size, random: Random) -> None:
    font = ImageFont.load_default(size=float(random.uniform(14, 50)))
    _, _, width, height = font.getbbox("SAMPLE 26")
    draw.text(_corner(size, random, width, height), "SAMPLE 26", fill=255, font=font)


def _box(draw: ImageDraw.ImageDraw, size: Size, random: Random) -> None:
    width, height = (int(side) for side in random.integers(20, 140, 2))
    left, top = _corner(size, random, width, height)
    draw.rectangle((left, top, left + width, top + height), fill=255)


def _disc(draw: ImageDraw.ImageDraw, size: Size, random: Random) -> None:
    width = int(random.integers(16, 120))
    left, top = _corner(size, random, width, width)
    draw.ellipse((left, top, left + width, top + width), fill=255)


def _scratch(draw: ImageDraw.ImageDraw, size: Size, random: Random) -> None:
    ends = random.uniform(0, 1, (2, 2)) * size
    draw.line([tuple(end) for end in ends], fill=255, width=int(random.integers(1, 5)))


def _dot(draw: ImageDraw.ImageDraw, size: Size, random: Random) -> None:
    width = int(random.integers(1, 6))
    left, top = _corner(size, random, width, width)
    draw.rectangle((left, top, left + width, top + width), fill=255)


# --- fills -----------------------------------------------------------------------------------


def _levels(values: NDArray[np.floating]) -> Rgb:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _noisy(case: Case, random: Random) -> Rgb:
    return _levels(case.truth + random.normal(0, 3, case.truth.shape))


def _blurred(case: Case, _: Random) -> Rgb:
    return cv2.GaussianBlur(case.truth, (0, 0), 1.2)


def _tinted(case: Case, random: Random) -> Rgb:
    return _levels(case.truth + random.uniform(-5, 5, 3))


def _decoded(case: Case, random: Random) -> Rgb:
    """Softer, with some noise and a colour cast, as a VAE's decoder returns it."""
    soft = cv2.GaussianBlur(case.truth, (0, 0), 0.8).astype(float)
    return _levels(soft + random.normal(0, 2, soft.shape) + random.uniform(-3, 3, 3))


def _opencv(method: int) -> Callable[[Case, Random], Rgb]:
    return lambda case, _: cv2.inpaint(case.marked, case.mask.astype(np.uint8) * 255, 5, method)


def _cast(case: Case, random: Random) -> Rgb:
    cast = np.zeros(3)
    cast[random.integers(3)] = random.choice([-25, 25])
    return _levels(case.truth + cast)


def _mark_remains(case: Case, random: Random) -> Rgb:
    return _levels(case.marked + random.normal(0, 1, case.truth.shape))


def _noise(case: Case, random: Random) -> Rgb:
    return random.integers(0, 256, case.truth.shape).astype(np.uint8)


def _other_photograph(case: Case, random: Random) -> Rgb:
    others = [name for name in PHOTOGRAPHS if name != case.photograph]
    other = sample_images.read_photograph(str(random.choice(others))).convert("RGB")
    return np.asarray(other.resize((case.truth.shape[1], case.truth.shape[0])))


def _shifted(case: Case, random: Random) -> Rgb:
    offset = random.integers(24, 80, 2) * random.choice([-1, 1], 2)
    return np.roll(case.truth, tuple(int(px) for px in offset), axis=(0, 1))


Fills = Mapping[str, Callable[[Case, Random], Rgb]]
GOOD: Fills = {
    "good: the truth": lambda case, _: case.truth,
    "good: noise of 3": _noisy,
    "good: blurred": _blurred,
    "good: a cast of 5": _tinted,
    "good: as a VAE decodes": _decoded,
    "good: OpenCV, Telea": _opencv(cv2.INPAINT_TELEA),
    "good: OpenCV, Navier-Stokes": _opencv(cv2.INPAINT_NS),
}
BAD: Fills = {
    "black": lambda case, _: np.zeros_like(case.truth),
    "black, lifted by 24": lambda case, _: np.full_like(case.truth, 24),
    "the mark left in": lambda case, _: case.marked,
    "the mark left in, noise of 1": _mark_remains,
    "noise": _noise,
    "another photograph": _other_photograph,
    "a cast of 25 in one channel": _cast,
    "another place of the same image": _shifted,
}
ALWAYS_GROSS = ("the mark left in", "the mark left in, noise of 1")
THIN_ONLY = ("good: OpenCV, Telea", "good: OpenCV, Navier-Stokes")


def _measure_speed() -> None:
    """Prints the fastest of five runs: other load on the machine only adds to the others."""
    large = np.random.default_rng(0).integers(0, 256, (4000, 6000, 3), np.uint8)
    whole, mark = np.ones(large.shape[:2], np.bool_), np.zeros(large.shape[:2], np.bool_)
    mark[1000:1060, 2000:2200] = True
    for name, mask in (("a mark of 200x60", mark), ("all of it", whole)):
        plan = regions.plan(mask, mode="auto", window=(512, 512))
        before, after = (
            DecodedImage(pixels=pixels, mode="RGB", format="PNG") for pixels in (large, 255 - large)
        )
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            quality_gates.examine(before, after, mask, plan, ())
            seconds.append(time.perf_counter() - start)
        print_row(f"24 megapixels, {name}", f"{min(seconds) * 1000:.1f} ms")


if __name__ == "__main__":
    main()
