"""The OpenCV engine fills masked pixels and leaves the others unchanged."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import Cancelled, EngineError, MaskError, Released
from shared.geometry.box import Box
from shared.params import Params
from workers.engines import load_engine
from workers.engines.protocol import Interruption, Pixels, RegionWork


def flat_with_mark(height: int = 48, width: int = 64) -> tuple[Pixels, Pixels]:
    """A plain (H, W, 3) ground with a red mark, and the (H, W) mask over it."""
    image = np.full((height, width, 3), (40, 90, 160), dtype=np.uint8)
    image[20:28, 10:50] = (250, 0, 0)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[20:28, 10:50] = 255
    return image, mask


def work(
    image: Pixels, mask: Pixels, params: Params, *, interruption: Interruption | None = None
) -> RegionWork:
    height, width = mask.shape
    return RegionWork(
        image=image,
        mask=mask,
        windows=(Box(0, 0, width, height),),
        params=params,
        seed=0,
        interruption=interruption or Interruption(),
    )


@pytest.mark.parametrize("method", ["telea", "navier-stokes"])
def test_a_mark_on_plain_ground_is_removed(method: str) -> None:
    image, mask = flat_with_mark()
    future = load_engine("opencv").submit(work(image, mask, Params(opencv_method=method)))  # type: ignore[arg-type]
    assert future.done()
    filled = future.result()
    assert filled.dtype == np.uint8
    assert np.abs(filled.astype(int) - (40, 90, 160)).max() <= 2


def test_methods_and_radii_give_different_results_only_inside_the_mask() -> None:
    rng = np.random.default_rng(7)
    image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
    _, mask = flat_with_mark()
    engine = load_engine("opencv")
    results = [
        engine.submit(work(image, mask, params)).result()
        for params in (
            Params(opencv_method="telea", opencv_radius=3),
            Params(opencv_method="telea", opencv_radius=9),
            Params(opencv_method="navier-stokes", opencv_radius=3),
        )
    ]
    assert len({result.tobytes() for result in results}) == 3
    for result in results:
        assert np.array_equal(result[mask == 0], image[mask == 0])


def test_a_view_of_a_larger_image_is_accepted() -> None:
    image, mask = flat_with_mark()
    filled = load_engine("opencv").submit(work(image[:, 4:60], mask[:, 4:60], Params())).result()
    assert np.abs(filled.astype(int) - (40, 90, 160)).max() <= 2


def test_the_engine_has_a_name_a_device_and_a_revision() -> None:
    engine = load_engine("opencv")
    assert (engine.name, engine.device) == ("opencv", "cpu")
    assert engine.revision.split()[0] == "opencv"
    assert engine.revision.count(".") >= 2


def test_a_mask_over_the_whole_region_is_a_mask_error() -> None:
    image, mask = flat_with_mark()
    future = load_engine("opencv").submit(work(image, np.full_like(mask, 255), Params()))
    with pytest.raises(MaskError, match="covers the whole region"):
        future.result()


def test_errors_of_opencv_become_engine_errors() -> None:
    image, mask = flat_with_mark()
    future = load_engine("opencv").submit(work(image, mask[:, :-8], Params()))
    with pytest.raises(EngineError, match="opencv"):
        future.result()


def test_the_future_raises_an_interruption_and_that_the_engine_is_closed() -> None:
    image, mask = flat_with_mark()
    interruption = Interruption()
    interruption.set(Cancelled("cancelled by the user"))
    engine = load_engine("opencv")
    with pytest.raises(Cancelled, match="cancelled by the user"):
        engine.submit(work(image, mask, Params(), interruption=interruption)).result()
    engine.close()
    with pytest.raises(Released):
        engine.submit(work(image, mask, Params())).result()
