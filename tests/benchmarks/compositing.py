"""Quality at the mask's edge: our compositing, IOPaint's, diffusers' and a hard paste.

The engine is simulated: it returns the true image with a colour cast, softened and with noise,
so that only the compositing is measured. Every method gets the same mask and the same result.
``--images FILE`` writes crops of all four next to each other.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from shared.geometry.box import Box
from shared.geometry.regions import Region
from shared.images import decode
from shared.masks import apply_threshold, dilate
from shared.params import Params
from tests.benchmarks.marked_photographs import (
    PHOTOGRAPHS,
    Case,
    Grey,
    Mask,
    Pixels,
    cases,
    grey,
    photograph,
)
from workers.pipeline.compositing import composite

Method = Callable[[Pixels, Grey, Pixels], Pixels]
"""method(marked image, mask, engine's result for the whole image) -> finished image"""

OURS = Params(mask_dilation=1, mask_feather=2)
BAND_PX, EYE_PX = 4, 1.0
NEAR_PX = 8


def main(sheet: Path | None = None) -> None:
    """Prints a table for each photograph and one for all; sheet: a JPEG of crops to write."""
    if sheet:
        _write_sheet(sheet)
    by_photograph = {
        name: [measure(case) for case in cases(photograph(name))] for name in PHOTOGRAPHS
    }
    all_scores = [scores for group in by_photograph.values() for scores in group]
    for title, group in [*by_photograph.items(), ("all", all_scores)]:
        _print_line(title, "PSNR in mask, dB", "seam, levels/px", "leak, %", "changed outside, px")
        for method in METHODS:
            mean = mean_scores(scores[method] for scores in group)
            figures = f"{mean.psnr:.2f}", f"{mean.seam:.3f}", f"{mean.leak:.2f}"
            _print_line(f"  {method}", *figures, f"{mean.changed:.0f}")
    _print_line(f"ours at least as good, of {len(all_scores)}", *map(str, _wins(all_scores)))


def _print_line(*cells: str) -> None:
    widths = (34, 18, 17, 9, 20)
    print("".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)))


# --- the methods ---------------------------------------------------------------------------


def ours(marked: Pixels, mask: Grey, painted: Pixels, params: Params = OURS) -> Pixels:
    """The product's own steps, with the whole image as the only region, at 1:1."""
    original = decode(_as_png(marked), max_pixels=10**8)
    repainted = dilate(apply_threshold(mask, threshold=params.mask_threshold), params.mask_dilation)
    whole = Box(0, 0, *original.size)
    region = Region(box=whole, size=whole.size, windows=(whole,))
    return np.asarray(composite(original, repainted, [region], [painted], params).pixels)


def with_a_ring(marked: Pixels, mask: Grey, painted: Pixels) -> Pixels:
    return ours(marked, mask, painted, replace(OURS, colour_fit="ring"))


def iopaint(marked: Pixels, mask: Grey, painted: Pixels) -> Pixels:
    """IOPaint 1.x: the mask at 127, blurred with a kernel of 23 (``sd_mask_blur`` 11), as weight.

    ``forward_pre_process`` and ``_pad_forward`` in ``iopaint/model/base.py``.
    """
    blurred = cv2.GaussianBlur(grey(mask > 127), (23, 23), 0)[..., None] / 255
    return (painted * blurred + marked * (1 - blurred)).astype(np.uint8)


def apply_overlay(marked: Pixels, mask: Grey, painted: Pixels) -> Pixels:
    """diffusers' own method, with the mask blurred as in its inpainting guide."""
    processor = _processor()
    blurred = processor.blur(Image.fromarray(mask), blur_factor=33)
    original, result = Image.fromarray(marked), Image.fromarray(painted)
    return np.asarray(processor.apply_overlay(blurred, original, result))


@cache
def _processor() -> Any:
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor()


def hard_paste(marked: Pixels, mask: Grey, painted: Pixels) -> Pixels:
    return np.where(mask[..., None] >= 128, painted, marked)


PEERS: Mapping[str, Method] = {
    "hard paste": hard_paste,
    "IOPaint": iopaint,
    "diffusers apply_overlay": apply_overlay,
}
METHODS: Mapping[str, Method] = {"ours": ours, "ours, colour_fit=ring": with_a_ring, **PEERS}


