"""--dry-run looks at every file, says what would run, and records nothing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from shared.geometry.regions import OVERLAP_PX
from tests.conftest import Bucket
from tests.producer.desk import Desk, Ran, png

COUNTS = ("rows", "invalid", "regions", "windows", "empty", "overwritten")


def rehearsed(desk: Desk, manifest: Path | str, *options: str) -> tuple[dict[str, int], Ran]:
    ran = desk.submit(manifest, "--dry-run", "--json", *options)
    return ran.json, ran


def counts(*numbers: int) -> dict[str, int]:
    return dict(zip(COUNTS, numbers, strict=True))


def test_a_good_manifest_is_counted_and_nothing_is_recorded(desk: Desk) -> None:
    manifest = desk.catalog(3)
    shutil.rmtree(desk.folder / ".inpaint")
    before = sorted(desk.folder.rglob("*"))
    found, ran = rehearsed(desk, manifest)
    assert ran.status == 0
    assert found == counts(3, 0, 3, 3, 0, 0)
    assert sorted(desk.folder.rglob("*")) == before
    assert desk.submit(manifest, "--dry-run").out == (
        "dry run: 3 rows, 0 invalid; would run 3 regions in 3 windows; 0 rows have an empty "
        "mask; 0 results would be overwritten\n"
    )


def test_regions_and_windows_are_those_that_a_worker_would_plan(desk: Desk) -> None:
    size = (1600, 1200)
    desk.picture("1.png", size=size)
    desk.mask("far apart.png", (10, 10, 20, 20), (1500, 1100, 1510, 1110), size=size)
    desk.mask("wide.png", (100, 100, 1500, 110), size=size)
    desk.mask("empty.png", size=size)
    manifest = desk.manifest([("1.png", "far apart.png", "2.png")],
                             columns=("image", "mask", "output"))  # fmt: skip
    assert rehearsed(desk, manifest, "--engine", "sd2")[0] == counts(1, 0, 2, 2, 0, 0)
    assert rehearsed(desk, manifest, "--engine", "opencv")[0] == counts(1, 0, 2, 2, 0, 0)
    assert rehearsed(desk, manifest, "--engine", "sd2", "--set", "mode=full")[0] == counts(
        *(1, 0, 1, 1, 0, 0)
    )
    wide = desk.manifest([("1.png", "wide.png", "2.png")], columns=("image", "mask", "output"))
    found = rehearsed(desk, wide, "--engine", "sd2")[0]
    across = -(-(1400 - OVERLAP_PX) // (512 - OVERLAP_PX))
    assert found["regions"] == 1
    assert across <= found["windows"] <= across + 1
    empty = desk.manifest([("1.png", "empty.png", "2.png")], columns=("image", "mask", "output"))
    assert rehearsed(desk, empty)[0] == counts(1, 0, 0, 0, 1, 0)


def test_what_is_painted_again_counts_as_well(desk: Desk) -> None:
    size = (1400, 1400)
    desk.picture("1.png", size=size)
    desk.mask("hole.png", (100, 100, 1200, 1200), size=size)
    manifest = desk.manifest([("1.png", "hole.png", "2.png")], columns=("image", "mask", "output"))
    once = rehearsed(desk, manifest, "--engine", "sd2")[0]
    assert once == counts(1, 0, 1, 1, 0, 0)
    twice = rehearsed(desk, manifest, "--engine", "sd2", "--set", "refine_strength=0.4")[0]
    assert twice == counts(1, 0, 2, 1 + 9, 0, 0)


def test_dilation_and_threshold_count_as_they_will_in_the_run(desk: Desk) -> None:
    desk.picture("1.png")
    grey = Image.new("L", (64, 48), 40)
    desk.write("grey.png", png(grey))
    manifest = desk.manifest([("1.png", "grey.png")])
    assert rehearsed(desk, manifest)[0]["empty"] == 1
    assert rehearsed(desk, manifest, "--set", "mask_threshold=40")[0]["empty"] == 0


def test_a_template_is_laid_at_its_corner_and_an_inverted_one_repaints_the_rest(desk: Desk) -> None:
    desk.picture("1.png")
    desk.mask("corner.png", (0, 0, 8, 8), size=(8, 8))
    manifest = desk.manifest([("1.png", "corner.png")])
    laid = rehearsed(desk, manifest, "--set", "mask_fit=bottom-right")
    assert laid[0] == counts(1, 0, 1, 1, 0, 0)
    kept = rehearsed(desk, manifest, "--set", "mask_fit=bottom-right", "--set", "mask_invert=true")
    assert kept[0]["empty"] == 1


def test_results_that_are_there_already_are_counted(desk: Desk) -> None:
    manifest = desk.catalog(2)
    desk.picture("m-out/1.png")
    assert rehearsed(desk, manifest)[0] == counts(2, 0, 2, 2, 0, 1)


def test_every_row_that_would_fail_is_named_with_its_reason(desk: Desk) -> None:
    desk.picture("good.png")
    desk.mask("good-mask.png", (1, 1, 5, 5))
    desk.mask("small-mask.png", size=(32, 48))
    desk.write("text.png", "no picture")
    desk.write("cut.png", (desk.folder / "good.png").read_bytes()[:60])
    colours = Image.new("RGB", (64, 48), (255, 0, 0))
    desk.write("colours.png", png(colours))
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
    manifest = desk.manifest(
        [(image, mask, f"out/{n}.png") for n, (image, mask) in enumerate(rows)],
        columns=("image", "mask", "output"),
    )
    found, ran = rehearsed(desk, manifest)
    assert ran.status == 2
    assert found == counts(len(rows), 9, 1, 1, 0, 0)
    problems = ran.err.splitlines()
    assert [problem.split(":")[0] for problem in problems] == [f"line {n}" for n in range(3, 12)]
    for problem, expected in zip(
        problems,
        (
            "object_missing: ",
            "object_missing: ",
            "the mask is 32x48, the picture 64x48; make the mask the picture's size",
            "bad_image",
            "image",
            "the mask has several colours, or no black",
            "has no alpha channel; give a mask",
            "lies outside the 64x48 picture",
            "is not a regular file",
        ),
        strict=True,
    ):
        assert expected in problem


def test_a_picture_over_the_caps_is_found(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = desk.catalog(1)
    monkeypatch.setenv("INPAINT_MAX_PIXELS", "3071")
    found, ran = rehearsed(desk, manifest)
    assert (ran.status, found["invalid"]) == (2, 1)
    assert "line 2: object_too_large: " in ran.err
    monkeypatch.setenv("INPAINT_MAX_PIXELS", "3072")
    assert rehearsed(desk, manifest)[1].status == 0


def test_bad_rows_of_the_manifest_are_named_too(desk: Desk) -> None:
    desk.catalog(1)
    manifest = desk.manifest([("in/1.png", "masks/1.png"), ("../x.png", "alpha")])
    found, ran = rehearsed(desk, manifest)
    assert ran.status == 2
    assert found == counts(2, 1, 1, 1, 0, 0)
    assert "line 3: image: '../x.png': '..' is refused" in ran.err


def test_a_picture_whose_size_lies_far_behind_is_read_to_there(desk: Desk) -> None:
    """The size of a JPEG stands behind its metadata, here behind 600 kB of comments."""
    import io

    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "JPEG")
    data = stream.getvalue()
    comment = b"\xff\xfe\xff\xff" + b"x" * 0xFFFD
    desk.write("1.jpg", data[:2] + comment * 10 + data[2:])
    desk.mask("mask.png", (1, 1, 5, 5))
    manifest = desk.manifest([("1.jpg", "mask.png")])
    assert rehearsed(desk, manifest)[0] == counts(1, 0, 1, 1, 0, 0)


def test_a_dry_run_reads_from_s3(desk: Desk, s3: Bucket) -> None:
    desk.picture("1.png")
    desk.mask("m.png", (1, 1, 5, 5))
    for name in ("1.png", "m.png"):
        s3.client.put_object(Bucket=s3.name, Key=name, Body=(desk.folder / name).read_bytes())
    body = b"image,mask\n1.png,m.png\n2.png,m.png\n1.png,alpha\n"
    s3.client.put_object(Bucket=s3.name, Key="m.csv", Body=body)
    found, ran = rehearsed(desk, s3.uri("m.csv"), "--skip-invalid")
    assert found["rows"] == 3
    assert f"line 3: object_missing: '{s3.uri('2.png')}' does not exist" in ran.err
