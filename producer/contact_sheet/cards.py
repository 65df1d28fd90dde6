"""The contact sheet's cards: one job each, with its images read, cropped and reduced."""

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

from producer.reports import RankedJob
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
CACHED_MASKS = 4
# A close-up shows at most this share of each side, and at least so many of the image's pixels.
CLOSE_UP_MAX_SHARE = 0.6
CLOSE_UP_MIN_PX = 96
# The margin around the marks, as a share of their own size.
CLOSE_UP_MARGIN = 0.35
SCATTERED_SHARE = 1 / 3
SEARCH_GRID = 512
# A larger profile is a printer's; it would outweigh the images in the page.
MAX_PROFILE_BYTES = 16 * 1024


@dataclass(frozen=True, kw_only=True)
class View:
    """The same part of the image before and after, and what was repainted; of equal sizes.

    before, after: RGB or RGBA; after is None where nothing was published. mask: mode L,
    255 = repainted; None if unknown.
    """

    before: Image.Image | None
    after: Image.Image | None
    mask: Image.Image | None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A job with its images. close_up: None where the whole image shows the marks well enough.

    params: those that differ from the submission's usual ones. notes: what could not be shown,
    and why.
    """

    job: RankedJob
    params: Mapping[str, Any]
    whole: View
    close_up: View | None
    notes: tuple[str, ...]


def usual_params(params_sample: Iterable[str]) -> dict[str, Any]:
    """Return the values that more than half of these jobs have. params_sample: JSON."""
    sample = [json.loads(text) for text in params_sample]
    usual = {}
    for name in sorted({name for params in sample for name in params}):
        counts = Counter(json.dumps(params.get(name)) for params in sample)
        value, count = counts.most_common(1)[0]
        if 2 * count > len(sample):
            usual[name] = json.loads(value)
    return usual


def build_cards(
    jobs: Sequence[RankedJob], usual: Mapping[str, Any], storage: Storage, settings: Settings
) -> Iterator[Card]:
    """Yield a card per job, in order; the images of ``THREADS`` jobs are in memory at a time."""
    builder = CardBuilder(storage, settings)
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(jobs), THREADS):
            batch = jobs[start : start + THREADS]
            yield from pool.map(lambda job: builder.build(job, usual), batch)


class CardBuilder:
    """Reads a job's files. What cannot be read becomes a note on the card, not an error."""

    def __init__(self, storage: Storage, settings: Settings) -> None:
        self._storage = storage
        self._settings = settings
        # All rows often share one mask: it is read and decoded once.
        self._cached_mask = lru_cache(CACHED_MASKS)(self._read_mask)

    def build(self, job: RankedJob, usual: Mapping[str, Any]) -> Card:
        notes: list[str] = []
        before = self._before(job, notes)
        after = self._after(job, notes) if job.state == "succeeded" else None
        mask = self._mask(job, before, notes) if before else None
        if before and after and before.size != after.size:
            notes.append("image {}x{}, result {}x{}".format(*before.size, *after.size))
        box = close_up_box(mask) if mask is not None else None
        params = json.loads(job.params)
        return Card(
            job=job,
            params={name: value for name, value in params.items() if usual.get(name) != value},
            whole=_view(before, after, mask, None),
            close_up=_view(before, after, mask, box) if box else None,
            notes=tuple(notes),
        )

    def _before(self, job: RankedJob, notes: list[str]) -> DecodedImage | None:
        try:
            image, version = self._read_image(job.image)
        except InpaintError as error:
            notes.append(f"no image: {error}")
            return None
        if version == job.output_version and job.image == job.output:
            notes.append("the result was written over its image; both sides show it")
        elif job.image_version and version != job.image_version:
            notes.append("the image was changed after this job read it")
        return image

    def _after(self, job: RankedJob, notes: list[str]) -> DecodedImage | None:
        try:
            image, version = self._read_image(job.output)
        except InpaintError as error:
            notes.append(f"no result: {error}")
            return None
        if job.output_version and version != job.output_version:
            notes.append("the output was overwritten after this job wrote it")
        return image

    def _mask(self, job: RankedJob, image: DecodedImage, notes: list[str]) -> Mask | None:
        """Return (H, W) bool, the union of all passes' masks; None if none could be read."""
        loaded = []
        for pass_mask, params in Params.from_json(job.params, seed=job.seed).all_passes():
            location = pass_mask or job.mask
            try:
                loaded.append(masks.load(location, image, params, read_file=self._cached_mask))
            except InpaintError as error:
                notes.append(f"no mask: {error}")
        return np.logical_or.reduce(loaded) if loaded else None

    def _read_image(self, uri: str) -> tuple[DecodedImage, str]:
        """Return the image and its object's version."""
        stored = self._storage.get(uri, max_bytes=self._settings.max_object_bytes)
        return images.decode(stored.data, max_pixels=self._settings.max_pixels), stored.version

    def _read_mask(self, uri: str) -> masks.Grey:
        data = self._storage.get(uri, max_bytes=self._settings.max_object_bytes).data
        return masks.decode_mask(data, max_pixels=self._settings.max_pixels)


