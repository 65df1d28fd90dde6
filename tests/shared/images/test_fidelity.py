"""Files of every kind, repainted and looked at by decoders that are not ours."""

from __future__ import annotations

import pytest

from tests import sample_images
from tests.benchmarks import fidelity

COFFEE = sample_images.read_photograph("coffee.png").crop((100, 50, 303, 221))  # no whole blocks
LARGER = {"WebP, lossy": 9.0}  # it loses nothing more
# jpeglib writes no restart markers; no pixel depends on them.
LOST = {kind: ("restarts",) for kind in fidelity.KINDS if "restarts" in kind}


@pytest.mark.parametrize("kind", fidelity.KINDS)
def test_outside_the_mark_every_pixel_is_the_sources_and_nothing_is_lost(kind: str) -> None:
    kept = fidelity.compare(fidelity.KINDS[kind](COFFEE))
    assert kept.changed == 0
    assert kept.repainted > 200
    assert kept.lost == LOST.get(kind, ())
    assert "mode" in kept.metadata
    assert kept.copied is None or kept.copied > 0.93
    assert kept.size < LARGER.get(kind, 1.1)
