"""Images with 16 bits a channel, palettes, transparent colours; and TIFFs that are refused."""

from __future__ import annotations

import io
import sys
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from skimage import data

from shared import images, masks
from shared.errors import EngineUnavailable, ImageError
from shared.images.tiff_ifd import read_directory

Pixels = NDArray[Any]

CAT = data.chelsea()[40:140, 80:230]
DEEP = CAT.astype(np.uint16) * 257 ^ 5
HOLES = np.tile(np.linspace(0, 65535, 150).astype(np.uint16), (100, 1))
MODES = {
    "RGB;16": DEEP,
    "RGBA;16": np.dstack([DEEP, HOLES]),
    "LA;16": np.dstack([DEEP[..., 1], HOLES]),
}


def png(pixels: Pixels) -> bytes:
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(pixels)))


def tiff(pixels: Pixels, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, metadata=None, **options)
    return buffer.getvalue()


def decode(file: bytes) -> images.DecodedImage:
    return images.decode(file, max_pixels=10**6)


def painted(image: images.DecodedImage, colour: Any, where: slice) -> images.DecodedImage:
    """The image with a square of one colour; alpha as it was, unless the colour has one."""
    pixels = image.pixels.copy()
    pixels[where, where, : len(colour)] = colour
    touched = np.zeros(pixels.shape[:2], np.bool_)
    touched[where, where] = True
    return image.replace(pixels, touched=touched)


