"""JPEG files changed in place: untouched blocks keep their DCT coefficients, so their pixels.

A sample is replaced where a pixel that it averages was touched. Blocks without such a sample are
copied. In the others the source's own samples stay between the new ones, unrounded, and the
block is transformed and quantised with the source's table. Luma and chroma have blocks of their
own: with 4:2:0 a touched pixel rewrites 8x8 pixels of luma and 16x16 of chroma.

The guarantee, verified on every file that is written: a pixel decodes as before unless it lies in
a rewritten block, or within one chroma sample of a rewritten block of subsampled chroma, where
decoders interpolate.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import StorageUnavailable
from shared.images.codec import CannotSplice, Spliced
from shared.images.jpeg_markers import (
    APP0,
    APP14,
    APP15,
    COMMENT,
    EOI,
    FRAMES,
    PROGRESSIVE,
    QUANTISATION,
    SOI,
    START_OF_SCAN,
    MarkerError,
    walk_segments,
)
from shared.images.optional_libraries import jpeglib

Mask = NDArray[np.bool_]  # (H, W)
Blocks = NDArray[np.int16]  # (rows, columns, 8, 8) quantised coefficients, row = vertical frequency
Floats = NDArray[np.float64]

_HUFFMAN_FRAMES = frozenset({0xC0, 0xC1, PROGRESSIVE})
_MAX_BLOCKS = 10  # in one MCU of an interleaved scan: ITU-T T.81, B.2.3
_CHUNK_BLOCKS = 1024  # transformed at once, to bound memory

# jpeglib keeps the markers it reads, and its choice of libjpeg, in globals.
_LOCK = threading.Lock()
_READER, _BASELINE_WRITER, _PROGRESSIVE_WRITER = "turbo210", "turbo210", "mozjpeg403"

# Samples from pixels: weights (C, components), then the offsets. ITU-R BT.601 as in JFIF 1.02;
# Pillow's CMYK is the inverse of what files hold.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]).T
_YCCK = np.block([[_YCC, np.zeros((3, 1))], [np.zeros((1, 3)), -np.ones((1, 1))]])
_ColourSpace = tuple[Floats, tuple[int, ...]]
_COLOUR_SPACES: Mapping[str, _ColourSpace] = {
    "grey": (np.eye(1), (0,)),
    "RGB": (np.eye(3), (0, 0, 0)),
    "YCC": (_YCC, (0, 128, 128)),
    "CMYK": (-np.eye(4), (255, 255, 255, 255)),
    "YCCK": (_YCCK, (0, 128, 128, 255)),
}

# The orthonormal 8-point DCT-II, (frequency, sample): T.81, A.3.3.
_FREQUENCY, _SAMPLE = np.mgrid[:8, :8]
_DCT: Floats = np.cos((2 * _SAMPLE + 1) * _FREQUENCY * np.pi / 16) / 2
_DCT[0] /= np.sqrt(2)


def splice(source: bytes, pixels: NDArray[Any], touched: Mask, *, metadata: bytes) -> Spliced:
    """The source with the touched pixels replaced; all arrays in the orientation of the file.

    pixels: (H, W) or (H, W, C) uint8 in Pillow's L, RGB or CMYK; untouched ones are ignored
    if no touched one shares their sample. touched: (H, W). metadata: the result's segments,
    without APP14, which comes from the source. Raises CannotSplice; EngineUnavailable if
    jpeglib is missing; StorageUnavailable if the disk of temporary files is full.
    """
    stream = _read_stream(source)
    library = jpeglib()
    with tempfile.TemporaryDirectory(prefix="inpaint-") as name:
        folder = Path(name)
        _check_disk_space(folder, source, touched.size)
        coefficients = _read_coefficients(library, stream.plain, folder)
        space = _COLOUR_SPACES[stream.colour_space]
        rewritten = _rewrite_blocks(coefficients, space, pixels, touched)
        body = _write_coefficients(library, coefficients, stream, folder)
    blocks = sum(component.size for component in rewritten)
    return Spliced(
        data=b"".join([SOI, metadata, *stream.adobe, body, EOI]),
        reach=_reach(coefficients, rewritten, touched.shape),
        copied=1 - sum(int(component.sum()) for component in rewritten) / blocks,
    )


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """A file's segments, each from its marker on.

    plain: a file of all that its pixels need. adobe: the APP14 segments. tables: quantisation.
    """

    plain: bytes
    has_jfif: bool
    adobe: tuple[bytes, ...]
    tables: tuple[bytes, ...]
    frame: bytes

    @property
    def progressive(self) -> bool:
        return self.frame[1] == PROGRESSIVE

    @property
    def component_ids(self) -> bytes:
        return self.frame[10::3]

    @property
    def colour_space(self) -> str:
        """A key of _COLOUR_SPACES, by libjpeg's rules; jpeglib does not read these segments."""
        adobe = [part for part in self.adobe if part[4:9] == b"Adobe" and len(part) >= 16]
        transform = adobe[-1][15] if adobe else None
        if len(self.component_ids) == 4:
            return "CMYK" if transform in (None, 0) else "YCCK"
        if len(self.component_ids) == 1:
            return "grey"
        is_rgb = transform == 0 if adobe else self.component_ids == b"RGB"
        return "RGB" if is_rgb and not self.has_jfif else "YCC"


