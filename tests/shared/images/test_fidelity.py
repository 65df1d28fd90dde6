"""Repainted files of every kind, read by decoders that the product does not use."""

from __future__ import annotations

import pytest

from tests import sample_images
from tests.benchmarks import fidelity

COFFEE = sample_images.read_photograph("coffee.png").crop((100, 50, 303, 221))  # no whole blocks
LARGER = {"WebP, lossy": 9.0}  # the result is lossless
# jpeglib writes no restart markers; no pixel depends on them.
LOST = {kind: ("restarts",) for kind in fidelity.KINDS if "restarts" in kind}


@pytest.mark.parametrize("kind", fidelity.KINDS)
def test_outside_the_mark_every_pixel_is_the_sources_and_no_metadata_is_lost(kind: str) -> None:
    comparison = fidelity.compare(fidelity.KINDS[kind](COFFEE))
    assert comparison.changed == 0
    assert comparison.repainted > 200
    assert comparison.lost == LOST.get(kind, ())
    assert "mode" in comparison.metadata
    assert comparison.copied is None or comparison.copied > 0.93
    assert comparison.size < LARGER.get(kind, 1.1)
