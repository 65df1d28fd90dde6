"""Inks: seen through the image's profile, painted with a black channel, kept elsewhere."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from skimage import data

from shared import images
from shared.images import cmyk

Pixels = NDArray[np.uint8]
COFFEE = data.coffee()[60:231, 150:353]


def light(inks: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3) of 0 to 1 from (..., 4) inks of 0 to 1; this press prints a weak magenta."""
    strength = np.array([1.0, 0.6, 1.0])
    return (1 - inks[..., :3] * strength) * (1 - inks[..., 3:])


def profile() -> bytes:
    """A CMYK profile, ICC version 2, with 8-bit tables that say what ``light`` says."""
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    grid = np.stack(np.meshgrid(*[np.linspace(0, 1, 5)] * 4, indexing="ij"), axis=-1)
    rgb = np.rint(light(grid).reshape(1, -1, 3) * 255).astype(np.uint8)
    seen = ImageCms.applyTransform(
        Image.fromarray(rgb), ImageCms.buildTransform(srgb, lab, "RGB", "LAB")
    )
    axis = np.linspace(0, 255, 17).astype(np.uint8)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(1, -1, 3)
    signed = points ^ np.array([0, 128, 128], np.uint8)  # as Pillow keeps a and b
    points_lab = Image.frombytes("LAB", (points.shape[1], 1), signed.tobytes())
    points_rgb = ImageCms.applyTransform(
        points_lab, ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    )
    ink = np.asarray(points_rgb).reshape(-1, 3) / 255
    black = (1 - ink.max(axis=-1, keepdims=True)) * 0.8
    inks = (1 - ink / np.maximum(1 - black, 1e-3)) / [1.0, 0.6, 1.0]
    back = np.concatenate([inks, black], axis=-1).clip(0, 1) * 255
    return packed(
        {
            b"A2B0": table(4, 3, 5, np.asarray(seen).reshape(-1, 3) ^ np.uint8([0, 128, 128])),
            b"B2A0": table(3, 4, 17, np.rint(back).astype(np.uint8)),
            b"wtpt": struct.pack(">4s4x3i", b"XYZ ", 63190, 65536, 54061),
            b"desc": struct.pack(">4s4xI5s78x", b"desc", 5, b"test\0"),
            b"cprt": b"text\0\0\0\0none\0",
        }
    )


def table(inputs: int, outputs: int, points: int, values: Pixels) -> bytes:
    straight = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if n % 4 == 0 else 0 for n in range(9)))
    head = struct.pack(">4s4xBBBx", b"mft1", inputs, outputs, points)
    return head + matrix + straight * inputs + values.tobytes() + straight * outputs


def packed(tags: dict[bytes, bytes]) -> bytes:
    start, lines, bodies = 132 + 12 * len(tags), b"", b""
    for name, body in tags.items():
        lines += struct.pack(">4sII", name, start + len(bodies), len(body))
        bodies += body + bytes(-len(body) % 4)
    size = start + len(bodies)
    head = struct.pack(">I4sI4s4s4s", size, b"none", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    return head + struct.pack(">I", len(tags)) + lines + bodies


PROFILE = profile()


def separated(rgb: Pixels) -> Image.Image:
    inks = cmyk.from_rgb(rgb.astype(np.float32), PROFILE)
    size = (rgb.shape[1], rgb.shape[0])
    return Image.frombytes("CMYK", size, np.rint(inks).astype(np.uint8).tobytes())


def save(format: str, icc: bytes = PROFILE) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    separated(COFFEE).save(buffer, format, icc_profile=icc, **options)
    return buffer.getvalue()


def decode(file: bytes) -> images.DecodedImage:
    return images.decode(file, max_pixels=10**6)


@pytest.mark.parametrize("format", ["TIFF", "JPEG"])
def test_an_engine_gets_the_colours_that_the_profile_defines(format: str) -> None:
    through = decode(save(format)).rgb().astype(int)
    plain = decode(save(format, b"")).rgb().astype(int)
    assert np.abs(through - COFFEE).mean() < 8
    assert np.abs(plain - COFFEE).mean() > 12


@pytest.mark.parametrize("icc", [b"", PROFILE], ids=["without a profile", "with a profile"])
def test_separated_colours_convert_back_and_have_black_ink(icc: bytes) -> None:
    rgb = np.array([[20, 25, 30], [90, 60, 40], [200, 180, 160], [255, 255, 255]], np.float32)
    inks = cmyk.from_rgb(rgb, icc)
    assert inks.shape == (4, 4)
    assert inks[0, 3] > 120
    assert inks[2, 3] < 60
    assert inks.sum(axis=1).max() <= 3.2 * 255
    seen = cmyk.to_rgb(np.rint(inks).astype(np.uint8)[None], icc)[0]
    assert np.abs(seen.astype(int) - rgb).max() <= (24 if icc else 2)


def test_black_and_white_convert_back_exactly_without_a_profile() -> None:
    corners = np.array([[0, 0, 0], [255, 255, 255]], np.float32)
    assert cmyk.from_rgb(corners, b"").tolist() == [[0, 0, 0, 255], [0, 0, 0, 0]]


def test_a_profile_that_cannot_be_used_is_ignored() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = np.array([[10, 200, 90]], np.float32)
    for useless in (b"no profile", srgb, PROFILE[:400]):
        assert np.array_equal(cmyk.from_rgb(rgb, useless), cmyk.from_rgb(rgb, b""))


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (4, 6, 3)])
def test_any_shape_of_colours_is_taken(shape: tuple[int, ...]) -> None:
    assert cmyk.from_rgb(np.full(shape, 77, np.float32), PROFILE).shape == (*shape[:-1], 4)
