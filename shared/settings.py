"""Settings: the ``INPAINT_*`` variables, read once at the start of a command."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from shared.errors import SettingsError
from shared.params import did_you_mean

PREFIX = "INPAINT_"
DOTENV = ".env"

# Old name to new name. A user may have the old one in a .env: it works for one more version.
RENAMED = {
    "refused_seconds": "write_retry_seconds",
    "upkeep_seconds": "maintenance_seconds",
    "megapixels_in_hand": "megapixel_budget",
}

log = logging.getLogger(__name__)

# The query options of a Redis URL that kombu understands.
_BROKER_OPTIONS = frozenset(
    {"virtual_host", "ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
)
# Host, port, database number and options; or the path of a Unix socket.
_BROKER_URL = re.compile(
    r"rediss?://([^/?#]*@)?[^/?#@:]+(:\d{1,5})?(/\d*)?(\?.*)?|redis\+socket:///.+", re.DOTALL
)


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("empty; name a folder or leave the variable unset")
    return value


def _resolve(path: Path) -> Path:
    """Makes a path absolute without symlinks: Storage compares resolved paths with roots."""
    return Path(os.path.realpath(path.expanduser()))


def _resolve_all(paths: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(_resolve(path) for path in paths)


def _check_database_url(value: SecretStr | None) -> SecretStr | None:
    if value is None:
        return None
    try:
        url = make_url(value.get_secret_value())
    except (ArgumentError, ValueError):
        raise ValueError(
            "use postgresql+psycopg://user:password@host/name or sqlite:///file"
        ) from None
    # SQLAlchemy would load psycopg2 for "postgresql" and knows no "postgres".
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ValueError(f"{url.drivername!r} is not supported; use postgresql+psycopg or sqlite")
    if url.drivername == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("a database in memory cannot be shared by processes; use sqlite:///file")
    return SecretStr(url.render_as_string(hide_password=False))


def _check_broker_url(value: SecretStr | None) -> SecretStr | None:
    if value is not None and not _BROKER_URL.fullmatch(value.get_secret_value()):
        raise ValueError("use redis://host:6379/0, rediss:// or redis+socket:///path")
    if value is not None:
        _check_broker_parts(value.get_secret_value())
    return value


def _check_broker_parts(url: str) -> None:
    """Raises ValueError. The message leaves the URL out: it may hold a password."""
    try:
        # kombu would report both mistakes only at the first connection.
        port = urlsplit(url).port
    except ValueError:
        raise ValueError("the port must be a number from 1 to 65535") from None
    if port == 0:
        raise ValueError("the port must be a number from 1 to 65535")
    unknown = set(parse_qs(urlsplit(url).query)) - _BROKER_OPTIONS
    if unknown:
        raise ValueError(f"{min(unknown)!r} is not an option of a Redis URL")


Attention = Literal["auto", "flash", "cudnn", "efficient", "math", "xformers", "sliced"]
Compile = Literal["off", "auto", "default", "max-autotune"]
Quantization = Literal["off", "int8_weights", "int8", "fp8"]
MemoryMode = Literal[
    "attention_slicing", "vae_slicing", "vae_tiling", "model_offload", "sequential_offload"
]

BatchSize = Annotated[int, Field(ge=1, le=256)] | Literal["auto"]
MemoryModes = Annotated[tuple[MemoryMode, ...], NoDecode, BeforeValidator(_split)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Folders = Annotated[
    tuple[Path, ...], NoDecode, BeforeValidator(_split), AfterValidator(_resolve_all)
]


class Settings(BaseSettings):
    """One field per ``INPAINT_*`` variable, read from the environment and ``./.env``.

    The environment wins over ``.env``. Frozen: a command passes its options to ``load``.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=DOTENV,
        extra="ignore",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    # The descriptions are the text of docs/settings.md; a test compares them.
    home: Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_resolve)] = Field(
        default=Path(".inpaint"),
        description="Folder of the SQLite database and the embedded Redis; created for this user "
        "only (0700).",
    )
    database_url: Annotated[SecretStr | None, AfterValidator(_check_database_url)] = Field(
        default=None,
        description="The job table: `postgresql+psycopg://...` or `sqlite:///...`. "
        "Unset: SQLite in `INPAINT_HOME`.",
    )
    broker_url: Annotated[SecretStr | None, AfterValidator(_check_broker_url)] = Field(
        default=None,
        description="Redis for Celery: `redis://...`. Unset: the product starts its own.",
    )
    engine: str = Field(
        default="sd2", description="`sd2`, `opencv` or `diffusers:FOLDER_OR_HUB_ID[@REVISION]`."
    )
    buckets: Names = Field(
        default=(),
        description="Allowed S3 buckets, comma separated. "
        "Unset: every bucket that the credentials can reach.",
    )
    roots: Folders = Field(
        default=(Path(),),
        description="Allowed folders for local files, comma separated. Unset: the current folder.",
    )
    lease_seconds: float = Field(
        default=60,
        gt=0,
        le=3600,
        description="A lease expires after this time without a heartbeat; "
        "the job then counts as lost and runs again.",
    )
    heartbeat_seconds: float = Field(
        default=15, gt=0, description="How often a worker renews its leases."
    )
    maintenance_seconds: float = Field(
        default=2,
        gt=0,
        le=60,
        description="How often a worker dispatches due jobs and reclaims expired leases.",
    )
    stall_seconds: float = Field(
        default=900,
        gt=0,
        description="A worker process is restarted if its engine makes no progress for this long.",
    )
    freeze_seconds: float = Field(
        default=30,
        gt=0,
        description="A worker process is killed and restarted if it does not run for this long: "
        "native code holds the interpreter lock, or the process is stopped. At most half of "
        "`INPAINT_LEASE_SECONDS`; a larger value counts as that.",
    )
    write_retry_seconds: float = Field(
        default=600,
        ge=0,
        description="How long a worker retries a write that fails (disk full, permission denied) "
        "before the attempt fails.",
    )
    queue_bound: int = Field(
        default=1000,
        ge=1,
        le=100_000,
        description="Maximum number of messages in Redis per engine and priority.",
    )
    concurrency: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Concurrent jobs per worker process; 0: a default by engine.",
    )
    megapixel_budget: int = Field(
        default=0,
        ge=0,
        description="Decoded megapixels that a worker process holds in memory at a time; further "
        "jobs wait. 0: as many as fit half of the machine's memory, divided among its processes.",
    )
    max_batch: BatchSize = Field(
        default="auto",
        description="Maximum rows in one forward pass; a window takes two rows with guidance, else "
        "one. `auto`: the largest batch that fits.",
    )
    deterministic: bool = Field(
        default=False,
        description="Pad every forward pass to `INPAINT_MAX_BATCH` rows (8 if `auto`): "
        "a job's result is bit-identical whatever else is in the batch.",
    )
    compile: Compile = Field(
        default="off",
        description="`default` or `max-autotune`: run the UNet through `torch.compile`; `auto`: "
        "only if a worker measures at its start that this is faster. Needs a C compiler and "
        "Python's headers; the first start takes minutes, later ones use the cache in "
        "`INPAINT_HOME`.",
    )
    attention: Attention = Field(
        default="auto",
        description="`flash`, `cudnn`, `efficient`, `math`, `xformers` or `sliced`. `auto`: on a "
        "GPU the fastest of the first three, measured for each window size.",
    )
    quantization: Quantization = Field(
        default="off",
        description="8-bit weights in the UNet's attention blocks: `int8_weights` (less memory), "
        "`int8` (activations too; needs CUDA, `INPAINT_COMPILE` and an `INPAINT_ATTENTION` other "
        "than `auto`) or `fp8` (needs compute capability 8.9). Needs the extra `quantization`. "
        "Recorded in `engine_revision`; pixels change slightly.",
    )
    memory: MemoryModes = Field(
        default=(),
        description="Modes that use less GPU memory, comma separated: `attention_slicing`, "
        "`vae_slicing`, `vae_tiling`, `model_offload`, `sequential_offload`. "
        "Unset: switched on one by one when memory runs out.",
    )
    max_object_bytes: int = Field(
        default=512 * 2**20,
        ge=1024,
        description="Largest image or mask file that is read, in bytes.",
    )
    max_pixels: int = Field(
        default=250_000_000, ge=1, description="Largest image or mask that is decoded, in pixels."
    )
    max_failures: int = Field(
        default=5, ge=1, le=100, description="A job fails for good after this many failed attempts."
    )
    retry_base_seconds: float = Field(
        default=30,
        ge=0,
        description="Longest wait before the first retry; doubles with each further retry.",
    )
    retry_cap_seconds: float = Field(
        default=900, ge=0, description="Longest wait before any retry."
    )
    log_level: str = Field(
        default="INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        description="`DEBUG`, `INFO`, `WARNING` or `ERROR`.",
    )

    @model_validator(mode="after")
    def _check_two_heartbeats_per_lease(self) -> Self:
        if self.heartbeat_seconds * 2 > self.lease_seconds:
            raise ValueError("INPAINT_HEARTBEAT_SECONDS must be at most half INPAINT_LEASE_SECONDS")
        return self

    @property
    def freeze_limit_seconds(self) -> float:
        """A frozen process is killed after this time: its leases must not have expired."""
        return min(self.freeze_seconds, self.lease_seconds / 2)

    @property
    def database(self) -> URL:
        if self.database_url is None:
            return URL.create("sqlite", database=str(self.home / "inpaint.db"))
        return make_url(self.database_url.get_secret_value())


