"""What a job's parameters make of its result: rounds, text, plugin, format, provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared import images, jobs
from shared.jobs import Selection
from shared.params import PassSpec
from tests.workers.bench import Workbench, pixels

SIZE = (700, 600)
BOX, OTHER = (100, 120, 160, 150), (400, 300, 440, 340)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Workbench]:
    bench = Workbench(f"sqlite:///{tmp_path / 'inpaint.db'}", tmp_path)
    yield bench
    bench.close()


def ran(bench: Workbench, *, image: str = "", output: str = "out/r.png", **params: object) -> int:
    job = bench.add(
        image=image or bench.picture("in.png"),
        mask=bench.mask("mask.png", SIZE, BOX),
        output=bench.path(output),
        **params,
    )
    bench.run(job)
    return job


def changed(bench: Workbench, output: str = "out/r.png") -> Any:
    return (pixels(bench.path("in.png")) != pixels(bench.path(output))).any(axis=-1)


def inside(*boxes: tuple[int, int, int, int]) -> Any:
    mask = np.zeros((SIZE[1], SIZE[0]), np.bool_)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def xmp(path: str) -> str:
    return images.decode(Path(path).read_bytes(), max_pixels=10**6).metadata.xmp.decode()


def test_a_job_of_two_rounds_repaints_both_masks_and_records_the_second_one(
    bench: Workbench,
) -> None:
    second = bench.mask("eyes.png", SIZE, OTHER)
    values = (("num_inference_steps", 20), ("prompt", "eyes"))
    job = ran(bench, passes=(PassSpec(mask=second, values=values),))
    found = changed(bench)
    assert not found[~inside(BOX, OTHER)].any()
    assert found[inside(BOX)].mean() > 0.9
    assert found[inside(OTHER)].mean() > 0.9
    (attempt,) = bench.attempts(job)
    assert json.loads(attempt.inputs) == {second: sha256(Path(second).read_bytes()).hexdigest()}
    assert attempt.mask_sha256 == sha256(Path(bench.path("mask.png")).read_bytes()).hexdigest()
    assert len(bench.job(job).mask_version.split()) == 2
    assert (attempt.regions, attempt.windows) == (2, 2)
    works = bench.bench.engine.works  # type: ignore[attr-defined]
    assert [(w.params.prompt, w.params.num_inference_steps) for w in works] == [
        ("", 50),
        ("eyes", 20),
    ]


def test_a_mask_is_inverted_and_laid_over_as_asked(bench: Workbench) -> None:
    small = bench.mask("small.png", (100, 80), (0, 0, 90, 80))
    job = bench.add(
        image=bench.picture("in.png"),
        mask=small,
        output=bench.path("out/r.png"),
        mask_invert=True,
        mask_fit="bottom-right",
    )
    bench.run(job)
    assert bench.job(job).error_message is None
    assert np.array_equal(changed(bench), inside((690, 520, 700, 600)))


def test_text_is_drawn_last_and_inside_its_box(bench: Workbench) -> None:
    ran(bench, text="SALE", text_box="300,200,500,260", text_color="#ff0000")
    found = changed(bench)
    assert not found[~inside(BOX, (300, 200, 500, 260))].any()
    after = pixels(bench.path("out/r.png"))[200:260, 300:500]
    assert (after == (255, 0, 0)).all(axis=-1).mean() > 0.1


def test_text_without_a_box_goes_where_the_mask_is(bench: Workbench) -> None:
    ran(bench, text="I", text_color="white")
    assert not changed(bench)[~inside(BOX)].any()
    left, top, right, bottom = BOX
    after = pixels(bench.path("out/r.png"))[top:bottom, left:right]
    assert (after == 255).all(axis=-1).any()


def test_a_font_is_an_input_that_is_read_and_recorded(bench: Workbench) -> None:
    font = bench.write("font.ttf", b"not a font")
    job = ran(bench, text="A", text_font=font)
    (attempt,) = bench.attempts(job)
    assert attempt.error_code == "bad_font"
    assert json.loads(attempt.inputs) == {font: sha256(b"not a font").hexdigest()}


@pytest.mark.parametrize(
    ("params", "format"),
    [({"format": "jpeg", "quality": 60}, "JPEG"), ({"format": "webp"}, "WEBP"), ({}, "PNG")],
)
def test_the_asked_format_is_written(bench: Workbench, params: dict[str, Any], format: str) -> None:
    ran(bench, output="out/result", **params)
    with Image.open(bench.path("out/result")) as image:
        assert image.format == format


def test_a_lower_quality_makes_a_smaller_file(bench: Workbench) -> None:
    sizes = []
    for quality in (95, 30):
        output = f"out/{quality}.jpg"
        ran(bench, output=output, quality=quality)
        sizes.append(Path(bench.path(output)).stat().st_size)
    assert sizes[1] < sizes[0] / 2


def test_a_result_says_how_it_was_made_but_not_where_files_lie(bench: Workbench) -> None:
    eyes = bench.mask("eyes.png", SIZE, OTHER)
    job = ran(bench, prompt="a cup", passes=(PassSpec(mask=eyes),))
    said = xmp(bench.path("out/r.png"))
    assert "compositeWithTrainedAlgorithmicMedia" in said
    assert f">{job}<" in said or f'"{job}"' in said
    assert "a cup" in said
    assert "eyes.png" in said
    assert str(bench.folder) not in said


@pytest.mark.parametrize("case", ["turned off", "empty mask"])
def test_nothing_is_said_where_it_is_turned_off_or_nothing_was_done(
    bench: Workbench, case: str
) -> None:
    off = case == "turned off"
    job = bench.add(
        image=bench.picture("in.png"),
        mask=bench.mask("m.png", SIZE, *([BOX] if off else [])),
        output=bench.path("out/r.png"),
        provenance=not off,
    )
    bench.run(job)
    assert bench.job(job).state == "succeeded"
    assert xmp(bench.path("out/r.png")) == ""


@pytest.fixture
def flat(bench: Workbench) -> str:
    """A picture where whatever the engine paints shows at once."""
    Image.new("RGB", SIZE, (120, 120, 120)).save(bench.path("flat.png"))
    return bench.path("flat.png")


def test_a_result_that_fails_its_gate_is_not_published(bench: Workbench, flat: str) -> None:
    job = ran(bench, image=flat, gate="fail")
    row, (attempt,) = bench.job(job), bench.attempts(job)
    assert (row.state, row.error_code) in (("failed", "gate_seam"), ("failed", "gate_colour"))
    assert attempt.reseeds == 1
    assert row.score == json.loads(attempt.scores)["score"] < 0.5
    assert not Path(bench.path("out/r.png")).exists()


def test_a_result_for_review_is_published_and_found_until_it_is_run_again(
    bench: Workbench, flat: str
) -> None:
    job = ran(bench, image=flat, gate="review")
    row = bench.job(job)
    assert row.state == "succeeded"
    assert row.review in ("gate_seam", "gate_colour")
    assert row.score < 0.5
    assert Path(bench.path("out/r.png")).exists()
    assert jobs.retry(bench.db, Selection(review=True)).count == 1
    assert (bench.job(job).review, bench.job(job).score) == (None, None)


def test_an_attempt_records_the_seed_that_made_the_result(bench: Workbench) -> None:
    job = ran(bench, seed=11, gate="review")
    (attempt,) = bench.attempts(job)
    painted = pixels(bench.path("out/r.png"))[130, 130]
    assert painted[0] == attempt.seed % 251
    assert bench.job(job).seed == 11


@pytest.mark.parametrize("invert", [False, True])
def test_holes_are_filled_only_where_they_are_what_is_repainted(
    bench: Workbench, invert: bool
) -> None:
    image = np.full((600, 700, 4), 200, np.uint8)
    image[..., 3] = 255
    image[100:200, 100:200, 3] = 0
    Image.fromarray(image).save(bench.path("holes.png"))
    job = bench.add(
        image=bench.path("holes.png"),
        mask="alpha",
        output=bench.path("out/r.png"),
        mask_invert=invert,
    )
    bench.run(job)
    alpha = pixels(bench.path("out/r.png"))[..., 3]
    assert (alpha[100:200, 100:200] == (0 if invert else 255)).all()


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"text": "A", "text_box": "900,0,950,50"}, "bad_parameter"),
        ({"text": "much too long", "text_size": 200}, "text_does_not_fit"),
        ({"postprocess": "nobody"}, "postprocess_missing"),
        ({"format": "jpeg"}, "bad_image"),
    ],
)
def test_what_would_fail_at_the_end_fails_before_anything_is_painted(
    bench: Workbench, params: dict[str, Any], code: str
) -> None:
    job = bench.add(
        image=bench.picture("in.png", mode="RGBA"),
        mask=bench.mask("mask.png", SIZE, BOX),
        output=bench.path("out/r"),
        **params,
    )
    bench.run(job)
    assert bench.job(job).error_code == code
    assert bench.bench.engine.works == []  # type: ignore[attr-defined]


def test_a_picture_whose_holes_are_filled_needs_no_alpha(bench: Workbench) -> None:
    image = np.full((600, 700, 4), 200, np.uint8)
    image[..., 3] = 255
    image[100:200, 100:200, 3] = 0
    Image.fromarray(image).save(bench.path("holes.png"))
    job = bench.add(
        image=bench.path("holes.png"), mask="alpha", output=bench.path("r.jpg"), format="jpeg"
    )
    bench.run(job)
    assert bench.job(job).state == "succeeded"
    with Image.open(bench.path("r.jpg")) as written:
        assert (written.format, written.mode) == ("JPEG", "RGB")
