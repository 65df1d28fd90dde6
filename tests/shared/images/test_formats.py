"""Every format in FORMATS stores what its record says; a new format is tested here at once."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms
from skimage import data

from shared import images
from shared.errors import ImageError
from shared.image_formats import FORMAT_PARAMETERS, FORMATS, content_type, format_of
from shared.images.codec import load_codec
from shared.images.image import MODE_DESCRIPTIONS, full_scale
from shared.images.signatures import recognise
from shared.params import PARAMETERS

CAT = data.chelsea()[40:100, 80:170]
ALPHA = np.tile(np.linspace(0, 255, 90).astype(np.uint8), (60, 1))
EXIF = Image.Exif()
EXIF[0x010F] = "camera"
METADATA = images.Metadata(
    exif=EXIF.tobytes()[6:],
    icc=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    xmp=b'<x:xmpmeta xmlns:x="adobe:ns:meta/"/>',
    dpi=(300, 150),
)
EVERY_MODE = [(format, mode) for format in FORMATS for mode in FORMATS[format].modes]


def pixels_in(mode: str) -> NDArray[Any]:
    """(60, 90) or (60, 90, C) pixels of a photograph in the mode."""
    layout = mode.partition(";")[0]
    if layout == "1":
        return CAT[..., 1] > 128
    channels = {"L": CAT[..., 1], "LA": np.dstack([CAT[..., 1], ALPHA]), "I": CAT[..., 1]}
    pixels = channels.get(layout, CAT if layout == "RGB" else np.dstack([CAT, ALPHA]))
    return pixels.astype(np.uint16) * 257 ^ 5 if full_scale(mode) == 65535 else pixels.copy()


def encoded(format: str, mode: str, metadata: images.Metadata | None = None) -> bytes:
    image = images.DecodedImage(
        pixels=pixels_in(mode), mode=mode, format=format, metadata=metadata or images.Metadata()
    )
    other = next(name for name in FORMATS if name != format)
    # An image that came from another format, so that the metadata is framed anew.
    source = images.DecodedImage(**{**vars(image), "format": other})
    return images.encode(source, format=format)


def decode(file: bytes) -> images.DecodedImage:
    return images.decode(file, max_pixels=10**6)


@pytest.mark.parametrize(("format", "mode"), EVERY_MODE)
def test_every_mode_of_the_record_is_written_and_read(format: str, mode: str) -> None:
    file = encoded(format, mode)
    image = decode(file)
    assert (image.format, image.mode) == (format, mode)
    assert images.probe(file, max_pixels=10**6) == image.size == (90, 60)
    if image.encoding.lossless:
        assert np.array_equal(image.pixels, pixels_in(mode))


@pytest.mark.parametrize(("format", "mode"), EVERY_MODE)
def test_a_repainted_file_keeps_its_mode_and_its_other_pixels(format: str, mode: str) -> None:
    before = decode(encoded(format, mode))
    touched = np.zeros((60, 90), np.bool_)
    touched[16:24, 16:24] = True
    pixels = before.pixels.copy()
    pixels[touched] = pixels[::-1][touched]
    after = decode(images.encode(before.replace(pixels, touched=touched)))
    assert (after.format, after.mode) == (format, mode)
    same = (before.pixels == after.pixels).reshape(60, 90, -1).all(axis=-1)
    # JPEG's chroma blocks have 16x16 pixels, and decoders interpolate between their samples.
    assert same[:14].all()
    assert same[34:].all()


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_carries_the_metadata_of_its_record_and_no_other(format: str) -> None:
    metadata = decode(encoded(format, "RGB", METADATA)).metadata
    carried = [kind for kind in ("exif", "icc", "xmp", "dpi") if getattr(metadata, kind)]
    assert carried == list(FORMATS[format].metadata)
    for kind in carried:
        if kind == "dpi":
            assert metadata.dpi == pytest.approx(METADATA.dpi, abs=0.5)
        elif kind == "exif":
            assert b"camera" in metadata.exif
        else:
            assert getattr(metadata, kind) == getattr(METADATA, kind)


@pytest.mark.parametrize("format", FORMATS)
def test_a_new_xmp_packet_reaches_the_file_of_a_format_that_carries_one(format: str) -> None:
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="new"/>'
    image = decode(encoded(format, "RGB", METADATA))
    touched = np.zeros((60, 90), np.bool_)
    touched[3, 3] = True
    file = images.encode(
        image.replace(image.pixels ^ touched[..., None], touched=touched), xmp=packet
    )
    assert (packet in file) == ("xmp" in FORMATS[format].metadata)


@pytest.mark.parametrize("format", FORMATS)
def test_only_a_format_with_quality_has_smaller_files_at_a_low_quality(format: str) -> None:
    image = decode(encoded(format, "RGB"))
    sizes = [len(images.encode(image, format=format, quality=quality)) for quality in (10, 95)]
    assert (sizes[0] < sizes[1]) == FORMATS[format].has_quality


@pytest.mark.parametrize("format", FORMATS)
def test_a_truncated_file_is_refused(format: str) -> None:
    file = encoded(format, "RGB")
    for share in (0.001, 0.1, 0.5, 0.9):
        with pytest.raises(ImageError):
            decode(file[: int(len(file) * share)])


@pytest.mark.parametrize("format", FORMATS)
def test_a_format_is_recognised_and_named_alike_everywhere(format: str) -> None:
    record = FORMATS[format]
    assert recognise(encoded(format, "RGB")) is record
    assert load_codec(record).plugin is not None
    assert PARAMETERS["format"].read(format.lower()) in FORMAT_PARAMETERS
    for suffix in record.suffixes:
        assert format_of(f"s3://bucket/a.b/image{suffix.upper()}") == format
        assert content_type(f"image{suffix}") == record.content_type


def test_no_two_formats_share_a_suffix() -> None:
    for first, second in combinations(FORMATS.values(), 2):
        assert not set(first.suffixes) & set(second.suffixes)


def test_every_mode_has_a_description_for_messages() -> None:
    assert {mode for record in FORMATS.values() for mode in record.modes} == set(MODE_DESCRIPTIONS)


def test_a_name_without_a_known_suffix_is_of_no_format() -> None:
    assert format_of("s3://bucket.png/image") is None
    assert content_type("image.gif") == "application/octet-stream"


def test_the_records_load_neither_numpy_nor_pillow() -> None:
    code = "import sys, shared.params; print({'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
