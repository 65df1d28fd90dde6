"""A region as latents: where its windows lie, and how overlapping windows become one.

MultiDiffusion (Bar-Tal et al. 2023, equation 5 with equal weights): the predictions of all
windows over a latent are averaged at every step, so that windows share one picture and no
seam exists. A region of one window is the same code with nothing to average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.geometry.box import Box
from workers.engines.protocol import RegionWork


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The windows of one region, all of one size.

    factor: image pixels to a latent's side. size: (height, width) of the region in latents.
    windows: in latents. pixel_windows: the same in image pixels.
    """

    factor: int
    size: tuple[int, int]
    windows: tuple[Box, ...]

    @property
    def window_size(self) -> tuple[int, int]:
        """(height, width) in latents."""
        left, top, right, bottom = self.windows[0]
        return bottom - top, right - left

    @property
    def pixel_size(self) -> tuple[int, int]:
        """(height, width) of the region in image pixels."""
        return self.size[0] * self.factor, self.size[1] * self.factor

    @property
    def pixel_windows(self) -> tuple[Box, ...]:
        return tuple(Box(*(edge * self.factor for edge in box)) for box in self.windows)


def plan_canvas(work: RegionWork, factor: int) -> Canvas:
    """Raises ValueError unless windows lie in the region, on the latents' grid, in one size."""
    height, width = work.image.shape[:2]
    if work.image.shape != (height, width, 3) or work.mask.shape != (height, width):
        raise ValueError(f"image {work.image.shape} and mask {work.mask.shape} do not match")
    if not work.windows:
        raise ValueError("the region has no window")
    edges = [height, width, *(edge for box in work.windows for edge in box)]
    if any(edge % factor for edge in edges):
        raise ValueError(f"region {width}x{height}: an edge is not a multiple of {factor} px")
    for left, top, right, bottom in work.windows:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"window {left, top, right, bottom} is not in {width}x{height}")
    if len({(right - left, bottom - top) for left, top, right, bottom in work.windows}) > 1:
        raise ValueError("the region's windows differ in size")
    windows = tuple(Box(*(edge // factor for edge in box)) for box in work.windows)
    return Canvas(factor=factor, size=(height // factor, width // factor), windows=windows)


def crop(whole: Tensor, box: Box) -> Tensor:
    """A view of (..., H, W) inside the box."""
    left, top, right, bottom = box
    return whole[..., top:bottom, left:right]


def count_windows(size: tuple[int, int], windows: Iterable[Box]) -> Tensor:
    """(1, 1, H, W) float32: how many windows lie over each place."""
    counts = torch.zeros(1, 1, *size)
    for box in windows:
        crop(counts, box).add_(1)
    return counts


def sum_windows(parts: Sequence[Tensor], size: tuple[int, int], windows: Sequence[Box]) -> Tensor:
    """One (1, C, H, W) from parts of (C, h, w), added where windows overlap, else 0."""
    whole = parts[0].new_zeros(1, parts[0].shape[0], *size)
    for part, box in zip(parts, windows, strict=True):
        crop(whole, box).add_(part)
    return whole


def average_windows(
    parts: Sequence[Tensor], size: tuple[int, int], windows: Sequence[Box]
) -> Tensor:
    """One (1, C, H, W) from parts of (C, h, w), averaged where windows overlap, else 0."""
    whole = sum_windows(parts, size, windows)
    return whole / count_windows(size, windows).clamp_(min=1).to(whole.device)


def blend_windows(parts: Iterable[Tensor], size: tuple[int, int], windows: Sequence[Box]) -> Tensor:
    """One (C, H, W) from parts of (C, h, w): each fades linearly towards its window's edges.

    A tent over each window is linear in every overlap up to half a window; divided by the
    tents' sum the weights add up to exactly 1 where one window lies alone. Parts are taken
    one after another, so that an iterator never holds all of a large region's.
    """
    parts = iter(parts)
    first = next(parts)
    tent = _tent(*first.shape[-2:]).to(first.device)
    total = first.new_zeros(size)
    for box in windows:
        crop(total, box).add_(tent)
    whole = first.new_zeros(first.shape[0], *size)

    def add(part: Tensor, box: Box) -> None:
        crop(whole, box).add_(part * (tent / crop(total, box)))

    add(first, windows[0])
    del first  # with it, the whole pass that it came from would stay
    for part, box in zip(parts, windows[1:], strict=True):
        add(part, box)
    return whole


def _tent(height: int, width: int) -> Tensor:
    """(height, width) float32: the distance to the nearest edge, one axis times the other."""
    rows, columns = (
        torch.minimum(places := torch.arange(n) + 0.5, n - places) for n in (height, width)
    )
    return rows[:, None] * columns[None, :]
