"""Plugins: a function of the user's own that finishes a picture, say a model that mends faces.

A plugin is an entry point of the group ``inpaint.postprocess``: a callable that is given the
picture, (H, W, 3) uint8 RGB, and where it was repainted, (H, W) bool, and returns a picture,
uint8 RGB. Where it returns the same size, only repainted pixels are taken from it; where it
returns another, its picture is the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import numpy as np
from PIL import Image

from shared.errors import InpaintError, InputError, PostprocessError
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
    """Loads an installed plugin; raises InputError (code ``postprocess_missing``).

    Raises PostprocessError where it cannot be imported.
    """
    found = {one.name: one for one in entry_points(group=GROUP)}
    if name not in found:
        known = ", ".join(sorted(found)) or "none"
        raise InputError(
            f"postprocess: no plugin {name!r} is installed on this worker (installed: {known})",
            code="postprocess_missing",
        )
    try:
        plugin: Plugin = found[name].load()
    except Exception as error:
        raise PostprocessError(_said(name, "cannot be imported", error)) from error
    return plugin


def finish(picture: DecodedImage, repainted: Mask, params: Params) -> DecodedImage:
    """The picture as ``params.postprocess`` leaves it, in its own mode.

    repainted: (H, W).

    Raises InputError where there is no such plugin, and PostprocessError where it fails or
    returns something else.
    """
    name = params.postprocess
    result = _called(find(name), name, picture, repainted)
    size = (result.shape[1], result.shape[0])
    if size != picture.size:
        return _resized(picture, result)
    whole = Box(0, 0, *size)
    region = Region(box=whole, size=size, windows=(whole,))
    as_it_is = replace(params, colour_fit="off")
    return compositing.composite(picture, repainted, [region], [result], as_it_is)


def _called(plugin: Plugin, name: str, picture: DecodedImage, repainted: Mask) -> Pixels:
    try:
        result: Any = plugin(np.ascontiguousarray(picture.rgb()), repainted.copy())
    except InpaintError:
        raise
    except Exception as error:
        raise PostprocessError(_said(name, "failed", error)) from error
    if not isinstance(result, np.ndarray) or result.dtype != np.uint8:
        raise _wrong(name, type(result).__name__)
    if result.ndim != 3 or result.shape[2] != 3 or 0 in result.shape:
        raise _wrong(name, f"an array of shape {result.shape}")
    return result


def _said(name: str, what: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"postprocess: {name} {what}: {type(error).__name__}: {text}"


def _wrong(name: str, got: str) -> PostprocessError:
    return PostprocessError(
        f"postprocess: {name} returned {got}; it must return (height, width, 3) uint8"
    )


def _resized(picture: DecodedImage, result: Pixels) -> DecodedImage:
    """A picture of another size: no pixel of the source is left in it."""
    colours = from_rgb(result.astype(np.float32), picture.mode)
    alpha = picture.alpha()
    if picture.mode == "1":
        pixels: Array = colours >= 0.5
    else:
        pixels = np.rint(colours).astype(picture.pixels.dtype)
    if alpha is not None:
        size = (result.shape[1], result.shape[0])
        scaled = Image.fromarray(np.ascontiguousarray(alpha)).resize(size, Image.Resampling.LANCZOS)
        per_level = np.iinfo(pixels.dtype).max // 255
        layer = np.asarray(scaled).astype(pixels.dtype)[..., None] * pixels.dtype.type(per_level)
        pixels = np.concatenate([pixels, layer], axis=-1)
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    pixels.flags.writeable = False
    touched = np.ones(result.shape[:2], np.bool_)
    return replace(picture, pixels=pixels, touched=touched, source=b"")
