"""Cards: one job each, with its pictures read, laid side by side and made small."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from sqlalchemy import RowMapping

from shared import images, masks
from shared.errors import InpaintError
from shared.geometry.box import Box
from shared.images import DecodedImage
from shared.masks import Mask
from shared.params import Params
from shared.settings import Settings
from shared.storage import Storage

SIDE_PX = 640
THREADS = 4
KEPT_MASKS = 4
CLOSE_UP = 0.6  # a close-up shows at most this share of each side
CLOSE_UP_PX = 96  # and at least this much of the picture
MARGIN = 0.35  # of the marks' own size, around them
SCATTERED = 1 / 3
GRID = 512
PROFILE_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class View:
    """The same place before and after, and what was repainted there; images of one size.

    after: None where nothing was published. mask: 255 = repainted; None: unknown.
    """

    before: Image.Image | None
    after: Image.Image | None
    mask: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """job: its row. params: those that differ from the submission's usual ones.

    notes: what could not be shown, and why.
    """

    job: RowMapping
    params: Mapping[str, Any]
    whole: View
    close_up: View | None
    notes: tuple[str, ...]


def usual_params(sample: Iterable[str]) -> dict[str, Any]:
    """The values that more than half of these jobs share. sample: params as JSON."""
    every = [json.loads(text) for text in sample]
    usual = {}
    for name in sorted({name for params in every for name in params}):
        counted = Counter(json.dumps(params.get(name)) for params in every)
        value, count = counted.most_common(1)[0]
        if 2 * count > len(every):
            usual[name] = json.loads(value)
    return usual


def cards(
    rows: Sequence[RowMapping], usual: Mapping[str, Any], storage: Storage, settings: Settings
) -> Iterator[Card]:
    """One after the other, in the rows' order; only a few jobs' pictures exist at a time."""
    desk = CardBuilder(storage, settings)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(rows), THREADS):
            batch = rows[start : start + THREADS]
            yield from pool.map(lambda row: desk.card(row, usual), batch)


class CardBuilder:
    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage = storage
        self._settings = settings
        # One mask for all rows is common; it is read and decoded once.
        self._mask_file = lru_cache(KEPT_MASKS)(self._read_mask)

    def card(self, job: RowMapping, usual: Mapping[str, Any]) -> Card:
        notes: list[str] = []
        before = self._before(job, notes)
        after = self._after(job, notes) if job["state"] == "succeeded" else None
        mask = self._mask(job, before, notes) if before else None
        if before and after and before.size != after.size:
            notes.append("image {}x{}, result {}x{}".format(*before.size, *after.size))
        place = close_up_place(mask) if mask is not None else None
        own = {k: v for k, v in json.loads(job["params"]).items() if usual.get(k) != v}
        return Card(
            job=job,
            params=own,
            whole=_view(before, after, mask, None),
            close_up=_view(before, after, mask, place) if place else None,
            notes=tuple(notes),
        )

    def _before(self, job: RowMapping, notes: list[str]) -> DecodedImage | None:
        try:
            picture, version = self._picture(job["image"])
        except InpaintError as error:
            notes.append(f"no image: {error}")
            return None
        if version == job["output_version"] and job["image"] == job["output"]:
            notes.append("the result was written over its image; both sides show it")
        elif job["image_version"] and version != job["image_version"]:
            notes.append("the image was changed after this job read it")
        return picture

    def _after(self, job: RowMapping, notes: list[str]) -> DecodedImage | None:
        try:
            picture, version = self._picture(job["output"])
        except InpaintError as error:
            notes.append(f"no result: {error}")
            return None
        if job["output_version"] and version != job["output_version"]:
            notes.append("the output was written by something else after this job")
        return picture

    def _mask(self, job: RowMapping, picture: DecodedImage, notes: list[str]) -> Mask | None:
        """(H, W) what the job's rounds repaint, one or the other; None: not one could be read."""
        found = []
        for name, params in Params.from_json(job["params"], seed=job["seed"]).all_passes():
            try:
                found.append(self._round(name or job["mask"], picture, params))
            except InpaintError as error:
                notes.append(f"no mask: {error}")
        return np.logical_or.reduce(found) if found else None

    def _round(self, name: str, picture: DecodedImage, params: Params) -> Mask:
        return masks.load(name, picture, params, read_file=self._mask_file)

    def _picture(self, uri: str) -> tuple[DecodedImage, str]:
        """The picture and its object's version."""
        found = self._storage.get(uri, max_bytes=self._settings.max_object_bytes)
        return images.decode(found.data, max_pixels=self._settings.max_pixels), found.version

    def _read_mask(self, uri: str) -> masks.Grey:
        data = self._storage.get(uri, max_bytes=self._settings.max_object_bytes).data
        return masks.decode_mask(data, max_pixels=self._settings.max_pixels)


