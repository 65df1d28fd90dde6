"""The wheel holds our packages, their data and both licences."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("producer", "workers", "shared", "migrations")
ENTRY_POINTS = "shared/entry_points/"  # its package is installed beside the others
METADATA_FILES = ("pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built offline, from a copy: a build leaves folders in its source tree."""
    source = tmp_path_factory.mktemp("source")
    for name in METADATA_FILES:
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    folder = tmp_path_factory.mktemp("wheel")
    command = (
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--wheel-dir", str(folder), str(source)),
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def files(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_every_file_of_our_packages_is_in_the_wheel(wheel: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", *PACKAGES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    expected = {path.removeprefix(ENTRY_POINTS) for path in tracked.stdout.split()}
    assert expected - files(wheel) <= {"migrations/script.py.mako"}


def test_the_wheel_adds_no_other_top_level_package(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in files(wheel)}
    assert {top for top in tops if not top.endswith(".dist-info")} == {*PACKAGES, "inpaint_batch"}


def test_both_licences_are_declared_and_in_the_wheel(wheel: Path) -> None:
    headers = metadata(wheel)
    assert headers["License-Expression"] == "Apache-2.0 AND Bitstream-Vera"
    licences = headers.get_all("License-File") or []
    assert licences == ["LICENSE", "workers/pipeline/fonts/LICENSE"]
    for licence in licences:
        assert any(name.endswith(f".dist-info/licenses/{licence}") for name in files(wheel))
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_classifiers_name_the_supported_pythons(wheel: Path) -> None:
    headers = metadata(wheel)
    classifiers = headers.get_all("Classifier") or []
    named = [text.rpartition(" ")[2] for text in classifiers if ":: Python :: 3." in text]
    assert named == supported_pythons(headers["Requires-Python"])
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r'"(3\.\d+)"', workflow) == named


def supported_pythons(requirement: str) -> list[str]:
    """``<3.14,>=3.11`` as ``3.11`` to ``3.13``."""
    below, above = (int(minor) for minor in re.findall(r"3\.(\d+)", requirement))
    return [f"3.{minor}" for minor in range(above, below)]


def test_the_changelog_has_an_entry_for_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert version in headings
