"""Libraries of the extras, imported only for the files that need them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from shared.errors import EngineUnavailable


def imagecodecs() -> Any:
    """Raises EngineUnavailable if it is not installed."""
    return _library("imagecodecs", "images with 16 bits a colour channel need")


def tifffile() -> Any:
    """Raises EngineUnavailable if it is not installed."""
    return _library("tifffile", "images with 16 bits a colour channel need")


def jpeglib() -> Any:
    """Raises EngineUnavailable if it is not installed."""
    return _library("jpeglib", "writing JPEG needs")


def _library(name: str, need: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineUnavailable(
            f"{need} the package {name}; install inpaint-batch[opencv] or [worker]"
        ) from error
