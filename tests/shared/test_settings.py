"""Settings from environment and .env, or one line with everything that is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from shared import settings
from shared.errors import SettingsError
from shared.settings import Settings

SECRET = "hush-hush"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No ``INPAINT_*`` variable in the environment and no ``.env`` in the current folder."""
    for name in [name for name in os.environ if name.startswith(settings.PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def error_message() -> str:
    with pytest.raises(SettingsError) as caught:
        settings.load()
    assert caught.value.code == "bad_settings"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_by_default_everything_is_in_the_current_folder(tmp_path: Path) -> None:
    loaded = settings.load()
    assert loaded.home == tmp_path / ".inpaint"
    assert loaded.database.render_as_string() == f"sqlite:///{tmp_path}/.inpaint/inpaint.db"
    assert loaded.broker_url is None
    assert loaded.roots == (tmp_path,)
    assert loaded.buckets == ()
    assert (loaded.lease_seconds, loaded.heartbeat_seconds) == (60, 15)


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INPAINT_HOME", "~/somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("INPAINT_BUCKETS", "one, two,,")
    monkeypatch.setenv("INPAINT_ROOTS", f"{tmp_path}/a,relative")
    monkeypatch.setenv("INPAINT_QUEUE_BOUND", "7")
    loaded = settings.load()
    assert loaded.home == tmp_path / "somewhere"
    assert loaded.buckets == ("one", "two")
    assert loaded.roots == (tmp_path / "a", tmp_path / "relative")
    assert loaded.queue_bound == 7


def test_a_root_that_is_a_symlink_is_resolved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.setenv("INPAINT_ROOTS", "link")
    assert settings.load().roots == (tmp_path / "real",)


def test_a_dotenv_file_is_read_and_the_environment_wins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("INPAINT_ENGINE=opencv\nINPAINT_MAX_BATCH=2\nOTHER=1\n")
    monkeypatch.setenv("INPAINT_MAX_BATCH", "3")
    loaded = settings.load()
    assert (loaded.engine, loaded.max_batch) == ("opencv", 3)


def test_a_dotenv_file_that_is_not_text_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"INPAINT_ENGINE=\xff\xfe\n")
    assert ".env cannot be read" in error_message()


@pytest.mark.parametrize(
    ("url", "driver"),
    [
        ("postgresql://u:p@host:5432/name", "postgresql+psycopg"),
        ("postgres://host/name", "postgresql+psycopg"),
        ("postgresql+psycopg://host/name", "postgresql+psycopg"),
        ("sqlite:///file.db", "sqlite"),
    ],
)
def test_the_usual_database_urls_are_accepted(
    monkeypatch: pytest.MonkeyPatch, url: str, driver: str
) -> None:
    monkeypatch.setenv("INPAINT_DATABASE_URL", url)
    assert settings.load().database.drivername == driver


def test_everything_wrong_is_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_QUEUE_BOUND", "many")
    monkeypatch.setenv("INPAINT_LEASE_SECONDS", "-1")
    monkeypatch.setenv("INPAINT_LOG_LEVEL", "LOUD")
    monkeypatch.setenv("INPAINT_DATABASE_URL", "mysql://host/name")
    monkeypatch.setenv("INPAINT_BROKER_URL", "amqp://host")
    monkeypatch.setenv("INPAINT_BUKETS", "b")
    message = error_message()
    for name in ("QUEUE_BOUND", "LEASE_SECONDS", "LOG_LEVEL", "DATABASE_URL", "BROKER_URL"):
        assert f"INPAINT_{name}: " in message
    assert "INPAINT_BUKETS is not a setting; did you mean 'INPAINT_BUCKETS'?" in message
    assert "'mysql' is not supported; use postgresql+psycopg or sqlite" in message
    assert "use redis://host:6379/0" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", f"postgresql://u:{SECRET}@host:port/name"),
        ("DATABASE_URL", f"postgresql://u:p:{SECRET}"),
        ("DATABASE_URL", f"u:{SECRET}@host/name"),
        ("DATABASE_URL", f"mysql://u:{SECRET}@host/name"),
        ("DATABASE_URL", ""),
        ("BROKER_URL", f"amqp://u:{SECRET}@host"),
        ("BROKER_URL", f"redis://:{SECRET}@host:port/0"),
        ("BROKER_URL", f"redis://:{SECRET}@host:6379/zero"),
        ("BROKER_URL", f"redis:/{SECRET}"),
        ("BROKER_URL", "redis://"),
        ("BROKER_URL", ""),
        ("LEASE_SECONDS", "nan"),
        ("LEASE_SECONDS", "3601"),
        ("HEARTBEAT_SECONDS", "nan"),
        ("HEARTBEAT_SECONDS", "0"),
        ("HEARTBEAT_SECONDS", "30.1"),
        ("RETRY_BASE_SECONDS", "inf"),
        ("RETRY_CAP_SECONDS", "nan"),
        ("QUEUE_BOUND", "0"),
        ("QUEUE_BOUND", "1.5"),
        ("CONCURRENCY", "-1"),
        ("MAX_BATCH", "257"),
        ("MAX_OBJECT_BYTES", "1023"),
        ("MAX_PIXELS", "0"),
        ("MAX_FAILURES", "0"),
    ],
)
def test_an_invalid_value_is_refused_without_showing_secrets(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"INPAINT_{name}", value)
    message = error_message()
    assert f"INPAINT_{name}" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host:6379/0",
        "redis://:p@ss:word@host/1",
        "rediss://user:password@host:6380/2?ssl_cert_reqs=required",
        "redis+socket:///run/redis.sock",
    ],
)
def test_the_usual_broker_urls_are_accepted(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("INPAINT_BROKER_URL", url)
    broker = settings.load().broker_url
    assert broker is not None
    assert broker.get_secret_value() == url


def test_no_representation_contains_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_DATABASE_URL", f"postgresql://u:{SECRET}@host/name")
    monkeypatch.setenv("INPAINT_BROKER_URL", f"redis://:{SECRET}@host/0")
    loaded = settings.load()
    assert loaded.database.password == SECRET
    for shown in (repr(loaded), str(loaded), str(loaded.database), loaded.model_dump_json()):
        assert SECRET not in shown


def test_an_unknown_name_suggests_the_most_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_DATABASE", "x")
    assert (
        "INPAINT_DATABASE is not a setting; did you mean 'INPAINT_DATABASE_URL'?" in error_message()
    )


def test_an_unknown_name_in_a_dotenv_file_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("INPAINT_ENGIN=opencv\n")
    assert "INPAINT_ENGIN is not a setting; did you mean 'INPAINT_ENGINE'?" in error_message()


OLD_NAMES = [
    ("INPAINT_REFUSED_SECONDS", "INPAINT_WRITE_RETRY_SECONDS"),
    ("INPAINT_UPKEEP_SECONDS", "INPAINT_MAINTENANCE_SECONDS"),
    ("INPAINT_MEGAPIXELS_IN_HAND", "INPAINT_MEGAPIXEL_BUDGET"),
]


def value(variable: str) -> object:
    return getattr(settings.load(), variable.removeprefix(settings.PREFIX).lower())


@pytest.mark.parametrize(("old", "new"), OLD_NAMES)
def test_an_old_name_still_works_with_a_warning_that_names_the_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, old: str, new: str
) -> None:
    monkeypatch.setenv(old, "7")
    assert value(new) == 7
    assert caplog.messages == [f"{old} is now called {new}; the next version refuses the old name"]


