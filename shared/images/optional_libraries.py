"""Libraries for 16 bits of colour, loaded only for pictures that have them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from shared.errors import EngineUnavailable


def imagecodecs() -> Any:
    """Raises EngineUnavailable where it is not installed."""
    return _library("imagecodecs")


def tifffile() -> Any:
    """Raises EngineUnavailable where it is not installed."""
    return _library("tifffile")


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineUnavailable(
            f"pictures with 16 bits a colour channel need the package {name}; "
            "install inpaint-batch[opencv] or [worker]"
        ) from error
