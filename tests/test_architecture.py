"""Import boundaries, the map of modules, and the length and comments of functions."""

from __future__ import annotations

import ast
import io
import os
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("producer", "shared", "workers", "migrations")
MAY_IMPORT = {
    "producer": {"producer", "shared"},
    "workers": {"workers", "shared"},
    "shared": {"shared"},
    "migrations": {"shared"},
}
# The only modules that may import a heavy library; a folder stands for all modules in it.
IMPORTED_IN = {
    "boto3": ("shared/storage/s3.py",),
    "botocore": ("shared/storage/s3.py", "shared/storage/error_mapping.py"),
    "celery": ("shared/jobs/queue.py", "workers/worker_process.py"),
    "kombu": ("shared/jobs/queue.py",),
    "torch": ("workers/engines/stable_diffusion/",),
    "diffusers": ("workers/engines/stable_diffusion/",),
    "transformers": ("workers/engines/stable_diffusion/",),
    "cv2": ("workers/engines/opencv.py",),
    "jinja2": ("producer/contact_sheet/html.py",),
    "lxml": ("shared/images/provenance.py",),
    "alembic": ("shared/db/schema.py", "migrations/"),
}
# The one package whose code lies in its __init__.py.
ENTRY_POINTS = "shared/entry_points/inpaint_batch/__init__.py"
HEAVY = (
    *("torch", "diffusers", "transformers", "cv2", "boto3", "celery", "alembic"),
    *("skimage", "imagecodecs", "tifffile", "lxml"),
)

COMMENT_SHARE = (0.03, 0.06)
MEDIAN_LINES, P90_LINES = 7, 19
TOOL_COMMENTS = ("noqa", "type:", "fmt:", "pragma")


@cache
def modules(package: str) -> tuple[Path, ...]:
    paths = tuple(sorted((REPOSITORY / package).rglob("*.py")))
    assert paths
    return paths


def every_module() -> list[Path]:
    return [path for package in PACKAGES for path in modules(package)]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def imports(path: Path) -> set[str]:
    """Top-level names that a module imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).partition(".")[0])
    return names


def short(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_from_both_sides_to_shared_and_nowhere_else(package: str) -> None:
    ours = {*PACKAGES, "tests"}
    wrong = {
        short(path): sorted(foreign)
        for path in modules(package)
        if (foreign := (imports(path) & ours) - MAY_IMPORT[package])
    }
    assert wrong == {}


@pytest.mark.parametrize("library", IMPORTED_IN)
def test_a_library_is_imported_only_in_its_modules(library: str) -> None:
    users = {short(path) for path in every_module() if library in imports(path)}
    assert users, f"no module imports {library}: this test checks the wrong name"
    assert {user for user in users if not user.startswith(IMPORTED_IN[library])} == set()


def sql_writes(path: Path) -> Iterator[str]:
    """Tables that a module writes: ``update(Job)``, or SQL in a string."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("update", "delete"):
            yield from (arg.id for arg in node.args if isinstance(arg, ast.Name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from re.findall(r"\b(?:UPDATE|DELETE FROM)\s+(\w+)", node.value)


def test_only_one_package_changes_a_jobs_state() -> None:
    tables = {"Job", "jobs", "Attempt", "attempts"}
    writers = {
        short(path)
        for package in ("producer", "shared", "workers")
        for path in modules(package)
        if tables & set(sql_writes(path))
    }
    assert {writer.rpartition("/")[0] for writer in writers} == {"shared/jobs"}


def in_a_fresh_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_producer_never_loads_a_model_library() -> None:
    names = [short(path)[:-3].replace("/", ".") for path in modules("producer")]
    code = (
        f"import importlib, sys\n"
        f"for name in {[name for name in names if not name.endswith('__init__')]}:\n"
        f"    importlib.import_module(name)\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules))\n"
    )
    assert in_a_fresh_process(code).split() == []


def test_a_submission_of_local_files_loads_neither_boto3_nor_celery(
    tmp_path: Path, redis_url: str
) -> None:
    (tmp_path / "m.csv").write_text("image,mask\na.png,alpha\n")
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from producer.cli.submit import submit\n"
        "from shared import settings\n"
        "from shared.db import schema\n"
        "from shared.db import Database\n"
        "schema.ensure(db := Database(settings.load().database))\n"  # alembic, once
        "db.close()\n"
        "ran = CliRunner().invoke(submit, ['m.csv', '--engine', 'opencv'])\n"
        "assert ran.exit_code == 0, ran.output\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules))\n"
    )
    loaded = in_a_fresh_process(
        f"import os; os.chdir({str(tmp_path)!r})\n{code}",
        INPAINT_BROKER_URL=redis_url,
        INPAINT_HOME=str(tmp_path / "home"),
    )
    assert loaded.split() == ["alembic"]


def test_every_module_has_a_docstring() -> None:
    undocumented = [
        short(path)
        for path in every_module()
        if path.name != "__init__.py" and not ast.get_docstring(tree(path))
    ]
    assert undocumented == []


def test_every_module_has_its_line_in_the_architecture_page_and_every_line_its_module() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    lines = re.findall(r"^\| `([\w/]+\.py)` \| \S", page, re.MULTILINE)
    expected = {short(path) for path in every_module() if path.name != "__init__.py"}
    assert sorted(lines) == sorted(expected | {ENTRY_POINTS})


def test_functions_are_short() -> None:
    lines = sorted(
        node.end_lineno - node.lineno + 1
        for path in every_module()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno
    )
    assert statistics.median(lines) <= MEDIAN_LINES
    assert lines[int(0.9 * len(lines))] <= P90_LINES


def test_about_one_line_in_twenty_to_thirty_is_a_comment() -> None:
    comments = lines = 0
    for path in every_module():
        text = path.read_text("utf-8")
        lines += sum(bool(line.strip()) for line in text.splitlines())
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        comments += sum(
            token.type == tokenize.COMMENT
            and not token.string.lstrip("# ").startswith(TOOL_COMMENTS)
            for token in tokens
        )
    lowest, highest = COMMENT_SHARE
    assert lowest <= comments / lines <= highest
