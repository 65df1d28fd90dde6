"""Writing another format than the source's: what it can store is kept, the rest is refused."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import IFDRational
from skimage import data

from shared import images
from shared.errors import ImageError

CAT = Image.fromarray(data.chelsea()).resize((90, 60))
ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKER, EXPOSURE, LATITUDE = 0x010F, 0x829A, 1


def save(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photograph() -> bytes:
    exif = Image.Exif()
    exif[MAKER] = "camera"
    exif.get_ifd(0x8769)[EXPOSURE] = IFDRational(1, 300)
    exif.get_ifd(0x8825)[LATITUDE] = "N"
    return save(CAT, "JPEG", exif=exif, icc_profile=ICC, dpi=(240, 240), quality=95)


def opened(file: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def changed(file: bytes, *formats: str, **options: Any) -> bytes:
    for format in formats:
        file = images.encode(images.decode(file, max_pixels=10**6), format=format, **options)
    return file


@pytest.mark.parametrize(
    "formats",
    [("TIFF",), ("PNG",), ("WEBP",), ("TIFF", "JPEG"), ("TIFF", "PNG", "TIFF"), ("WEBP", "TIFF")],
    ids="-".join,
)
def test_exif_profile_and_resolution_survive_changes_of_format(formats: tuple[str, ...]) -> None:
    after = opened(changed(photograph(), *formats))
    exif = after.getexif()
    assert exif[MAKER] == "camera"
    assert exif.get_ifd(0x8769)[EXPOSURE] == pytest.approx(1 / 300)
    assert exif.get_ifd(0x8825)[LATITUDE] == "N"
    assert after.info["icc_profile"] == ICC
    if "WEBP" not in formats:
        assert after.info["dpi"] == pytest.approx((240, 240), abs=0.05)


def test_a_turned_photograph_is_upright_everywhere() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    before = save(CAT, "JPEG", exif=exif)
    for format in ("PNG", "TIFF", "WEBP", "BMP"):
        after = opened(changed(before, format))
        assert after.size == (60, 90)
        assert after.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_a_lower_quality_makes_a_smaller_file(format: str) -> None:
    sizes = [len(changed(save(CAT, "PNG"), format, quality=quality)) for quality in (1, 50, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 3


@pytest.mark.parametrize("quality", [0, 101, -1])
def test_a_quality_out_of_range_is_refused(quality: int) -> None:
    with pytest.raises(ImageError, match=f"quality {quality} is not from 1 to 100"):
        changed(save(CAT, "PNG"), "JPEG", quality=quality)


def test_quality_has_no_effect_on_a_lossless_format() -> None:
    file = save(CAT, "PNG")
    assert images.encode(images.decode(file, max_pixels=10**6), quality=50) is file


def test_a_quality_for_an_untouched_jpeg_encodes_it_anew() -> None:
    after = changed(photograph(), "JPEG", quality=40)
    assert len(after) < len(photograph()) / 1.5
    assert opened(after).getexif()[MAKER] == "camera"


def test_transparency_is_refused_by_jpeg_and_kept_by_bmp() -> None:
    clear = CAT.copy()
    clear.putalpha(Image.linear_gradient("L").resize(CAT.size))
    with pytest.raises(ImageError, match="transparency; write PNG or WEBP or TIFF or BMP"):
        changed(save(clear, "PNG"), "JPEG")
    after = changed(save(clear, "PNG", dpi=(300, 300)), "BMP")
    assert np.array_equal(np.asarray(opened(after)), np.asarray(clear))
    assert opened(after).info["dpi"] == pytest.approx((300, 300), abs=0.05)
