"""JPEG results: untouched pixels decode exactly as before, in every kind of file."""

from __future__ import annotations

import io
import logging
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import jpeglib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from skimage import data

from shared import images
from shared.errors import EngineUnavailable, FidelityError, ImageError, StorageUnavailable
from shared.images import jpeg_format, jpeg_splice
from shared.images.codec import CannotSplice

Pixels = NDArray[Any]
Mask = NDArray[np.bool_]
Area = tuple[int, int, int, int]  # left, top, right, bottom

PHOTOGRAPHS = {name: Image.fromarray(getattr(data, name)()) for name in ("coffee", "astronaut")}
COFFEE = PHOTOGRAPHS["coffee"].crop((150, 60, 353, 231))  # 203 x 171: no whole blocks
BOX = (61, 43, 102, 90)


def save(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **{"quality": 85, **options})
    return buffer.getvalue()


def opened(file: bytes) -> Any:
    image = Image.open(io.BytesIO(file))
    image.load()
    return image


def by_pillow(file: bytes) -> Pixels:
    return np.asarray(opened(file))


def by_opencv(file: bytes) -> Pixels:
    flags = cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION
    decoded = cv2.imdecode(np.frombuffer(file, np.uint8), flags)
    assert decoded is not None
    return decoded


def decode(file: bytes) -> images.DecodedImage:
    return images.decode(file, max_pixels=20_000_000)


def boxed(shape: tuple[int, ...], box: Area) -> Mask:
    touched = np.zeros(shape[:2], np.bool_)
    touched[box[1] : box[3], box[0] : box[2]] = True
    return touched


def repainted(file: bytes, touched: Mask) -> images.DecodedImage:
    """The file's image with pixels from elsewhere where it is touched."""
    image = decode(file)
    pixels = image.pixels.copy()
    pixels[touched] = np.roll(pixels, (37, 53), (0, 1))[touched] ^ 1
    return image.replace(pixels, touched=touched)


def differs(before: Pixels, after: Pixels) -> Mask:
    assert before.shape == after.shape
    return (before != after).reshape(*before.shape[:2], -1).any(axis=-1)


