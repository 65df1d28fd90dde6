"""The error tree: one class for each code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import shared.errors
from shared.errors import InpaintError

ROOT = Path(__file__).parents[2]


def subclasses(error: type[InpaintError]) -> Iterator[type[InpaintError]]:
    for subclass in error.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


ERRORS = [
    error
    for error in (InpaintError, *subclasses(InpaintError))
    if error.__module__ == shared.errors.__name__
]


def test_each_class_has_its_own_code() -> None:
    codes = [error.code for error in ERRORS]
    assert sorted(codes) == sorted(set(codes))
    assert all("code" in vars(error) for error in ERRORS)


def test_each_class_stands_in_the_tree_at_the_top_of_the_module_below_its_base() -> None:
    tree = str(shared.errors.__doc__).partition("\n\n")[2].partition("\n\n")[0]
    path: list[str] = []
    drawn = {}
    for line in tree.splitlines():
        connector, name = re.match(r"([│├└─ ]*)(\w+)", line).groups()  # type: ignore[union-attr]
        depth = len(connector) // 4
        path[depth:] = [name]
        drawn[name] = path[depth - 1] if depth else "Exception"
    assert drawn == {error.__name__: error.__bases__[0].__name__ for error in ERRORS}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_each_code_is_documented(error: type[InpaintError]) -> None:
    documented = (ROOT / "docs" / "errors.md").read_text()
    assert f"`{error.code}`" in documented


# A state of a job, an outcome of an attempt, and what a command prints after Ctrl-C.
OTHER_MEANINGS = {"cancelled", "released", "interrupted"}


def strings(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


@pytest.mark.parametrize("package", ["shared", "workers", "producer"])
def test_no_other_module_writes_a_code_as_a_string(package: str) -> None:
    codes = {error.code for error in ERRORS} - OTHER_MEANINGS
    literals = {
        path.relative_to(ROOT).as_posix(): strings(path) & codes
        for path in (ROOT / package).rglob("*.py")
        if path != Path(shared.errors.__file__)
    }
    assert {path: found for path, found in literals.items() if found} == {}


def test_an_error_has_the_code_of_its_class_and_no_other() -> None:
    with pytest.raises(TypeError, match="code"):
        InpaintError("message", code="bad_input")  # type: ignore[call-arg]
