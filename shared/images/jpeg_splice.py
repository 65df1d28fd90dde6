"""JPEG files changed in place: what was not repainted keeps its coefficients, so its pixels.

A sample is replaced where a pixel it averages was touched. Blocks without such a sample are
copied. In the others the source's own samples stand between the new ones, unrounded, and the
block is transformed and quantised with the source's table. Brightness and colour are blocks
of their own: with 4:2:0 a touched pixel costs 8x8 pixels of brightness and 16x16 of colour.

The promise, checked on every file that is written: a pixel decodes as before unless it lies in
a rewritten block, or within one colour sample of a rewritten block of subsampled colour, where
decoders interpolate.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import EngineUnavailable, ImageError, StorageUnavailable

Mask = NDArray[np.bool_]  # (H, W)
Blocks = NDArray[np.int16]  # (rows, columns, 8, 8) quantised coefficients, row = frequency down
Floats = NDArray[np.float64]

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_APP0, _APP14, _APP15, _COMMENT, _TABLES, _SCAN = 0xE0, 0xEE, 0xEF, 0xFE, 0xDB, 0xDA
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES, _PROGRESSIVE = frozenset({0xC0, 0xC1, 0xC2}), 0xC2
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_MOST_BLOCKS = 10  # in one MCU of an interleaved scan: ITU-T T.81, B.2.3
_CHUNK = 1024  # blocks worked on at once

# jpeglib keeps what it reads of a file's markers, and its choice of libjpeg, in globals.
_LOCK = threading.Lock()
_READER, _BASELINE_WRITER, _PROGRESSIVE_WRITER = "turbo210", "turbo210", "mozjpeg403"

# Samples from pixels: weights (C, components), then the offsets. ITU-R BT.601 as in JFIF 1.02;
# Pillow's CMYK is the inverse of what files hold.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).T
_YCCK = np.block([[_YCC, np.zeros((3, 1))], [np.zeros((1, 3)), -np.ones((1, 1))]])
_Space = tuple[Floats, tuple[int, ...]]
_SPACES: Mapping[str, _Space] = {
    "grey": (np.eye(1), (0,)),
    "RGB": (np.eye(3), (0, 0, 0)),
    "YCC": (_YCC, (0, 128, 128)),
    "CMYK": (-np.eye(4), (255, 255, 255, 255)),
    "YCCK": (_YCCK, (0, 128, 128, 255)),
}

_FREQUENCY, _PLACE = np.mgrid[:8, :8]
_DCT: Floats = np.cos((2 * _PLACE + 1) * _FREQUENCY * np.pi / 16) / 2
_DCT[0] /= np.sqrt(2)


class CannotSplice(ImageError):
    """The file must be encoded as a whole; ``str()`` says why."""


@dataclass(frozen=True, kw_only=True)
class Spliced:
    """data: the file. reach: (H, W), the pixels that may decode differently from the source.

    copied: the share of blocks whose coefficients are the source's.
    """

    data: bytes
    reach: Mask
    copied: float


def splice(source: bytes, pixels: NDArray[Any], touched: Mask, *, metadata: bytes) -> Spliced:
    """The source with the touched pixels replaced, everything as it lies in the file.

    pixels: (H, W) or (H, W, C) uint8, not turned by any orientation, in Pillow's L, RGB or
    CMYK; untouched ones are not looked at where no touched one shares their sample.
    touched: (H, W). metadata: the segments the result is to have, without APP14, which comes
    from the source. Raises CannotSplice; EngineUnavailable where jpeglib is missing; and
    StorageUnavailable where the disk of temporary files is full.
    """
    stream = _read_stream(source)
    library = _jpeglib()
    with tempfile.TemporaryDirectory(prefix="inpaint-") as name:
        folder = Path(name)
        _check_room(folder, source, touched.size)
        image = _read_coefficients(library, stream.plain, folder)
        rewritten = _repaint(image, _SPACES[stream.space], pixels, touched)
        body = _write_coefficients(library, image, stream, folder)
    return Spliced(
        data=b"".join([_SOI, metadata, *stream.adobe, body, _EOI]),
        reach=_reach(image, rewritten, touched.shape),
        copied=1 - sum(int(one.sum()) for one in rewritten) / sum(one.size for one in rewritten),
    )


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """A file's parts. plain: all that its pixels need. adobe: the APP14 segments."""

    plain: bytes
    jfif: bool
    adobe: tuple[bytes, ...]
    tables: tuple[bytes, ...]
    frame: bytes

    @property
    def progressive(self) -> bool:
        return self.frame[1] == _PROGRESSIVE

    @property
    def space(self) -> str:
        """One of _SPACES, as libjpeg decides it; jpeglib does not look at these segments."""
        names = self.frame[10::3]
        marks = [part for part in self.adobe if part[4:9] == b"Adobe" and len(part) >= 16]
        transform = marks[-1][15] if marks else None
        if len(names) == 4:
            return "CMYK" if transform in (None, 0) else "YCCK"
        if len(names) == 1:
            return "grey"
        is_rgb = transform == 0 if marks else names == b"RGB"
        return "RGB" if is_rgb and not self.jfif else "YCC"