def _read_stream(data: bytes) -> _Stream:
    """Splits the file into segments; raises CannotSplice for whatever would make libjpeg give up.

    libjpeg as jpeglib builds it ends the whole process on a fatal error.
    """
    parts = _split(data)
    frames = [part for part in parts if part[1] in FRAMES]
    scans = [part for part in parts if part[1] == START_OF_SCAN]
    if len(frames) != 1 or not scans:
        raise CannotSplice("it has no single frame with scans")
    _check_frame(frames[0])
    if frames[0][1] == PROGRESSIVE:
        _check_complete(frames[0], scans)
    first = parts.index(scans[0])
    if any(part[1] == QUANTISATION for part in parts[first:]):
        raise CannotSplice("it changes its quantisation between scans")
    needed = [part for part in parts if not _is_metadata(part)]
    return _Stream(
        plain=b"".join([SOI, *needed, EOI]),
        has_jfif=any(part[1] == APP0 and part[4:9] == b"JFIF\0" for part in parts[:first]),
        adobe=tuple(part for part in parts[:first] if part[1] == APP14),
        tables=tuple(part for part in parts[:first] if part[1] == QUANTISATION),
        frame=frames[0],
    )


def _split(data: bytes) -> list[bytes]:
    try:
        return [data[segment.start : segment.end] for segment in walk_segments(data)]
    except MarkerError as error:
        raise CannotSplice("it is damaged between its segments") from error


def _is_metadata(part: bytes) -> bool:
    return APP0 <= part[1] <= APP15 or part[1] == COMMENT


def _check_frame(frame: bytes) -> None:
    if frame[1] not in _HUFFMAN_FRAMES:
        raise CannotSplice("its pixels are arithmetic-coded or lossless")
    factors = frame[11::3]
    blocks = sum((factor >> 4) * (factor & 15) for factor in factors)
    if len(factors) > 1 and blocks > _MAX_BLOCKS:
        raise CannotSplice("its colours are sampled too finely to be written together")


def _check_complete(frame: bytes, scans: list[bytes]) -> None:
    """Raises CannotSplice if scans are missing: decoders then smooth from block to block."""
    missing = np.full((256, 64), 1)  # bits still to come, by component and coefficient
    for scan in scans:
        count = scan[4]
        low, high, bits = scan[5 + 2 * count : 8 + 2 * count]
        missing[list(scan[5 : 5 + 2 * count : 2]), low : high + 1] = bits & 15
    if missing[list(frame[10::3])].any():
        raise CannotSplice("its last progressive scans are missing")


def lacks_end(data: bytes) -> bool:
    """Whether nothing follows the last scan, not even the EOI marker."""
    if data.endswith(EOI):
        return False
    try:
        ends = [segment.end for segment in walk_segments(data)]
    except MarkerError:
        return False
    return bool(ends) and ends[-1] >= len(data)


