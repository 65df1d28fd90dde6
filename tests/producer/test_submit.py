"""inpaint-submit as a user runs it: what it records, prints and exits with."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from producer.resolve import RowDefaults
from producer.validate import CHUNK, JobSpool, validate_manifest
from shared import jobs
from shared.errors import ImageError
from shared.jobs import AttemptRecord, submissions
from shared.jobs.queue import Queue
from shared.jobs.retry import RetryPolicy
from shared.params import Params
from shared.storage import Storage
from tests.conftest import Bucket
from tests.job_table import JobTable
from tests.producer.workspace import CommandResult, Workspace

NEVER = RetryPolicy(max_failures=1, base_seconds=0, cap_seconds=0)
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(params=["sqlite", "postgresql"])
def both_databases(
    request: pytest.FixtureRequest, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> Iterator[JobTable]:
    """The workspace's tables, on SQLite and on PostgreSQL."""
    if request.param == "postgresql":
        url = request.getfixturevalue("migrated_url")
        monkeypatch.setenv("INPAINT_DATABASE_URL", url)
    table = workspace.table()
    if not table.db.is_sqlite:
        with table.db.write() as connection:
            connection.exec_driver_sql("TRUNCATE submissions, jobs, attempts RESTART IDENTITY")
    yield table
    table.db.close()


def job_ids(table: JobTable) -> list[int]:
    with table.db.read() as connection:
        return list(connection.exec_driver_sql("SELECT id FROM jobs ORDER BY id").scalars())


def all_jobs(table: JobTable) -> list[Any]:
    return [table.job(job) for job in job_ids(table)]


def finish(table: JobTable, **found: Any) -> None:
    """Takes every job that is queued to its end, with the versions that its inputs have now."""
    store = Storage(roots=[Path("/")], buckets=())
    for row in all_jobs(table):
        if row.state != "queued":
            continue
        leased = table.acquire(row.id, seen=row.attempt)
        assert leased is not None
        versions = [store.stat(uri) for uri in (row.image, row.mask)]
        from shared import jobs

        record = jobs.AttemptRecord(
            image_version=versions[0].version if versions[0] else None,
            mask_version=versions[1].version if versions[1] else None,
            **found,
        )
        jobs.succeed(table.db, leased, record)


def assert_refused(result: CommandResult, *expected: str) -> None:
    assert result.status == 2
    assert result.out == ""
    for text in expected:
        assert text in result.err


# --- recorded and queued ---------------------------------------------------------------------


def test_every_row_becomes_a_queued_job(
    workspace: Workspace, both_databases: JobTable, redis_url: str
) -> None:
    result = workspace.submit(workspace.catalog(3))
    assert result.status == 0
    assert result.out.splitlines() == [
        "submission 1: 3 rows, 3 accepted",
        f"results: {workspace.folder}/m-out",
        "work: inpaint-worker --engine opencv",
        "watch: inpaint-jobs status 1 --watch",
    ]
    assert result.err == ""
    rows = all_jobs(both_databases)
    assert [row.line for row in rows] == [2, 3, 4]
    assert [row.image for row in rows] == [f"{workspace.folder}/in/{n}.png" for n in (1, 2, 3)]
    assert [row.output for row in rows] == [f"{workspace.folder}/m-out/{n}.png" for n in (1, 2, 3)]
    assert {row.state for row in rows} == {"queued"}
    queue = Queue(redis_url)
    assert queue.ready_messages("opencv") == {(row.id, 0) for row in rows}
    queue.close()
    (submission,) = both_databases.submissions()
    assert (submission.rows, submission.invalid) == (3, 0)
    assert submission.recorded_at is not None
    assert json.loads(submission.options)["engine"] == "opencv"


def test_json_is_one_object_with_the_documented_keys(workspace: Workspace) -> None:
    result = workspace.submit(workspace.catalog(2), "--json")
    assert result.json == {
        "submission": 1,
        "rows": 2,
        "accepted": 2,
        "duplicates": 0,
        "invalid": 0,
    }
    assert list(result.json) == ["submission", "rows", "accepted", "duplicates", "invalid"]
    assert len(result.out.splitlines()) == 1


