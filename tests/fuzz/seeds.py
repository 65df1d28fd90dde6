"""Valid files of every format and kind, small, to be damaged."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin
from skimage import data

EXIF = Image.Exif()
EXIF[0x0112] = 6
EXIF[0x010E] = "a cat"
ICC = bytes(range(256)) * 3
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"


@cache
def seeds() -> tuple[tuple[str, bytes], ...]:
    """(format, file), some 45 of them, each of 61x43 pixels or about a hundred by seventy."""
    cat = Image.fromarray(data.chelsea())
    small, large = cat.resize((61, 43)), cat.resize((113, 71))
    return (*_jpegs(small, large), *_pngs(small), *_webps(small), *_tiffs(small), *_bmps(small))


def _jpegs(small: Image.Image, large: Image.Image) -> list[tuple[str, bytes]]:
    options: list[dict[str, Any]] = [
        {},
        {"progressive": True},
        {"subsampling": 0, "quality": 97},
        {"subsampling": 1, "restart_marker_blocks": 2},
        {"keep_rgb": True},
        {"exif": EXIF, "icc_profile": ICC, "comment": b"a comment", "dpi": (300, 300)},
    ]
    files = [_saved(image, "JPEG", **kind) for image in (small, large) for kind in options]
    files += [_saved(small.convert(mode), "JPEG", progressive=p)
              for mode in ("L", "CMYK") for p in (False, True)]  # fmt: skip
    return [("JPEG", file) for file in files]


def _pngs(small: Image.Image) -> list[tuple[str, bytes]]:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a cat")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    text.add_text("Comment", "long " * 99, zip=True)
    files = [
        _saved(_mode(small, mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
    ]
    files.append(_saved(small, "PNG", pnginfo=text, exif=EXIF, icc_profile=ICC, dpi=(72, 72)))
    files.append(_saved(_mode(small, "P"), "PNG", transparency=3, bits=4))
    files.append(_saved(small, "PNG", transparency=(1, 2, 3)))
    files.append(_saved(small, "PNG", save_all=True, append_images=[small.rotate(90)]))
    return [("PNG", file) for file in files]


def _webps(small: Image.Image) -> list[tuple[str, bytes]]:
    files = [
        _saved(_mode(small, mode), "WEBP", lossless=lossless)
        for mode in ("RGB", "RGBA")
        for lossless in (True, False)
    ]
    files.append(_saved(small, "WEBP", exif=EXIF, icc_profile=ICC, xmp=XMP))
    files.append(_saved(small, "WEBP", save_all=True, append_images=[small.rotate(90)]))
    return [("WEBP", file) for file in files]


def _tiffs(small: Image.Image) -> list[tuple[str, bytes]]:
    modes = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")
    files = [_saved(_mode(small, mode), "TIFF") for mode in modes]
    kinds = ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    files += [_saved(small, "TIFF", compression=kind) for kind in kinds]
    files += [_saved(_mode(small, "1"), "TIFF", compression=k) for k in ("group3", "group4")]
    files.append(_saved(small, "TIFF", big_tiff=True, icc_profile=ICC, dpi=(300, 300)))
    files.append(_saved(small, "TIFF", save_all=True, append_images=[small]))
    return [("TIFF", file) for file in files]


def _bmps(small: Image.Image) -> list[tuple[str, bytes]]:
    return [("BMP", _saved(_mode(small, mode), "BMP")) for mode in ("1", "L", "P", "RGB", "RGBA")]


def _mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256 + 7)
    converted = image.convert("L").convert(mode) if mode == "LA" else image.convert(mode)
    if mode in ("LA", "RGBA"):
        converted.putalpha(Image.linear_gradient("L").resize(image.size))
    return converted


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
