"""The console scripts refuse to run with another project's packages in the place of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shared.entry_points import inpaint_batch

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = Path(inpaint_batch.__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]
REMEDY = (
    "install inpaint-batch in an environment of its own (pipx, uv tool, a container) "
    "and keep other projects off PYTHONPATH"
)


def run(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """``PROGRAM --help`` as its console script runs it; path: what PYTHONPATH begins with."""
    module, _, function = SCRIPTS[program].partition(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    python_path = os.pathsep.join(map(str, (*path, ENTRY_POINTS, ROOT)))
    return subprocess.run(
        [sys.executable, "-P", "-c", script, "--help"],
        env={**os.environ, "PYTHONPATH": python_path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("program", SCRIPTS)
def test_a_command_runs_when_the_packages_are_ours(program: str) -> None:
    done = run(program)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: " in done.stdout


@pytest.mark.parametrize("program", SCRIPTS)
@pytest.mark.parametrize("name", inpaint_batch.PACKAGES)
def test_a_foreign_package_that_hides_ours_is_one_line(
    tmp_path: Path, program: str, name: str
) -> None:
    package = tmp_path / name
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('must not be imported')\n")
    done = run(program, tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"{program}: the package {name!r} in {package} is another project's and hides ours; "
        f"{REMEDY}\n"
    )


def test_a_foreign_module_of_one_file_is_found_too(tmp_path: Path) -> None:
    (tmp_path / "shared.py").touch()
    done = run("inpaint-submit", tmp_path)
    assert f"the package 'shared' in {tmp_path / 'shared.py'} is another" in done.stderr


def test_a_distribution_that_overwrote_our_files_is_named(tmp_path: Path) -> None:
    for name in inpaint_batch.PACKAGES:
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "shared").unlink()
    shutil.copytree(ROOT / "shared", tmp_path / "shared")
    shutil.copytree(ENTRY_POINTS / "inpaint_batch", tmp_path / "inpaint_batch")
    (tmp_path / "shared" / "settings.py").write_text("DEBUG = True\n")
    metadata = tmp_path / "web_shop-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: web-shop\nVersion: 2.0\n")
    (metadata / "RECORD").write_text("shared/settings.py,,\n")
    done = run("inpaint-submit", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"inpaint-submit: web-shop has installed its own package 'shared' over ours in "
        f"{tmp_path / 'shared'}; {REMEDY}\n"
    )


def test_an_import_error_of_our_own_is_not_blamed_on_others(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ImportError('click is broken')\n")
    done = run("inpaint-submit", tmp_path)
    assert done.returncode == 1
    assert "ImportError: click is broken" in done.stderr


def test_the_module_of_the_scripts_is_installed_under_its_own_name() -> None:
    assert {target.partition(":")[0] for target in SCRIPTS.values()} == {"inpaint_batch"}
    find = PYPROJECT["tool"]["setuptools"]["packages"]["find"]
    assert ENTRY_POINTS.relative_to(ROOT).as_posix() in find["where"]
    assert "inpaint_batch" in find["include"]