# --- where to look ---------------------------------------------------------------------------


def close_up_place(mask: Mask) -> Box | None:
    """The marks with a margin, in the picture's own aspect; of scattered marks the densest part.

    None where nothing is repainted, or the picture is small enough as it is.
    """
    height, width = mask.shape
    tight = masks.bounding_box(mask)
    least = CLOSE_UP_PX / max(width, height)
    if tight is None or least > CLOSE_UP:
        return None
    share = max(tight.width / width, tight.height / height) * (1 + 2 * MARGIN)
    middle = (tight.left + tight.right) // 2, (tight.top + tight.bottom) // 2
    if share > CLOSE_UP:
        share = max(SCATTERED, least)
        middle = _densest(mask, share)
    share = max(share, least)
    size = max(1, round(share * width)), max(1, round(share * height))
    left, top = (
        min(max(at - side // 2, 0), whole - side)
        for at, side, whole in zip(middle, size, (width, height), strict=True)
    )
    return Box(left, top, left + size[0], top + size[1])


def _densest(mask: Mask, share: float) -> tuple[int, int]:
    """The middle, (x, y), of the window of that share of each side that holds most of the mask."""
    step = max(1, max(mask.shape) // GRID)
    sums = np.pad(mask[::step, ::step], ((1, 0), (1, 0))).cumsum(0, np.int64).cumsum(1)
    high, wide = (max(1, round(share * (side - 1))) for side in sums.shape)
    rows = sums[high:] - sums[:-high]
    held = rows[:, wide:] - rows[:, :-wide]
    top, left = np.unravel_index(int(held.argmax()), held.shape)
    return int(left + wide // 2) * step, int(top + high // 2) * step


# --- making it small -------------------------------------------------------------------------


def _view(
    before: DecodedImage | None, after: DecodedImage | None, mask: Mask | None, place: Box | None
) -> View:
    """place: in the image's pixels; None: all of it."""
    one = before or after
    if one is None:
        return View(before=None, after=None, mask=None)
    frame = place or Box(0, 0, *one.size)
    shrink = min(1.0, SIDE_PX / max(frame.size))
    size = max(1, round(frame.width * shrink)), max(1, round(frame.height * shrink))
    return View(
        before=_small(before, _within(frame, one, before), size) if before else None,
        after=_small(after, _within(frame, one, after), size) if after else None,
        mask=_small_mask(mask, frame, size) if mask is not None else None,
    )


def _within(frame: Box, of: DecodedImage, other: DecodedImage) -> Box:
    """The same place in a picture that may be larger or smaller."""
    if of.size == other.size:
        return frame
    x, y = (theirs / ours for theirs, ours in zip(other.size, of.size, strict=True))
    left, top = int(frame.left * x), int(frame.top * y)
    return Box(
        left, top, max(round(frame.right * x), left + 1), max(round(frame.bottom * y), top + 1)
    )


def _small(picture: DecodedImage, place: Box, size: tuple[int, int]) -> Image.Image:
    """RGB, or RGBA where something is transparent; with the picture's colour profile."""
    where = masks.slices(place)
    image = Image.fromarray(
        np.ascontiguousarray(images.as_rgb(picture.pixels[where], picture.mode))
    )
    alpha = picture.alpha()
    if alpha is not None:
        image.putalpha(Image.fromarray(np.ascontiguousarray(alpha[where])))
    small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if picture.mode in ("RGB", "RGBA") and len(picture.metadata.icc) <= PROFILE_BYTES:
        small.info["icc_profile"] = picture.metadata.icc
    return small


def _small_mask(mask: Mask, place: Box, size: tuple[int, int]) -> Image.Image:
    """255 where any of the pixels is repainted, so that hairlines stay."""
    part = Image.fromarray(np.ascontiguousarray(mask[masks.slices(place)]).view(np.uint8) * 255)
    return part.resize(size, Image.Resampling.BOX).point(lambda value: 255 if value else 0)
