"""Manifests that are not what they seem, and what must not leak from any command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from producer.resolve import Options
from producer.validate import check
from shared.errors import ManifestError
from shared.storage import Storage
from tests.conftest import Bucket
from tests.producer.desk import Desk


@pytest.mark.parametrize(
    ("name", "delimiter", "said"),
    [
        ("m.csv", ";", "separated by semicolons; save it with commas, or tabs in a .tsv"),
        ("m.csv", "\t", "separated by tabs; save it with commas, or tabs in a .tsv"),
        ("m.csv", "|", "separated by bars; save it with commas"),
        ("m.tsv", ",", "separated by commas; save it with tabs"),
    ],
)
def test_another_delimiter_is_named(desk: Desk, name: str, delimiter: str, said: str) -> None:
    desk.write(name, f"image{delimiter}mask\na.png{delimiter}alpha\n")
    ran = desk.submit(name)
    assert ran.status == 2
    assert f"line 1: the columns are {said}" in ran.err


def test_a_quote_that_swallows_the_next_row_is_named_by_where_it_opens(desk: Desk) -> None:
    desk.write("m.csv", 'image,mask\na.png,"al"\nb.png,"alpha\nc.png,"alpha"\nd.png,alpha\n')
    ran = desk.submit("m.csv")
    assert ran.status == 2
    assert "line 3: a quote that opens here is not closed as it should, up to line 4" in ran.err


class Meanwhile(Storage):
    """A store where something happens once a manifest has been opened."""

    def __init__(self, happens: Callable[[], Any], **allowed: Any) -> None:
        super().__init__(**allowed)
        self._happens = happens

    def open(self, uri: str) -> Any:
        opened = super().open(uri)
        self._happens()
        return opened


def rows(store: Storage, manifest: str) -> int:
    options = Options(manifest=manifest, output="/out", engine="opencv")
    checked = check(options, store, report=lambda _problem: None)
    checked.spool.close()
    return checked.rows


def test_a_manifest_that_changes_while_it_is_read_is_refused(desk: Desk) -> None:
    manifest = desk.catalog(2)

    def grow() -> None:
        with manifest.open("a") as file:
            file.write("in/1.png,alpha\n")

    roots = [desk.folder, Path("/out")]
    store = Meanwhile(grow, roots=roots, buckets=())
    with pytest.raises(ManifestError, match=r"m\.csv: changed while it was read; submit it again"):
        rows(store, str(manifest))
    assert rows(Storage(roots=roots, buckets=()), str(manifest)) == 3


def test_a_manifest_on_s3_that_changes_while_it_is_read_is_refused(s3: Bucket) -> None:
    def put(rows: str) -> None:
        s3.client.put_object(Bucket=s3.name, Key="m.csv", Body=f"image,mask\n{rows}".encode())

    put("a.png,alpha\n")
    store = Meanwhile(lambda: put("b.png,alpha\n"), roots=[Path("/out")], buckets=[s3.name])
    with pytest.raises(ManifestError, match="changed while it was read"):
        rows(store, s3.uri("m.csv"))


def test_control_characters_do_nothing_to_a_terminal(desk: Desk) -> None:
    desk.catalog(1)
    desk.write("m.csv", "image,mask,id\nin/1.png,alpha,a\x1b]0;owned\x07b\n")
    assert desk.submit("m.csv").status == 0
    for ran in (desk.jobs("list"), desk.jobs("show", 1)):
        assert "\x1b" not in ran.out
        assert "a\\x1b]0;owned\\x07b" in ran.out


def test_no_secret_is_printed_logged_or_recorded(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hush-5f3a"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("INPAINT_BUCKETS", "shop")
    monkeypatch.setenv("INPAINT_BROKER_URL", f"redis://:{secret}@127.0.0.1:9/0")
    said = []

    def run(command: Callable[..., Any], *arguments: str) -> None:
        ran = command(*arguments)
        said.append(ran.out + ran.err)

    desk.catalog(1)
    bad = desk.manifest([(f"s3://key:{secret}@shop/a.png", "alpha")], name="bad.csv")
    run(desk.submit, "m.csv")
    run(desk.submit, str(bad))
    run(desk.submit, f"https://user:{secret}@host/m.csv")
    run(desk.submit, "m.csv", "--output", f"s3://key:{secret}@shop/out/")
    run(desk.jobs, "retry", "--submission", "1")
    run(desk.jobs, "export")
    recorded = b"".join(
        path.read_bytes() for path in (desk.folder / ".inpaint").glob("inpaint.db*")
    )
    monkeypatch.setenv("INPAINT_DATABASE_URL", f"postgresql+psycopg://u:{secret}@127.0.0.1:9/x")
    run(desk.jobs, "status")
    run(desk.jobs, "doctor", "--engine", "opencv")
    monkeypatch.setenv("INPAINT_DATABASE_URL", f"mysql://u:{secret}@host/x")
    run(desk.jobs, "status")
    assert len(said) == 9
    assert all(said), "each of them had something to say"
    assert b"in/1.png" in recorded
    assert not [text for text in (*said, caplog.text, repr(recorded)) if secret in text]
