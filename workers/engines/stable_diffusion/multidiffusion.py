"""A canvas: one region's latents, covered by windows that overlap.

MultiDiffusion (Bar-Tal et al. 2023, equation 5 with equal weights): at every step the predictions
of all windows are averaged where they overlap, so that the windows form one image without seams.
A region of one window takes the same path with nothing to average.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.geometry.box import Box
from workers.engines.protocol import RegionWork

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The windows of one region, all of one size.

    vae_factor: image pixels per latent along a side. size: (height, width) of the region in
    latents. windows: in latents.
    """

    vae_factor: int
    size: Size
    windows: tuple[Box, ...]

    @property
    def window_size(self) -> Size:
        """(height, width) in latents."""
        left, top, right, bottom = self.windows[0]
        return bottom - top, right - left

    @property
    def pixel_size(self) -> Size:
        """(height, width) of the region in image pixels."""
        return self.size[0] * self.vae_factor, self.size[1] * self.vae_factor

    @property
    def pixel_windows(self) -> tuple[Box, ...]:
        """The windows in image pixels."""
        return tuple(Box(*(edge * self.vae_factor for edge in box)) for box in self.windows)


def plan_canvas(work: RegionWork, vae_factor: int) -> Canvas:
    """Convert the region's windows to latents.

    Raises ValueError unless the windows have one size and lie in the region and on the latents'
    grid.
    """
    height, width = work.image.shape[:2]
    _check_windows(work, height, width, vae_factor)
    windows = tuple(Box(*(edge // vae_factor for edge in box)) for box in work.windows)
    size = height // vae_factor, width // vae_factor
    return Canvas(vae_factor=vae_factor, size=size, windows=windows)


def _check_windows(work: RegionWork, height: int, width: int, vae_factor: int) -> None:
    if work.image.shape != (height, width, 3) or work.mask.shape != (height, width):
        raise ValueError(f"image {work.image.shape} and mask {work.mask.shape} do not match")
    if not work.windows:
        raise ValueError("the region has no window")
    edges = [height, width, *(edge for box in work.windows for edge in box)]
    if any(edge % vae_factor for edge in edges):
        raise ValueError(f"region {width}x{height}: an edge is not a multiple of {vae_factor} px")
    for left, top, right, bottom in work.windows:
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise ValueError(f"window {left, top, right, bottom} is not in {width}x{height}")
    if len({(right - left, bottom - top) for left, top, right, bottom in work.windows}) > 1:
        raise ValueError("the region's windows differ in size")


def crop(canvas: Tensor, window: Box) -> Tensor:
    """Return a view of (..., H, W) inside the window."""
    left, top, right, bottom = window
    return canvas[..., top:bottom, left:right]


def count_windows(size: Size, windows: Iterable[Box]) -> Tensor:
    """Return (1, 1, H, W) float32: how many windows cover each place."""
    counts = torch.zeros(1, 1, *size)
    for window in windows:
        crop(counts, window).add_(1)
    return counts


def sum_windows(tensors: Sequence[Tensor], size: Size, windows: Sequence[Box]) -> Tensor:
    """Add one (C, h, w) tensor per window into (1, C, H, W); 0 outside all windows."""
    canvas = tensors[0].new_zeros(1, tensors[0].shape[0], *size)
    for tensor, window in zip(tensors, windows, strict=True):
        crop(canvas, window).add_(tensor)
    return canvas


def average_windows(tensors: Sequence[Tensor], size: Size, windows: Sequence[Box]) -> Tensor:
    """Average one (C, h, w) tensor per window into (1, C, H, W); 0 outside all windows."""
    canvas = sum_windows(tensors, size, windows)
    # min=1: places without a window divide 0 by 1.
    return canvas / count_windows(size, windows).clamp_(min=1).to(canvas.device)


def blend_windows(tensors: Iterable[Tensor], size: Size, windows: Sequence[Box]) -> Tensor:
    """Blend one (C, h, w) tensor per window into (C, H, W) with tent-shaped weights.

    weight = tent / sum of tents; it falls linearly across an overlap of up to half a window and
    is exactly 1 where one window lies alone. The tensors are consumed one after another, so that
    a large region's decoded windows are never all in memory.
    """
    tensors = iter(tensors)
    first = next(tensors)
    tent = _tent(*first.shape[-2:]).to(first.device)
    tent_sum = first.new_zeros(size)
    for window in windows:
        crop(tent_sum, window).add_(tent)
    canvas = first.new_zeros(first.shape[0], *size)

    def add(tensor: Tensor, window: Box) -> None:
        crop(canvas, window).add_(tensor * (tent / crop(tent_sum, window)))

    add(first, windows[0])
    del first  # a view: it would keep the VAE's whole first batch in memory
    for tensor, window in zip(tensors, windows[1:], strict=True):
        add(tensor, window)
    return canvas


def _tent(height: int, width: int) -> Tensor:
    """Return (height, width) float32: distance to the nearer edge along y times that along x."""
    rows, columns = (
        torch.minimum(centres := torch.arange(side) + 0.5, side - centres)
        for side in (height, width)
    )
    return rows[:, None] * columns[None, :]