def complete(data: bytes) -> tuple[bytes, bytes]:
    """The file that lacks EOI, with two endings that decode alike only if no pixel is missing.

    A decoder that needs more bits reads zeros in the first and other bits in the second.
    Raises CannotSplice if whole scans are missing.
    """
    _read_stream(data)
    cut = data.rstrip(b"\xff")
    return cut + EOI, cut + b"\x55\xaa" * 256 + EOI


def _check_disk_space(folder: Path, source: bytes, pixels: int) -> None:
    """Raises StorageUnavailable: on a full disk libjpeg would end the process."""
    if shutil.disk_usage(folder).free < 4 * len(source) + 4 * pixels:
        raise StorageUnavailable(f"no room for temporary files in {folder.parent}; free some")


def _read_coefficients(library: Any, plain: bytes, folder: Path) -> Any:
    """jpeglib's DCTJPEG of a file, loaded."""
    path = folder / "source.jpg"
    path.write_bytes(plain)
    with _LOCK:
        library.version.set(_READER)
        try:
            coefficients = library.read_dct(path)
            coefficients.load()
        except OSError as error:
            raise CannotSplice("its coefficients cannot be read") from error
    # The range of 8-bit baseline coefficients: libjpeg's encoder gives up on larger ones.
    for blocks in _components(coefficients):
        flat = blocks.reshape(-1, 64)
        if flat[:, 0].min() < -1024 or flat.max() > 1023 or flat[:, 1:].min() < -1023:
            raise CannotSplice("its coefficients are out of range")
    return coefficients


def _components(coefficients: Any) -> list[Blocks]:
    c = coefficients
    return [c.Y, c.Cb, c.Cr, c.K][: c.num_components]