def load(**overrides: Any) -> Settings:
    """Reads the environment and ``.env``; overrides win over both.

    Raises SettingsError that lists everything wrong. Logs a warning for each old name.
    """
    problems = []
    try:
        variables = _variables()
        problems = _unknown(variables)
        settings = Settings(**{**_values_of_old_names(variables), **overrides})
    except ValidationError as error:
        problems += _describe(error)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"settings: {DOTENV} cannot be read: {error}") from error
    if problems:
        raise SettingsError("settings: " + "; ".join(problems))
    return settings


def _variables() -> dict[str, str | None]:
    """Every ``INPAINT_*`` variable; the environment wins over ``.env``."""
    dotenv = {name.upper(): value for name, value in dotenv_values(DOTENV).items()}
    merged = {**dotenv, **os.environ}
    return {name: value for name, value in merged.items() if name.startswith(PREFIX)}


def _unknown(variables: Iterable[str]) -> list[str]:
    # Pydantic ignores unknown variables, so a misspelt one would silently have no effect.
    known = {_variable(name) for name in Settings.model_fields}
    unknown = sorted({*variables} - known - {_variable(name) for name in RENAMED})
    return [f"{name} is not a setting{did_you_mean(name, known)}" for name in unknown]


def _values_of_old_names(variables: Mapping[str, str | None]) -> dict[str, str | None]:
    """New names to the values set under old ones; a value under the new name wins."""
    values = {}
    for old_name, new_name in RENAMED.items():
        old, new = _variable(old_name), _variable(new_name)
        if old in variables and new in variables:
            log.warning("%s is ignored: its new name %s is set too; remove %s", old, new, old)
        elif old in variables:
            log.warning("%s is now called %s; the next version refuses the old name", old, new)
            values[new_name] = variables[old]
    return values


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _describe(error: ValidationError) -> list[str]:
    """One message per variable: its name and the rule, never the value (it may be a password)."""
    messages: dict[str, list[str]] = {}
    for problem in error.errors():
        message = problem["msg"].removeprefix("Value error, ")
        name = f"{_variable(str(problem['loc'][0]))}: " if problem["loc"] else ""
        messages.setdefault(name, []).append(message)
    return [name + _join_alternatives(alternatives) for name, alternatives in messages.items()]


def _join_alternatives(messages: list[str]) -> str:
    """Joins the messages about one field: Pydantic reports a field of several types once a type."""
    first, *others = messages
    return " or ".join([first, *(other.removeprefix("Input should be ") for other in others)])