def _read_stream(data: bytes) -> _Stream:
    """Takes the file apart and checks all that would make the C library give up.

    libjpeg as jpeglib builds it ends the whole process where it cannot go on.
    """
    parts = list(_segments(data))
    frames = [part for part in parts if part[1] in _FRAMES]
    scans = [part for part in parts if part[1] == _SCAN]
    if len(frames) != 1 or not scans:
        raise CannotSplice("it has no single frame with scans")
    if frames[0][1] not in _HUFFMAN_FRAMES:
        raise CannotSplice("its pixels are arithmetic-coded or lossless")
    factors = frames[0][11::3]
    if len(factors) > 1 and sum((one >> 4) * (one & 15) for one in factors) > _MOST_BLOCKS:
        raise CannotSplice("its colours are sampled too finely to be written together")
    if frames[0][1] == _PROGRESSIVE:
        _check_complete(frames[0], scans)
    first = parts.index(scans[0])
    if any(part[1] == _TABLES for part in parts[first:]):
        raise CannotSplice("it changes its quantisation between scans")
    needed = [part for part in parts if not _APP0 <= part[1] <= _APP15 and part[1] != _COMMENT]
    return _Stream(
        plain=b"".join([_SOI, *needed, _EOI]),
        jfif=any(part[1] == _APP0 and part[4:9] == b"JFIF\0" for part in parts[:first]),
        adobe=tuple(part for part in parts[:first] if part[1] == _APP14),
        tables=tuple(part for part in parts[:first] if part[1] == _TABLES),
        frame=frames[0],
    )


def _segments(data: bytes) -> Iterator[bytes]:
    """Each segment up to the end of the image; a scan's header together with its data."""
    return (data[start:end] for start, end in _spans(data))


def _spans(data: bytes) -> Iterator[tuple[int, int]]:
    at = len(_SOI)
    while at + 4 <= len(data) and data[at : at + 2] != _EOI:
        if data[at] != 0xFF:
            raise CannotSplice("it is damaged between its segments")
        if data[at + 1] == 0xFF:
            at += 1
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if data[at + 1] == _SCAN:
            found = _MARKER.search(data, end)
            end = found.start() if found else len(data)
        yield at, end
        at = end


def lacks_end(data: bytes) -> bool:
    """Whether the last scan is followed by nothing, not even the marker of the image's end."""
    if data.endswith(_EOI):
        return False
    try:
        *_, (_, end) = (0, 0), *_spans(data)
    except CannotSplice:
        return False
    return end >= len(data)