@pytest.mark.parametrize("mode", MODES)
def test_all_sixteen_bits_are_read_and_written(mode: str) -> None:
    image = decode(png(MODES[mode]))
    assert image.mode == mode
    assert np.array_equal(image.pixels, MODES[mode])
    after = images.encode(painted(image, [1, 2, 3][: 1 if mode == "LA;16" else 3], slice(5, 9)))
    read = imagecodecs.png_decode(after)
    assert read[6, 6, 0] == 1
    read[5:9, 5:9] = MODES[mode][5:9, 5:9]
    assert np.array_equal(read, MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_engines_get_eight_bits_and_masks_the_alpha(mode: str) -> None:
    image = decode(png(MODES[mode]))
    green = 0 if mode == "LA;16" else 1
    assert np.array_equal(image.rgb()[..., 1], MODES[mode][..., green] >> 8)
    if image.has_alpha:
        assert np.array_equal(masks.alpha_to_mask(image), 255 - (HOLES >> 8))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP"])
def test_a_format_of_eight_bits_is_refused_with_the_remedy(format: str) -> None:
    with pytest.raises(ImageError, match="cannot hold 16-bit colour; write PNG or TIFF"):
        images.encode(decode(png(DEEP)), format=format)


def test_sixteen_bits_go_from_png_to_tiff_and_back() -> None:
    for mode, pixels in MODES.items():
        across = images.encode(decode(png(pixels)), format="TIFF")
        assert np.array_equal(tifffile.imread(io.BytesIO(across)), pixels)
        assert decode(across).mode == mode
        assert np.array_equal(
            imagecodecs.png_decode(images.encode(decode(across), format="PNG")), pixels
        )


@pytest.mark.parametrize("library", ["imagecodecs", "tifffile"])
def test_without_the_library_the_error_names_the_remedy(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = png(DEEP) if library == "imagecodecs" else tiff(DEEP)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EngineUnavailable, match=rf"{library}.*inpaint-batch\[opencv\]"):
        decode(file)


@pytest.mark.parametrize("compression", [None, "lzw", "zstd"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_a_deep_file_that_ends_too_early_is_refused(compression: Any, share: float) -> None:
    for file in (png(DEEP), tiff(DEEP, compression=compression)):
        with pytest.raises(ImageError):
            decode(file[: int(len(file) * share)])


@pytest.mark.parametrize("pixels", [CAT, CAT[..., 0], DEEP], ids=["colour", "grey", "deep"])
@pytest.mark.parametrize("compression", ["jpeg2000", "png", "webp"])
def test_a_compression_that_pillow_lacks_is_read(pixels: Pixels, compression: str) -> None:
    if compression == "webp" and pixels is not CAT:
        return
    options = {"lossless": True} if compression == "webp" else None
    file = tiff(pixels, compression=compression, compressionargs=options)
    image = decode(file)
    touched = np.zeros(pixels.shape[:2], np.bool_)
    touched[:9] = True
    after = decode(images.encode(image.replace(pixels[::-1].copy(), touched=touched)))
    assert (after.mode, after.format) == (image.mode, "TIFF")
    assert np.array_equal(after.pixels, pixels[::-1])
    with pytest.raises(ImageError):
        decode(file[: len(file) // 2])


@pytest.mark.parametrize("named", [True, False], ids=["as unspecified", "not at all"])
@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_a_fourth_channel_without_a_name_is_alpha(depth: Any, *, named: bool) -> None:
    pixels = np.dstack([CAT, HOLES >> 8]).astype(depth)
    if named:
        file = tiff(pixels, photometric="rgb", extrasamples=["unspecified"])
    else:
        file = cv2.imencode(".tif", pixels[..., [2, 1, 0, 3]])[1].tobytes()
    image = decode(file)
    assert (image.has_alpha, np.array_equal(image.pixels, pixels)) == (True, True)
    after = images.encode(painted(image, [1, 2, 3], slice(5, 9)))
    with tifffile.TiffFile(io.BytesIO(after)) as read:
        assert read.pages[0].extrasamples == ((0,) if named else ())
        assert np.array_equal(read.pages[0].asarray()[10:], pixels[10:])


def test_the_first_of_two_descriptions_stays() -> None:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, CAT, photometric="rgb", description="of a cat")
    after = images.encode(painted(decode(buffer.getvalue()), [1, 2, 3], slice(5, 9)))
    with tifffile.TiffFile(io.BytesIO(after)) as read:
        assert read.pages[0].description == "of a cat"


def test_a_missing_strip_is_damage_not_black() -> None:
    file = bytearray(tiff(DEEP, rowsperstrip=10))
    lengths = read_directory(file).entries[279]
    file[lengths.offset : lengths.offset + 4] = bytes(4)
    with pytest.raises(ImageError, match="damaged"):
        decode(bytes(file))


FIVE = np.dstack([DEEP, HOLES, HOLES])
REFUSED: dict[str, tuple[bytes, str]] = {
    "two extra channels": (
        tiff(FIVE, photometric="rgb", extrasamples=["unassalpha", "unspecified"]),
        "2 extra channels",
    ),
    "an unnamed channel": (
        tiff(
            MODES["LA;16"], photometric="minisblack", planarconfig="contig", extrasamples=[2]
        ).replace(b"\x52\x01\x03\0", b"\x51\x01\x03\0"),
        "unnamed extra channel",
    ),
    "signed bytes": (tiff(CAT.astype(np.int8), photometric="rgb"), "signed.* 8-bit"),
    "L*a*b*": (tiff(CAT, photometric="icclab"), "colours of a rare kind"),
    "a rare compression": (tiff(CAT, compression="jpegxl"), "compressed in a way"),
    "floats": (tiff(DEEP.astype(np.float32), photometric="rgb"), "32, 32, 32 bits"),
    "half floats": (tiff(DEEP.astype(np.float16), photometric="rgb"), "floats"),
    "signed numbers": (tiff(DEEP.astype(np.int16), photometric="rgb"), "signed"),
    "deep inks": (tiff(MODES["RGBA;16"], photometric="separated"), "not plain grey or RGB"),
    "raw": (tiff(DEEP, extratags=[(50706, 1, 4, b"\1\4\0\0", True)]), "DNG"),
    "pages": (tiff(np.stack([DEEP, DEEP]), photometric="rgb"), "several pages"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_could_not_be_written_back_is_refused(case: str) -> None:
    file, reason = REFUSED[case]
    with pytest.raises(ImageError, match=reason):
        decode(file)


def test_photoshops_layers_which_hold_the_old_image_are_dropped() -> None:
    layers = b"Adobe Photoshop Document Data Block\0"
    file = tiff(CAT, photometric="rgb", extratags=[(37724, 7, len(layers), layers, True)])
    assert layers not in images.encode(painted(decode(file), [1, 2, 3], slice(5, 9)))


# Palettes and transparent colours


def indexed(colours: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(CAT).quantize(colours).save(buffer, "PNG", **options)
    return buffer.getvalue()


def opened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def test_a_palette_with_room_takes_new_colours_exactly() -> None:
    before = indexed(16)
    after = opened(images.encode(painted(decode(before), [1, 2, 3], slice(5, 9))))
    assert after.mode == "P"
    colours = np.asarray(after.convert("RGB"))
    assert colours[6, 6].tolist() == [1, 2, 3]
    same = np.asarray(after) == np.asarray(opened(before))
    assert (~same).sum() == 16


def test_a_full_palette_takes_the_nearest_of_its_colours() -> None:
    image = decode(indexed(256))
    colour = image.pixels[50, 70]
    after = opened(images.encode(painted(image, colour, slice(5, 9))))
    assert (after.mode, len(after.getpalette() or ())) == ("P", 768)
    assert np.array_equal(np.asarray(after.convert("RGB"))[6, 6], colour)


def test_more_new_colours_than_entries_are_quantised() -> None:
    image, touched = decode(indexed(200)), np.zeros((100, 150), np.bool_)
    touched[20:80, 30:110] = True
    pixels = image.pixels.copy()
    pixels[touched] = data.coffee()[100:200, 100:250][touched]
    after = opened(images.encode(image.replace(pixels, touched=touched)))
    seen = np.asarray(after.convert("RGB")).astype(int)
    assert after.mode == "P"
    assert np.array_equal(seen[~touched], pixels[~touched])
    assert np.abs(seen[touched] - pixels[touched]).mean() < 6


def test_a_palettes_transparency_stays() -> None:
    before = indexed(16, transparency=bytes(range(0, 256, 16)))
    image = decode(before)
    after = decode(images.encode(painted(image, [1, 2, 3], slice(5, 25))))
    assert opened(images.encode(painted(image, [1, 2, 3], slice(5, 25)))).mode == "P"
    assert np.array_equal(after.pixels[..., 3], image.pixels[..., 3])


def test_a_transparency_that_the_palette_lacks_makes_it_rgba() -> None:
    image = decode(indexed(256, transparency=bytes([7] * 256)))
    after = opened(images.encode(painted(image, [1, 2, 3, 255], slice(5, 9))))
    assert after.mode == "RGBA"
    assert after.getpixel((6, 6)) == (1, 2, 3, 255)
    assert after.getpixel((0, 0)) == tuple(image.pixels[0, 0].tolist())


def test_a_full_palette_without_a_colour_that_is_near_makes_it_rgba() -> None:
    image = decode(indexed(256, transparency=bytes(range(256))))
    after = opened(images.encode(painted(image, [0, 255, 0], slice(5, 9))))
    assert after.mode == "RGBA"
    assert after.getpixel((6, 6)) == (0, 255, 0, int(image.pixels[6, 6, 3]))


def test_a_transparent_colour_is_kept_and_no_new_pixel_becomes_transparent() -> None:
    buffer = io.BytesIO()
    Image.fromarray(CAT).save(buffer, "PNG", transparency=tuple(CAT[0, 0].tolist()))
    image = decode(buffer.getvalue())
    assert image.mode == "RGBA"
    clash = painted(image, CAT[0, 0], slice(50, 60))
    after = opened(images.encode(clash))
    assert after.mode == "RGB"
    assert after.info["transparency"] == tuple(CAT[0, 0].tolist())
    again = decode(images.encode(clash))
    assert np.array_equal(again.pixels[..., 3], image.pixels[..., 3])
    assert np.abs(again.pixels[55, 55, :3].astype(int) - CAT[0, 0]).max() == 1


def test_a_transparent_colour_becomes_alpha_where_alpha_has_values_in_between() -> None:
    buffer = io.BytesIO()
    Image.fromarray(CAT).save(buffer, "PNG", transparency=tuple(CAT[0, 0].tolist()))
    after = opened(images.encode(painted(decode(buffer.getvalue()), [1, 2, 3, 90], slice(5, 9))))
    assert (after.mode, after.getpixel((6, 6))) == ("RGBA", (1, 2, 3, 90))