# --- the close-up's box ----------------------------------------------------------------------


def close_up_box(mask: Mask) -> Box | None:
    """Return a box around the marks with a margin, in the image's aspect.

    Marks too far apart for one close-up give the box with the most of them. None if nothing
    is repainted, or the image is so small that a close-up would show no more.
    """
    height, width = mask.shape
    marks = masks.bounding_box(mask)
    min_share = CLOSE_UP_MIN_PX / max(width, height)
    if marks is None or min_share > CLOSE_UP_MAX_SHARE:
        return None
    share = max(marks.width / width, marks.height / height) * (1 + 2 * CLOSE_UP_MARGIN)
    centre = (marks.left + marks.right) // 2, (marks.top + marks.bottom) // 2
    if share > CLOSE_UP_MAX_SHARE:
        share = max(SCATTERED_SHARE, min_share)
        centre = _densest_centre(mask, share)
    share = max(share, min_share)
    box_width, box_height = max(1, round(share * width)), max(1, round(share * height))
    # Shifted inwards where it would cross the image's border.
    left = min(max(centre[0] - box_width // 2, 0), width - box_width)
    top = min(max(centre[1] - box_height // 2, 0), height - box_height)
    return Box(left, top, left + box_width, top + box_height)


def _densest_centre(mask: Mask, share: float) -> tuple[int, int]:
    """Return the centre (x, y) of the window with the most masked pixels.

    share: the window's part of each side. Every window's sum is the difference of four values
    of the integral image: S(b, r) - S(t, r) - S(b, l) + S(t, l).
    """
    # Subsampled: a 100-megapixel mask would need an integral image of 800 MB.
    step = max(1, max(mask.shape) // SEARCH_GRID)
    integral = np.pad(mask[::step, ::step], ((1, 0), (1, 0))).cumsum(0, np.int64).cumsum(1)
    height, width = (max(1, round(share * (side - 1))) for side in integral.shape)
    rows = integral[height:] - integral[:-height]
    sums = rows[:, width:] - rows[:, :-width]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(left + width // 2) * step, int(top + height // 2) * step


# --- reducing --------------------------------------------------------------------------------


def _view(
    before: DecodedImage | None, after: DecodedImage | None, mask: Mask | None, box: Box | None
) -> View:
    """Crop and reduce to at most ``SIDE_PX``. box: in the image's pixels; None for all of it."""
    reference = before or after
    if reference is None:
        return View(before=None, after=None, mask=None)
    crop = box or Box(0, 0, *reference.size)
    scale = min(1.0, SIDE_PX / max(crop.size))
    size = max(1, round(crop.width * scale)), max(1, round(crop.height * scale))
    return View(
        before=_reduce(before, _scale_box(crop, reference, before), size) if before else None,
        after=_reduce(after, _scale_box(crop, reference, after), size) if after else None,
        mask=_reduce_mask(mask, crop, size) if mask is not None else None,
    )


def _scale_box(box: Box, source: DecodedImage, target: DecodedImage) -> Box:
    """Return the same part of ``target``, which may be of another size than ``source``."""
    if source.size == target.size:
        return box
    x, y = (new / old for new, old in zip(target.size, source.size, strict=True))
    left, top = int(box.left * x), int(box.top * y)
    # At least one pixel, however small the target is.
    return Box(left, top, max(round(box.right * x), left + 1), max(round(box.bottom * y), top + 1))


def _reduce(image: DecodedImage, box: Box, size: tuple[int, int]) -> Image.Image:
    """Return RGB, or RGBA if the image has transparency, with the image's colour profile."""
    region = masks.slices(box)
    rgb = images.as_rgb(image.pixels[region], image.mode)
    full_size = Image.fromarray(np.ascontiguousarray(rgb))
    alpha = image.alpha()
    if alpha is not None:
        full_size.putalpha(Image.fromarray(np.ascontiguousarray(alpha[region])))
    reduced = full_size.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    # A CMYK or grey profile does not describe the RGB pixels that are written.
    if image.mode in ("RGB", "RGBA") and len(image.metadata.icc) <= MAX_PROFILE_BYTES:
        reduced.info["icc_profile"] = image.metadata.icc
    return reduced


def _reduce_mask(mask: Mask, box: Box, size: tuple[int, int]) -> Image.Image:
    """Return mode L, 255 where any pixel is repainted, so that thin lines stay visible."""
    crop = np.ascontiguousarray(mask[masks.slices(box)]).view(np.uint8) * 255
    reduced = Image.fromarray(crop).resize(size, Image.Resampling.BOX)
    return reduced.point(lambda value: 255 if value else 0)
