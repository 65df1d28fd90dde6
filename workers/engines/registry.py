"""Loading an engine by its name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from shared.engines import ENGINES, EngineSpec, engine_spec
from shared.errors import EngineUnavailable, ParameterError
from shared.params import did_you_mean
from workers.engines.options import EngineOptions
from workers.engines.protocol import Engine


def load_engine(name: str, options: EngineOptions | None = None, **choices: Any) -> Engine:
    """Load an engine by its name: ``opencv``, ``sd2`` or ``diffusers:MODEL[@REVISION]``.

    MODEL is a folder with a diffusers pipeline, or a hub id. Options are given as
    ``EngineOptions`` or as keywords. Raises EngineUnavailable with one line that names the remedy.
    """
    options = options or EngineOptions(**choices)
    if options.max_batch is not None and options.max_batch < 1:
        raise EngineUnavailable(f"max_batch: {options.max_batch} is not allowed; use 1 or more")
    spec = _find_spec(name)
    module, _, function = spec.loader.partition(":")
    try:
        engine: Engine = getattr(import_module(module), function)(name, options)
    except ImportError as error:
        # The first part: the package that pip installs, not the submodule that failed.
        missing = (error.name or "a module").partition(".")[0]
        raise EngineUnavailable(
            f"{missing} is not installed ({error}); pip install 'inpaint-batch[{spec.extra}]'"
        ) from error
    return engine


def _find_spec(name: str) -> EngineSpec:
    try:
        return engine_spec(name)
    except ParameterError as error:
        known = [spec.usage for spec in ENGINES.values()]
        hint = f"; write 'diffusers:{name}'" if "/" in name else did_you_mean(name, known)
        raise EngineUnavailable(f"engine {name!r} is not known{hint}") from error
