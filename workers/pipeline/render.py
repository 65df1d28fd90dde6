"""From a leased job to the bytes of its result: fetch, decode, inpaint, finish, encode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256

import numpy as np

from shared import images, masks
from shared.engines import engine_spec
from shared.images import DecodedImage
from shared.images.provenance import Provenance, add_provenance
from shared.jobs import LeasedJob
from shared.jobs.submissions import join_versions
from shared.masks import Grey, Mask
from shared.params import Params, further_inputs, is_file
from shared.settings import Settings
from workers.job_context import JobContext
from workers.pipeline import plugins
from workers.pipeline.inpainting import MaskedPass, inpaint
from workers.pipeline.text_overlay import TextOverlay, draw_text, resolve_text_box
from workers.pixel_budget import BYTES_PER_PIXEL
from workers.worker_context import PipelineContext


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """data: the result's file. replaced_version: of the output as it was when the work began.

    A replaced_version of None means that there was no output.
    """

    data: bytes
    replaced_version: str | None


def render(worker: PipelineContext, job: JobContext) -> Rendered:
    """Make the file of a job's result, and fill in the attempt's record. Publishes nothing.

    May raise any InpaintError.
    """
    with job.stage("fetch"):
        inputs = _fetch(worker, job)
    with worker.pixel_budget.reserve(_count_pixels(worker, job, inputs), job.interruption):
        data = _render_pixels(worker, job, inputs)
    return Rendered(data=data, replaced_version=inputs.output_version)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """image: its file. files: masks and fonts by location. output_version: None if absent."""

    image: bytes
    files: Mapping[str, bytes]
    output_version: str | None


def _fetch(worker: PipelineContext, job: JobContext) -> _Inputs:
    leased, record, max_bytes = job.leased, job.record, worker.settings.max_object_bytes
    # Before the inputs: the put then notices every change of the output from here on.
    output = worker.storage.stat(leased.output)
    image = worker.storage.get(leased.image, max_bytes=max_bytes)
    record.image_sha256, record.image_version = sha256(image.data).hexdigest(), image.version
    mask = [leased.mask] if is_file(leased.mask) else []
    locations = [*mask, *further_inputs(job.params.to_json())]
    objects = {
        location: worker.storage.get(location, max_bytes=max_bytes) for location in locations
    }
    record.mask_version = join_versions([item.version for item in objects.values()])
    record.inputs = {location: sha256(item.data).hexdigest() for location, item in objects.items()}
    record.mask_sha256 = record.inputs.pop(leased.mask, None)
    return _Inputs(
        image=image.data,
        files={location: item.data for location, item in objects.items()},
        output_version=output.version if output else None,
    )


def _count_pixels(worker: PipelineContext, job: JobContext, inputs: _Inputs) -> int:
    """The pixels that a job's memory is estimated by: of its image, larger masks, and fonts.

    The budget's bytes per pixel include a mask of the image's size; of larger ones the rest
    counts. A font counts as the pixels that take as many bytes. Raises what decoding would raise
    for a header.
    """
    max_pixels = worker.settings.max_pixels
    width, height = images.probe(inputs.image, max_pixels=max_pixels)
    image_pixels = pixels = width * height
    for location, data in inputs.files.items():
        if location == job.params.text_font:
            pixels += len(data) // BYTES_PER_PIXEL
        else:
            width, height = masks.probe_mask(data, max_pixels=max_pixels)
            pixels += max(0, width * height - image_pixels)
    return pixels


def _render_pixels(worker: PipelineContext, job: JobContext, inputs: _Inputs) -> bytes:
    """Every step that holds decoded pixels: from the inputs' files to the result's file."""
    with job.stage("decode"):
        image = images.decode(inputs.image, max_pixels=worker.settings.max_pixels)
        passes = _read_passes(worker.settings, job.leased, image, inputs.files)
        job.record.width, job.record.height = image.size
        _check_last_steps(job.leased, image, passes, inputs.files)
    result = inpaint(worker, job, image, passes)
    if job.params.postprocess or job.params.text:
        with job.stage("finish"):
            result = _apply_plugin_and_text(job.params, result, passes, inputs.files)
    with job.stage("encode"):
        data = _encode(worker, job, result)
        job.record.result_sha256 = sha256(data).hexdigest()
    return data


def _read_passes(
    settings: Settings, job: LeasedJob, image: DecodedImage, files: Mapping[str, bytes]
) -> list[MaskedPass]:
    """The job's passes, each with its mask at the image's size."""

    @cache  # passes often share a mask
    def read_file(location: str) -> Grey:
        return masks.decode_mask(files[location], max_pixels=settings.max_pixels)

    passes = []
    for pass_mask, params in job.params.all_passes():
        location = pass_mask or job.mask
        mask = masks.load(location, image, params, read_file=read_file)
        # Inverted, the alpha mask selects the opaque pixels and leaves the holes transparent.
        is_alpha = location == "alpha" and not params.mask_invert
        passes.append(MaskedPass(mask=mask, params=params, is_alpha=is_alpha))
    return passes


def _check_last_steps(
    job: LeasedJob, image: DecodedImage, passes: Sequence[MaskedPass], files: Mapping[str, bytes]
) -> None:
    """Raise now what plugin, text and encoding would raise after inpainting, the costly step."""
    params = job.params
    if params.postprocess:
        plugins.find(params.postprocess)
    if params.text:
        _draw_text(params, image, _union(passes), files)
    # Holes that are filled leave no alpha for the output's format to reject.
    fills_holes = any(masked_pass.is_alpha for masked_pass in passes)
    if not fills_holes:
        images.check(image, format=_output_format(job))


def _union(passes: Sequence[MaskedPass]) -> Mask:
    union: Mask = np.logical_or.reduce([masked_pass.mask for masked_pass in passes])
    return union


def _apply_plugin_and_text(
    params: Params, image: DecodedImage, passes: Sequence[MaskedPass], files: Mapping[str, bytes]
) -> DecodedImage:
    mask = _union(passes)
    if params.postprocess:
        image = plugins.apply(image, mask, params)
    return _draw_text(params, image, mask, files) if params.text else image


def _draw_text(
    params: Params, image: DecodedImage, mask: Mask, files: Mapping[str, bytes]
) -> DecodedImage:
    overlay = TextOverlay(
        text=params.text,
        box=resolve_text_box(params.text_box, mask),
        font=files.get(params.text_font, b""),
        size=params.text_size,
        color=params.text_color,
        align=params.text_align,
    )
    return draw_text(image, overlay)


def _encode(worker: PipelineContext, job: JobContext, image: DecodedImage) -> bytes:
    params, seed = job.params, job.record.seed
    xmp = None
    # A result without a changed pixel is not generated, whatever the parameters say.
    if params.provenance and image.touched is not None:
        provenance = Provenance(
            job=job.id,
            seed=params.seed if seed is None else seed,
            engine=_without_folder(job.leased.engine),
            revision=worker.engine.revision,
            params_json=_without_folders(params).to_json(),
            trained=engine_spec(job.leased.engine).is_trained,
        )
        xmp = add_provenance(image.metadata.xmp, provenance)
    quality = params.quality or None
    return images.encode(image, format=_output_format(job.leased), quality=quality, xmp=xmp)


def _without_folders(params: Params) -> Params:
    """Results are published; the folders and buckets of their inputs are not."""
    passes = tuple(replace(spec, mask=_without_folder(spec.mask)) for spec in params.passes)
    return replace(params, passes=passes, text_font=_without_folder(params.text_font))


def _without_folder(location: str) -> str:
    kind, colon, path = location.partition(":")
    if kind == "diffusers" and path.startswith("/"):
        return kind + colon + path.rpartition("/")[2]
    return location.rpartition("/")[2] if "/" in location and is_file(location) else location


def _output_format(job: LeasedJob) -> str | None:
    """The parameter's format, else that of the output's name; None for the image's own.

    Also None if both names have the same format: the image's bytes may be of another one, and
    a PNG called .jpg stays a PNG.
    """
    if job.params.format:
        return job.params.format.upper()
    named = images.format_of(job.output)
    return None if named == images.format_of(job.image) else named