def _as_png(image: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


# --- the metrics ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scores:
    """psnr: dB, higher is better. seam: levels per pixel, leak: %, changed: pixels; lower is."""

    psnr: float
    seam: float
    leak: float
    changed: float

    def is_as_good_as(self, other: Scores) -> tuple[bool, bool, bool]:
        """In PSNR, seam and leak; differences below the printed precision count as ties."""
        return (
            self.psnr > other.psnr - 0.005,
            self.seam < other.seam + 0.0005,
            self.leak < other.leak + 0.005,
        )


def mean_scores(many: Iterable[Scores]) -> Scores:
    scores = tuple(many)
    names = [metric.name for metric in fields(Scores)]
    return Scores(**{name: float(np.mean([getattr(s, name) for s in scores])) for name in names})


def measure(case: Case) -> dict[str, Scores]:
    return {name: _scores(case, method) for name, method in METHODS.items()}


def _scores(case: Case, method: Method) -> Scores:
    result = method(case.marked, case.mask, case.painted)
    unmarked = method(case.true, case.mask, case.painted)
    mask = case.mask >= 128
    outside = (result != case.marked).any(axis=-1) & ~mask
    return Scores(
        psnr=_psnr(result, case.true, mask),
        seam=_seam(result, case.true, mask),
        leak=_leak(result, unmarked, case, mask),
        changed=int(outside.sum()),
    )


def _psnr(result: Pixels, true: Pixels, where: Mask) -> float:
    error = np.square(result[where].astype(np.float64) - true[where]).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


def _seam(result: Pixels, true: Pixels, mask: Mask) -> float:
    """The mean absolute error of gradients within 4 px of the mask's edge, in levels per pixel.

    Levin, Zomet, Peleg and Weiss (2004) minimise it to hide a seam. The error is blurred by
    1 px first, so that grain does not count as an edge.
    """
    error = cv2.GaussianBlur(result.astype(np.float32) - true, (0, 0), EYE_PX)
    band = dilate(mask, BAND_PX) & dilate(~mask, BAND_PX)
    down = np.abs(np.diff(error, axis=0))[band[1:] & band[:-1]]
    across = np.abs(np.diff(error, axis=1))[band[:, 1:] & band[:, :-1]]
    return float((down.mean() + across.mean()) / 2)


def _leak(result: Pixels, unmarked: Pixels, case: Case, mask: Mask) -> float:
    """Percent of the mark that remains, in the mask and within 8 px of it.

    |<result - unmarked, mark>| / <mark, mark>, where ``unmarked`` is the same method's result
    for the image without the mark. The difference is due to the mark alone.
    """
    near = dilate(mask, NEAR_PX)
    mark = case.marked[near].astype(np.float64) - case.true[near]
    rest = result[near].astype(np.float64) - unmarked[near]
    return float(100 * abs((rest * mark).sum()) / np.square(mark).sum())


def _wins(cases_scores: Sequence[Mapping[str, Scores]]) -> list[int]:
    """In how many cases ours is as good as the best in PSNR, seam and leak."""
    as_good = [
        np.all([scores["ours"].is_as_good_as(scores[peer]) for peer in PEERS], axis=0)
        for scores in cases_scores
    ]
    return [int(total) for total in np.sum(as_good, axis=0)]


# --- the crops --------------------------------------------------------------------------

_SHOWN = (  # photograph, case, left and top of the crop
    ("coffee", "lettering, soft mask, strong cast", (100, 100)),
    ("astronaut", "lettering in a JPEG, tight mask, strong cast", (205, 290)),
    ("rocket", "scratches, tight mask, uneven cast", (25, 90)),
)
_CROP_PX, _ZOOM, _GAP, _CAPTION = 88, 3, 8, 24


def _write_sheet(path: Path) -> None:
    """A row per case: the marked image, the four methods, the true image."""
    side = _CROP_PX * _ZOOM
    titles = ("marked", *PEERS, "ours", "true image")
    size = (len(titles) * (side + _GAP) + _GAP, len(_SHOWN) * (side + _CAPTION) + _CAPTION + _GAP)
    sheet = Image.new("RGB", size, "#f7f6f3")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=15)
    for line, (name, case_name, corner) in enumerate(_SHOWN):
        case = next(case for case in cases(photograph(name)) if case.name == case_name)
        shown = {"marked": case.marked, "true image": case.true}
        for title in (*PEERS, "ours"):
            shown[title] = METHODS[title](case.marked, case.mask, case.painted)
        top = _CAPTION + line * (side + _CAPTION)
        for column, title in enumerate(titles):
            left = _GAP + column * (side + _GAP)
            draw.text((left, 4), title, fill="#222222", font=font)
            sheet.paste(_enlarged(shown[title], corner), (left, top))
        draw.text((_GAP, top + side + 3), f"{name}: {case_name}", fill="#8a8780", font=font)
    sheet.save(path, quality=90)


def _enlarged(image: Pixels, corner: tuple[int, int]) -> Image.Image:
    left, top = corner
    crop = Image.fromarray(image).crop((left, top, left + _CROP_PX, top + _CROP_PX))
    return crop.resize((_CROP_PX * _ZOOM, _CROP_PX * _ZOOM), Image.Resampling.BICUBIC)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, metavar="FILE", help="a JPEG to write")
    main(parser.parse_args().images)
