"""Plugins: a user's function that post-processes a result, such as a face restoration model.

A plugin is an entry point of the group ``inpaint.postprocess``: a callable that takes the image,
(H, W, 3) uint8 RGB, and the mask of repainted pixels, (H, W) bool, and returns an image, uint8
RGB. If that has the same size, only its repainted pixels are used; otherwise it is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import InpaintError, PluginMissing, PostprocessError, one_line
from shared.geometry.box import Box
from shared.geometry.regions import Region
from shared.images import Array, DecodedImage, from_rgb
from shared.masks import Mask
from shared.params import Params
from workers.engines.protocol import Pixels
from workers.pipeline import compositing

GROUP = "inpaint.postprocess"

Plugin = Callable[[Pixels, Mask], Pixels]


@cache
def find(name: str) -> Plugin:
    """Import an installed plugin. Raises PluginMissing, or PostprocessError if importing fails."""
    installed = {entry_point.name: entry_point for entry_point in entry_points(group=GROUP)}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise PluginMissing(
            f"postprocess: no plugin {name!r} is installed on this worker (installed: {known})"
        )
    try:
        plugin: Plugin = installed[name].load()
    except Exception as error:  # whatever somebody else's module raises
        raise _failure(name, "cannot be imported", error) from error
    return plugin


def apply(image: DecodedImage, mask: Mask, params: Params) -> DecodedImage:
    """Run the plugin ``params.postprocess``; returns its result in the image's own mode.

    mask: (H, W), True where repainted. Raises PluginMissing, and PostprocessError if the
    plugin fails or returns something else than an image.
    """
    result = _call(find(params.postprocess), params.postprocess, image, mask)
    size = (result.shape[1], result.shape[0])
    if size != image.size:
        return _replace_all(image, result)
    # One region of the whole image: compositing then keeps every pixel outside the feather.
    whole = Box(0, 0, *size)
    region = Region(box=whole, size=size, windows=(whole,))
    unfitted = replace(params, colour_fit="off")
    return compositing.composite(image, mask, [region], [result], unfitted)


def _call(plugin: Plugin, name: str, image: DecodedImage, mask: Mask) -> Pixels:
    try:
        result: Any = plugin(np.ascontiguousarray(image.rgb()), mask.copy())
    except InpaintError:
        raise
    except Exception as error:  # whatever somebody else's code raises
        raise _failure(name, "failed", error) from error
    if not isinstance(result, np.ndarray) or result.dtype != np.uint8:
        raise _wrong_type(name, type(result).__name__)
    if result.ndim != 3 or result.shape[2] != 3 or 0 in result.shape:
        raise _wrong_type(name, f"an array of shape {result.shape}")
    return result


def _failure(name: str, problem: str, error: Exception) -> PostprocessError:
    text = one_line(error, max_chars=1000)
    return PostprocessError(f"postprocess: {name} {problem}: {type(error).__name__}: {text}")


def _wrong_type(name: str, returned: str) -> PostprocessError:
    return PostprocessError(
        f"postprocess: {name} returned {returned}; it must return (height, width, 3) uint8"
    )


def _replace_all(image: DecodedImage, result: Pixels) -> DecodedImage:
    """The result in the image's mode and depth, at its own size; alpha is scaled to it."""
    colours = from_rgb(result.astype(np.float32), image.mode)
    alpha = image.alpha()
    if image.mode == "1":
        pixels: Array = colours >= 0.5
    else:
        pixels = np.rint(colours).astype(image.pixels.dtype)
    if alpha is not None:
        size = (result.shape[1], result.shape[0])
        scaled = Image.fromarray(np.ascontiguousarray(alpha)).resize(size, Image.Resampling.LANCZOS)
        # 1 for 8 bits, 257 for 16: from uint8 to the image's depth.
        per_level = np.iinfo(pixels.dtype).max // 255
        layer = np.asarray(scaled).astype(pixels.dtype)[..., None] * pixels.dtype.type(per_level)
        pixels = np.concatenate([pixels, layer], axis=-1)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    pixels.flags.writeable = False
    touched = np.ones(result.shape[:2], np.bool_)
    # No source: the encoder would copy untouched JPEG blocks from it, and there are none.
    return replace(image, pixels=pixels, touched=touched, source=b"")