def test_the_same_manifest_again_adds_nothing_and_says_so(
    workspace: Workspace, both_databases: JobTable
) -> None:
    manifest = workspace.catalog(3)
    workspace.submit(manifest)
    again = workspace.submit(manifest)
    assert again.status == 0
    assert again.out.splitlines()[0] == (
        "submission 1: 3 rows, 0 accepted, 3 already recorded; nothing added; 3 still to run"
    )
    assert workspace.submit(manifest, "--json").json["duplicates"] == 3
    assert len(job_ids(both_databases)) == 3
    assert len(both_databases.submissions()) == 1


def test_a_longer_manifest_adds_only_its_new_rows(workspace: Workspace, table: JobTable) -> None:
    workspace.submit(workspace.catalog(2))
    assert workspace.submit(workspace.catalog(3), "--json").json == {
        "submission": 2,
        "rows": 3,
        "accepted": 1,
        "duplicates": 2,
        "invalid": 0,
    }
    assert len(job_ids(table)) == 3


def test_identical_rows_are_one_job(workspace: Workspace, both_databases: JobTable) -> None:
    workspace.catalog(1)
    manifest = workspace.manifest([("in/1.png", "masks/1.png")] * 3)
    assert workspace.submit(manifest, "--json").json == {
        "submission": 1,
        "rows": 3,
        "accepted": 1,
        "duplicates": 2,
        "invalid": 0,
    }
    assert len(job_ids(both_databases)) == 1
    finish(both_databases)
    assert workspace.submit(manifest, "--force", "--json").json["accepted"] == 1
    finish(both_databases)
    assert workspace.submit(manifest, "--force", "--json").json["accepted"] == 1


def test_a_finished_submission_says_how_to_run_rows_again(
    workspace: Workspace, both_databases: JobTable
) -> None:
    manifest = workspace.catalog(2)
    workspace.submit(manifest)
    for job in job_ids(both_databases):
        both_databases.succeed(job)
    again = "nothing added (--force or --changed run rows again)"
    assert again in workspace.submit(manifest).out
    assert again not in workspace.submit(manifest, "--force").out


def test_an_interrupted_submission_is_completed(
    workspace: Workspace, both_databases: JobTable
) -> None:
    manifest = workspace.catalog(4)
    _record_part_of(workspace, both_databases, manifest, rows=2)
    assert len(job_ids(both_databases)) == 2
    result = workspace.submit(manifest)
    assert result.out.splitlines()[0] == (
        "submission 1: 4 rows, 2 accepted, 2 already recorded; "
        "it had been interrupted and is complete now; 4 still to run"
    )
    assert [row.line for row in all_jobs(both_databases)] == [2, 3, 4, 5]
    assert {row.state for row in all_jobs(both_databases)} == {"queued"}
    assert "nothing added" in workspace.submit(manifest).out


def _record_part_of(workspace: Workspace, table: JobTable, manifest: Path, *, rows: int) -> None:
    """Leave the database as a producer that is killed between two chunks leaves it."""
    options = RowDefaults(
        manifest=str(manifest), output=f"{workspace.folder}/m-out", engine="opencv"
    )
    checked = validate_manifest(
        options, Storage(roots=[workspace.folder], buckets=()), report=pytest.fail
    )
    opened = submissions.open_submission(
        table.db,
        manifest=options.manifest,
        digest=checked.digest,
        options="{}",
        rows=checked.rows,
        invalid=0,
    )
    submissions.record(table.db, opened.id, list(checked.jobs())[:rows])
    checked.close()


def test_two_producers_with_one_manifest_record_each_row_once(
    workspace: Workspace, both_databases: JobTable
) -> None:
    count = 4000
    manifest = workspace.manifest([(f"in/{n}.png", "alpha") for n in range(count)])
    command = [sys.executable, "-m", "tests.producer.run_submit", str(manifest), "--json"]
    running = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=60) for process in running]
    assert [err for _, err in answers] == [b"", b""]
    summaries = [json.loads(out) for out, _ in answers]
    assert sum(summary["accepted"] for summary in summaries) == count
    assert sum(summary["duplicates"] for summary in summaries) == count
    assert {summary["submission"] for summary in summaries} == {1}
    assert len(job_ids(both_databases)) == count


