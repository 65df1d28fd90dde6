"""The documents: tables agree with the code, commands run, links resolve, the site builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

import shared.errors
from producer.cli.jobs import jobs_command
from producer.cli.submit import submit
from producer.manifest import COLUMNS
from shared.params import PARAMETERS, Params
from shared.presets import presets
from shared.settings import Settings
from tests import sample_images
from tests.conftest import Bucket
from tests.test_end_to_end import Shell, upload
from workers.supervisor import worker

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
TEXTS = {path: path.read_text() for path in sorted(PAGES)}


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading of ``docs/PAGE.md``, without its header."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    lines = text.partition(f"\n## {heading}\n")[2].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| --- "))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return rows


def test_the_settings_table_names_every_field_with_its_default_and_meaning() -> None:
    expected = []
    for name, field in Settings.model_fields.items():
        default = "`.`" if name == "roots" else f"`{field.default}`"
        shown = "" if field.default in (None, ()) else default
        expected.append([f"`INPAINT_{name.upper()}`", shown, str(field.description)])
    assert table("settings", "Variables") == expected


def test_the_presets_table_is_the_presets() -> None:
    expected = [
        [
            preset.name,
            preset.use,
            f"{preset.values['guidance_scale']:g}",
            str(preset.values["num_inference_steps"]),
            f"{preset.values['strength']:g}",
        ]
        for preset in presets().values()
    ]
    assert table("parameters", "Presets") == expected


def names(page: str, heading: str) -> list[str]:
    """The names in the first cells of a table."""
    return [name for row in table(page, heading) for name in re.findall(r"`([a-z_]+)`", row[0])]


def test_every_column_of_a_manifest_is_documented_and_exists() -> None:
    assert set(names("manifest", "Columns")) == set(COLUMNS) - set(PARAMETERS)


def test_the_parameters_table_names_each_with_its_range_and_default() -> None:
    expected = [
        [f"`{name}`", parameter.allowed, shown_default(name)]
        for name, parameter in PARAMETERS.items()
    ]
    assert [row[:3] for row in table("parameters", "Parameters")] == expected


def shown_default(name: str) -> str:
    """Empty where there is none, and for the seed, which is derived from the row's content."""
    default = Params.__dataclass_fields__[name].default
    if name == "seed" or default == "":
        return ""
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default:g}`" if isinstance(default, int | float) else f"`{default}`"


def options(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--") and name != "--version"
    }


def documented_options() -> dict[str, set[str]]:
    """By the command's name: the options in the table below its heading."""
    _, *sections = (ROOT / "docs" / "commands.md").read_text().split("\n## ")
    documented = {}
    for section in sections:
        heading, _, body = section.partition("\n")
        name = re.split(r" [A-Z[]", heading)[0]
        cells = " ".join(re.findall(r"^\| (`--.*?) \| ", body, re.MULTILINE))
        documented[name] = set(re.findall(r"--[a-z-]+", cells))
    return documented


def test_every_command_and_option_is_documented_and_exists() -> None:
    expected = {"inpaint-submit": options(submit), "inpaint-worker": options(worker)}
    for name, subcommand in jobs_command.commands.items():
        expected[f"inpaint-jobs {name}"] = options(subcommand)
    assert documented_options() == expected


def error_classes() -> list[type[shared.errors.InpaintError]]:
    errors = vars(shared.errors).values()
    return [
        error
        for error in errors
        if isinstance(error, type) and issubclass(error, shared.errors.InpaintError)
    ]


def test_every_error_code_is_explained_and_only_those() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    first_cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    explained = {code for cell in first_cells for code in re.findall(r"`([a-z_]+)`", cell)}
    assert explained == {error.code for error in error_classes()}


def test_every_error_says_whether_a_retry_can_help() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| .* \| (yes|no|once|-) \|", text, re.MULTILINE))
    for error in error_classes():
        if rows.get(error.code) in ("yes", "no"):
            assert error.retryable == (rows[error.code] == "yes"), error.code


