"""Files made to do harm, as inputs of a worker."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shared import images, masks
from shared.errors import ImageError, InputError, MaskError, ObjectTooLarge
from shared.images.png_format import make_chunk
from shared.storage import Storage, files
from tests.conftest import Bucket
from tests.fuzz.mutations import BOMB
from tests.fuzz.seeds import seeds
from tests.producer.workspace import png
from tests.workers.worker_harness import WorkerHarness

HEADER = b"\x89PNG\r\n\x1a\n"


def with_chunk(name: bytes, body: bytes) -> bytes:
    file = png(Image.new("RGB", (64, 48), (9, 120, 150)))
    return file[:33] + make_chunk(name, body) + file[33:]


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (9, 120, 150)).save(buffer, "JPEG", progressive=True)
    file = buffer.getvalue().removesuffix(b"\xff\xd9")
    last = file[file.rindex(b"\xff\xda") :]
    return file + last * count + b"\xff\xd9"


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        (
            HEADER
            + make_chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
            + make_chunk(b"IDAT", BOMB),
            ObjectTooLarge,
            r"30000x30000 is 900\.0 megapixels; at most 10\.0 are allowed",
        ),
        (
            jpeg_with_scans(400),
            ImageError,
            "scans, 100 at most are read; save it again as baseline JPEG",
        ),
    ],
    ids=["pixels", "scans"],
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    file: bytes, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        images.decode(file, max_pixels=10_000_000)
    with pytest.raises((error, MaskError), match=message):
        masks.decode_mask(file, max_pixels=10_000_000)


def test_a_jpeg_of_many_scans_is_still_read() -> None:
    assert images.decode(jpeg_with_scans(80), max_pixels=10_000).size == (64, 48)
    behind = jpeg_with_scans(0) + b"\xff\xda" * 300
    assert images.decode(behind, max_pixels=10_000).size == (64, 48)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        (b"iCCP", b"profile\0\0" + BOMB),
        (b"zTXt", b"Comment\0\0" + BOMB),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
        (b"tEXt", b"Comment\0" + b"x" * 30_000_000),
        (b"eXIf", b"II*\0\x08\0\0\0" + b"\xff" * 1_000_000),
    ],
    ids=["a profile", "packed text", "packed XMP", "plain text", "EXIF"],
)
def test_a_huge_chunk_of_metadata_costs_nothing(name: bytes, body: bytes) -> None:
    image = images.decode(with_chunk(name, body), max_pixels=10_000)
    assert image.size == (64, 48)
    pixels = image.pixels.copy()
    touched = pixels[..., 0] < 0
    touched[3, 3], pixels[3, 3] = True, 255
    after = images.encode(image.replace(pixels, touched=touched))
    assert images.decode(after, max_pixels=10_000).pixels[3, 3].tolist() == [255] * 3


def palette_png(transparent: int) -> bytes:
    """With a palette of two colours, and transparency for so many."""
    image = Image.new("P", (8, 8))
    image.putpalette([9, 9, 9, 200, 200, 200])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", bits=1)
    file = buffer.getvalue()
    place = file.index(b"IDAT") - 4
    return file[:place] + make_chunk(b"tRNS", bytes(transparent)) + file[place:]


def big_tiff(offset: int) -> bytes:
    return struct.pack("<2sHHHQ", b"II", 43, 8, 0, offset) + bytes(64)


@pytest.mark.parametrize(
    "file",
    [
        HEADER
        + make_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 0, 2, 0, 0, 0))
        + make_chunk(b"tRNS", bytes(6))
        + make_chunk(b"IDAT", zlib.compress(bytes(200)))
        + make_chunk(b"IEND", b""),
        palette_png(300),
        big_tiff(1 << 63),
        big_tiff((1 << 64) - 1),
    ],
    ids=["no depth", "more alpha than palette", "past any file", "past the end"],
)
def test_a_contradictory_header_is_an_input_error(file: bytes) -> None:
    with suppress(ImageError):
        images.probe(file, max_pixels=10_000)
    for read in (images.decode, masks.decode_mask):
        with pytest.raises(InputError, match="damaged"):
            read(file, max_pixels=10_000)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'i.db'}", tmp_path)
    yield harness
    harness.close()


def run_job_on(harness: WorkerHarness, image: str, mask: str = "box:0,0,1,1") -> Any:
    job = harness.add(image=image, mask=mask, output=harness.path("out.png"))
    harness.run(job)
    return harness.job(job)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_an_image_of_any_shape_is_inpainted(harness: WorkerHarness, size: tuple[int, int]) -> None:
    image = harness.write("in.png", png(Image.new("RGB", size, (9, 120, 150))))
    row = run_job_on(harness, image)
    assert (row.state, row.error_message) == ("succeeded", None)
    with Image.open(harness.path("out.png")) as result:
        assert result.size == size
        assert result.getpixel((0, 0)) != (9, 120, 150)


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        (b"", "bad_image", "the file is empty (0 bytes); upload it again"),
        (png(Image.new("L", (64, 48)))[:60], "image_truncated", "ends too early or is damaged"),
        (b"<!DOCTYPE html><html/>", "bad_image", "the file is an HTML page; use JPEG, PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_image", "is an SVG drawing; use"),
        (b"8BPS\0\1" + bytes(50), "bad_image", "a Photoshop document (PSD); use JPEG"),
        (with_chunk(b"acTL", b"\0\0\0\2\0\0\0\0"), "bad_image", "is animated; save one image"),
        (jpeg_with_scans(400), "bad_image", "scans, 100 at most"),
        (with_chunk(b"IDAT", zlib.compress(bytes(99))), "image_truncated", "damaged"),
    ],
    ids=["empty", "truncated", "HTML", "SVG", "PSD", "animated", "scans", "pixels"],
)
def test_an_unusable_file_fails_with_its_code(
    harness: WorkerHarness, data: bytes, code: str, message: str
) -> None:
    row = run_job_on(harness, harness.write("in.png", data))
    assert (row.state, row.error_code) == ("failed", code)
    assert message in row.error_message
    assert not Path(harness.path("out.png")).exists()
    as_mask = run_job_on(
        harness, harness.write("good.png", seeds()[0][1]), harness.write("m.png", data)
    )
    assert as_mask.error_code == "bad_mask"
    assert message in as_mask.error_message


def test_the_version_recorded_is_that_of_the_bytes_read(s3: Bucket) -> None:
    store = Storage(roots=[], buckets=[s3.name])
    first, second = (s3.client.put_object(Bucket=s3.name, Key="a.png", Body=body)["ETag"]
                     for body in (b"one", b"two"))  # fmt: skip
    stat = store.stat(s3.uri("a.png"))
    assert stat is not None
    assert stat.version == second
    s3.client.put_object(Bucket=s3.name, Key="a.png", Body=b"one")
    image = store.get(s3.uri("a.png"), max_bytes=10)
    assert (image.data, image.version) == (b"one", first)


def test_an_image_that_is_written_while_it_is_read_is_read_again(
    harness: WorkerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = harness.write("in.png", png(Image.new("RGB", (64, 48))))
    job = harness.add(image=image, mask="box:0,0,9,9", output=harness.path("out.png"))
    check = files.__name__ + ".check_size"
    written = [png(Image.new("RGB", (64, 48), (1, 2, 3))) + b"more"]

    def write(uri: str, _size: int, _cap: int) -> None:
        if uri == image and written:
            Path(image).write_bytes(written.pop())

    monkeypatch.setattr(check, write)
    harness.run(job)
    (attempt,) = harness.attempts(job)
    assert (attempt.outcome, attempt.error_code) == ("retried", "storage_unavailable")
    assert "changed while it was read" in attempt.error_message
    harness.run(job)
    assert harness.job(job).state == "succeeded"
