"""The engines: one EngineSpec each, with everything that is known before an engine is loaded.

A new engine is a module with a ``load`` function and one entry in ``ENGINES``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared.errors import ParameterError


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What producer and workers need to know about an engine before it is loaded.

    kind: the engine's name up to the first colon. usage: the name as a user writes it.
    loader: ``module:function``; the function takes the engine's name and EngineOptions and
    returns an Engine. library: the module that is missing if ``extra`` is not installed.
    takes_model: the name continues with ``:MODEL``.
    device: what one worker process runs on.
    any_size: accepts regions of any size; otherwise a region consists of windows of
    ``width`` x ``height`` pixels.
    has_seeds: the result depends on the seed. is_trained: the result comes from a trained model;
    its provenance metadata says so.
    mask_defaults: defaults of mask parameters for this engine, in pixels.
    jobs_per_batch_row: concurrent jobs of a worker process per row of the engine's largest batch;
    0: one per CPU core.
    gate_remedy: the advice in the message of a failed quality gate.
    """

    kind: str
    usage: str
    loader: str
    library: str
    extra: str
    takes_model: bool = False
    device: Literal["cpu", "cuda"]
    any_size: bool
    has_seeds: bool
    is_trained: bool
    mask_defaults: Mapping[str, int] = field(default_factory=dict)
    jobs_per_batch_row: int
    gate_remedy: str


_OPENCV = EngineSpec(
    kind="opencv",
    usage="opencv",
    loader="workers.engines.opencv:load",
    library="cv2",
    extra="opencv",
    device="cpu",
    any_size=True,
    has_seeds=False,
    is_trained=False,
    jobs_per_batch_row=0,
    gate_remedy="try another opencv_method or opencv_radius, a mask that covers all of the mark",
)


def _diffusion(*, kind: str, usage: str, loader: str, takes_model: bool) -> EngineSpec:
    return EngineSpec(
        kind=kind,
        usage=usage,
        loader=loader,
        library="torch",
        extra="worker",
        takes_model=takes_model,
        device="cuda",
        any_size=False,
        has_seeds=True,
        is_trained=True,
        # Measured: the table of mask margins in docs/benchmarks.md.
        mask_defaults={"mask_dilation": 1, "mask_feather": 2},
        # While one batch is on the device, the jobs of a second one are fetched and encoded.
        jobs_per_batch_row=2,
        gate_remedy="try another seed",
    )


# In the order in which error messages list them.
ENGINES: Mapping[str, EngineSpec] = {
    spec.kind: spec
    for spec in (
        _diffusion(
            kind="sd2",
            usage="sd2",
            loader="workers.engines.stable_diffusion.loaders:load_sd2",
            takes_model=False,
        ),
        _OPENCV,
        _diffusion(
            kind="diffusers",
            usage="diffusers:FOLDER_OR_HUB_ID[@REVISION]",
            loader="workers.engines.stable_diffusion.loaders:load_diffusers",
            takes_model=True,
        ),
    )
}

*_FIRST, _LAST = (spec.usage for spec in ENGINES.values())
USAGE = f"{', '.join(_FIRST)} or {_LAST}"


def engine_spec(name: str) -> EngineSpec:
    """The spec of an engine by its full name; raises ParameterError for an unknown one."""
    kind, colon, _ = name.partition(":")
    spec = ENGINES.get(kind)
    if spec is None or bool(colon) != spec.takes_model:
        raise ParameterError(f"engine: {name!r} is not known; use {USAGE}")
    return spec


def engine_name(text: str) -> str:
    """The canonical name of an engine and its queue: a model's folder becomes absolute.

    Raises ParameterError.
    """
    spec = engine_spec(text)
    model = text.partition(":")[2]
    if spec.takes_model and not model:
        raise ParameterError(f"engine: {text!r} names no model; use {USAGE}")
    # Workers on other machines, and those started in other folders, must get the same queue name.
    if spec.takes_model and Path(model).is_dir():
        return f"{spec.kind}:{os.path.realpath(model)}"
    return text
