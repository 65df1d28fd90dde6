"""Restart markers for baseline JPEG, which jpeglib does not write: the scan coded once more.

The coefficients stay; only their entropy code is new. AC codes are those of the file that
libjpeg wrote, DC codes the typical ones of ITU-T T.81, K.3.1, since a restart needs categories
of difference that the file may not have had.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.int16]  # (rows, columns, 8, 8)
Numbers = NDArray[np.int64]

_FRAMES, _CODES, _SCAN, _INTERVAL = (0xC0, 0xC1), 0xC4, 0xDA, 0xDD
_ZIGZAG = np.array(
    sorted(range(64), key=lambda n: (n // 8 + n % 8, n // 8 if (n // 8 + n % 8) % 2 else n % 8))
)
# How many DC codes there are of 1 to 16 bits, for brightness and for colour; then 0 to 11.
_DC_COUNTS = ((0, 1, 5, *(1,) * 6, *(0,) * 7), (0, 3, *(1,) * 9, *(0,) * 5))
_END_OF_BLOCK, _SIXTEEN_ZEROS = 0x00, 0xF0
_CHUNK_MCUS = 1 << 13  # worked on at once


def inserted(parts: Sequence[bytes], components: Sequence[Blocks], interval: int) -> list[bytes]:
    """The segments of a baseline file of one scan, with a restart after each interval of MCUs.

    Raises KeyError where the file's own codes do not hold what its scan needs.
    """
    frame = next(part for part in parts if part[1] in _FRAMES)
    scan = next(part for part in parts if part[1] == _SCAN)
    count = scan[4]
    head = scan[: 8 + 2 * count]
    chosen = [(byte >> 4, byte & 15) for byte in scan[6 : 5 + 2 * count : 2]]
    codes = _codes(parts)
    mcus, owners = _in_order(components, [(one >> 4, one & 15) for one in frame[11::3]])
    tables = [(codes[0, dc], codes[1, ac]) for dc, ac in chosen]
    step = interval * max(1, _CHUNK_MCUS // interval)
    pieces: list[bytes] = []
    for start in range(0, len(mcus), step):
        tokens = _tokens(mcus[start : start + step].astype(np.int64), owners, interval)
        pieces += _pieces(*_coded(tokens, tables), tokens.interval)
    data = bytearray(pieces[0])
    for number, piece in enumerate(pieces[1:]):
        data += bytes([0xFF, 0xD0 + number % 8]) + piece
    others = [part for part in parts if part[1] not in (_CODES, _SCAN, _INTERVAL)]
    own = [part for part in parts if part[1] == _CODES]
    restart = struct.pack(">BBHH", 0xFF, _INTERVAL, 4, interval)
    return [*others, *own, *map(_dc_segment, (0, 1)), restart, head + bytes(data)]


def _dc_segment(number: int) -> bytes:
    counts = _DC_COUNTS[number]
    return struct.pack(">BBHB", 0xFF, _CODES, 31, number) + bytes(counts) + bytes(range(12))


def _codes(parts: Sequence[bytes]) -> dict[tuple[int, int], tuple[Numbers, Numbers]]:
    """(class, number) of each table to its codes and their lengths, by symbol; length 0: none."""
    found = {}
    for segment in (*(part for part in parts if part[1] == _CODES), *map(_dc_segment, (0, 1))):
        at = 4
        while at < len(segment):
            kind, counts = segment[at], segment[at + 1 : at + 17]
            symbols = segment[at + 17 : at + 17 + sum(counts)]
            found[kind >> 4, kind & 15] = _canonical(counts, symbols)
            at += 17 + len(symbols)
    return found


def _canonical(counts: bytes, symbols: bytes) -> tuple[Numbers, Numbers]:
    """T.81, C.2: codes of a length count up, and go on doubled at the next length."""
    codes, lengths = np.zeros(256, np.int64), np.zeros(256, np.int64)
    code, place = 0, 0
    for length, number in enumerate(counts, 1):
        for symbol in symbols[place : place + number]:
            codes[symbol], lengths[symbol] = code, length
            code += 1
        place, code = place + number, code << 1
    return codes, lengths


def _in_order(
    components: Sequence[Blocks], factors: Sequence[tuple[int, int]]
) -> tuple[NDArray[np.int16], NDArray[np.intp]]:
    """(MCUs, blocks, 64) coefficients as a scan has them, and whose each block of an MCU is.

    factors: (across, down) of each component. Blocks past a component's edge repeat its last
    DC and nothing else.
    """
    if len(components) == 1:
        factors = [(1, 1)]
    across = max(-(-one.shape[1] // h) for one, (h, _) in zip(components, factors, strict=True))
    down = max(-(-one.shape[0] // v) for one, (_, v) in zip(components, factors, strict=True))
    ordered, owners = [], []
    for number, (blocks, (h, v)) in enumerate(zip(components, factors, strict=True)):
        rows, columns = blocks.shape[:2]
        flat = blocks.reshape(rows, columns, 64)[..., _ZIGZAG]
        missing = ((0, down * v - rows), (0, across * h - columns), (0, 0))
        padded = np.pad(flat, missing, mode="edge")
        padded[rows:, :, 1:] = 0
        padded[:, columns:, 1:] = 0
        split = padded.reshape(down, v, across, h, 64).swapaxes(1, 2)
        ordered.append(split.reshape(down * across, v * h, 64))
        owners += [number] * (v * h)
    return np.concatenate(ordered, axis=1), np.array(owners)


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    """One per Huffman code, in the scan's order. is_ac: of which class its table is; owner: the
    component; size: how many bits of value follow."""

    symbol: Numbers
    is_ac: NDArray[np.bool_]
    owner: Numbers
    value: Numbers
    size: Numbers
    interval: Numbers


def _tokens(mcus: Numbers, owners: NDArray[np.intp], interval: int) -> _Tokens:
    """T.81, F.1.2: differences of DC, then each AC value behind its run of zeros."""
    count, width = mcus.shape[:2]
    dc = _differences(mcus[..., 0], owners, interval).ravel()
    flat = mcus.reshape(-1, 64)[:, 1:]
    block, place = np.nonzero(flat)
    before = np.where(np.diff(block, prepend=-1) == 0, np.roll(place, 1), -1)
    run, ac = place - before - 1, flat[block, place]
    zeros = np.repeat(np.arange(len(run)), run // 16)
    last = np.full(len(flat), -1)
    last[block] = place
    ends = np.nonzero(last < 62)[0]
    sizes = _bits(dc), _bits(ac)
    nothing = np.zeros(len(zeros) + len(ends), np.int64)
    key = np.concatenate(
        [
            *(np.arange(len(dc)) * 256, block * 256 + 2 * place + 2),
            *(block[zeros] * 256 + 2 * place[zeros] + 1, ends * 256 + 255),
        ]
    )
    order = np.argsort(key, kind="stable")
    marks = [np.full(len(zeros), _SIXTEEN_ZEROS), np.full(len(ends), _END_OF_BLOCK)]
    of_block = key[order] // 256
    return _Tokens(
        symbol=np.concatenate([sizes[0], (run % 16 << 4) | sizes[1], *marks])[order],
        is_ac=(np.arange(len(key)) >= len(dc))[order],
        owner=np.tile(owners, count)[of_block],
        value=np.concatenate([dc, ac, nothing])[order],
        size=np.concatenate([*sizes, nothing])[order],
        interval=of_block // width // interval,
    )


def _differences(dc: Numbers, owners: NDArray[np.intp], interval: int) -> Numbers:
    """(MCUs, blocks) each DC less the one before it of its component, 0 after a restart."""
    result = np.empty_like(dc)
    for number in range(int(owners.max()) + 1):
        mine = dc[:, owners == number]
        before = np.roll(mine.ravel(), 1).reshape(mine.shape)
        before[::interval, 0] = 0
        result[:, owners == number] = mine - before
    return result


def _bits(values: Numbers) -> Numbers:
    """How many bits the magnitude has."""
    sizes: Numbers = np.frexp(np.abs(values).astype(np.float64))[1].astype(np.int64)
    return sizes


def _coded(
    tokens: _Tokens, tables: Sequence[tuple[tuple[Numbers, Numbers], ...]]
) -> tuple[Numbers, Numbers]:
    """The bits of each token as a number, and how many they are."""
    codes, lengths = (
        np.array([[table[is_ac][part] for is_ac in (0, 1)] for table in tables]) for part in (0, 1)
    )
    where = tokens.owner, tokens.is_ac.astype(np.intp), tokens.symbol
    if (lengths[where] == 0).any():
        raise KeyError("a symbol without a code")
    extra = np.where(tokens.value < 0, tokens.value + (1 << tokens.size) - 1, tokens.value)
    return (codes[where] << tokens.size) | extra, lengths[where] + tokens.size


def _pieces(values: Numbers, lengths: Numbers, interval: Numbers) -> Iterator[bytes]:
    """The bytes of each interval: filled up with ones, and a zero behind each byte of ones."""
    starts = np.flatnonzero(np.diff(interval, prepend=-1))
    totals = np.add.reduceat(lengths, starts)
    padding = -totals % 8
    ends = np.append(starts[1:], len(values))
    packed = _packed(np.insert(values, ends, (1 << padding) - 1), np.insert(lengths, ends, padding))
    edges = np.cumsum(totals + padding) // 8
    for low, high in pairwise([0, *edges.tolist()]):
        yield packed[low:high].replace(b"\xff", b"\xff\0")


def _packed(values: Numbers, lengths: Numbers) -> bytes:
    token = np.repeat(np.arange(len(values)), lengths)
    shift = np.cumsum(lengths)[token] - 1 - np.arange(len(token))
    return np.packbits((values[token] >> shift & 1).astype(np.uint8)).tobytes()