def commands(kind: str) -> list[list[str]]:
    """The lines of every ``sh`` block marked ``<!-- run: kind -->``."""
    blocks = re.findall(rf"<!-- run: {kind} -->\n```sh\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_every_command_of_ours_in_the_readme_is_run() -> None:
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    written = [
        shlex.split(line, comments=True)
        for line in blocks.splitlines()
        if line.startswith("inpaint-")
    ]
    kinds = ("laptop", "sd2", "fleet", "worker")
    assert sorted(written) == sorted(command for kind in kinds for command in commands(kind))


def test_the_readme_is_an_introduction() -> None:
    assert len(README.split()) <= 1200


def test_every_make_target_in_the_documents_exists() -> None:
    targets = {
        name for text in TEXTS.values() for name in re.findall(r"(?m)(?:`|^)make ([a-z-]+)", text)
    }
    done = subprocess.run(
        ["make", "-n", *sorted(targets)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_extra_in_the_documents_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for path, text in TEXTS.items():
        for named in re.findall(r"(?:'\.|inpaint-batch)\[([a-z,]+)\]", text):
            assert set(named.split(",")) <= set(project["optional-dependencies"]), path


def test_the_laptop_s_commands_work_as_written(tmp_path: Path) -> None:
    sample_images.write_catalog(tmp_path / "catalog")
    shell = Shell(tmp_path)
    for command in commands("laptop"):
        shell.run(*command)
    assert (tmp_path / "catalog" / "manifest-out" / "coffee.jpg").is_file()


def test_the_commands_for_stable_diffusion_work_as_written(tmp_path: Path) -> None:
    """Without its weights: a dry run, which checks everything but the model."""
    sample_images.write_catalog(tmp_path / "catalog")
    shell = Shell(tmp_path)
    for program, *arguments in commands("sd2"):
        rehearsed = [word for word in arguments if word != "--local"]
        shell.run(program, *rehearsed, *(["--dry-run"] if program == "inpaint-submit" else []))


def test_the_fleet_s_commands_work_as_written(
    tmp_path: Path, s3: Bucket, postgres_url: str, redis_url: str
) -> None:
    s3.client.create_bucket(Bucket="shop")
    shop = Bucket(name="shop", client=s3.client)
    sample_images.write_archive(tmp_path / "archive")
    upload(shop, tmp_path / "archive", "2026")
    shell = Shell(
        tmp_path,
        INPAINT_DATABASE_URL=postgres_url,
        INPAINT_BROKER_URL=redis_url,
        INPAINT_BUCKETS="shop",
    )
    shell.run("inpaint-jobs", "upgrade")
    workers = [shell.start(*command) for command in commands("worker")]
    try:
        for command in commands("fleet"):
            shell.run(*command)
    finally:
        for process in workers:
            process.terminate()
        assert {process.wait(20) for process in workers} == {0}
    keys = [entry["Key"] for entry in shop.client.list_objects_v2(Bucket="shop")["Contents"]]
    assert any(key.startswith("clean/") for key in keys)
    shell.run("inpaint-jobs", "list", "--state", "failed")


def links(path: Path) -> Iterator[Path]:
    """The files that a page links to or shows."""
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[path]):
        if not target.startswith(("https://", "#")):
            yield (path.parent / target.partition("#")[0]).resolve()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_every_file_that_a_document_links_to_is_there(path: Path) -> None:
    for target in links(path):
        assert target.is_file(), target
        if target.suffix in (".png", ".jpg"):
            with Image.open(target) as image:
                image.verify()


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(
    tmp_path: Path,
) -> None:
    command = (sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.glob("*.html"))
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} <= {page.stem for page in pages}
    for page in pages:
        loaded = re.findall(
            r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?(https?:[^\s>]+)", page.read_text()
        )
        assert loaded == [], page.name
