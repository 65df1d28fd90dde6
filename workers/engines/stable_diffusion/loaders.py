"""Load the engines ``sd2`` and ``diffusers:MODEL[@REVISION]``; torch is imported on the first call.

``shared.engines`` names these functions.
"""

from __future__ import annotations

from pathlib import Path

from shared.errors import EngineUnavailable
from workers.engines.options import EngineOptions
from workers.engines.protocol import Engine
from workers.engines.stable_diffusion.library_logs import demote_expected_lines

SD2_ID = "sd2-community/stable-diffusion-2-inpainting"
SD2_REVISION = "main"  # a branch: its commit could not be looked up without access to the hub
SD2_REMOVED_ID = "stabilityai/stable-diffusion-2-inpainting"


def load_sd2(name: str, options: EngineOptions) -> Engine:
    """Load Stable Diffusion v2 inpainting from the hub or its cache."""
    return _load(name, SD2_ID, SD2_REVISION, options)


def load_diffusers(name: str, options: EngineOptions) -> Engine:
    """name: ``diffusers:MODEL[@REVISION]``; MODEL is a pipeline folder or a hub id."""
    model, revision = split_revision(name.removeprefix("diffusers:"))
    if model == SD2_REMOVED_ID:
        raise EngineUnavailable(
            f"{SD2_REMOVED_ID} left the hub in November 2025; use engine 'sd2' "
            f"(diffusers:{SD2_ID}) or diffusers:FOLDER with a local copy"
        )
    return _load(name, model, revision, options)


def split_revision(text: str) -> tuple[str, str | None]:
    """Split ``owner/model@v2`` into model and revision; None if there is no revision.

    An existing folder whose name contains ``@`` is a model without a revision. Raises
    EngineUnavailable if the model is empty.
    """
    model, at, revision = text.rpartition("@")
    if not at or Path(text).expanduser().is_dir():
        model, revision = text, ""
    if not model:
        raise EngineUnavailable("engine 'diffusers:' names no model; write diffusers:FOLDER_OR_ID")
    return model, revision or None


def _load(name: str, model: str, revision: str | None, options: EngineOptions) -> Engine:
    # Imported here because importing torchao, through diffusers, emits the expected lines.
    with demote_expected_lines():
        from workers.engines.stable_diffusion.attention import set_attention
        from workers.engines.stable_diffusion.components import load_components
        from workers.engines.stable_diffusion.engine import DiffusionEngine
    components = load_components(model, revision, options)
    set_attention(components, options.attention, options.compile)
    return DiffusionEngine(name=name, components=components, options=options)
