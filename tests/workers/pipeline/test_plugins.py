"""Plugins: the example of the docs, installed as a package, and plugins that fail."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shared.errors import InputError, PostprocessError
from shared.images import DecodedImage
from shared.params import Params
from workers.pipeline import plugins

DOCS = (Path(__file__).parents[3] / "docs" / "plugins.md").read_text()

OTHERS = """
import numpy as np

def double(image, repainted):
    return image.repeat(2, axis=0).repeat(2, axis=1)

def invert(image, repainted):
    image[:] = 255 - image
    repainted[:] = True
    return image

def text(image, repainted):
    return "an image"

def floats(image, repainted):
    return image / 255

def fail(image, repainted):
    raise RuntimeError("no weights\\n at all")
"""


@pytest.fixture(autouse=True)
def installed_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The docs' package and one of bad plugins, as an installer lays them out."""
    code = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)[0]
    (tmp_path / "inpaint_sharpen.py").write_text(code)
    (tmp_path / "inpaint_others.py").write_text(OTHERS)
    entry = re.search(r"^(sharpen = .*)$", DOCS, re.MULTILINE)
    assert entry
    names = ("double", "invert", "text", "floats", "fail")
    lines = [entry[1].replace('"', ""), *(f"{name} = inpaint_others:{name}" for name in names)]
    info = tmp_path / "inpaint_sharpen-1.0.dist-info"
    info.mkdir()
    lines.append("heavy = inpaint_heavy:run")
    (tmp_path / "inpaint_heavy.py").write_text("import a_model")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: inpaint-sharpen\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[inpaint.postprocess]\n" + "\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins.find.cache_clear()
    yield
    plugins.find.cache_clear()
    for module in ("inpaint_sharpen", "inpaint_others"):
        sys.modules.pop(module, None)


def make_image(mode: str = "RGB") -> DecodedImage:
    shape = {"L": (40, 60), "RGB": (40, 60, 3), "RGBA": (40, 60, 4)}[mode]
    noise = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    return DecodedImage(pixels=noise, mode=mode, format="PNG", source=b"the source")


def repainted_mask() -> np.ndarray:
    mask = np.zeros((40, 60), np.bool_)
    mask[10:20, 15:35] = True
    return mask


def apply(name: str, mode: str = "RGB", feather: int = 0) -> tuple[DecodedImage, DecodedImage]:
    before = make_image(mode)
    params = Params(postprocess=name, mask_feather=feather)
    return before, plugins.apply(before, repainted_mask(), params)


def test_the_docs_plugin_sharpens_what_was_repainted_and_nothing_else() -> None:
    before, after = apply("sharpen")
    changed = (before.pixels != after.pixels).any(axis=-1)
    assert changed[repainted_mask()].mean() > 0.9
    assert not changed[~repainted_mask()].any()
    assert after.touched is not None
    assert np.array_equal(after.touched, changed)


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_a_plugin_sees_rgb_and_its_result_goes_into_the_image_s_own_mode(mode: str) -> None:
    before, after = apply("invert", mode)
    inside = repainted_mask()
    colours = slice(None) if mode == "L" else slice(0, 3)
    old, new = before.pixels[..., colours], after.pixels[..., colours]
    assert np.array_equal(new[inside], 255 - old[inside])
    assert np.array_equal(new[~inside], old[~inside])
    assert mode == "L" or np.array_equal(before.pixels[..., 3], after.pixels[..., 3])


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_result_of_another_size_replaces_the_whole_image(mode: str) -> None:
    before, after = apply("double", mode)
    assert after.size == (120, 80)
    assert after.mode == mode
    if mode != "RGBA":
        assert np.array_equal(after.pixels[::2, ::2], before.pixels)
    assert after.source == b""
    assert after.touched is not None
    assert after.touched.all()


def test_a_plugin_that_is_not_installed_names_those_that_are() -> None:
    with pytest.raises(InputError, match=r"no plugin 'faces' .*double, .*sharpen") as caught:
        apply("faces")
    assert caught.value.code == "postprocess_missing"
    assert not caught.value.retryable


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text", "text returned str; it must return (height, width, 3) uint8"),
        ("floats", "floats returned ndarray"),
        ("fail", "fail failed: RuntimeError: no weights at all"),
        ("heavy", "heavy cannot be imported: ModuleNotFoundError: No module named 'a_model'"),
    ],
)
def test_a_plugin_that_fails_is_an_error_with_its_name(name: str, message: str) -> None:
    with pytest.raises(PostprocessError, match=re.escape(message)) as caught:
        apply(name)
    assert caught.value.code == "postprocess_failed"
