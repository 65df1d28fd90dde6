"""What the documents say is what the code does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from PIL import Image

import shared.errors
from producer.cli.jobs import jobs_command
from producer.cli.submit import submit
from producer.manifest import COLUMNS
from shared.params import PARAMETERS
from shared.presets import presets
from shared.settings import Settings
from tests import sample_images
from tests.conftest import Bucket
from tests.test_end_to_end import Shell, upload
from workers.supervisor import worker

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("producer", "workers", "shared")


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


def names(page: str, heading: str) -> set[str]:
    """The names in the first cells of a table."""
    return {name for row in table(page, heading) for name in re.findall(r"`([a-z_]+)`", row[0])}


def test_every_column_of_a_manifest_is_documented_and_exists() -> None:
    assert names("manifest", "Columns") == set(COLUMNS) - set(PARAMETERS)


def test_every_parameter_is_documented_and_exists() -> None:
    assert names("parameters", "Parameters") == set(PARAMETERS)


def options(command: click.Command) -> set[str]:
    return {
        name
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    }


def documented_options(row: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", row))


def test_every_command_and_option_is_documented_and_exists() -> None:
    rows = table("commands", "Options")
    documented = {tuple(re.findall(r"[a-z-]+", row[0])): row for row in rows}
    for command, name in ((submit, ("inpaint-submit",)), (worker, ("inpaint-worker",))):
        assert documented_options(" ".join(documented[name])) == options(command)
    for name, subcommand in jobs_command.commands.items():
        row = " ".join(documented["inpaint-jobs", name])
        assert documented_options(row.replace("'s", "")) == options(subcommand), name


def codes() -> Iterator[str]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            yield from re.findall(r'code\s*=\s*"([a-z_]+)"', path.read_text())


def test_every_error_code_is_explained_and_only_those() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    first_cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    explained = {code for cell in first_cells for code in re.findall(r"`([a-z_]+)`", cell)}
    assert explained == {*codes(), "image_truncated"}


def test_every_error_says_whether_a_retry_can_help() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| .* \| (yes|no|once|-) \|", text, re.MULTILINE))
    for error in vars(shared.errors).values():
        if not isinstance(error, type) or error.code not in rows:
            continue
        if rows[error.code] in ("yes", "no"):
            assert error.retryable == (rows[error.code] == "yes"), error.code


def commands(kind: str) -> list[list[str]]:
    """The lines of every ``sh`` block marked ``<!-- run: kind -->``."""
    blocks = re.findall(rf"<!-- run: {kind} -->\n```sh\n(.*?)```", README, re.DOTALL)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]


def test_every_command_of_ours_in_the_readme_is_run() -> None:
    """The rest needs a model or a fleet's real names, and is named here."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    written = [line for line in blocks.splitlines() if line.startswith("inpaint-")]
    run = [*commands("laptop"), *commands("fleet"), *commands("worker")]
    left = [line for line in written if shlex.split(line, comments=True) not in run]
    assert [line for line in left if "--engine sd2" not in line] == []


def test_the_laptop_s_commands_work_as_written(tmp_path: Path) -> None:
    sample_images.write_catalog(tmp_path / "catalog")
    shell = Shell(tmp_path)
    for command in commands("laptop"):
        shell.run(*command)
    assert (tmp_path / "catalog" / "manifest-out" / "coffee.jpg").is_file()


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
    keys = [one["Key"] for one in shop.client.list_objects_v2(Bucket="shop")["Contents"]]
    assert any(key.startswith("clean/") for key in keys)
    shell.run("inpaint-jobs", "list", "--state", "failed")


@pytest.mark.parametrize("path", re.findall(r"\]\(((?:docs|docker)/[^)]+)\)", README))
def test_every_file_the_readme_points_to_is_there(path: str) -> None:
    assert (ROOT / path).is_file()
    if path.endswith((".png", ".jpg")):
        with Image.open(ROOT / path) as image:
            image.verify()