def endings(data: bytes) -> tuple[bytes, bytes]:
    """The file that lacks its end, twice, with ends that decode alike if no pixel is missing.

    A decoder that needs more bits reads the one's as zeros and the other's as something else.
    Raises CannotSplice where whole scans are missing.
    """
    _read_stream(data)
    whole = data.rstrip(b"\xff")
    return whole + _EOI, whole + b"\x55\xaa" * 256 + _EOI


def _check_complete(frame: bytes, scans: list[bytes]) -> None:
    """Raises CannotSplice where scans are missing: decoders then guess, from block to block."""
    missing = np.full((256, 64), 1)
    for scan in scans:
        count = scan[4]
        low, high, bits = scan[5 + 2 * count : 8 + 2 * count]
        missing[list(scan[5 : 5 + 2 * count : 2]), low : high + 1] = bits & 15
    if missing[list(frame[10::3])].any():
        raise CannotSplice("its last progressive scans are missing")


def _jpeglib() -> Any:
    try:
        import jpeglib
    except ImportError as error:
        raise EngineUnavailable(
            "writing JPEG needs the package jpeglib; install inpaint-batch[opencv] or [worker]"
        ) from error
    return jpeglib


def _check_room(folder: Path, source: bytes, pixels: int) -> None:
    """Raises StorageUnavailable: libjpeg, out of room while it writes, would end the process."""
    if shutil.disk_usage(folder).free < 4 * len(source) + 4 * pixels:
        raise StorageUnavailable(f"no room for temporary files in {folder.parent}; free some")


def _read_coefficients(library: Any, plain: bytes, folder: Path) -> Any:
    """jpeglib's DCTJPEG of a file, loaded."""
    path = folder / "source.jpg"
    path.write_bytes(plain)
    with _LOCK:
        library.version.set(_READER)
        try:
            image = library.read_dct(path)
            image.load()
        except OSError as error:
            raise CannotSplice("its coefficients cannot be read") from error
    for blocks in _components(image):
        flat = blocks.reshape(-1, 64)
        if flat[:, 0].min() < -1024 or flat.max() > 1023 or flat[:, 1:].min() < -1023:
            raise CannotSplice("its coefficients are out of range")
    return image


def _components(image: Any) -> list[Blocks]:
    return [image.Y, image.Cb, image.Cr, image.K][: image.num_components]


