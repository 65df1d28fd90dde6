from __future__ import annotations

import contextlib
import io
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import IFDRational
from skimage import data

from shared import images
from shared.errors import ImageError, ImageTruncated, ObjectTooLarge
from shared.images.png_format import make_chunk
from shared.images.tiff_ifd import copy_tags, read_directory

LIMIT = 10_000_000
CAT = Image.fromarray(data.chelsea()).resize((150, 100))
GREY16 = (np.asarray(CAT.convert("L")).astype(np.uint16) << 8) + 7
ICC = b"not a valid profile, but copied unread" * 3
XMP = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"


def cat(mode: str) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(GREY16)
    image = CAT.convert("L").convert(mode) if mode == "LA" else CAT.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def open_(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def exact(file: bytes) -> NDArray[Any]:
    """What any reader sees, in a mode that can hold all of it."""
    image = open_(file)
    return np.asarray(image if image.mode == "I;16" else image.convert("RGBA"))


def decode(file: bytes) -> images.DecodedImage:
    return images.decode(file, max_pixels=LIMIT)


def repainted(file: bytes, *, where: tuple[int, int] = (5, 7), **options: Any) -> bytes:
    """The file encoded again with one pixel, (row, column), black, or not black if it was."""
    image = decode(file)
    pixels = image.pixels.copy()
    pixels[where] = 0 if pixels[where].any() else 1
    touched = np.zeros(pixels.shape[:2], np.bool_)
    touched[where] = True
    return images.encode(image.replace(pixels, touched=touched), **options)


LOSSLESS = [
    *[("PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")],
    *[("TIFF", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")],
    *[("BMP", mode) for mode in ("1", "L", "P", "RGB")],
    *[("WEBP", mode) for mode in ("RGB", "RGBA")],
]


@pytest.mark.parametrize(("format", "mode"), LOSSLESS)
def test_untouched_pixels_come_back_exactly(format: str, mode: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    before = save(cat(mode), format, **options)
    after = repainted(before)
    same = exact(before) == exact(after)
    changed = ~(same if same.ndim == 2 else same.all(axis=-1))
    assert changed.sum() <= 1
    assert open_(after).format == format
    assert after != before


@pytest.mark.parametrize(
    ("format", "mode", "seen"),
    [
        *[("PNG", "P", "RGB"), ("PNG", "I;16", "I;16"), ("PNG", "1", "1"), ("BMP", "P", "RGB")],
        *[("TIFF", "CMYK", "CMYK"), ("TIFF", "P", "RGB"), ("TIFF", "LA", "LA")],
    ],
)
def test_the_mode_is_kept(format: str, mode: str, seen: str) -> None:
    before = save(cat(mode), format)
    assert decode(before).mode == seen
    assert open_(repainted(before)).mode == mode


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_an_untouched_image_is_written_as_its_source_bytes(format: str) -> None:
    file = save(CAT, format)
    assert images.encode(decode(file)) is file


def test_a_transparent_palette_entry_becomes_alpha() -> None:
    source = cat("P")
    file = save(source, "PNG", transparency=int(np.asarray(source)[0, 0]))
    image = decode(file)
    alpha = image.alpha()
    assert image.mode == "RGBA"
    assert alpha is not None
    assert alpha[0, 0] == 0
    assert np.array_equal(exact(file), image.pixels)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_key_becomes_alpha(mode: str) -> None:
    source = cat(mode)
    file = save(source, "PNG", transparency=source.getpixel((0, 0)))
    image = decode(file)
    alpha = image.alpha()
    assert alpha is not None
    assert alpha[0, 0] == 0
    assert alpha.any()


# JPEG


def test_jpeg_keeps_tables_subsampling_and_progression() -> None:
    for subsampling, progressive in ((0, True), (1, False), (2, True)):
        options = {"quality": 71, "subsampling": subsampling, "progressive": progressive}
        before = save(CAT, "JPEG", **options)
        old, new = open_(before), open_(repainted(before))
        assert old.quantization == new.quantization  # type: ignore[attr-defined]
        assert old.layer == new.layer  # type: ignore[attr-defined]
        assert new.info.get("progressive", 0) == (1 if progressive else 0)


def test_jpeg_with_rgb_inside_stays_rgb() -> None:
    before = save(CAT, "JPEG", keep_rgb=True, quality=90)
    after = repainted(before)
    assert open_(after).info["adobe_transform"] == 0
    assert np.abs(exact(before).astype(int) - exact(after))[20:].max() <= 6


def test_jpeg_changes_little_outside_and_nothing_in_its_header() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a cat"
    comment = {"comment": b"hello", "dpi": (300, 300), "exif": exif, "icc_profile": ICC}
    before = save(CAT, "JPEG", quality=90, **comment, xmp=XMP)
    old, new = open_(before), open_(repainted(before))
    assert new.info["comment"] == b"hello"
    assert new.info["dpi"] == (300, 300)
    assert new.info["icc_profile"] == ICC
    assert new.info["xmp"] == XMP
    assert new.info["exif"] == old.info["exif"]


def test_a_large_colour_profile_survives_in_pieces() -> None:
    profile = bytes(range(256)) * 600
    after = repainted(save(CAT, "JPEG", icc_profile=profile))
    assert open_(after).info["icc_profile"] == profile
    assert open_(repainted(after, format="PNG")).info["icc_profile"] == profile


# Metadata


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "BMP"])
def test_profile_resolution_and_xmp_are_kept(format: str) -> None:
    options: dict[str, dict[str, Any]] = {
        "PNG": {"icc_profile": ICC, "dpi": (300, 150)},
        "WEBP": {"icc_profile": ICC, "xmp": XMP, "lossless": True},
        "TIFF": {"icc_profile": ICC, "dpi": (300, 150), "tiffinfo": {700: XMP}},
        "BMP": {"dpi": (300, 150)},
    }
    before = save(CAT, format, **options[format])
    old, new = open_(before), open_(repainted(before))
    for key in ("icc_profile", "xmp"):
        assert new.info.get(key) == old.info.get(key)
    if "dpi" in old.info:
        assert new.info["dpi"] == pytest.approx(old.info["dpi"])


def test_a_bitmap_without_a_resolution_gets_none() -> None:
    before = save(CAT, "BMP", dpi=(0, 0))
    assert repainted(before)[38:46] == before[38:46]


def test_png_text_and_private_safe_chunks_are_kept_bit_by_bit() -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("Author", "somebody")
    text.add_itxt("Title", "Katze", "de", "Titel")
    after = repainted(save(CAT, "PNG", pnginfo=text, gamma=0.45))
    assert open_(after).info["Author"] == "somebody"
    assert open_(after).info["Title"] == "Katze"
    whole = save(CAT, "PNG")
    private = make_chunk(b"prVt", b"mine")
    assert private in repainted(whole[:33] + private + whole[33:])


def test_tiff_keeps_its_compression() -> None:
    for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        after = repainted(save(CAT, "TIFF", compression=name))
        assert open_(after).info["compression"] == name
    assert open_(repainted(save(CAT, "TIFF", compression="jpeg"))).info["compression"] != "jpeg"


@pytest.mark.parametrize("order", ["II", "MM"])
def test_tiff_keeps_its_tags_and_exif_in_either_byte_order(order: str) -> None:
    exif = Image.Exif()
    exif[0x010E], exif[0x013B], exif[0x0112] = "a cat", "somebody", 3
    exif.get_ifd(0x8769)[0x829A] = IFDRational(1, 300)
    exif.get_ifd(0x8769)[0x9003] = "2026:01:02 03:04:05"
    exif.get_ifd(0x8825)[1] = "N"
    exif.endian = {"II": "<", "MM": ">"}[order]
    block = exif.tobytes()[6:]
    assert block[:2] == order.encode()
    written = save(CAT, "TIFF", dpi=(300, 150), icc_profile=ICC)
    before = copy_tags(written, block, skipped=frozenset(), added={})
    after = open_(repainted(before)).getexif()
    assert (after[0x010E], after[0x013B], after.get(0x0112)) == ("a cat", "somebody", None)
    assert after.get_ifd(0x8769)[0x829A] == pytest.approx(1 / 300)
    assert after.get_ifd(0x8769)[0x9003] == "2026:01:02 03:04:05"
    assert after.get_ifd(0x8825)[1] == "N"
    assert open_(repainted(before)).info["dpi"] == (300, 150)
    assert open_(repainted(before)).info["icc_profile"] == ICC


def test_webp_loses_nothing_unless_a_quality_allows_it() -> None:
    for before in (save(CAT, "WEBP", lossless=True), save(CAT, "WEBP", quality=80)):
        after = repainted(before)
        assert b"VP8L" in after
        assert np.count_nonzero((exact(before) != exact(after)).any(axis=-1)) == 1
        assert b"VP8L" not in repainted(before, quality=80)


def test_lossless_webp_keeps_the_colour_of_transparent_pixels() -> None:
    image = cat("RGB")
    image.putalpha(Image.fromarray(np.zeros((100, 150), np.uint8)))
    before = save(image, "WEBP", lossless=True, exact=True)
    after = decode(repainted(before)).rgb()
    assert np.array_equal(after[50:], np.asarray(CAT)[50:])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_orientation_is_applied_once_and_reset_unless_a_jpeg_keeps_its_blocks(
    format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "camera"
    options = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    before = save(CAT.resize((144, 96)), format, exif=exif, **options.get(format, {}))
    shown = np.asarray(ImageOps.exif_transpose(open_(before)).convert("RGB")).astype(int)
    image = decode(before)
    assert np.array_equal(image.rgb(), shown)
    assert images.probe(before, max_pixels=LIMIT) == image.size
    after = open_(repainted(before, where=(0, 0)))
    assert after.getexif().get(0x0112, 1) == (orientation if format == "JPEG" else 1)
    seen = np.asarray(ImageOps.exif_transpose(after).convert("RGB"))
    assert np.array_equal(seen[10:, 10:], shown[10:, 10:])
    assert after.getexif()[0x010F] == "camera"


def test_the_thumbnail_which_shows_the_old_image_is_dropped() -> None:
    tiff = struct.pack("<2sHIH", b"II", 42, 8, 0) + struct.pack("<I", 14)
    second = struct.pack("<HHHIIHHIII", 2, 0x201, 4, 1, 44, 0x202, 4, 1, 9, 0)
    block = tiff + second
    exif = b"Exif\0\0" + block.ljust(44, b"\0") + b"THUMBNAIL"
    after = repainted(save(CAT, "JPEG", exif=exif))
    assert b"THUMBNAIL" not in after
    assert b"Exif\0\0II" in after


def test_a_damaged_thumbnail_does_not_keep_the_orientation_from_being_reset() -> None:
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0" + struct.pack("<2sHIH", b"II", 42, 8, 1) + entry + struct.pack("<I", 9999)
    after = repainted(save(CAT, "PNG", exif=exif))
    assert open_(after).size == (100, 150)
    assert open_(after).getexif()[0x0112] == 1


# Refusals


REFUSED = {
    "empty": (b"", "empty"),
    "an HTML page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML"),
    "an SVG": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "a Photoshop file": (b"8BPS\0\1" + bytes(50), "PSD"),
    "a GIF": (save(cat("P"), "GIF"), "GIF"),
    "a HEIC": (b"\0\0\0\x18ftypheic" + bytes(30), "HEIC"),
    "an AVIF": (b"\0\0\0\x18ftypavif" + bytes(30), "AVIF"),
    "a PDF": (b"%PDF-1.7\n", "PDF"),
    "anything else": (b"hello, world, this is text", "hello"),
    "an animated PNG": (save(CAT, "PNG", save_all=True, append_images=[CAT.rotate(9)]), "animated"),
    "an animated WebP": (
        save(CAT, "WEBP", save_all=True, append_images=[CAT.rotate(9)]),
        "animated",
    ),
    "several pages": (save(CAT, "TIFF", save_all=True, append_images=[CAT]), "pages"),
    "floats": (save(CAT.convert("F"), "TIFF"), "32 bits"),
    "no pixels": (b"BM" + bytes(12) + struct.pack("<Iii", 40, 0, 5) + bytes(30), "0x5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_in_one_line(case: str) -> None:
    file, word = REFUSED[case]
    with pytest.raises(ImageError, match=word) as caught:
        decode(file)
    assert "\n" not in str(caught.value)


def test_a_tiff_that_says_its_width_twice_is_refused_without_a_warning() -> None:
    file = bytearray(save(CAT, "TIFF"))
    width = read_directory(file).entries[256]
    struct.pack_into("<I", file, width.offset - 4, 2)
    with pytest.raises(ImageError, match="damaged"):
        decode(bytes(file))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.98])
def test_truncated_files_are_refused(format: str, share: float) -> None:
    file = save(CAT, format)
    with pytest.raises(ImageError):
        decode(file[: int(len(file) * share)])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_damage_anywhere_gives_an_image_or_an_image_error(format: str) -> None:
    file, random = save(CAT, format), np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(file)
        for place in random.integers(0, min(len(file), 400), 3):
            damaged[place] = random.integers(256)
        with contextlib.suppress(ImageError, ObjectTooLarge):
            decode(bytes(damaged))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_too_many_pixels_are_refused_before_decoding(format: str) -> None:
    file = save(CAT, format)
    assert images.decode(file, max_pixels=15_000).size == (150, 100)
    with pytest.raises(ObjectTooLarge, match="150x100"):
        images.decode(file, max_pixels=14_999)
    with pytest.raises(ObjectTooLarge):
        images.probe(file, max_pixels=14_999)


def test_a_bomb_of_a_header_never_reaches_pillow_nor_warns() -> None:
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n" + make_chunk(b"IHDR", header) + make_chunk(b"IDAT", b"x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ObjectTooLarge, match=r"900\.0 megapixels"):
            decode(file)
        with pytest.raises(ImageError):
            images.decode(file, max_pixels=10**10)


# Probing


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_a_few_kilobytes_are_enough_to_probe(format: str) -> None:
    file = save(CAT, format)
    assert images.probe(file[:2000], max_pixels=LIMIT) == (150, 100)


def test_probe_says_when_it_needs_more_of_the_file() -> None:
    file = save(CAT, "TIFF")
    at_end = file[:4] + struct.pack("<I", len(file)) + file[8:]
    with pytest.raises(ImageTruncated):
        images.probe(at_end, max_pixels=LIMIT)


# Encoding to another format


def test_another_format_is_written_where_it_can_hold_the_image() -> None:
    exif = Image.Exif()
    exif[0x010F] = "camera"
    before = save(CAT, "JPEG", exif=exif, icc_profile=ICC, dpi=(300, 300))
    for format in ("PNG", "TIFF", "WEBP", "BMP"):
        after = open_(images.encode(decode(before), format=format))
        assert after.format == format
        if format != "BMP":
            assert after.info["icc_profile"] == ICC
        if format in ("PNG", "WEBP"):
            assert after.getexif()[0x010F] == "camera"
        if format != "WEBP":
            assert np.array_equal(np.asarray(after), decode(before).rgb())
            assert after.info["dpi"] == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize(
    ("mode", "format"), [("RGBA", "JPEG"), ("I;16", "WEBP"), ("LA", "JPEG"), ("I;16", "BMP")]
)
def test_a_format_that_cannot_hold_the_image_is_refused(mode: str, format: str) -> None:
    with pytest.raises(ImageError, match="cannot hold"):
        images.encode(decode(save(cat(mode), "PNG")), format=format)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ImageError, match="GIF"):
        images.encode(decode(save(CAT, "PNG")), format="GIF")


def test_the_name_decides_the_format() -> None:
    assert images.format_of("s3://bucket/a.b/c.JPG") == "JPEG"
    assert images.format_of("c.tif") == "TIFF"
    assert images.format_of("s3://bucket.png/c") is None


# What an engine sees


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16", "CMYK"])
def test_engines_get_eight_bit_rgb(mode: str) -> None:
    source = cat(mode)
    image = decode(save(source, "TIFF"))
    expected = Image.fromarray((GREY16 >> 8).astype(np.uint8)) if mode == "I;16" else source
    assert image.rgb().dtype == np.uint8
    assert np.array_equal(image.rgb(), np.asarray(expected.convert("RGB")))


def test_pixels_are_read_only() -> None:
    image = decode(save(CAT, "PNG"))
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0] = 1


def test_real_photographs_decode_as_pillow_decodes_them() -> None:
    for name in ("rocket.jpg", "coffee.png"):
        file = (Path(data.__file__).parent / name).read_bytes()
        assert np.array_equal(decode(file).rgb(), np.asarray(open_(file).convert("RGB")))
