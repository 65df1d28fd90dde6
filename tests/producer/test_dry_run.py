"""--dry-run reads every file, shows what would run, and records nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from shared.geometry.regions import OVERLAP_PX
from tests.conftest import Bucket
from tests.producer.workspace import CommandResult, Workspace, png

COUNTS = ("rows", "invalid", "regions", "windows", "empty", "overwritten")


def dry_run(
    workspace: Workspace, manifest: Path | str, *options: str
) -> tuple[dict[str, int], CommandResult]:
    result = workspace.submit(manifest, "--dry-run", "--json", *options)
    return result.json, result


def counts(*numbers: int) -> dict[str, int]:
    return dict(zip(COUNTS, numbers, strict=True))


def test_a_good_manifest_is_counted_and_nothing_is_recorded(workspace: Workspace) -> None:
    manifest = workspace.catalog(3)
    shutil.rmtree(workspace.folder / ".inpaint")
    before = sorted(workspace.folder.rglob("*"))
    report, result = dry_run(workspace, manifest)
    assert result.status == 0
    assert report == counts(3, 0, 3, 3, 0, 0)
    assert sorted(workspace.folder.rglob("*")) == before
    assert workspace.submit(manifest, "--dry-run").out == (
        "dry run: 3 rows, 0 invalid; would run 3 regions in 3 windows; 0 rows have an empty "
        "mask; 0 results would be overwritten\n"
    )


def test_regions_and_windows_are_those_that_a_worker_would_plan(workspace: Workspace) -> None:
    size = (1600, 1200)
    workspace.image("1.png", size=size)
    workspace.mask("far apart.png", (10, 10, 20, 20), (1500, 1100, 1510, 1110), size=size)
    workspace.mask("wide.png", (100, 100, 1500, 110), size=size)
    workspace.mask("empty.png", size=size)
    manifest = workspace.manifest([("1.png", "far apart.png", "2.png")],
                             columns=("image", "mask", "output"))  # fmt: skip
    assert dry_run(workspace, manifest, "--engine", "sd2")[0] == counts(1, 0, 2, 2, 0, 0)
    assert dry_run(workspace, manifest, "--engine", "opencv")[0] == counts(1, 0, 2, 2, 0, 0)
    assert dry_run(workspace, manifest, "--engine", "sd2", "--set", "mode=full")[0] == counts(
        *(1, 0, 1, 1, 0, 0)
    )
    wide = workspace.manifest([("1.png", "wide.png", "2.png")], columns=("image", "mask", "output"))
    report = dry_run(workspace, wide, "--engine", "sd2")[0]
    across = -(-(1400 - OVERLAP_PX) // (512 - OVERLAP_PX))
    assert report["regions"] == 1
    assert across <= report["windows"] <= across + 1
    empty = workspace.manifest(
        [("1.png", "empty.png", "2.png")], columns=("image", "mask", "output")
    )
    assert dry_run(workspace, empty)[0] == counts(1, 0, 0, 0, 1, 0)


def test_refinement_passes_are_counted(workspace: Workspace) -> None:
    size = (1400, 1400)
    workspace.image("1.png", size=size)
    workspace.mask("hole.png", (100, 100, 1200, 1200), size=size)
    manifest = workspace.manifest(
        [("1.png", "hole.png", "2.png")], columns=("image", "mask", "output")
    )
    once = dry_run(workspace, manifest, "--engine", "sd2")[0]
    assert once == counts(1, 0, 1, 1, 0, 0)
    twice = dry_run(workspace, manifest, "--engine", "sd2", "--set", "refine_strength=0.4")[0]
    assert twice == counts(1, 0, 2, 1 + 9, 0, 0)


def test_dilation_and_threshold_apply_as_in_the_run(workspace: Workspace) -> None:
    workspace.image("1.png")
    grey = Image.new("L", (64, 48), 40)
    workspace.write("grey.png", png(grey))
    manifest = workspace.manifest([("1.png", "grey.png")])
    assert dry_run(workspace, manifest)[0]["empty"] == 1
    assert dry_run(workspace, manifest, "--set", "mask_threshold=40")[0]["empty"] == 0


def test_a_small_mask_is_placed_by_mask_fit_and_can_be_inverted(
    workspace: Workspace,
) -> None:
    workspace.image("1.png")
    workspace.mask("corner.png", (0, 0, 8, 8), size=(8, 8))
    manifest = workspace.manifest([("1.png", "corner.png")])
    laid = dry_run(workspace, manifest, "--set", "mask_fit=bottom-right")
    assert laid[0] == counts(1, 0, 1, 1, 0, 0)
    kept = dry_run(
        workspace, manifest, "--set", "mask_fit=bottom-right", "--set", "mask_invert=true"
    )
    assert kept[0]["empty"] == 1


def test_existing_results_are_counted(workspace: Workspace) -> None:
    manifest = workspace.catalog(2)
    workspace.image("m-out/1.png")
    assert dry_run(workspace, manifest)[0] == counts(2, 0, 2, 2, 0, 1)


def test_every_row_that_would_fail_is_named_with_its_reason(workspace: Workspace) -> None:
    workspace.image("good.png")
    workspace.mask("good-mask.png", (1, 1, 5, 5))
    workspace.mask("small-mask.png", size=(32, 48))
    workspace.write("text.png", "not an image")
    workspace.write("cut.png", (workspace.folder / "good.png").read_bytes()[:60])
    colours = Image.new("RGB", (64, 48), (255, 0, 0))
    workspace.write("colours.png", png(colours))
    rows = [
        ("good.png", "good-mask.png"),
        ("missing.png", "good-mask.png"),
        ("good.png", "missing-mask.png"),
        ("good.png", "small-mask.png"),
        ("text.png", "good-mask.png"),
        ("cut.png", "alpha"),
        ("good.png", "colours.png"),
        ("good.png", "alpha"),
        ("good.png", '"box:100,100,200,200"'),
        (".", "alpha"),
    ]
    manifest = workspace.manifest(
        [(image, mask, f"out/{n}.png") for n, (image, mask) in enumerate(rows)],
        columns=("image", "mask", "output"),
    )
    report, result = dry_run(workspace, manifest)
    assert result.status == 2
    assert report == counts(len(rows), 9, 1, 1, 0, 0)
    problems = result.err.splitlines()
    assert [problem.split(":")[0] for problem in problems] == [f"line {n}" for n in range(3, 12)]
    for problem, expected in zip(
        problems,
        (
            "object_missing: ",
            "object_missing: ",
            "the mask is 32x48, the image 64x48; make the mask the image's size",
            "bad_image",
            "image",
            "the mask has several colours, or no black",
            "has no alpha channel; give a mask file or a box",
            "lies outside the 64x48 image",
            "is not a regular file",
        ),
        strict=True,
    ):
        assert expected in problem


def test_an_image_above_the_size_limit_is_reported(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = workspace.catalog(1)
    monkeypatch.setenv("INPAINT_MAX_PIXELS", "3071")
    report, result = dry_run(workspace, manifest)
    assert (result.status, report["invalid"]) == (2, 1)
    assert "line 2: object_too_large: " in result.err
    monkeypatch.setenv("INPAINT_MAX_PIXELS", "3072")
    assert dry_run(workspace, manifest)[1].status == 0


def test_bad_rows_of_the_manifest_are_named_too(workspace: Workspace) -> None:
    workspace.catalog(1)
    manifest = workspace.manifest([("in/1.png", "masks/1.png"), ("../x.png", "alpha")])
    report, result = dry_run(workspace, manifest)
    assert result.status == 2
    assert report == counts(2, 1, 1, 1, 0, 0)
    assert "line 3: image: '../x.png': '..' is refused" in result.err


def test_an_image_whose_size_is_behind_long_metadata_is_read_in_full(workspace: Workspace) -> None:
    """A JPEG holds its size behind its metadata, here behind 600 kB of comments."""
    import io

    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "JPEG")
    data = stream.getvalue()
    comment = b"\xff\xfe\xff\xff" + b"x" * 0xFFFD
    workspace.write("1.jpg", data[:2] + comment * 10 + data[2:])
    workspace.mask("mask.png", (1, 1, 5, 5))
    manifest = workspace.manifest([("1.jpg", "mask.png")])
    assert dry_run(workspace, manifest)[0] == counts(1, 0, 1, 1, 0, 0)


def test_a_dry_run_reads_from_s3(workspace: Workspace, s3: Bucket) -> None:
    workspace.image("1.png")
    workspace.mask("m.png", (1, 1, 5, 5))
    for name in ("1.png", "m.png"):
        s3.client.put_object(Bucket=s3.name, Key=name, Body=(workspace.folder / name).read_bytes())
    body = b"image,mask\n1.png,m.png\n2.png,m.png\n1.png,alpha\n"
    s3.client.put_object(Bucket=s3.name, Key="m.csv", Body=body)
    report, result = dry_run(workspace, s3.uri("m.csv"), "--skip-invalid")
    assert report["rows"] == 3
    assert f"line 3: object_missing: '{s3.uri('2.png')}' does not exist" in result.err