def allowed(file: bytes, touched: Mask) -> Mask:
    """The touched MCUs, and one colour sample around them where colour is subsampled."""
    layers = opened(file).layer
    across, down = max(layer[1] for layer in layers), max(layer[2] for layer in layers)
    if len(layers) == 1:
        across = down = 1
    height, width = touched.shape
    grid = np.pad(touched, ((0, -height % (8 * down)), (0, -width % (8 * across))))
    blocks = grid.reshape(grid.shape[0] // (8 * down), 8 * down, -1, 8 * across).any(axis=(1, 3))
    whole = blocks.repeat(8 * down, axis=0).repeat(8 * across, axis=1)
    near = whole.copy()
    for axis, factor in ((0, down), (1, across)):
        grown = near.copy()
        for step in range(-factor if factor > 1 else 0, factor + 1 if factor > 1 else 1):
            grown |= np.roll(near, step, axis)
        near = grown
    return near[:height, :width]


def rms_error(pixels: Pixels, expected: Pixels, where: Mask) -> float:
    return float(np.sqrt(((pixels[where].astype(float) - expected[where]) ** 2).mean()))


def with_sampling(folder: Path, *factors: tuple[int, int]) -> bytes:
    """The photograph with sampling factors (down, across) that Pillow does not write."""
    image = jpeglib.from_spatial(np.array(COFFEE))
    image.samp_factor = np.array(factors)
    image.write_spatial(str(folder / "sampled.jpg"), qt=85)
    return (folder / "sampled.jpg").read_bytes()


def transformed(file: bytes, transform: int) -> bytes:
    """The file with another colour space in its Adobe segment: valid, with odd colours."""
    return with_byte(file, b"Adobe", 11, transform)


def with_byte(file: bytes, segment: bytes, offset: int, value: int) -> bytes:
    place = file.index(segment) + offset
    return file[:place] + bytes([value]) + file[place + 1 :]


def without_adobe(file: bytes) -> bytes:
    """The file without its Adobe segment."""
    start = file.index(b"\xff\xee")
    return file[:start] + file[start + 16 :]


def renamed(file: bytes) -> bytes:
    """An RGB file with components 1 to 3, so that only its Adobe segment says that it is RGB."""
    start = file.index(b"\xff\xc0") + 10
    scan = file.index(b"\xff\xda") + 5
    names = {start: 1, start + 3: 2, start + 6: 3, scan: 1, scan + 2: 2, scan + 4: 3}
    return bytes(names.get(at, byte) for at, byte in enumerate(file))


FILES = {
    **{
        f"{name}, {kind}": save(COFFEE, subsampling=number, progressive=kind == "progressive")
        for kind in ("baseline", "progressive")
        for number, name in enumerate(("4:4:4", "4:2:2", "4:2:0"))
    },
    "grey": save(COFFEE.convert("L")),
    "grey, sampled by two": with_byte(save(COFFEE.convert("L")), b"\xff\xc0", 11, 0x22),
    "table with a zero": with_byte(save(COFFEE), b"\xff\xdb", 9, 0),
    "grey, progressive": save(COFFEE.convert("L"), progressive=True),
    "CMYK": save(COFFEE.convert("CMYK")),
    "CMYK, progressive": save(COFFEE.convert("CMYK"), progressive=True),
    "YCCK": transformed(save(COFFEE.convert("CMYK")), 2),
    "CMYK, unmarked": without_adobe(save(COFFEE.convert("CMYK"))),
    "RGB": save(COFFEE, keep_rgb=True),
    "RGB, numbered": renamed(save(COFFEE, keep_rgb=True)),
    "RGB, unmarked": without_adobe(save(COFFEE, keep_rgb=True)),
    "YCC, numbered as RGB": transformed(save(COFFEE, keep_rgb=True), 1),
    "restarts": save(COFFEE, restart_marker_blocks=3),
    "restarts, progressive": save(COFFEE, restart_marker_rows=1, progressive=True),
    "finest": save(COFFEE, quality=100, subsampling=0),
    "coarse": save(COFFEE, quality=5),
    "16-bit tables": save(COFFEE, qtables=[[300] * 64, [400] * 64]),
    "one pixel": save(COFFEE.crop((100, 50, 101, 51))),
    "one row": save(COFFEE.crop((0, 50, 203, 51))),
    "smaller than a block": save(COFFEE.crop((100, 50, 107, 53))),
    "one block and a column": save(COFFEE.crop((100, 50, 117, 66))),
    "retina": save(Image.fromarray(data.retina()).resize((706, 705))),
    **{name: save(photograph) for name, photograph in PHOTOGRAPHS.items()},
}


def assert_same_outside(before: bytes, after: bytes, touched: Mask) -> None:
    outside = ~allowed(before, touched)
    for read in (by_pillow, by_opencv):
        assert not (differs(read(before), read(after)) & outside).any()


@pytest.mark.parametrize("name", FILES)
def test_nothing_outside_the_touched_blocks_changes(name: str) -> None:
    before = FILES[name]
    image = repainted(before, boxed(decode(before).pixels.shape, BOX))
    touched = image.touched
    if touched is None:
        touched = boxed(image.pixels.shape, (0, 0, 1, 1))
        image = repainted(before, touched)
    after = images.encode(image)
    assert after != before
    assert_same_outside(before, after, touched)
    assert opened(after).layer == opened(before).layer
    assert opened(after).quantization == opened(before).quantization
    assert opened(after).info.get("progressive") == opened(before).info.get("progressive")


@pytest.mark.parametrize(
    "name", ["4:4:4, baseline", "4:2:0, baseline", "4:2:0, progressive", "grey", "RGB", "coarse"]
)
def test_touched_pixels_are_as_exact_as_in_a_file_encoded_as_a_whole(name: str) -> None:
    image = repainted(FILES[name], boxed((171, 203), BOX))
    spliced, whole = images.encode(image), jpeg_format.encode(image, None)
    assert image.touched is not None
    ours, theirs = (
        rms_error(by_pillow(file), image.pixels, image.touched) for file in (spliced, whole)
    )
    assert ours <= theirs * 1.03 + 0.05


@pytest.mark.parametrize("name", [name for name in FILES if name[:3] in ("CMY", "YCC", "RGB")])
def test_new_pixels_have_the_given_colour_in_every_colour_space(name: str) -> None:
    image, touched = decode(FILES[name]), boxed((171, 203), BOX)
    colour = (30, 90, 120, 60)[: image.pixels.shape[2]]
    pixels = image.pixels.copy()
    pixels[touched] = colour
    after = by_pillow(images.encode(image.replace(pixels, touched=touched)))
    whole_blocks = after[48:88, 64:96].astype(int)
    assert np.abs(whole_blocks - colour).max() <= 3


@pytest.mark.parametrize("name", ["4:2:2, baseline", "4:2:0, baseline", "4:2:0, progressive"])
def test_pixels_that_share_a_block_with_the_mask_change_less_than_in_a_file_encoded_as_a_whole(
    name: str,
) -> None:
    image = repainted(FILES[name], boxed((171, 203), BOX))
    assert image.touched is not None
    beside = allowed(FILES[name], image.touched) & ~image.touched
    before = by_pillow(FILES[name])
    ours = rms_error(by_pillow(images.encode(image)), before, beside)
    assert ours < rms_error(by_pillow(jpeg_format.encode(image, None)), before, beside)


def test_no_trace_of_a_mark_that_the_file_clipped_to_white() -> None:
    marked = np.zeros((64, 64, 3), np.uint8)
    marked[:, 3::7] = 255
    before = save(Image.fromarray(marked), quality=40)
    image = decode(before)
    touched = boxed((64, 64), (16, 16, 48, 48))
    pixels = image.pixels.copy()
    pixels[touched] = 128
    after = by_pillow(images.encode(image.replace(pixels, touched=touched)))
    assert np.abs(after[touched].astype(int) - 128).max() <= 2


@pytest.mark.parametrize("name", ["coffee", "astronaut", "retina", "4:2:0, progressive"])
def test_blocks_are_copied_and_the_file_keeps_its_size(name: str) -> None:
    before = FILES[name]
    touched = boxed(by_pillow(before).shape, BOX)
    image = repainted(before, touched)
    spliced = jpeg_splice.splice(before, image.pixels, touched, metadata=b"")
    blocks = touched.size / 64
    assert 1 - spliced.copied < 100 / blocks
    assert len(spliced.data) < len(before) * 1.05


def test_luma_is_copied_in_blocks_of_eight_pixels_whatever_the_chroma_sampling(
    tmp_path: Path,
) -> None:
    before = FILES["4:2:0, baseline"]
    after = images.encode(repainted(before, boxed((171, 203), (40, 40, 44, 44))))
    old, new = (coefficients(file, tmp_path) for file in (before, after))
    changed = [(a != b).any(axis=(2, 3)) for a, b in zip(old, new, strict=True)]
    luma, *chroma = [np.argwhere(component).tolist() for component in changed]
    assert luma == [[5, 5]]
    assert all(component in ([[2, 2]], []) for component in chroma)


def coefficients(file: bytes, folder: Path) -> list[NDArray[np.int16]]:
    path = folder / "read.jpg"
    path.write_bytes(file)
    image = jpeglib.read_dct(path)
    image.load()
    return [image.Y, image.Cb, image.Cr]


@pytest.mark.parametrize(
    "factors",
    [((1, 4), (1, 1), (1, 1)), ((2, 1), (1, 1), (1, 1)), ((2, 2), (1, 2), (1, 1))],
    ids=["4:1:1", "4:4:0", "mixed"],
)
def test_unusual_subsampling_is_kept(factors: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    before = with_sampling(tmp_path, *factors)
    touched = boxed((171, 203), BOX)
    after = images.encode(repainted(before, touched))
    assert_same_outside(before, after, touched)
    assert opened(after).layer == opened(before).layer


@settings(max_examples=30, deadline=None)
@given(
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    subsampling=st.integers(0, 2),
    progressive=st.booleans(),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
    restart_marker_blocks=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_any_size_and_any_touched_pixels(
    width: int, height: int, mode: str, seed: int, **options: Any
) -> None:
    random = np.random.default_rng(seed)
    image = COFFEE.crop((20, 30, 20 + width, 30 + height)).convert(mode)
    before = save(image, **options)
    touched = random.random((height, width)) < random.choice([0.001, 0.02, 0.3])
    touched[random.integers(height), random.integers(width)] = True
    after = images.encode(repainted(before, touched))
    assert_same_outside(before, after, touched)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_an_image_with_an_orientation_keeps_it(orientation: int, subsampling: int) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "camera"
    before = save(COFFEE, exif=exif, subsampling=subsampling)
    image = repainted(before, boxed(decode(before).pixels.shape, BOX))
    after = images.encode(image)
    assert opened(after).getexif()[0x0112] == orientation
    assert opened(after).getexif()[0x010F] == "camera"
    old, new = (np.asarray(ImageOps.exif_transpose(opened(file))) for file in (before, after))
    left, top, right, bottom = BOX
    outside = ~boxed(old.shape, (left - 18, top - 18, right + 18, bottom + 18))
    assert not (differs(old, new) & outside).any()
    inside = boxed(old.shape, BOX)
    assert rms_error(new, image.pixels, inside) < rms_error(new, old, inside) / 4
    assert np.array_equal(decode(after).pixels, new)


def test_every_segment_is_kept_except_the_thumbnail() -> None:
    directory = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, 0x112, 3, 1, 6, 0, 26)
    thumbnail = struct.pack("<HHHIIHHIII", 2, 0x201, 4, 1, 56, 0x202, 4, 1, 9, 0)
    exif = b"Exif\0\0" + directory + thumbnail + b"THUMBNAIL"
    before = save(
        COFFEE, exif=exif, icc_profile=b"profile" * 20_000, comment=b"hello", dpi=(300, 200)
    )
    after = images.encode(repainted(before, boxed((203, 171), BOX)))
    for name in ("icc_profile", "comment", "dpi", "jfif"):
        assert opened(after).info[name] == opened(before).info[name]
    assert opened(after).getexif()[0x112] == 6
    assert b"THUMBNAIL" in before
    assert b"THUMBNAIL" not in after


def test_a_file_without_jfif_gets_no_jfif_segment_and_keeps_its_component_names() -> None:
    plain = FILES["4:2:0, baseline"]
    start = plain.index(b"\xff\xe0")
    before = plain[:start] + plain[start + 18 :]
    after = images.encode(repainted(before, boxed((171, 203), BOX)))
    assert b"JFIF" not in after[:300]
    assert_same_outside(before, after, boxed((171, 203), BOX))


def test_results_are_the_same_in_concurrent_threads() -> None:
    names = ["4:2:0, baseline", "4:2:0, progressive", "grey, progressive", "CMYK", "restarts"] * 8
    repainted_images = [repainted(FILES[name], boxed((171, 203), BOX)) for name in names]
    first = zip(names[:5], repainted_images[:5], strict=True)
    alone = {name: images.encode(image) for name, image in first}
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(images.encode, repainted_images))
    assert together == [alone[name] for name in names]


# Files that cannot be spliced


def without_last_scan(file: bytes) -> bytes:
    return file[: file.rindex(b"\xff\xda")] + b"\xff\xd9"


def with_tables_between_scans(file: bytes) -> bytes:
    start = file.index(b"\xff\xdb")
    table = file[start : start + 2 + int.from_bytes(file[start + 2 : start + 4])]
    place = file.index(b"\xff\xc4", file.index(b"\xff\xda"))
    return file[:place] + table + file[place:]


def with_huge_coefficient() -> bytes:
    """8x8 grey whose one coefficient needs 15 bits: decoders clip it, encoders give up."""
    frame = struct.pack(">HHBHHBBBB", 0xFFC0, 11, 8, 8, 8, 1, 1, 0x11, 0)
    tables = b"\xff\xdb\0\x43\0" + b"\1" * 64
    for number, symbol in ((0x00, 15), (0x10, 0)):
        tables += struct.pack(">HHB", 0xFFC4, 20, number) + b"\1" + bytes(15) + bytes([symbol])
    scan = struct.pack(">HHBBBBBB", 0xFFDA, 8, 1, 1, 0, 0, 63, 0) + b"\x7f\xfe\x7f"
    return b"\xff\xd8" + tables + frame + scan + b"\xff\xd9"


REFUSED = {
    "scans are missing": without_last_scan(FILES["4:2:0, progressive"]),
    "between scans": with_tables_between_scans(FILES["4:2:0, progressive"]),
    "out of range": with_huge_coefficient(),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_file_that_cannot_be_spliced_is_encoded_as_a_whole_with_a_warning(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = REFUSED[reason]
    touched = boxed(decode(before).pixels.shape, (2, 2, 6, 6))
    with caplog.at_level(logging.WARNING):
        after = images.encode(repainted(before, touched))
    assert opened(after).size == opened(before).size
    assert [reason in message for message in caplog.messages] == [True]


def test_arithmetic_coding_is_not_spliced(tmp_path: Path) -> None:
    path = tmp_path / "arithmetic.jpg"
    path.write_bytes(FILES["grey"])
    with jpeglib.version("turbo210"):
        image = jpeglib.read_dct(path)
        image.load()
        image.write_dct(str(path), flags=["ARITH_CODE"])
    pixels = np.zeros((171, 203), np.uint8)
    with pytest.raises(CannotSplice, match="arithmetic"):
        jpeg_splice.splice(path.read_bytes(), pixels, pixels == 0, metadata=b"")


def test_more_blocks_than_a_scan_can_hold_never_reach_the_c_library() -> None:
    file = with_byte(FILES["4:4:4, progressive"], b"\xff\xc2", 14, 0x44)
    pixels = np.zeros((171, 203, 3), np.uint8)
    with pytest.raises(CannotSplice, match="too finely"):
        jpeg_splice.splice(file, pixels, pixels[..., 0] == 0, metadata=b"")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("name", ["4:2:0, baseline", "4:2:0, progressive", "restarts"])
def test_damage_that_pillow_ignores_never_ends_the_process(name: str, share: float) -> None:
    file = bytearray(FILES[name])
    place = int(len(file) * share)
    file[place : place + 8] = b"\x5a" * 8
    try:
        image = repainted(bytes(file), boxed((171, 203), BOX))
    except ImageError:
        return
    try:
        assert opened(images.encode(image)).size == (203, 171)
    except FidelityError:
        pass


def test_a_file_that_decodes_differently_outside_the_mask_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        jpeg_splice, "_reach", lambda image, rewritten, shape: np.zeros(shape, np.bool_)
    )
    image = repainted(FILES["grey"], boxed((171, 203), BOX))
    with pytest.raises(FidelityError, match="outside the mask would have changed"):
        images.encode(image)


def test_without_jpeglib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jpeglib", None)
    image = repainted(FILES["grey"], boxed((171, 203), BOX))
    with pytest.raises(EngineUnavailable, match=r"inpaint-batch\[opencv\]"):
        images.encode(image)


def test_a_full_disk_is_an_error_before_the_c_library_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    image = repainted(FILES["grey"], boxed((171, 203), BOX))
    with pytest.raises(StorageUnavailable, match="no room"):
        images.encode(image)
