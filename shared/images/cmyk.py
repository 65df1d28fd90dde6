"""CMYK to RGB and back, through the image's colour profile if it has one."""

from __future__ import annotations

import io
import logging
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]

# As Photoshop converts by default.
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC


def to_rgb(inks: Pixels, profile: bytes) -> Pixels:
    """(h, w, 3) sRGB from (h, w, 4) inks, 255 = full ink."""
    image = Image.frombytes("CMYK", (inks.shape[1], inks.shape[0]), inks.tobytes())
    transforms = _transforms(profile)
    if transforms is None:
        return np.asarray(image.convert("RGB"))
    return np.asarray(transforms[0].apply(image))


def from_rgb(rgb: NDArray[np.float32], profile: bytes) -> NDArray[np.float32]:
    """(..., 4) inks of 0 to 255 from (..., 3) sRGB of 0 to 255."""
    transforms = _transforms(profile)
    if transforms is None:
        return _separated(rgb)
    # ImageCms takes images only: the colours become one row.
    row = np.rint(rgb).clip(0, 255).astype(np.uint8).reshape(1, -1, 3)
    if row.size == 0:
        return np.zeros((*rgb.shape[:-1], 4), np.float32)
    inks = np.asarray(transforms[1].apply(Image.fromarray(row)))
    return inks.reshape(*rgb.shape[:-1], 4).astype(np.float32)


def _separated(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without a profile: black = (1 - max(r, g, b))^2, so that highlights have none.

    The exact inverse of Pillow's conversion in ``to_rgb``, light = (1 - ink) * (1 - black).
    """
    light = rgb / np.float32(255)
    black = (1 - light.max(axis=-1, keepdims=True)) ** 2
    inks = 1 - light / np.maximum(1 - black, np.float32(1e-6))
    # Full black leaves no light that an ink could absorb.
    inks[np.broadcast_to(black > 1 - 1e-6, inks.shape)] = 0
    both = np.concatenate([inks, black], axis=-1)
    return np.asarray(both.clip(0, 1) * np.float32(255), np.float32)


@lru_cache(maxsize=8)
def _transforms(
    profile: bytes,
) -> tuple[ImageCms.ImageCmsTransform, ImageCms.ImageCmsTransform] | None:
    """To sRGB and back; None if the profile is absent, damaged, or has one direction only."""
    if not profile:
        return None
    try:
        inks = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        return (
            ImageCms.ImageCmsTransform(inks, srgb, "CMYK", "RGB", _INTENT, flags=_FLAGS),
            ImageCms.ImageCmsTransform(srgb, inks, "RGB", "CMYK", _INTENT, flags=_FLAGS),
        )
    except (OSError, ValueError, TypeError, ImageCms.PyCMSError) as error:
        log.warning("the CMYK image's colour profile cannot be used: %s", error)
        return None