def _subsampling(coefficients: Any) -> list[tuple[int, int]]:
    """(down, across), the pixels per sample, of each component."""
    if coefficients.num_components == 1:
        return [(1, 1)]
    finest = coefficients.samp_factor.max(axis=0)
    return [(int(down), int(across)) for down, across in finest // coefficients.samp_factor]


def _rewrite_blocks(
    coefficients: Any, space: _ColourSpace, pixels: NDArray[Any], touched: Mask
) -> list[Mask]:
    """Writes the touched pixels into the coefficients in place.

    Returns (rows, columns) of each component, True where a block was rewritten.
    """
    weights, offsets = space
    pixels = pixels.reshape(*touched.shape, -1)
    rewritten = []
    components = zip(_components(coefficients), _subsampling(coefficients), strict=True)
    for number, (blocks, factor) in enumerate(components):
        is_touched = _touched_blocks(touched, blocks.shape[:2], factor)
        table = np.asarray(coefficients.get_component_qt(number), np.float64)
        places = np.argwhere(is_touched)
        for start in range(0, len(places), _CHUNK_BLOCKS):
            rows, columns = places[start : start + _CHUNK_BLOCKS].T
            window = _block_pixels(rows, columns, factor, touched.shape)
            targets = pixels[window] @ weights[:, number] + offsets[number]
            blocks[rows, columns] = _replace_samples(
                blocks[rows, columns], table, targets, touched[window], factor
            )
        rewritten.append(is_touched)
    return rewritten


def _touched_blocks(touched: Mask, grid: tuple[int, ...], factor: tuple[int, int]) -> Mask:
    """(rows, columns), True where a block holds a touched pixel."""
    (rows, columns), (down, across) = grid, factor
    padded = np.zeros((rows * 8 * down, columns * 8 * across), np.bool_)
    padded[: touched.shape[0], : touched.shape[1]] = touched
    return np.asarray(padded.reshape(rows, 8 * down, columns, 8 * across).any(axis=(1, 3)))


def _block_pixels(
    rows: NDArray[np.intp],
    columns: NDArray[np.intp],
    factor: tuple[int, int],
    shape: tuple[int, ...],
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Indices of the (n, h, w) pixels of n blocks; beyond the image its edge pixels repeat."""
    (down, across), (height, width) = factor, shape
    ys = np.minimum(rows[:, None] * 8 * down + np.arange(8 * down), height - 1)
    xs = np.minimum(columns[:, None] * 8 * across + np.arange(8 * across), width - 1)
    return ys[:, :, None], xs[:, None, :]


def _replace_samples(
    blocks: Blocks, table: Floats, targets: Floats, touched: Mask, factor: tuple[int, int]
) -> Blocks:
    """(n, 8, 8) coefficients with the touched samples at their targets, the others unchanged.

    targets, touched: (n, 8 down, 8 across).
    """
    split = (len(blocks), 8, factor[0], 8, factor[1])
    replaced = touched.reshape(split).any(axis=(2, 4))
    new = targets.reshape(split).mean(axis=(2, 4)) - 128
    samples = np.where(replaced, new, _DCT.T @ (blocks * table) @ _DCT)
    # The millionth makes ties round alike on every processor, whatever its order of summation.
    quantised = np.floor(_DCT @ samples @ _DCT.T / np.maximum(table, 1) + (0.5 + 1e-6))
    return np.clip(quantised, -1023, 1023).astype(np.int16)


def _write_coefficients(library: Any, coefficients: Any, stream: _Stream, folder: Path) -> bytes:
    """Everything after the metadata and before EOI."""
    if coefficients.num_components <= 3:
        written = _write_file(library, coefficients, folder, progressive=stream.progressive)
        return b"".join(part for part in _split(written) if not _is_metadata(part))
    # jpeglib does not write a fourth component, so each becomes a scan of a grey file.
    scans: list[bytes] = []
    for blocks, identity in zip(_components(coefficients), stream.component_ids, strict=True):
        scans += _component_scans(library, blocks, identity, stream, folder)
    return b"".join([*stream.tables, stream.frame, *scans])


def _component_scans(
    library: Any, blocks: Blocks, identity: int, stream: _Stream, folder: Path
) -> list[bytes]:
    """The scans of one component, with its Huffman tables."""
    grey = library.from_dct(Y=blocks, qt=50)
    written = _write_file(library, grey, folder, progressive=False)
    if stream.progressive:
        grey = _read_coefficients(library, written, folder)
        written = _write_file(library, grey, folder, progressive=True)
    scans = []
    for part in _split(written):
        if part[1] == START_OF_SCAN:
            scans.append(part[:5] + bytes([identity]) + part[6:])
        elif not _is_metadata(part) and part[1] != QUANTISATION and part[1] not in FRAMES:
            scans.append(part)
    return scans


def _write_file(library: Any, coefficients: Any, folder: Path, *, progressive: bool) -> bytes:
    """The file of jpeglib's DCTJPEG, with its own quantisation tables and without metadata."""
    path = folder / "result.jpg"
    coefficients.markers, coefficients.qt = None, 50 if coefficients.content is None else -1
    with _LOCK:
        library.version.set(_PROGRESSIVE_WRITER if progressive else _BASELINE_WRITER)
        coefficients.write_dct(str(path), flags=[] if progressive else ["OPTIMIZE_CODING"])
    return path.read_bytes()


def _reach(coefficients: Any, rewritten: list[Mask], shape: tuple[int, ...]) -> Mask:
    """(H, W), True where a decoder computes a pixel from any rewritten block."""
    reach = np.zeros(shape, np.bool_)
    for blocks, (down, across) in zip(rewritten, _subsampling(coefficients), strict=True):
        samples = blocks.repeat(8, axis=0).repeat(8, axis=1)
        # Decoders interpolate subsampled chroma from the neighbouring sample.
        if down > 1:
            samples = _grow_rows(samples)
        if across > 1:
            samples = _grow_rows(samples.T).T
        upsampled = samples.repeat(down, axis=0).repeat(across, axis=1)
        reach |= upsampled[: shape[0], : shape[1]]
    return reach


def _grow_rows(samples: Mask) -> Mask:
    """One row more above and below."""
    grown = samples.copy()
    grown[1:] |= samples[:-1]
    grown[:-1] |= samples[1:]
    return grown
