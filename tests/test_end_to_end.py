"""The whole product as its users run it: the real commands, real servers, real photographs."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests import sample_images
from tests.conftest import Bucket
from tests.tiny_pipeline import build
from tests.workers.worker_harness import pixels

SCRIPTS = Path(sys.executable).parent


class Shell:
    """Runs our commands in a folder, with settings of its own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        ours = {name: v for name, v in os.environ.items() if not name.startswith("INPAINT_")}
        self.environment = {**ours, "HF_HUB_OFFLINE": "1", **settings}

    def run(self, *command: str, status: int = 0) -> str:
        """The command's stdout; asserts its exit status and that it left no traceback."""
        ended = subprocess.run(
            [str(SCRIPTS / command[0]), *command[1:]],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        assert ended.returncode == status, ended.stderr + ended.stdout
        assert "Traceback" not in ended.stderr
        return ended.stdout

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.folder / "started.log").open("ab") as log:
            return subprocess.Popen(
                [str(SCRIPTS / command[0]), *command[1:]],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


def table(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def kind(path: Path) -> tuple[object, ...]:
    with Image.open(path) as image:
        return image.size, image.mode, image.format


def test_on_a_laptop_one_command_does_it_all(shell: Shell) -> None:
    manifest = sample_images.write_catalog(shell.folder / "catalog")
    output = shell.run("inpaint-submit", str(manifest), "--local", "--engine", "opencv", "--json")
    summary = json.loads(output)
    rows = table(manifest)
    assert summary["submission"] == 1
    assert summary["rows"] == summary["accepted"] == summary["succeeded"] == len(rows)
    assert summary["duplicates"] == summary["invalid"] == summary["failed"] == 0
    assert summary["seconds"] > 0
    for row in rows:
        name = Path(row["image"]).name
        assert kind(manifest.parent / "manifest-out" / name) == kind(manifest.parent / row["image"])
    assert not list(shell.folder.rglob("*.tmp"))


def test_submitting_again_adds_nothing_and_force_runs_everything(shell: Shell) -> None:
    manifest = str(sample_images.write_archive(shell.folder / "archive"))
    local = ("inpaint-submit", manifest, "--local", "--engine", "opencv")
    shell.run(*local)
    again = json.loads(shell.run(*local, "--json"))
    assert (again["accepted"], again["duplicates"]) == (0, again["rows"])
    assert "nothing added" in shell.run(*local)
    forced = json.loads(shell.run(*local, "--force", "--json"))
    assert (forced["accepted"], forced["succeeded"]) == (forced["rows"], forced["rows"])


def test_a_failed_job_exits_1_and_says_why(shell: Shell) -> None:
    manifest = sample_images.write_archive(shell.folder / "archive")
    rows = manifest.read_text().splitlines()
    broken = manifest.parent / rows[1].split(",")[1]
    broken.write_bytes(b"<html>not found</html>")
    output = shell.run("inpaint-submit", str(manifest), "--local", "--engine", "opencv", status=1)
    assert "1 failed" in output
    assert "bad_image" in output
    listed = shell.run("inpaint-jobs", "list", "--state", "failed", "--json").splitlines()
    assert json.loads(listed[0])["error_code"] == "bad_image"
    sample_images.write_archive(shell.folder / "archive")
    assert "1 job to run again" in shell.run("inpaint-jobs", "retry", "--error", "bad_image")


@pytest.fixture
def fleet(
    tmp_path: Path, s3: Bucket, postgres_url: str, redis_url: str
) -> Iterator[tuple[Shell, Bucket]]:
    shell = Shell(
        tmp_path,
        INPAINT_DATABASE_URL=postgres_url,
        INPAINT_BROKER_URL=redis_url,
        INPAINT_BUCKETS=s3.name,
        INPAINT_MAINTENANCE_SECONDS="0.2",
    )
    shell.run("inpaint-jobs", "upgrade")
    workers = [
        shell.start("inpaint-worker", "--engine", "opencv", "--concurrency", "2") for _ in range(2)
    ]
    yield shell, s3
    for worker in workers:
        worker.terminate()
    assert [worker.wait(20) for worker in workers] == [0, 0]


def upload(bucket: Bucket, folder: Path, prefix: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            bucket.client.put_object(Bucket=bucket.name, Key=key, Body=path.read_bytes())


def opened(bucket: Bucket, key: str) -> np.ndarray[Any, Any]:
    body = bucket.client.get_object(Bucket=bucket.name, Key=key)["Body"].read()
    return np.asarray(Image.open(io.BytesIO(body)))


def test_a_fleet_works_on_a_manifest_on_s3(fleet: tuple[Shell, Bucket], tmp_path: Path) -> None:
    shell, bucket = fleet
    sample_images.write_catalog(tmp_path / "catalog")
    upload(bucket, tmp_path / "catalog", "shop/day 1")
    manifest = bucket.uri("shop/day 1/manifest.csv")
    submit = ("inpaint-submit", manifest, "--engine", "opencv", "--preset", "ecommerce")
    rehearsed = json.loads(shell.run(*submit, "--dry-run", "--json"))
    assert (rehearsed["invalid"], rehearsed["overwritten"]) == (0, 0)
    assert rehearsed["regions"] >= rehearsed["rows"]
    summary = json.loads(shell.run(*submit, "--wait", "--json"))
    assert summary["succeeded"] == summary["rows"] == rehearsed["rows"]
    source = opened(bucket, "shop/day 1/images/helmet.png")
    mask = opened(bucket, "shop/day 1/masks/helmet.png")
    result = opened(bucket, "shop/day 1/manifest-out/helmet.png")
    assert np.array_equal(source[mask < 128], result[mask < 128])
    assert not np.array_equal(source[mask >= 128], result[mask >= 128])
    _looked_at(shell, summary["submission"])


def _looked_at(shell: Shell, submission: int) -> None:
    exported = shell.run("inpaint-jobs", "export", "--format", "jsonl").splitlines()
    records = [json.loads(line) for line in exported]
    assert {record["state"] for record in records} == {"succeeded"}
    job = next(record for record in records if record["image"].endswith("helmet.png"))
    story = json.loads(shell.run("inpaint-jobs", "show", str(job["job"]), "--json"))
    (attempt,) = story["attempts"]
    assert story["params"]["num_inference_steps"] == 70
    assert "a black helmet" in story["params"]["prompt"]
    assert attempt["image_version"].strip('"') != ""
    assert attempt["result_sha256"] == job["result_sha256"]
    shown = shell.run("inpaint-jobs", "show", str(job["job"]))
    assert "guidance_scale" in shown
    assert "attempt 1" in shown
    assert f"succeeded {len(records)}" in shell.run("inpaint-jobs", "status", str(submission))


def test_only_what_changed_on_s3_runs_again(fleet: tuple[Shell, Bucket], tmp_path: Path) -> None:
    shell, bucket = fleet
    sample_images.write_archive(tmp_path / "archive")
    upload(bucket, tmp_path / "archive", "scans")
    submit = (
        *("inpaint-submit", bucket.uri("scans/manifest.csv")),
        *("--engine", "opencv", "--wait", "--json", "--changed"),
    )
    first = json.loads(shell.run(*submit))
    assert first["accepted"] == first["succeeded"] == first["rows"]
    assert json.loads(shell.run(*submit))["accepted"] == 0
    row = table(tmp_path / "archive" / "manifest.csv")[0]
    image = tmp_path / "archive" / row["image"]
    with Image.open(image) as changed:
        changed.putpixel((0, 0), changed.getpixel((5, 5)))
        stream = io.BytesIO()
        changed.save(stream, format=changed.format)
    key = f"scans/{image.relative_to(tmp_path / 'archive').as_posix()}"
    bucket.client.put_object(Bucket=bucket.name, Key=key, Body=stream.getvalue())
    again = json.loads(shell.run(*submit))
    assert (again["accepted"], again["duplicates"]) == (1, again["rows"] - 1)


def test_a_diffusion_model_in_a_folder_runs_end_to_end(shell: Shell) -> None:
    model = build(shell.folder / "model")
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(shell.folder / "in.png")
    manifest = shell.folder / "m.jsonl"
    rows = [
        {"image": "in.png", "mask": "box:200,200,264,232", "output": f"{seed}.png", "seed": seed}
        for seed in (1, 2)
    ]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = shell.run(
        *("inpaint-submit", str(manifest), "--local", "--devices", "cpu"),
        *("--engine", f"diffusers:{model}", "--set", "num_inference_steps=2"),
        *("--prompt", "plain wall", "--json"),
    )
    assert json.loads(output)["succeeded"] == 2
    before = noise.copy()
    after = [pixels(str(shell.folder / f"{seed}.png")) for seed in (1, 2)]
    # Grown by one pixel and feathered by two: a little more than the box may change.
    outside = np.ones((512, 512), bool)
    outside[190:242, 190:274] = False
    assert np.array_equal(before[outside], after[0][outside])
    assert not np.array_equal(after[0], after[1])
    record = json.loads(shell.run("inpaint-jobs", "export", "--format", "jsonl").splitlines()[0])
    assert record["engine"] == f"diffusers:{model}"
    assert record["windows"] == 1
