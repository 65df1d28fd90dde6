"""Fidelity: what a repainted file keeps, in every format, as other decoders read it.

Each photograph is written in each kind of file and a mark in it is repainted. Both files are
decoded by tifffile, imagecodecs or OpenCV; jpeglib reads the blocks of JPEGs.
"""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import jpeglib
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import (
    ExifTags,
    Image,
    ImageCms,
    ImageDraw,
    ImageFont,
    JpegImagePlugin,
    PngImagePlugin,
)

from shared import images
from tests import sample_images

Pixels = NDArray[Any]
Mask = NDArray[np.bool_]

PHOTOGRAPHS = (
    *("coffee.png", "astronaut.png", "chelsea.png", "rocket.jpg", "retina.jpg"),
    "hubble_deep_field.jpg",
)
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
    b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/></x:xmpmeta>'
)
DPI = (300, 300)
TAGS = {"EXIF": 271, "ICC": 34675, "XMP": 700, "dpi": 282}
WIDTHS = (40, 9, 9, 9, 7, 40)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A file against its source. changed: pixels that may not change and did. copied: the share
    of DCT blocks with the source's coefficients, None for other formats. size: in parts of the
    source's. metadata: the kinds that are equal; lost: the others."""

    changed: int
    repainted: int
    copied: float | None
    size: float
    metadata: tuple[str, ...]
    lost: tuple[str, ...]


def compare(file: bytes) -> Comparison:
    """Repaints a mark in the file and compares both files, read by other decoders."""
    image = images.decode(file, max_pixels=10**9)
    touched = mark(image.size)
    result = images.encode(image.replace(repainted(image, touched), touched=touched))
    before, after = upright(file), upright(result)
    differs = np.ones(touched.shape, np.bool_)
    if before.shape == after.shape and before.dtype == after.dtype:
        differs = (before != after).reshape(*touched.shape, -1).any(axis=-1)
    is_jpeg = image.format == "JPEG"
    may_change = within_reach(file, touched) if is_jpeg else touched
    old, new = metadata(file), metadata(result)
    return Comparison(
        changed=int((differs & ~may_change).sum()),
        repainted=int((differs & touched).sum()),
        copied=copied_blocks(file, result) if is_jpeg else None,
        size=len(result) / len(file),
        metadata=tuple(name for name in old if new.get(name) == old[name]),
        lost=tuple(name for name in old if new.get(name) != old[name]),
    )


def mark(size: tuple[int, int]) -> Mask:
    """(H, W): letters across the middle of a (width, height) image."""
    image = Image.new("1", size)
    font = ImageFont.load_default(max(10.0, min(size) / 8))
    ImageDraw.Draw(image).text((size[0] / 2, size[1] / 2), "SAMPLE", 1, font, anchor="mm")
    return np.asarray(image)


def repainted(image: images.DecodedImage, touched: Mask) -> Pixels:
    """The image's pixels, with pixels from elsewhere under the mark; alpha unchanged."""
    pixels = image.pixels.copy()
    moved = np.roll(pixels, (41, 67), (0, 1))
    if image.has_alpha:
        moved[..., -1] = pixels[..., -1]
    pixels[touched] = moved[touched]
    return pixels


# Decoders that the product does not use for the same format


def upright(file: bytes) -> Pixels:
    """(H, W) or (H, W, C) in the file's own mode and depth, turned as EXIF asks."""
    return turned(decoded(file), orientation(file))


def turned(pixels: Pixels, orientation: int) -> Pixels:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def orientation(file: bytes) -> int:
    if is_tiff(file):  # Pillow opens no big-endian BigTIFF
        return 1
    with opened(file) as image:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))


def opened(file: bytes) -> Image.Image:
    """By Pillow, without the search for further images behind a JPEG."""
    is_jpeg = file[:3] == b"\xff\xd8\xff"
    data = io.BytesIO(file)
    return JpegImagePlugin.JpegImageFile(data) if is_jpeg else Image.open(data)


def is_tiff(file: bytes) -> bool:
    return file[:2] in (b"II", b"MM")