@pytest.mark.parametrize(("old", "new"), OLD_NAMES)
def test_an_old_name_in_a_dotenv_file_still_works(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, old: str, new: str
) -> None:
    (tmp_path / ".env").write_text(f"{old}=7\n")
    assert value(new) == 7
    assert f"{old} is now called {new}" in caplog.text


@pytest.mark.parametrize(("old", "new"), OLD_NAMES)
@pytest.mark.parametrize("place_of_new", ["environment", "dotenv"])
def test_the_new_name_wins_over_the_old_one_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    old: str,
    new: str,
    place_of_new: str,
) -> None:
    monkeypatch.setenv(old, "7")
    if place_of_new == "environment":
        monkeypatch.setenv(new, "8")
    else:
        (tmp_path / ".env").write_text(f"{new}=8\n")
    assert value(new) == 8
    assert caplog.messages == [f"{old} is ignored: its new name {new} is set too; remove {old}"]


def test_an_old_name_in_the_environment_wins_over_the_same_one_in_a_dotenv_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("INPAINT_UPKEEP_SECONDS=7\n")
    monkeypatch.setenv("INPAINT_UPKEEP_SECONDS", "8")
    assert settings.load().maintenance_seconds == 8


def test_an_option_wins_over_an_old_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_UPKEEP_SECONDS", "7")
    assert settings.load(maintenance_seconds=8).maintenance_seconds == 8


def test_a_wrong_value_under_an_old_name_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_UPKEEP_SECONDS", "often")
    assert "INPAINT_MAINTENANCE_SECONDS: " in error_message()


def test_settings_under_their_present_names_cause_no_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _, new in OLD_NAMES:
        monkeypatch.setenv(new, "7")
    settings.load()
    assert caplog.messages == []


def test_a_lease_shorter_than_two_heartbeats_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INPAINT_LEASE_SECONDS", "20")
    assert "INPAINT_HEARTBEAT_SECONDS must be at most half INPAINT_LEASE_SECONDS" in error_message()
    monkeypatch.setenv("INPAINT_HEARTBEAT_SECONDS", "10")
    assert settings.load().heartbeat_seconds == 10


def test_settings_cannot_be_changed() -> None:
    loaded = settings.load()
    with pytest.raises(ValidationError, match="frozen"):
        loaded.engine = "opencv"  # type: ignore[misc]


def test_every_setting_is_described() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="a database in memory cannot be shared"):
        settings.load(database_url=url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://:secret@127.0.0.1:99999/0", "the port must be a number"),
        ("redis://:secret@127.0.0.1:6379/0?foo=bar", "'foo' is not an option"),
    ],
)
def test_a_broker_url_that_no_client_can_use_is_refused(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as error:
        settings.load(broker_url=url)
    assert "secret" not in str(error.value)


def test_a_variable_of_two_types_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_MAX_BATCH", "0")
    with pytest.raises(SettingsError) as caught:
        settings.load()
    assert str(caught.value) == (
        "settings: INPAINT_MAX_BATCH: Input should be greater than or equal to 1 or 'auto'"
    )
