"""The Dockerfiles, the compose file and the units agree with the code and with each other."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared import settings

ROOT = Path(__file__).resolve().parents[1]
DOCKER = ROOT / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))

# A default that is the setting's old name, itself with a default: ``${NEW:-${OLD:-0}}``.
OLD_NAMES = "|".join(settings.PREFIX + name.upper() for name in settings.RENAMED)
OLD_NAME = re.compile(rf"\$\{{(?:{OLD_NAMES}):-([^}}]*)\}}")
COMPOSE_TEXT = OLD_NAME.sub(r"\1", (DOCKER / "compose.yaml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
EXAMPLE = dict(
    line.split("=", 1)
    for line in (DOCKER / ".env.example").read_text().splitlines()
    if line and not line.startswith("#")
)
SCRIPTS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"])
OTHERS = {
    "redis": "valkey-server",
    "s3": "server",
    "buckets": "python",
    "flower": "celery",
}
"""The first word of the command, for each service that runs none of our scripts."""

REFERENCE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
SECRET = re.compile("PASSWORD|SECRET|ACCESS_KEY|AUTH$")

dockerfiles = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
services = pytest.mark.parametrize("name", SERVICES)


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    """Instruction and arguments, continued lines joined."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.M).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        instruction, _, arguments = line.partition(" ")
        yield instruction, arguments


def references() -> Iterator[tuple[str, str, str]]:
    """Each ``${NAME:-default}`` of the compose file: name, ``-`` or ``?`` or empty, the rest."""
    yield from REFERENCE.findall(COMPOSE_TEXT)


def substitute(value: object, known: dict[str, str]) -> str:
    def replacement(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        return known.get(name) or (rest if kind == "-" else pytest.fail(f"{name} is not set"))

    return REFERENCE.sub(replacement, str(value))


def is_pinned(image: str) -> bool:
    """True if the tag begins with a version."""
    tag = image.rpartition("/")[2].partition(":")[2]
    return bool(re.match(r"\d+\.\d+", tag))


def test_there_is_an_image_for_each_side() -> None:
    assert [path.name for path in DOCKERFILES] == ["producer.Dockerfile", "worker.Dockerfile"]


@dockerfiles
def test_every_copied_path_exists_and_reaches_the_build(path: Path) -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = [
        source
        for instruction, arguments in instructions(path)
        if instruction == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    ]
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert set(copied) <= allowed


@dockerfiles
def test_every_base_image_is_pinned(path: Path) -> None:
    build_arguments = dict(
        arguments.split("=", 1)
        for instruction, arguments in instructions(path)
        if instruction == "ARG" and "=" in arguments
    )
    bases = [
        substitute(arguments.partition(" ")[0], build_arguments)
        for instruction, arguments in instructions(path)
        if instruction == "FROM"
    ]
    assert bases
    assert [base for base in bases if not is_pinned(base)] == []


@dockerfiles
def test_the_container_does_not_run_as_root(path: Path) -> None:
    users = [arguments for instruction, arguments in instructions(path) if instruction == "USER"]
    assert users[-1:] == ["inpaint"]


@dockerfiles
def test_an_image_runs_a_command_of_ours(path: Path) -> None:
    commands = [
        arguments
        for instruction, arguments in instructions(path)
        if instruction in ("CMD", "HEALTHCHECK")
    ]
    programs = [re.findall(r'\["([^"]+)"', command) for command in commands]
    assert programs
    assert {name for names in programs for name in names} <= SCRIPTS


def test_the_worker_is_stopped_by_the_signal_it_handles() -> None:
    worker = dict(instructions(DOCKER / "worker.Dockerfile"))
    assert worker["STOPSIGNAL"] == "SIGTERM"
    assert "KillMode=mixed" in (DOCKER / "inpaint-worker.service").read_text()


@services
def test_every_image_is_ours_or_pinned(name: str) -> None:
    service = SERVICES[name]
    assert is_pinned(service["image"]), service["image"]
    if "build" in service:
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).exists()


@services
def test_every_command_is_known(name: str) -> None:
    command = SERVICES[name].get("command", [OTHERS.get(name)])
    assert command[0] in SCRIPTS or name == "postgres" or command[0] == OTHERS.get(name)


@services
def test_every_service_depends_on_services_that_report_when_they_are_ready(name: str) -> None:
    for other, rule in SERVICES[name].get("depends_on", {}).items():
        assert other in SERVICES
        if rule["condition"] == "service_healthy":
            assert "healthcheck" in SERVICES[other]
        else:
            assert rule["condition"] == "service_completed_successfully"
            assert SERVICES[other].get("restart") in (None, "on-failure:5")


@services
def test_every_named_volume_and_config_is_declared(name: str) -> None:
    sources = [volume.split(":")[0] for volume in SERVICES[name].get("volumes", [])]
    assert {source for source in sources if source.isalnum()} <= set(COMPOSE["volumes"])
    assert {config["source"] for config in SERVICES[name].get("configs", [])} <= set(
        COMPOSE["configs"]
    )


def test_redis_keeps_messages_on_disk_and_drops_none() -> None:
    configuration = COMPOSE["configs"]["redis"]["content"]
    assert "appendonly yes\n" in configuration
    assert "maxmemory-policy noeviction\n" in configuration


def test_every_variable_of_ours_is_a_setting() -> None:
    known = {settings.PREFIX + name.upper() for name in settings.Settings.model_fields}
    variables = {name for name, _, _ in references()} | set(EXAMPLE)
    for service in SERVICES.values():
        variables |= set(service.get("environment", {}))
    ours = {name for name in variables if name.startswith(settings.PREFIX)}
    assert "INPAINT_DATABASE_URL" in ours
    assert ours <= known


def test_the_example_names_every_variable_and_no_other() -> None:
    assert {name for name, _, _ in references()} == set(EXAMPLE)


def test_no_secret_has_a_default() -> None:
    secrets = {name for name in EXAMPLE if SECRET.search(name)}
    assert len(secrets) == 5
    assert {EXAMPLE[name] for name in secrets} == {""}
    assert {kind for name, kind, _ in references() if name in secrets} == {"?"}


def test_defaults_are_the_same_in_the_example_and_in_the_compose_file() -> None:
    for name, kind, rest in references():
        if kind == "-":
            assert EXAMPLE[name] == rest, name


def test_the_product_accepts_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = {name: value or "secret" for name, value in EXAMPLE.items()}
    monkeypatch.chdir(tmp_path)
    for name, value in SERVICES["worker"]["environment"].items():
        monkeypatch.setenv(name, substitute(value, known))
    loaded = settings.load()
    assert loaded.database.host == "postgres"
    assert loaded.buckets == ("inpaint",)


def test_numbers_in_the_example_are_the_defaults_of_the_settings() -> None:
    for name, field in settings.Settings.model_fields.items():
        if isinstance(field.default, int | float):
            shown = EXAMPLE.get(settings.PREFIX + name.upper(), field.default)
            assert float(shown) == field.default, name
