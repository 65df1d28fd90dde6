"""Engines by name: what ``--engine`` accepts, and what each name loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shared.errors import EngineUnavailable
from shared.params import did_you_mean
from workers.engines.options import EngineOptions
from workers.engines.protocol import Engine
from workers.engines.stable_diffusion.library_logs import expected_lines_at_debug

SD2_ID = "sd2-community/stable-diffusion-2-inpainting"
SD2_REVISION = "main"  # a branch until somebody with the hub at hand writes the commit here
SD2_GONE = "stabilityai/stable-diffusion-2-inpainting"


def load_engine(name: str, options: EngineOptions | None = None, **choices: Any) -> Engine:
    """An engine ready for work, by its name: ``opencv``, ``sd2`` or ``diffusers:MODEL[@REVISION]``.

    MODEL is a folder with a diffusers pipeline or a hub id. The options may be given as
    ``EngineOptions`` or by name. Raises EngineUnavailable with one line that names the remedy.
    """
    options = options or EngineOptions(**choices)
    if options.max_batch is not None and options.max_batch < 1:
        raise EngineUnavailable(f"max_batch: {options.max_batch} is not allowed; use 1 or more")
    kind = name.partition(":")[0] if name.startswith("diffusers:") else name
    if kind not in LOADERS:
        meant = f"; write 'diffusers:{name}'" if "/" in name else did_you_mean(name, KNOWN)
        raise EngineUnavailable(f"engine {name!r} is not known{meant}")
    return LOADERS[kind](name, options)


def _load_opencv(name: str, options: EngineOptions) -> Engine:  # noqa: ARG001
    try:
        from workers.engines.opencv import OpenCVEngine
    except ImportError as error:
        raise _not_installed(error, extra="opencv") from error
    return OpenCVEngine()


def _load_sd2(name: str, options: EngineOptions) -> Engine:
    return _load_diffusion(name, SD2_ID, SD2_REVISION, options)


def _load_diffusers(name: str, options: EngineOptions) -> Engine:
    model, revision = split_revision(name.removeprefix("diffusers:"))
    if model == SD2_GONE:
        raise EngineUnavailable(
            f"{SD2_GONE} left the hub in November 2025; use engine 'sd2' "
            f"(diffusers:{SD2_ID}) or diffusers:FOLDER with a local copy"
        )
    return _load_diffusion(name, model, revision, options)


def split_revision(text: str) -> tuple[str, str | None]:
    """``owner/model@v2`` is the model and its revision; an ``@`` in a folder's name is kept.

    Raises EngineUnavailable where no model is named.
    """
    model, at, revision = text.rpartition("@")
    if not at or Path(text).expanduser().is_dir():
        model, revision = text, ""
    if not model:
        raise EngineUnavailable("engine 'diffusers:' names no model; write diffusers:FOLDER_OR_ID")
    return model, revision or None


def _load_diffusion(name: str, model: str, revision: str | None, options: EngineOptions) -> Engine:
    try:
        with expected_lines_at_debug():
            from workers.engines.stable_diffusion.attention import choose_attention
            from workers.engines.stable_diffusion.engine import DiffusionEngine
            from workers.engines.stable_diffusion.loading import load_components
    except ImportError as error:
        raise _not_installed(error, extra="worker") from error
    components = load_components(model, revision, options)
    choose_attention(components, options.attention, options.compile)
    return DiffusionEngine(name=name, components=components, options=options)


def _not_installed(error: ImportError, *, extra: str) -> EngineUnavailable:
    module = (error.name or "a module").partition(".")[0]
    return EngineUnavailable(
        f"{module} is not installed ({error}); pip install 'inpaint-batch[{extra}]'"
    )


LOADERS: Mapping[str, Callable[[str, EngineOptions], Engine]] = {
    "opencv": _load_opencv,
    "sd2": _load_sd2,
    "diffusers": _load_diffusers,
}
KNOWN = ("opencv", "sd2", "diffusers:FOLDER_OR_ID[@REVISION]")