def _factors(image: Any) -> list[tuple[int, int]]:
    """(down, across), the pixels to a sample, of each component."""
    if image.num_components == 1:
        return [(1, 1)]
    most = image.samp_factor.max(axis=0)
    return [(int(down), int(across)) for down, across in most // image.samp_factor]


def _repaint(image: Any, space: _Space, pixels: NDArray[Any], touched: Mask) -> list[Mask]:
    """Puts the touched pixels into the image's blocks; says which blocks it rewrote."""
    weights, offsets = space
    pixels = pixels.reshape(*touched.shape, -1)
    rewritten = []
    components = zip(_components(image), _factors(image), strict=True)
    for number, (blocks, factor) in enumerate(components):
        hit = _blocks_of(touched, blocks.shape[:2], factor)
        table = np.asarray(image.get_component_qt(number), np.float64)
        places = np.argwhere(hit)
        for start in range(0, len(places), _CHUNK):
            rows, columns = places[start : start + _CHUNK].T
            window = _window(rows, columns, factor, touched.shape)
            asked = pixels[window] @ weights[:, number] + offsets[number]
            blocks[rows, columns] = _mixed(
                blocks[rows, columns], table, asked, touched[window], factor
            )
        rewritten.append(hit)
    return rewritten


def _blocks_of(touched: Mask, grid: tuple[int, ...], factor: tuple[int, int]) -> Mask:
    """(rows, columns) of blocks that hold a touched pixel."""
    (rows, columns), (down, across) = grid, factor
    padded = np.zeros((rows * 8 * down, columns * 8 * across), np.bool_)
    padded[: touched.shape[0], : touched.shape[1]] = touched
    return np.asarray(padded.reshape(rows, 8 * down, columns, 8 * across).any(axis=(1, 3)))


def _window(
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    factor: tuple[int, int],
    shape: tuple[int, ...],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the (n, h, w) pixels of n blocks; past the picture its last ones repeat."""
    (down, across), (height, width) = factor, shape
    ys = np.minimum(rows[:, None] * 8 * down + np.arange(8 * down), height - 1)
    xs = np.minimum(columns[:, None] * 8 * across + np.arange(8 * across), width - 1)
    return ys[:, :, None], xs[:, None, :]


def _mixed(
    blocks: Blocks, table: Floats, asked: Floats, touched: Mask, factor: tuple[int, int]
) -> Blocks:
    """(n, 8, 8) coefficients with the touched samples as asked, the others as they were.

    asked, touched: (n, 8 down, 8 across). Adding a millionth makes ties fall alike on every
    processor, whatever the order in which it adds up.
    """
    split = (len(blocks), 8, factor[0], 8, factor[1])
    changed = touched.reshape(split).any(axis=(2, 4))
    wanted = asked.reshape(split).mean(axis=(2, 4)) - 128
    samples = np.where(changed, wanted, _DCT.T @ (blocks * table) @ _DCT)
    quantised = np.floor(_DCT @ samples @ _DCT.T / np.maximum(table, 1) + (0.5 + 1e-6))
    return np.clip(quantised, -1023, 1023).astype(np.int16)


def _write_coefficients(library: Any, image: Any, stream: _Stream, folder: Path) -> bytes:
    """Everything after the metadata and before the end of the image."""
    progressive = stream.progressive
    if image.num_components <= 3:
        written = _written(library, image, folder, progressive=progressive)
        return b"".join(part for part in _segments(written) if not _APP0 <= part[1] <= _APP15)
    # jpeglib writes no fourth component, but any one of them alone: a scan of its own.
    scans = []
    for blocks, identity in zip(_components(image), stream.frame[10::3], strict=True):
        grey = library.from_dct(Y=blocks, qt=50)
        written = _written(library, grey, folder, progressive=False)
        if progressive:
            grey = _read_coefficients(library, written, folder)
            written = _written(library, grey, folder, progressive=True)
        for part in _segments(written):
            if part[1] == _SCAN:
                scans.append(part[:5] + bytes([identity]) + part[6:])
            elif not _APP0 <= part[1] <= _APP15 and part[1] != _TABLES and part[1] not in _FRAMES:
                scans.append(part)
    return b"".join([*stream.tables, stream.frame, *scans])


def _written(library: Any, image: Any, folder: Path, *, progressive: bool) -> bytes:
    """The file of jpeglib's DCTJPEG, with its own quantisation tables and no metadata."""
    path = folder / "result.jpg"
    image.markers, image.qt = None, 50 if image.content is None else -1
    with _LOCK:
        library.version.set(_PROGRESSIVE_WRITER if progressive else _BASELINE_WRITER)
        image.write_dct(str(path), flags=[] if progressive else ["OPTIMIZE_CODING"])
    return path.read_bytes()


def _reach(image: Any, rewritten: list[Mask], shape: tuple[int, ...]) -> Mask:
    """(H, W) the pixels a decoder makes from any rewritten block."""
    reach = np.zeros(shape, np.bool_)
    for blocks, (down, across) in zip(rewritten, _factors(image), strict=True):
        samples = blocks.repeat(8, axis=0).repeat(8, axis=1)
        if down > 1:
            samples = _grown(samples)
        if across > 1:
            samples = _grown(samples.T).T
        seen = samples.repeat(down, axis=0).repeat(across, axis=1)
        reach |= seen[: shape[0], : shape[1]]
    return reach


def _grown(samples: Mask) -> Mask:
    """One row more above and below."""
    grown = samples.copy()
    grown[1:] |= samples[:-1]
    grown[:-1] |= samples[1:]
    return grown
