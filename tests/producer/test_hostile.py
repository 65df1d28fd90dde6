"""Manifests that are not what they seem, and secrets that no command may print."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from producer import manifest
from producer.manifest import Problem
from producer.problem_report import ProblemReport
from producer.resolve import RowDefaults
from producer.validate import validate_manifest
from shared.errors import ManifestError
from shared.storage import Storage
from tests.conftest import Bucket
from tests.producer.workspace import Workspace


@pytest.mark.parametrize(
    ("name", "delimiter", "reason"),
    [
        ("m.csv", ";", "separated by semicolons; save it with commas, or tabs in a .tsv"),
        ("m.csv", "\t", "separated by tabs; save it with commas, or tabs in a .tsv"),
        ("m.csv", "|", "separated by bars; save it with commas"),
        ("m.tsv", ",", "separated by commas; save it with tabs"),
    ],
)
def test_a_wrong_delimiter_is_named(
    workspace: Workspace, name: str, delimiter: str, reason: str
) -> None:
    workspace.write(name, f"image{delimiter}mask\na.png{delimiter}alpha\n")
    result = workspace.submit(name)
    assert result.status == 2
    assert f"line 1: the columns are {reason}" in result.err


def test_an_unclosed_quote_is_reported_at_the_line_where_it_opens(
    workspace: Workspace,
) -> None:
    workspace.write("m.csv", 'image,mask\na.png,"al"\nb.png,"alpha\nc.png,"alpha"\nd.png,alpha\n')
    result = workspace.submit("m.csv")
    assert result.status == 2
    assert "line 3: a quote that opens here is not closed properly, up to line 4" in result.err


class ChangingStorage(Storage):
    """A storage that calls a function when a manifest has been opened."""

    def __init__(self, on_open: Callable[[], Any], **allowed: Any) -> None:
        super().__init__(**allowed)
        self._on_open = on_open

    def open(self, uri: str) -> Any:
        opened = super().open(uri)
        self._on_open()
        return opened


def rows(store: Storage, manifest: str) -> int:
    options = RowDefaults(manifest=manifest, output="/out", engine="opencv")
    checked = validate_manifest(options, store, report=lambda _problem: None)
    checked.close()
    return checked.rows


def test_a_manifest_that_changes_while_it_is_read_is_refused(workspace: Workspace) -> None:
    manifest = workspace.catalog(2)

    def grow() -> None:
        with manifest.open("a") as file:
            file.write("in/1.png,alpha\n")

    roots = [workspace.folder, Path("/out")]
    store = ChangingStorage(grow, roots=roots, buckets=())
    with pytest.raises(ManifestError, match=r"m\.csv: changed while it was read; submit it again"):
        rows(store, str(manifest))
    assert rows(Storage(roots=roots, buckets=()), str(manifest)) == 3


def test_a_manifest_on_s3_that_changes_while_it_is_read_is_refused(s3: Bucket) -> None:
    def put(rows: str) -> None:
        s3.client.put_object(Bucket=s3.name, Key="m.csv", Body=f"image,mask\n{rows}".encode())

    put("a.png,alpha\n")
    store = ChangingStorage(lambda: put("b.png,alpha\n"), roots=[Path("/out")], buckets=[s3.name])
    with pytest.raises(ManifestError, match="changed while it was read"):
        rows(store, s3.uri("m.csv"))


def test_control_characters_are_escaped_on_a_terminal(workspace: Workspace) -> None:
    workspace.catalog(1)
    workspace.write("m.csv", "image,mask,key\nin/1.png,alpha,a\x1b]0;owned\x07b\n")
    assert workspace.submit("m.csv").status == 0
    for result in (workspace.jobs("list"), workspace.jobs("show", 1)):
        assert "\x1b" not in result.out
        assert "a\\x1b]0;owned\\x07b" in result.out


def test_no_secret_is_printed_logged_or_recorded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hush-5f3a"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("INPAINT_BUCKETS", "shop")
    monkeypatch.setenv("INPAINT_BROKER_URL", f"redis://:{secret}@127.0.0.1:9/0")
    outputs = []

    def run(command: Callable[..., Any], *arguments: str) -> None:
        result = command(*arguments)
        outputs.append(result.out + result.err)

    workspace.catalog(1)
    bad = workspace.manifest([(f"s3://key:{secret}@shop/a.png", "alpha")], name="bad.csv")
    run(workspace.submit, "m.csv")
    run(workspace.submit, str(bad))
    run(workspace.submit, f"https://user:{secret}@host/m.csv")
    run(workspace.submit, "m.csv", "--output", f"s3://key:{secret}@shop/out/")
    run(workspace.jobs, "retry", "--submission", "1")
    run(workspace.jobs, "export")
    recorded = b"".join(
        path.read_bytes() for path in (workspace.folder / ".inpaint").glob("inpaint.db*")
    )
    monkeypatch.setenv("INPAINT_DATABASE_URL", f"postgresql+psycopg://u:{secret}@127.0.0.1:9/x")
    run(workspace.jobs, "status")
    run(workspace.jobs, "doctor", "--engine", "opencv")
    monkeypatch.setenv("INPAINT_DATABASE_URL", f"mysql://u:{secret}@host/x")
    run(workspace.jobs, "status")
    assert len(outputs) == 9
    assert all(outputs), "every command printed something"
    assert b"in/1.png" in recorded
    assert not [text for text in (*outputs, caplog.text, repr(recorded)) if secret in text]


def test_a_header_of_too_many_columns_is_refused_with_its_count(workspace: Workspace) -> None:
    workspace.write("m.csv", ",".join(f"c{n}" for n in range(100_000)) + "\n")
    result = workspace.submit("m.csv")
    assert result.status == 2
    assert result.err.endswith(
        "m.csv: line 1: 100,000 columns; at most 500 are allowed: is this a manifest?\n"
    )
    workspace.write("m.jsonl", json.dumps({f"c{n}": 1 for n in range(10_000)}) + "\n")
    result = workspace.submit("m.jsonl")
    assert "line 1: 10,000 columns; at most 500 are allowed" in result.err


def test_wrong_columns_are_compared_with_the_known_ones_a_few_times_only(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[str] = []

    def did_you_mean(name: str, _known: frozenset[str]) -> str:
        compared.append(name)
        return "; a suggestion"

    monkeypatch.setattr(manifest, "did_you_mean", did_you_mean)
    names = [f"c{n}" for n in range(200)]
    workspace.write("m.csv", ",".join(["image", "mask", *names, *names]) + "\n")
    error = workspace.submit("m.csv").err
    assert compared == names[:5]
    assert error.count("duplicate column") == error.count("is not known") == 20
    assert error.count("and 180 more like this") == 2
    compared.clear()
    rows = [json.dumps({"image": "a.png", "mask": "alpha", name: 1}) for name in names * 2]
    workspace.write("m.jsonl", "\n".join(rows))
    workspace.submit("m.jsonl")
    assert compared == names[:5]


def test_of_problems_that_are_alike_the_first_ten_are_printed(workspace: Workspace) -> None:
    rows = [f"in/{n}.png,alpha" + ("" if n % 2 else f",{5000 + n}") for n in range(10_000)]
    workspace.write("m.csv", "image,mask,priority\n" + "\n".join(rows) + "\n")
    result = workspace.submit("m.csv")
    assert result.status == 2
    lines = result.err.splitlines()
    assert len([line for line in lines if line.startswith("line ")]) == 20
    assert len([line for line in lines if line.startswith("4,990 more like this: ")]) == 2
    assert "10,000 of 10,000 rows are not valid; nothing was recorded" in lines[-1]


def test_problems_of_countless_kinds_are_counted_together() -> None:
    printed: list[str] = []
    report = ProblemReport(printed.append)
    for number in range(5_000):
        word = "".join(chr(97 + int(digit)) for digit in str(number))
        report(Problem(line=number, text=f"unknown {word}"))
    report.summarize()
    assert len(printed) == 101
    assert printed[-1] == "4,900 more of other kinds"


def test_a_row_of_countless_lines_is_refused_before_it_fills_the_memory(
    workspace: Workspace,
) -> None:
    workspace.write("m.csv.gz", gzip.compress(b"image,mask\n" + b'"\n",' * 3_000_000))
    result = workspace.submit("m.csv.gz")
    assert result.status == 2
    assert "line 2: a row of more than 1,048,576 characters; is a quote not closed?" in result.err


LIMITED_SUBMIT = """
import resource
from producer.cli.submit import submit
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
submit()
"""


@pytest.mark.parametrize("is_missing", [False, True], ids=["full", "missing"])
def test_a_temporary_folder_that_takes_nothing_is_one_line(
    workspace: Workspace, is_missing: bool
) -> None:
    """A limit on the size of files stands for the full disk: the kernel refuses the write."""
    rows = [f"in/{n}.png,alpha" for n in range(4_000)]
    workspace.write("m.csv", "image,mask\n" + "\n".join(rows) + "\n")
    program = LIMITED_SUBMIT
    if is_missing:  # every place that Python would try
        program = "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/proc/none']\n"
        program += LIMITED_SUBMIT
    result = subprocess.run(
        [sys.executable, "-c", program, "m.csv"],
        cwd=workspace.folder,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("inpaint-submit: cannot write a temporary file: ")
    assert result.stderr.endswith("; free space, or set TMPDIR to another folder\n")
