"""The console scripts: check that the four packages are ours, then run a command.

``producer``, ``workers``, ``shared`` and ``migrations`` are common names: another distribution, or
a folder on PYTHONPATH, may bring a package of the same name and hide ours. This module would be
hidden with them if it lay in one of them, so pyproject.toml installs it as a package with a name
of its own. It imports none of the four before the check.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTION = "inpaint-batch"
PACKAGES = ("producer", "workers", "shared", "migrations")


def submit() -> None:
    _run("inpaint-submit", "producer.cli.submit", "submit")


def jobs() -> None:
    _run("inpaint-jobs", "producer.cli.jobs", "jobs_command")


def worker() -> None:
    _run("inpaint-worker", "workers.supervisor", "worker")


def _run(program: str, module: str, command: str) -> None:
    """Exits with status 2 and one line on stderr if a foreign package hides or replaces ours."""
    if reason := _foreign_package():
        sys.exit(_refuse(program, reason))
    try:
        run = getattr(import_module(module), command)
    except (ImportError, AttributeError):
        # Two distributions in one site-packages write into the same folder: the last one wins.
        if reason := _overwritten_package():
            sys.exit(_refuse(program, reason))
        raise
    run()


def _foreign_package() -> str | None:
    """Names the first of the four packages that Python would import from elsewhere."""
    own_folder = _folder_of_the_packages()
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None:
            continue
        location = Path(next(iter(spec.submodule_search_locations or ()), None) or str(spec.origin))
        # find_spec imports nothing: a foreign __init__ may do anything.
        if location.resolve() != (own_folder / name).resolve():
            return f"the package {name!r} in {location} is another project's and hides ours"
    return None


def _folder_of_the_packages() -> Path:
    """site-packages, or the repository if the installation is an editable one."""
    return next(
        folder
        for folder in Path(__file__).parents
        if all((folder / name).is_dir() for name in PACKAGES)
    )


def _overwritten_package() -> str | None:
    """Names the first of the four packages that another distribution has installed files into."""
    # Imported here and called only after a failure: it reads the RECORD of every distribution.
    from importlib.metadata import packages_distributions

    distributions = packages_distributions()
    for name in PACKAGES:
        others = sorted(set(distributions.get(name, ())) - {DISTRIBUTION})
        if others:
            path = _folder_of_the_packages() / name
            return f"{', '.join(others)} has installed its own package {name!r} over ours in {path}"
    return None


def _refuse(program: str, reason: str) -> int:
    print(
        f"{program}: {reason}; install {DISTRIBUTION} in an environment of its own (pipx, uv tool, "
        "a container) and keep other projects off PYTHONPATH",
        file=sys.stderr,
    )
    return 2