def test_jobs_are_recorded_while_the_broker_is_down(
    workspace: Workspace, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_BROKER_URL", "redis://:hush@127.0.0.1:1/0")
    result = workspace.submit(workspace.catalog(2))
    assert result.status == 0
    assert "submission 1: 2 rows, 2 accepted" in result.out
    assert result.err.endswith("; workers dispatch the jobs when it is back\n")
    assert result.err.startswith("broker redis://")
    assert "hush" not in result.err
    assert len(job_ids(table)) == 2


def test_a_database_that_is_down_is_one_line(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_DATABASE_URL", "postgresql://u:hush@127.0.0.1:1/name")
    result = workspace.submit(workspace.catalog(1))
    assert_refused(result, "inpaint-submit: database: ")
    assert len(result.err.splitlines()) == 1
    assert "hush" not in result.err


def test_a_database_without_tables_names_the_remedy(
    workspace: Workspace, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_DATABASE_URL", postgres_url)
    assert_refused(workspace.submit(workspace.catalog(1)), "run: inpaint-jobs upgrade")
    assert workspace.jobs("upgrade").status == 0
    assert workspace.submit(workspace.catalog(1)).status == 0


def test_rows_beyond_the_queue_bound_stay_pending(
    workspace: Workspace, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_QUEUE_BOUND", "2")
    workspace.submit(workspace.catalog(5))
    assert sorted(table.states()) == ["pending"] * 3 + ["queued"] * 2


def test_a_submission_of_several_chunks_is_complete(workspace: Workspace, table: JobTable) -> None:
    count = 2 * CHUNK + 7
    manifest = workspace.manifest([(f"{n}.png", "alpha") for n in range(count)])
    assert workspace.submit(manifest, "--json").json["accepted"] == count
    with table.db.read() as connection:
        lines = connection.exec_driver_sql("SELECT count(DISTINCT line) FROM jobs").scalar_one()
    assert lines == count


# --- bad manifests ---------------------------------------------------------------------------


def test_a_bad_manifest_lists_every_bad_line_and_records_nothing(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.catalog(1)
    manifest = workspace.manifest(
        [
            ("in/1.png", "masks/1.png", "0.8", ""),
            ("in/1.png", "masks/1.png", "2", "x"),
            ("in/1.png",),
            ("http://h/1.png", "masks/1.png", "", ""),
            ("", "box:1", "", ""),
        ],
        columns=("image", "mask", "strength", "seed"),
    )
    result = workspace.submit(manifest)
    assert_refused(result)
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        *("line 3", "line 3", "line 4", "line 5", "line 6", "line 6"),
        "inpaint-submit",
    ]
    assert "line 3: seed: 'x' is not allowed; use a whole number from 0 to" in result.err
    assert "line 3: strength: '2' is not allowed; use a number above 0" in result.err
    assert "line 4: 1 cells under 4 columns; quote cells that hold the delimiter" in result.err
    assert "line 5: image: 'http://h/1.png': http:// is not supported; use s3://" in result.err
    assert "line 6: image: empty; name the image" in result.err
    assert lines[-1] == (
        "inpaint-submit: 4 of 5 rows are not valid; nothing was recorded. "
        "Fix them, or submit the others with --skip-invalid."
    )
    assert (job_ids(table), table.submissions()) == ([], [])


def test_good_rows_can_be_submitted_without_the_bad_ones(
    workspace: Workspace, table: JobTable
) -> None:
    workspace.catalog(2)
    manifest = workspace.manifest(
        [("in/1.png", "alpha"), ("../x.png", "alpha"), ("in/2.png", "alpha")]
    )
    result = workspace.submit(manifest, "--skip-invalid")
    assert result.status == 0
    assert "3 rows, 2 accepted, 1 invalid and skipped" in result.out
    assert "line 3: image: '../x.png': '..' is refused" in result.err
    assert [row.line for row in all_jobs(table)] == [2, 4]


def test_a_manifest_without_a_valid_row_is_refused_even_with_skip_invalid(
    workspace: Workspace,
) -> None:
    manifest = workspace.manifest([("../x.png", "alpha")])
    assert_refused(
        workspace.submit(manifest, "--skip-invalid"), "1 of 1 rows are not valid; nothing was"
    )


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("m.csv", b"", "empty; the first line must name the columns"),
        ("m.csv", b"image,mask\n", "no rows under the header; nothing to do"),
        ("m.jsonl", b"\n\n", "no rows"),
        ("m.csv", b"image,msk\na,b\n", "column 'msk' is not known"),
        ("m.csv", b'image,mask\n"a,b\n', "fix the quoting"),
        ("m.csv", "image,mask\na,b\n".encode("utf-16"), "save it as UTF-8"),
        ("m.csv.gz", gzip.compress(b"image,mask\na,b\n", mtime=0)[:-3], "the gzip data is damaged"),
        ("m.xlsx", b"PK", "is not a manifest"),
        ("m.csv", b"image,mask,key\na,b,x\x00y\n", "line 2: key: "),
    ],
)
def test_a_file_that_is_not_a_manifest_is_one_line(
    workspace: Workspace, name: str, data: bytes, expected: str
) -> None:
    assert_refused(workspace.submit(workspace.write(name, data)), expected)


def test_a_missing_manifest_is_one_line(workspace: Workspace) -> None:
    result = workspace.submit("nowhere.csv")
    assert result.err == f"inpaint-submit: '{workspace.folder}/nowhere.csv' does not exist\n"
    assert_refused(result)
    assert_refused(workspace.submit("http://host/m.csv"), "http:// is not supported")
    assert_refused(workspace.submit(workspace.folder), "is not a regular file")


def test_outputs_that_collide_name_both_lines(workspace: Workspace, table: JobTable) -> None:
    manifest = workspace.manifest(
        [("a/1.png", "alpha"), ("b/1.png", "alpha"), ("a/2.png", "alpha"), ("c/1.png", "alpha")]
    )
    result = workspace.submit(manifest)
    out = f"'{workspace.folder}/m-out/1.png'"
    assert_refused(
        result,
        f"line 3: output: {out} is also written by line 2; give the row an output of its own",
        f"line 5: output: {out} is also written by line 2",
        "2 of 4 rows are not valid",
    )
    assert job_ids(table) == []
    assert workspace.submit(manifest, "--skip-invalid", "--json").json["accepted"] == 2


def test_an_output_may_not_be_another_rows_image_or_mask(workspace: Workspace) -> None:
    manifest = workspace.manifest(
        [("1.png", "m1.png", "2.png"), ("2.png", "m2.png", "m1.png"), ("3.png", "alpha", "4.png")],
        columns=("image", "mask", "output"),
    )
    assert_refused(
        workspace.submit(manifest),
        f"line 2: output: '{workspace.folder}/2.png' is the image of line 3; give the row an ",
        f"line 3: output: '{workspace.folder}/m1.png' is the mask of line 2",
        "2 of 3 rows",
    )


def test_an_output_may_not_be_the_mask_for_all_rows(workspace: Workspace) -> None:
    manifest = workspace.manifest([("1.png", "all.png")], columns=("image", "output"))
    assert_refused(
        workspace.submit(manifest, "--mask", "all.png"),
        f"line 2: output: '{workspace.folder}/all.png' is also an input; choose another output",
    )
    manifest = workspace.manifest(
        [("1.png", "alpha", "all.png"), ("2.png", "", "x.png")],
        columns=("image", "mask", "output"),
    )
    assert_refused(workspace.submit(manifest, "--mask", "all.png"), "is the mask of line 3")


# --- options ---------------------------------------------------------------------------------


def test_options_apply_to_every_row_without_a_cell_of_its_own(
    workspace: Workspace, table: JobTable
) -> None:
    manifest = workspace.manifest(
        [("1.png", "cup", "", ""), ("2.png", "pot", "0.6", "7")],
        columns=("image", "product", "strength", "priority"),
    )
    result = workspace.submit(
        *(manifest, "--mask", "box:1,2,30,40", "--preset", "ecommerce+preview"),
        *("--prompt", "photo of a {product}", "--set", "guidance_scale=5"),
        *("--set", "seed=11", "--set", "strength=0.9", "--priority", "3"),
        *("--engine", "sd2", "--output", "results/"),
    )
    assert result.status == 0, result.err
    first, second = all_jobs(table)
    all_params = [Params.from_json(row.params, seed=row.seed) for row in (first, second)]
    assert [params.prompt for params in all_params] == ["photo of a cup", "photo of a pot"]
    assert [params.strength for params in all_params] == [0.9, 0.6]
    assert {params.guidance_scale for params in all_params} == {5.0}
    assert {params.num_inference_steps for params in all_params} == {20}
    assert {params.seed for params in all_params} == {11}
    assert [row.priority for row in (first, second)] == [3, 7]
    assert {row.mask for row in (first, second)} == {"box:1,2,30,40"}
    assert first.output == f"{workspace.folder}/results/1.png"
    assert {row.engine for row in (first, second)} == {"sd2"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--set", "strength"), "--set 'strength': write NAME=VALUE"),
        (("--set", "stength=1"), "'stength' is not a parameter; did you mean 'strength'?"),
        (("--set", "strength=2"), "strength: '2' is not allowed"),
        (("--preset", "ecomerce"), "did you mean 'ecommerce'?"),
        (("--prompt", "{"), "prompt: '{': "),
        (("--prompt", "{thing}"), "prompt: nothing fills {thing}"),
        (("--priority", "1001"), "priority: '1001' is not allowed"),
        (("--engine", "sd3"), "engine: 'sd3' is not known; use sd2, opencv"),
        (("--output", "http://h/x"), "http:// is not supported"),
        (("--output", "s3://Bad_Name/x"), "is not a bucket name"),
        (("--mask", "../m.png"), "'..' is refused"),
        (("--mask", "box:1,2"), "is not a box"),
        (("--set", "eta=0.5", "--set", "scheduler=euler"), "eta: 0.5 has no meaning"),
        (("--root", "/nowhere"), "does not exist"),
        (("--unknown",), "No such option"),
    ],
)
def test_a_bad_option_is_refused_with_the_remedy(
    workspace: Workspace, options: tuple[str, ...], expected: str
) -> None:
    assert_refused(workspace.submit(workspace.catalog(1), *options), expected)


def test_bad_settings_are_one_line(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INPAINT_QUEUE_BOUND", "many")
    monkeypatch.setenv("INPAINT_ENGIN", "opencv")
    result = workspace.submit(workspace.catalog(1))
    assert_refused(
        result, "inpaint-submit: settings: INPAINT_ENGIN is not", "INPAINT_QUEUE_BOUND: "
    )
    assert len(result.err.splitlines()) == 1


def test_files_outside_the_manifests_folder_need_a_root(
    workspace: Workspace, tmp_path: Path
) -> None:
    other_folder = tmp_path.resolve() / "elsewhere"
    other_folder.mkdir()
    manifest = workspace.manifest([(f"{other_folder}/1.png", "alpha")])
    assert_refused(
        workspace.submit(manifest), f"image: '{other_folder}/1.png' is outside the allowed folders"
    )
    assert workspace.submit(manifest, "--root", other_folder).status == 0
    assert workspace.submit(manifest, "--root", tmp_path, "--root", other_folder).status == 0


def test_a_mask_for_all_rows_and_the_output_may_lie_anywhere(
    workspace: Workspace, tmp_path: Path
) -> None:
    manifest = workspace.manifest([("1.png",)], columns=("image",))
    result = workspace.submit(
        manifest, "--mask", f"{tmp_path}/all.png", "--output", f"{tmp_path}/results"
    )
    assert result.status == 0, result.err


# --- again -----------------------------------------------------------------------------------


def test_force_runs_every_finished_row_again(
    workspace: Workspace, both_databases: JobTable
) -> None:
    manifest = workspace.catalog(3)
    workspace.submit(manifest)
    finish(both_databases)
    assert workspace.submit(manifest, "--json").json["accepted"] == 0
    assert workspace.submit(manifest, "--force", "--json").json == {
        "submission": 1,
        "rows": 3,
        "accepted": 3,
        "duplicates": 0,
        "invalid": 0,
    }
    assert both_databases.states() == ["queued"] * 3


def test_force_does_not_change_unfinished_jobs(workspace: Workspace, table: JobTable) -> None:
    manifest = workspace.catalog(2)
    workspace.submit(manifest)
    assert workspace.submit(manifest, "--force", "--json").json["accepted"] == 0


def test_changed_runs_only_rows_whose_files_changed(
    workspace: Workspace, both_databases: JobTable
) -> None:
    manifest = workspace.catalog(3)
    workspace.submit(manifest)
    finish(both_databases)
    assert workspace.submit(manifest, "--changed", "--json").json["accepted"] == 0
    workspace.image("in/2.png", colour=200)
    assert workspace.submit(manifest, "--changed", "--json").json == {
        "submission": 1,
        "rows": 3,
        "accepted": 1,
        "duplicates": 2,
        "invalid": 0,
    }
    assert both_databases.states() == ["succeeded", "queued", "succeeded"]
    finish(both_databases)
    os.utime(workspace.folder / "masks/3.png", ns=(1, 1))
    workspace.submit(manifest, "--changed")
    assert both_databases.states() == ["succeeded", "succeeded", "queued"]


def test_changed_does_not_run_failed_rows_whose_files_are_the_same(
    workspace: Workspace, both_databases: JobTable
) -> None:
    manifest = workspace.catalog(1)
    workspace.submit(manifest)
    (row,) = all_jobs(both_databases)
    leased = both_databases.acquire(row.id, seen=row.attempt)
    assert leased is not None
    storage = Storage(roots=[Path("/")], buckets=())
    image, mask = (storage.stat(place) for place in (row.image, row.mask))
    assert image
    assert mask
    record = AttemptRecord(image_version=image.version, mask_version=mask.version)
    jobs.fail(both_databases.db, leased, record, ImageError("damaged"), NEVER)
    assert workspace.submit(manifest, "--changed", "--json").json["accepted"] == 0
    workspace.image("in/1.png", colour=200)
    assert workspace.submit(manifest, "--changed", "--json").json["accepted"] == 1


def test_changed_on_s3_compares_etags(
    workspace: Workspace, table: JobTable, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_BUCKETS", s3.name)
    for n in (1, 2):
        s3.client.put_object(Bucket=s3.name, Key=f"jobs/{n}.png", Body=b"%d" % n)
    body = gzip.compress(
        b'{"image": "1.png", "mask": "alpha"}\n{"image": "2.png", "mask": "alpha"}'
    )
    s3.client.put_object(Bucket=s3.name, Key="jobs/m.jsonl.gz", Body=body)
    assert workspace.submit(s3.uri("jobs/m.jsonl.gz"), "--json").json["accepted"] == 2
    assert all_jobs(table)[0].output == s3.uri("jobs/m-out/1.png")
    _finish_on_s3(table, s3)
    s3.client.put_object(Bucket=s3.name, Key="jobs/1.png", Body=b"1")  # the same bytes again
    s3.client.put_object(Bucket=s3.name, Key="jobs/2.png", Body=b"two")
    assert workspace.submit(s3.uri("jobs/m.jsonl.gz"), "--changed", "--json").json["accepted"] == 1
    assert table.states() == ["succeeded", "queued"]


def _finish_on_s3(table: JobTable, s3: Bucket) -> None:
    store = Storage(roots=(), buckets=(s3.name,))
    for row in all_jobs(table):
        found = store.stat(row.image)
        assert found is not None
        table.succeed(row.id, image_version=found.version)


def test_a_bucket_that_is_not_allowed_is_refused(
    workspace: Workspace, s3: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INPAINT_BUCKETS", "others")
    assert_refused(workspace.submit(s3.uri("m.csv")), f"bucket '{s3.name}' is not allowed")
    manifest = workspace.manifest([(s3.uri("1.png"), "alpha")])
    assert_refused(workspace.submit(manifest), "line 2: image: ", "add it to INPAINT_BUCKETS")


# --- memory ----------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_rows(workspace: Workspace) -> None:
    small = workspace.manifest([(f"{n}.png", "alpha") for n in range(2_000)], name="small.csv")
    large = workspace.manifest([(f"{n}.png", "alpha") for n in range(60_000)], name="large.csv")
    few, many = _peak_megabytes(small), _peak_megabytes(large)
    assert many - few < 25, f"{few:.0f} MB for 2,000 rows, {many:.0f} MB for 60,000"


def _peak_megabytes(manifest: Path) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "tests.producer.run_submit", str(manifest), "--json", "--peak"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return float(done.stderr) / 1024


def test_a_spool_can_be_read_repeatedly_and_in_order() -> None:
    from tests.job_table import new_job

    spool = JobSpool()
    rows = [new_job(line) for line in range(CHUNK + 3)]
    for row in rows:
        spool.append(row)
    assert list(spool) == list(spool) == rows
    spool.append(new_job(CHUNK + 3))
    next(iter(spool))  # a reader that gives up half-way
    spool.append(new_job(CHUNK + 4))
    assert [row.line for row in spool] == list(range(CHUNK + 5))
    spool.close()