def decoded(file: bytes) -> Pixels:
    if file[:3] == b"\xff\xd8\xff":
        return np.asarray(imagecodecs.jpeg8_decode(file))
    if file[:4] == b"RIFF":
        return np.asarray(imagecodecs.webp_decode(file))
    if is_tiff(file):
        return by_tifffile(file)
    read = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED)
    assert read is not None
    return read


def by_tifffile(file: bytes) -> Pixels:
    with tifffile.TiffFile(io.BytesIO(file)) as tiff:
        page = tiff.pages.first
        pixels = page.asarray()
        if page.colormap is not None:
            return np.asarray(page.colormap >> 8).T[pixels]
        return np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else pixels


def within_reach(file: bytes, touched: Mask) -> Mask:
    """(H, W): the touched MCUs, and one colour sample around them where colour is subsampled."""
    turn = orientation(file)
    stored = turned(touched, {6: 8, 8: 6}.get(turn, turn))
    with opened(file) as image:
        layers: list[tuple[int, int, int, int]] = image.layer  # type: ignore[attr-defined]
    across, down = (max(layer[n] for layer in layers) if len(layers) > 1 else 1 for n in (1, 2))
    grid = np.pad(
        stored, ((0, -stored.shape[0] % (8 * down)), (0, -stored.shape[1] % (8 * across)))
    )
    blocks = grid.reshape(grid.shape[0] // (8 * down), 8 * down, -1, 8 * across).any(axis=(1, 3))
    whole = blocks.repeat(8 * down, axis=0).repeat(8 * across, axis=1).astype(np.uint8)
    kernel = np.ones((2 * down + 1 if down > 1 else 1, 2 * across + 1 if across > 1 else 1))
    near = cv2.dilate(whole, kernel.astype(np.uint8)) > 0
    return turned(near[: stored.shape[0], : stored.shape[1]], turn)


def copied_blocks(file: bytes, result: bytes) -> float:
    """The share of DCT blocks, of all components, with the same coefficients."""
    same = total = 0
    for old, new in zip(coefficients(file), coefficients(result), strict=True):
        same += int((old == new).all(axis=(2, 3)).sum())
        total += old.shape[0] * old.shape[1]
    return same / total


def coefficients(file: bytes) -> list[NDArray[np.int16]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "read.jpg"
        path.write_bytes(file)
        image = jpeglib.read_dct(path)
        image.load()
    return [image.Y, image.Cb, image.Cr, image.K][: image.num_components]


def metadata(file: bytes) -> dict[str, object]:
    """All metadata that other programs read, and how the pixels are stored."""
    values = tiff_metadata(file) if is_tiff(file) else pillow_metadata(file)
    return {name: value for name, value in values.items() if value}


def tiff_metadata(file: bytes) -> dict[str, object]:
    with tifffile.TiffFile(io.BytesIO(file)) as tiff:
        page = tiff.pages.first
        stored = (page.photometric, page.bitspersample, page.extrasamples, page.predictor)
        tags = {name: page.tags.get(number) for name, number in TAGS.items()}
        values = {name: tag.value for name, tag in tags.items() if tag is not None}
        return {"mode": (*stored, page.compression), **values}


def pillow_metadata(file: bytes) -> dict[str, object]:
    with opened(file) as image:
        if image.format == "PNG":
            image.load()  # text may stand behind the pixels
        return {
            "mode": storage(file, image),
            "restarts": restarts(file),
            "EXIF": image.getexif().get(ExifTags.Base.Make),
            "ICC": image.info.get("icc_profile"),
            "XMP": image.info.get("xmp"),
            "dpi": tuple(round(float(dots)) for dots in image.info.get("dpi", ())),
            "comment": image.info.get("comment"),
            "text": image.info.get("Title"),
        }


def storage(file: bytes, image: Image.Image) -> tuple[object, ...]:
    """Mode and depth; JPEG's sampling, tables and progression."""
    if image.format == "JPEG":
        tables = str(image.quantization)  # type: ignore[attr-defined]
        sampling = tuple(image.layer)  # type: ignore[attr-defined]
        return image.mode, sampling, tables, image.info.get("progressive")
    if image.format == "PNG":
        return tuple(file[24:26]) if file[25] != 3 else ("palette",)
    return (image.mode,)


def restarts(file: bytes) -> bytes:
    """JPEG's interval, in MCUs."""
    _, marker, segment = file.partition(b"\xff\xdd\0\4")
    return segment[:2] if marker and file[:2] == b"\xff\xd8" else b""


# Files


def jpeg(image: Image.Image, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    exif[ExifTags.Base.Orientation] = options.pop("orientation", 1)
    extras = {"icc_profile": ICC, "xmp": XMP, "dpi": DPI, "comment": b"a photograph", "exif": exif}
    if image.mode == "CMYK":
        del extras["icc_profile"]
    return saved(image, "JPEG", **{"quality": 88, **extras, **options})


def sampled(image: Image.Image, *factors: tuple[int, int]) -> bytes:
    """A JPEG with sampling factors, (down, across), that Pillow does not write."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sampled.jpg"
        spatial = jpeglib.from_spatial(np.array(image))
        spatial.samp_factor = np.array(factors)
        spatial.write_spatial(str(path), qt=88)
        return path.read_bytes()


def with_trailer(file: bytes) -> bytes:
    """A smaller image behind the first, and the directory that phones write for both."""
    segment = struct.pack(">HH4s", 0xFFE2, 6, b"MPF\0")
    return file[:2] + segment + file[2:] + jpeg(Image.new("RGB", (320, 240)))


def png(image: Image.Image, **options: Any) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a photograph")
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    if image.mode in ("RGB", "RGBA", "P"):
        options["icc_profile"] = ICC
    return saved(image, "PNG", pnginfo=text, exif=exif, dpi=DPI, **options)


def deep_png(pixels: Pixels) -> bytes:
    """By imagecodecs, with the metadata chunks that Pillow writes."""
    file = imagecodecs.png_encode(np.ascontiguousarray(pixels), level=6)
    chunks = png(Image.new("L" if pixels.ndim < 3 or pixels.shape[2] == 2 else "RGB", (1, 1)))
    return bytes(file[:33] + chunks[33 : chunks.index(b"IDAT") - 4] + file[33:])


def keyed(file: bytes, *key: int) -> bytes:
    """A PNG with a transparent colour."""
    body = b"tRNS" + struct.pack(f">{len(key)}H", *key)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    place = file.index(b"IDAT") - 4
    return file[:place] + chunk + file[place:]


def tiff(pixels: Pixels, **options: Any) -> bytes:
    tags = [(271, 2, 0, "camera", True), (700, 1, len(XMP), XMP, True)]
    if options.get("photometric") == "rgb":
        tags.append((34675, 7, len(ICC), ICC, True))
    if options.get("planarconfig") == "separate":
        pixels = np.moveaxis(pixels, -1, 0)
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        np.ascontiguousarray(pixels),
        metadata=None,
        resolution=DPI,
        resolutionunit=2,
        extratags=tags,
        **options,
    )
    return buffer.getvalue()


def webp(image: Image.Image, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "camera"
    return saved(image, "WEBP", exif=exif, icc_profile=ICC, xmp=XMP, **options)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def deep(image: Image.Image) -> Pixels:
    """uint16, with varying low bits."""
    pixels = np.asarray(image).astype(np.uint16)
    return pixels * 257 ^ (np.arange(pixels.size).reshape(pixels.shape) % 251).astype(np.uint16)


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


def cmyk(image: Image.Image) -> Image.Image:
    """With a black channel, which Pillow's own conversion leaves empty."""
    inks = 255 - np.asarray(image).astype(np.int16)
    black = inks.min(axis=-1, keepdims=True) // 2
    return Image.frombytes(
        "CMYK",
        image.size,
        np.concatenate([inks - black, black], axis=-1).astype(np.uint8).tobytes(),
    )


Writer = Callable[[Image.Image], bytes]

JPEGS: Mapping[str, Writer] = {
    **{
        f"JPEG {name} {kind}": lambda photo, s=number, p=kind == "progressive": jpeg(
            photo, subsampling=s, progressive=p
        )
        for kind in ("baseline", "progressive")
        for number, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))
    },
    "JPEG 4:1:1": lambda photo: sampled(photo, (1, 4), (1, 1), (1, 1)),
    "JPEG 4:4:0": lambda photo: sampled(photo, (2, 1), (1, 1), (1, 1)),
    "JPEG grey": lambda photo: jpeg(grey(photo)),
    "JPEG grey progressive": lambda photo: jpeg(grey(photo), progressive=True),
    "JPEG CMYK": lambda photo: jpeg(cmyk(photo)),
    "JPEG CMYK progressive": lambda photo: jpeg(cmyk(photo), progressive=True),
    "JPEG RGB inside": lambda photo: jpeg(photo, keep_rgb=True),
    "JPEG restarts by block": lambda photo: jpeg(photo, restart_marker_blocks=7),
    "JPEG restarts by row": lambda photo: jpeg(photo, restart_marker_rows=1, subsampling=0),
    "JPEG grey restarts": lambda photo: jpeg(grey(photo), restart_marker_blocks=5),
    "JPEG progressive restarts": lambda photo: jpeg(photo, restart_marker_rows=1, progressive=True),
    "JPEG quality 100": lambda photo: jpeg(photo, quality=100, subsampling=0),
    "JPEG quality 30": lambda photo: jpeg(photo, quality=30),
    "JPEG and a second image": lambda photo: with_trailer(jpeg(photo)),
    "JPEG without its end": lambda photo: jpeg(photo)[:-2],
    **{
        f"JPEG orientation {turn}": lambda photo, t=turn: jpeg(photo, orientation=t)
        for turn in range(2, 9)
    },
}
PNGS: Mapping[str, Writer] = {
    "PNG black and white": lambda photo: png(photo.convert("1")),
    "PNG grey": lambda photo: png(grey(photo)),
    "PNG grey, alpha": lambda photo: png(with_alpha(grey(photo))),
    "PNG RGB": png,
    "PNG RGBA": lambda photo: png(with_alpha(photo)),
    "PNG palette": lambda photo: png(photo.quantize(256)),
    "PNG palette of 16": lambda photo: png(photo.quantize(16)),
    "PNG palette, alpha": lambda photo: png(with_alpha(photo).quantize(200)),
    "PNG RGB, colour key": lambda photo: keyed(png(photo), *photo.getpixel((0, 0))),  # type: ignore[misc]
    "PNG grey, colour key": lambda photo: keyed(
        png(grey(photo)), int(np.asarray(grey(photo))[0, 0])
    ),
    "PNG 16-bit grey": lambda photo: deep_png(deep(grey(photo))),
    "PNG 16-bit grey, alpha": lambda photo: deep_png(deep(with_alpha(grey(photo)))),
    "PNG 16-bit RGB": lambda photo: deep_png(deep(photo)),
    "PNG 16-bit RGBA": lambda photo: deep_png(deep(with_alpha(photo))),
    "PNG 16-bit RGB, colour key": lambda photo: keyed(
        deep_png(deep(photo)), *deep(photo)[0, 0].tolist()
    ),
}
_LZW: Mapping[str, Any] = {"compression": "lzw", "predictor": True}
TIFFS: Mapping[str, Writer] = {
    "TIFF black and white, fax": lambda photo: saved(
        photo.convert("1"), "TIFF", compression="group4"
    ),
    "TIFF grey": lambda photo: tiff(np.asarray(grey(photo))),
    "TIFF grey, white is zero": lambda photo: tiff(
        np.asarray(grey(photo)), photometric="miniswhite"
    ),
    "TIFF grey, alpha": lambda photo: tiff(
        np.asarray(with_alpha(grey(photo))),
        photometric="minisblack",
        extrasamples=["unassalpha"],
        planarconfig="contig",
    ),
    "TIFF RGB": lambda photo: tiff(np.asarray(photo), photometric="rgb"),
    "TIFF RGB, LZW": lambda photo: tiff(np.asarray(photo), photometric="rgb", **_LZW),
    "TIFF RGB, tiles": lambda photo: tiff(
        np.asarray(photo), photometric="rgb", tile=(64, 48), compression="adobe_deflate"
    ),
    "TIFF RGB, planes": lambda photo: tiff(
        np.asarray(photo), photometric="rgb", planarconfig="separate", compression="packbits"
    ),
    "TIFF RGB, BigTIFF, big endian": lambda photo: tiff(
        np.asarray(photo), photometric="rgb", bigtiff=True, byteorder=">"
    ),
    "TIFF RGBA": lambda photo: tiff(
        np.asarray(with_alpha(photo)), photometric="rgb", extrasamples=["unassalpha"]
    ),
    "TIFF RGBA, associated": lambda photo: tiff(
        np.asarray(with_alpha(photo)), photometric="rgb", extrasamples=["assocalpha"]
    ),
    "TIFF palette": lambda photo: saved(photo.quantize(256), "TIFF", compression="tiff_lzw"),
    "TIFF CMYK": lambda photo: tiff(np.asarray(cmyk(photo)), photometric="separated", **_LZW),
    "TIFF 16-bit grey": lambda photo: tiff(deep(grey(photo)), **_LZW),
    "TIFF 16-bit grey, white is zero": lambda photo: tiff(
        deep(grey(photo)), photometric="miniswhite", byteorder=">"
    ),
    "TIFF 16-bit grey, alpha": lambda photo: tiff(
        deep(with_alpha(grey(photo))),
        photometric="minisblack",
        extrasamples=["unassalpha"],
        planarconfig="contig",
        **_LZW,
    ),
    "TIFF 16-bit RGB": lambda photo: tiff(deep(photo), photometric="rgb", compression="zstd"),
    "TIFF 16-bit RGB, LZW, big endian": lambda photo: tiff(
        deep(photo), photometric="rgb", byteorder=">", **_LZW
    ),
    "TIFF 16-bit RGB, planes, tiles": lambda photo: tiff(
        deep(photo), photometric="rgb", planarconfig="separate", tile=(64, 64), **_LZW
    ),
    "TIFF 16-bit RGBA": lambda photo: tiff(
        deep(with_alpha(photo)), photometric="rgb", extrasamples=["unassalpha"], **_LZW
    ),
}
OTHERS: Mapping[str, Writer] = {
    "WebP lossless": lambda photo: webp(photo, lossless=True),
    "WebP lossless, alpha": lambda photo: webp(with_alpha(photo), lossless=True, exact=True),
    "WebP, lossy": lambda photo: webp(photo, quality=80),
    "BMP": lambda photo: saved(photo, "BMP", dpi=DPI),
    "BMP RGBA": lambda photo: images.encode(
        images.decode(png(with_alpha(photo)), max_pixels=10**9), format="BMP"
    ),
    "BMP palette": lambda photo: saved(photo.quantize(256), "BMP", dpi=DPI),
}
KINDS: Mapping[str, Writer] = {**JPEGS, **PNGS, **TIFFS, **OTHERS}


def main() -> None:
    photographs = [sample_images.read_photograph(name) for name in PHOTOGRAPHS]
    photographs = [
        photo.crop((0, 0, min(photo.width, 701), min(photo.height, 523))) for photo in photographs
    ]
    print_row("files", "images", "outside", "copied", "size", "kept")
    for kind, write in KINDS.items():
        comparisons = [compare(write(photo)) for photo in photographs]
        copied = [file.copied for file in comparisons if file.copied is not None]
        lost = {name for file in comparisons for name in file.lost}
        print_row(
            kind,
            len(comparisons),
            sum(file.changed for file in comparisons),
            f"{min(copied):.1%}" if copied else "",
            f"{sum(file.size for file in comparisons) / len(comparisons):.2f}x",
            ", ".join(comparisons[0].metadata)
            + (f"; not {', '.join(sorted(lost))}" if lost else ""),
        )


def print_row(*cells: object) -> None:
    padded = (f"{cell!s:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    print("  ".join(padded).rstrip(), flush=True)


if __name__ == "__main__":
    main()
