"""From a leased job to the bytes of its result: fetch, decode, paint, finish, encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256

import numpy as np

from shared import images, masks
from shared.engines import engine_spec
from shared.images import DecodedImage
from shared.images.provenance import Provenance, add_provenance
from shared.jobs import AttemptRecord, LeasedJob
from shared.jobs.submissions import join_versions
from shared.masks import Grey, Mask
from shared.params import Params, further_inputs, is_file
from shared.settings import Settings
from shared.storage import Storage
from workers.active_jobs import StageTimer
from workers.engines.protocol import Engine, Interruption
from workers.pipeline import plugins
from workers.pipeline.inpainting import Brush, MaskedPass, paint
from workers.pipeline.text_overlay import Lettering, draw, text_box
from workers.pixel_budget import PixelBudget


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What rendering needs of a worker."""

    settings: Settings
    storage: Storage
    engine: Engine
    room: PixelBudget = field(default_factory=PixelBudget)


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """replaces: the version that lay at the output before the work began; None: nothing."""

    data: bytes
    replaces: str | None


def render(
    kit: Kit,
    job: LeasedJob,
    record: AttemptRecord,
    interruption: Interruption,
    *,
    gates: bool = True,
) -> Rendered:
    """The result's file. gates: False takes the first seed's result, whatever it is like.

    Raises every InpaintError there is, but publishes nothing.
    """
    stage = StageTimer(record, interruption)
    with stage("fetch"):
        fetched = _fetch(kit, job, record)
    width, height = images.probe(fetched.image, max_pixels=kit.settings.max_pixels)
    with kit.room.holding(width * height, interruption):
        data = _result(kit, job, record, interruption, fetched, gates=gates)
    return Rendered(data=data, replaces=fetched.replaces)


def _result(
    kit: Kit,
    job: LeasedJob,
    record: AttemptRecord,
    interruption: Interruption,
    fetched: _Fetched,
    *,
    gates: bool,
) -> bytes:
    """All that needs decoded pixels: from the inputs' files to the result's."""
    stage = StageTimer(record, interruption)
    with stage("decode"):
        picture = images.decode(fetched.image, max_pixels=kit.settings.max_pixels)
        rounds = _rounds(kit.settings, job, picture, fetched.files)
        record.width, record.height = picture.size
        _check(job, picture, rounds, fetched.files)
    brush = Brush(
        engine=kit.engine,
        interruption=interruption,
        stage=stage,
        record=record,
        priority=job.priority,
    )
    params = job.params if gates else replace(job.params, gate="off")
    result = paint(brush, picture, rounds, params=params)
    if job.params.postprocess or job.params.text:
        with stage("finish"):
            result = _finished(job, result, rounds, fetched.files)
    with stage("encode"):
        data = _encoded(kit, job, result, record)
        record.result_sha256 = sha256(data).hexdigest()
    return data


@dataclass(frozen=True, kw_only=True)
class _Fetched:
    """files: masks and fonts by location."""

    image: bytes
    files: Mapping[str, bytes]
    replaces: str | None


def _fetch(kit: Kit, job: LeasedJob, record: AttemptRecord) -> _Fetched:
    cap = kit.settings.max_object_bytes
    before = kit.storage.stat(job.output)
    image = kit.storage.get(job.image, max_bytes=cap)
    record.image_sha256, record.image_version = sha256(image.data).hexdigest(), image.version
    places = [*([job.mask] if is_file(job.mask) else []), *further_inputs(job.params.to_json())]
    found = {place: kit.storage.get(place, max_bytes=cap) for place in places}
    record.mask_version = join_versions([one.version for one in found.values()])
    record.inputs = {place: sha256(one.data).hexdigest() for place, one in found.items()}
    record.mask_sha256 = record.inputs.pop(job.mask, None)
    return _Fetched(
        image=image.data,
        files={place: one.data for place, one in found.items()},
        replaces=before.version if before else None,
    )


def _rounds(
    settings: Settings, job: LeasedJob, picture: DecodedImage, files: Mapping[str, bytes]
) -> list[MaskedPass]:
    """The job's passes, each with its mask as it lies over the picture."""

    @cache
    def read_file(location: str) -> Grey:
        return masks.decode_mask(files[location], max_pixels=settings.max_pixels)

    rounds = []
    for named, params in job.params.all_passes():
        name = named or job.mask
        mask = masks.load(name, picture, params, read_file=read_file)
        # An inverted one keeps the holes and repaints what is opaque already.
        is_alpha = name == "alpha" and not params.mask_invert
        rounds.append(MaskedPass(mask=mask, params=params, is_alpha=is_alpha))
    return rounds


def _check(
    job: LeasedJob, picture: DecodedImage, rounds: Sequence[MaskedPass], files: Mapping[str, bytes]
) -> None:
    """Finds what would fail after painting, before it: painting is what costs."""
    params = job.params
    if params.postprocess:
        plugins.find(params.postprocess)
    if params.text:
        _lettered(params, picture, _repainted(rounds), files)
    fills_holes = any(one.is_alpha for one in rounds)
    if not fills_holes:
        images.check(picture, format=_output_format(job))


def _repainted(rounds: Sequence[MaskedPass]) -> Mask:
    union: Mask = np.logical_or.reduce([one.mask for one in rounds])
    return union


def _finished(
    job: LeasedJob, picture: DecodedImage, rounds: Sequence[MaskedPass], files: Mapping[str, bytes]
) -> DecodedImage:
    """What comes after painting: the user's plugin, then text."""
    params = job.params
    repainted = _repainted(rounds)
    if params.postprocess:
        picture = plugins.finish(picture, repainted, params)
    return _lettered(params, picture, repainted, files) if params.text else picture


def _lettered(
    params: Params, picture: DecodedImage, repainted: Mask, files: Mapping[str, bytes]
) -> DecodedImage:
    lettering = Lettering(
        text=params.text,
        box=text_box(params.text_box, repainted),
        font=files.get(params.text_font, b""),
        size=params.text_size,
        color=params.text_color,
        align=params.text_align,
    )
    return draw(picture, lettering)


def _encoded(kit: Kit, job: LeasedJob, picture: DecodedImage, record: AttemptRecord) -> bytes:
    format = _output_format(job)
    xmp = None
    if job.params.provenance and picture.touched is not None:
        note = Provenance(
            job=job.id,
            seed=job.params.seed if record.seed is None else record.seed,
            engine=_nameless(job.engine),
            revision=kit.engine.revision,
            params_json=_nameless_params(job.params).to_json(),
            trained=engine_spec(job.engine).is_trained,
        )
        xmp = add_provenance(picture.metadata.xmp, note)
    return images.encode(picture, format=format, quality=job.params.quality or None, xmp=xmp)


def _nameless_params(params: Params) -> Params:
    """Without folders and buckets: results are published, places are not."""
    passes = tuple(replace(one, mask=_nameless(one.mask)) for one in params.passes)
    return replace(params, passes=passes, text_font=_nameless(params.text_font))


def _nameless(location: str) -> str:
    kind, colon, place = location.partition(":")
    if kind == "diffusers" and place.startswith("/"):
        return kind + colon + place.rpartition("/")[2]
    return location.rpartition("/")[2] if "/" in location and is_file(location) else location


def _output_format(job: LeasedJob) -> str | None:
    """What was asked for, or what the output's name asks for; None: the image's own.

    The image may not be what its name says; a PNG called .jpg stays a PNG.
    """
    if job.params.format:
        return job.params.format.upper()
    asked = images.format_of(job.output)
    return None if asked == images.format_of(job.image) else asked
