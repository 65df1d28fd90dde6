"""One tiny pipeline for all engine tests; torch runs on one thread, to leave cores for others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny pipeline, read only; torch runs on one thread."""
    import torch

    from tests.tiny_pipeline import build

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield build(tmp_path_factory.mktemp("tiny"))
    torch.set_num_threads(threads)
