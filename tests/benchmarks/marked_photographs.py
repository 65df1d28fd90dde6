"""Photographs with a mark, masks as users make them, and a simulated engine's result.

The simulated engine errs only in colour and grain: it returns the true image everywhere, with a
colour cast, softened and with noise.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from shared.masks import dilate
from tests.sample_images import read_photograph

Pixels = NDArray[np.uint8]  # (H, W, 3)
Grey = NDArray[np.uint8]  # (H, W), 255 = repaint
Mask = NDArray[np.bool_]

NOISE = 3.0  # levels, standard deviation
SOFTNESS_PX = 0.7

PHOTOGRAPHS: Mapping[str, tuple[str, tuple[int, int, int, int]]] = {
    "coffee": ("coffee.png", (60, 0, 540, 400)),
    "chelsea": ("chelsea.png", (0, 0, 451, 300)),
    "astronaut": ("astronaut.png", (0, 0, 512, 400)),
    "rocket": ("rocket.jpg", (100, 20, 580, 420)),
    "retina": ("retina.jpg", (300, 400, 800, 800)),
    "hubble": ("hubble_deep_field.jpg", (200, 200, 700, 600)),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """true and marked: (H, W, 3) without and with the mark; painted: the engine's result."""

    name: str
    true: Pixels
    marked: Pixels
    mask: Grey
    painted: Pixels


def photograph(name: str) -> Pixels:
    file, box = PHOTOGRAPHS[name]
    return np.asarray(read_photograph(file).convert("RGB").crop(box))


def cases(image: Pixels) -> Iterator[Case]:
    """Every mark with every mask, and every cast with each of them once."""
    for first, (mark, draw) in enumerate(MARKS.items()):
        cover, colour = draw(image.shape[1], image.shape[0])
        marked = _rounded(image + (np.array(colour) - image) * cover[..., None])
        true = image
        if mark == "lettering in a JPEG":
            true, marked = _as_jpeg(true), _as_jpeg(marked)
        for second, (kind, mask) in enumerate(_masks(cover).items()):
            cast = tuple(CASTS)[(first + second) % len(CASTS)]
            yield Case(
                name=f"{mark}, {kind} mask, {cast} cast",
                true=true,
                marked=marked,
                mask=mask,
                painted=_paint(true, cast, seed=4 * first + second),
            )


def _lettering(width: int, height: int) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    layer = Image.new("L", (width, height))
    draw, unit = ImageDraw.Draw(layer), min(width, height)
    for text, size, down in (("SAMPLE STUDIO", 0.14, 0.35), ("samplestudio.example", 0.05, 0.6)):
        font = ImageFont.load_default(size=size * unit)
        draw.text((width / 2, down * height), text, fill=255, font=font, anchor="mm")
    x, y, radius = width / 2, 0.8 * height, 0.09 * unit
    edge = max(2, round(0.2 * radius))
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=255, width=edge)
    return np.asarray(layer) * (0.55 / 255), (255, 255, 255)


def _scratches(width: int, height: int) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    random = np.random.default_rng(5)
    layer = Image.new("L", (4 * width, 4 * height))
    for _ in range(7):
        x, y = random.uniform((0.1, 0), (0.9, 0.4)) * layer.size
        end = (x + random.normal(0, 0.12) * layer.width, y + random.uniform(0.3, 0.6) * 4 * height)
        ImageDraw.Draw(layer).line((x, y, *end), fill=230, width=int(random.integers(5, 13)))
    return np.asarray(layer.resize((width, height), Image.Resampling.BOX)) / 255, (240, 235, 225)


def _patch(width: int, height: int) -> tuple[NDArray[np.float64], tuple[int, ...]]:
    cover = np.zeros((height, width))
    cover[-70:, -150:] = cover[:40, :90] = 1
    return cover, (200, 30, 40)


MARKS = {
    "lettering": _lettering,
    "lettering in a JPEG": _lettering,
    "scratches": _scratches,
    "patches": _patch,
}


def _masks(cover: NDArray[np.float64]) -> dict[str, Grey]:
    """exact; tight: without half-covered pixels; soft: blurred; wide: dilated by 2 px."""
    whole = cover > 0
    brushed = cv2.GaussianBlur(grey(dilate(whole, 1)), (0, 0), 1.2)
    return {
        "exact": grey(whole),
        "tight": grey(cover >= 0.5 * cover.max()),
        "soft": np.asarray(brushed, np.uint8),
        "wide": grey(dilate(whole, 2)),
    }


# Gain and offset per channel, and by how many levels the light varies over the image.
CASTS: Mapping[str, tuple[Sequence[float], Sequence[float], float]] = {
    "no": ((1, 1, 1), (0, 0, 0), 0),
    "weak": ((0.98, 1, 1.02), (2, -1, 1.5), 0),
    "strong": ((0.92, 1, 1.06), (8, -6, 4), 0),
    "uneven": ((1, 0.99, 1.01), (1, -1, 2), 9),
}


def _paint(true: Pixels, cast: str, *, seed: int) -> Pixels:
    """The engine's result: every pixel differs, as with a latent diffusion model."""
    gain, offset, height = CASTS[cast]
    rows, columns = (np.linspace(-1, 1, side) for side in true.shape[:2])
    x, y = columns[None, :, None], rows[:, None, None]
    light = height * (np.sin(1.7 * x + 1.1 * y) * [1, 0.6, -0.8] + 0.4 * np.cos(2.3 * y - x))
    soft = cv2.GaussianBlur(true.astype(np.float64), (0, 0), SOFTNESS_PX)
    noise = np.random.default_rng(seed).normal(0, NOISE, true.shape)
    return _rounded(soft * gain + offset + light + noise)


def _as_jpeg(image: Pixels) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90)
    return np.asarray(Image.open(buffer))


def _rounded(values: NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def grey(mask: Mask) -> Grey:
    return mask.astype(np.uint8) * np.uint8(255)
