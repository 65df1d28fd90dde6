"""What a job's parameters do to its result: passes, text, plugin, format, provenance."""

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
from tests.workers.worker_harness import WorkerHarness, pixels

SIZE = (700, 600)
BOX, OTHER = (100, 120, 160, 150), (400, 300, 440, 340)


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[WorkerHarness]:
    harness = WorkerHarness(f"sqlite:///{tmp_path / 'inpaint.db'}", tmp_path)
    yield harness
    harness.close()


def run(
    harness: WorkerHarness, *, image: str = "", output: str = "out/r.png", **params: object
) -> int:
    job = harness.add(
        image=image or harness.write_image("in.png"),
        mask=harness.write_mask("mask.png", SIZE, BOX),
        output=harness.path(output),
        **params,
    )
    harness.run(job)
    return job


def changed_pixels(harness: WorkerHarness, output: str = "out/r.png") -> Any:
    return (pixels(harness.path("in.png")) != pixels(harness.path(output))).any(axis=-1)


def inside(*boxes: tuple[int, int, int, int]) -> Any:
    mask = np.zeros((SIZE[1], SIZE[0]), np.bool_)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def xmp(path: str) -> str:
    return images.decode(Path(path).read_bytes(), max_pixels=10**6).metadata.xmp.decode()


def test_a_job_of_two_passes_repaints_both_masks_and_records_the_second_one(
    harness: WorkerHarness,
) -> None:
    second = harness.write_mask("eyes.png", SIZE, OTHER)
    values = (("num_inference_steps", 20), ("prompt", "eyes"))
    job = run(harness, passes=(PassSpec(mask=second, values=values),))
    changed = changed_pixels(harness)
    assert not changed[~inside(BOX, OTHER)].any()
    assert changed[inside(BOX)].mean() > 0.9
    assert changed[inside(OTHER)].mean() > 0.9
    (attempt,) = harness.attempts(job)
    assert json.loads(attempt.inputs) == {second: sha256(Path(second).read_bytes()).hexdigest()}
    assert attempt.mask_sha256 == sha256(Path(harness.path("mask.png")).read_bytes()).hexdigest()
    assert len(harness.job(job).mask_version.split()) == 2
    assert (attempt.regions, attempt.windows) == (2, 2)
    works = harness.worker.engine.works  # type: ignore[attr-defined]
    assert [(w.params.prompt, w.params.num_inference_steps) for w in works] == [
        ("", 50),
        ("eyes", 20),
    ]


def test_a_mask_is_inverted_and_fitted_as_its_parameters_say(harness: WorkerHarness) -> None:
    small = harness.write_mask("small.png", (100, 80), (0, 0, 90, 80))
    job = harness.add(
        image=harness.write_image("in.png"),
        mask=small,
        output=harness.path("out/r.png"),
        mask_invert=True,
        mask_fit="bottom-right",
    )
    harness.run(job)
    assert harness.job(job).error_message is None
    assert np.array_equal(changed_pixels(harness), inside((690, 520, 700, 600)))


def test_text_is_drawn_last_and_inside_its_box(harness: WorkerHarness) -> None:
    run(harness, text="SALE", text_box="300,200,500,260", text_color="#ff0000")
    changed = changed_pixels(harness)
    assert not changed[~inside(BOX, (300, 200, 500, 260))].any()
    after = pixels(harness.path("out/r.png"))[200:260, 300:500]
    assert (after == (255, 0, 0)).all(axis=-1).mean() > 0.1


def test_text_without_a_box_goes_where_the_mask_is(harness: WorkerHarness) -> None:
    run(harness, text="I", text_color="white")
    assert not changed_pixels(harness)[~inside(BOX)].any()
    left, top, right, bottom = BOX
    after = pixels(harness.path("out/r.png"))[top:bottom, left:right]
    assert (after == 255).all(axis=-1).any()


def test_a_font_is_an_input_that_is_read_and_recorded(harness: WorkerHarness) -> None:
    font = harness.write("font.ttf", b"not a font")
    job = run(harness, text="A", text_font=font)
    (attempt,) = harness.attempts(job)
    assert attempt.error_code == "bad_font"
    assert json.loads(attempt.inputs) == {font: sha256(b"not a font").hexdigest()}


@pytest.mark.parametrize(
    ("params", "format"),
    [({"format": "jpeg", "quality": 60}, "JPEG"), ({"format": "webp"}, "WEBP"), ({}, "PNG")],
)
def test_the_format_of_the_parameters_is_written(
    harness: WorkerHarness, params: dict[str, Any], format: str
) -> None:
    run(harness, output="out/result", **params)
    with Image.open(harness.path("out/result")) as image:
        assert image.format == format


def test_a_lower_quality_makes_a_smaller_file(harness: WorkerHarness) -> None:
    sizes = []
    for quality in (95, 30):
        output = f"out/{quality}.jpg"
        run(harness, output=output, quality=quality)
        sizes.append(Path(harness.path(output)).stat().st_size)
    assert sizes[1] < sizes[0] / 2


def test_provenance_names_parameters_but_no_folders(harness: WorkerHarness) -> None:
    eyes = harness.write_mask("eyes.png", SIZE, OTHER)
    job = run(harness, prompt="a cup", passes=(PassSpec(mask=eyes),))
    note = xmp(harness.path("out/r.png"))
    assert "compositeWithTrainedAlgorithmicMedia" in note
    assert f">{job}<" in note or f'"{job}"' in note
    assert "a cup" in note
    assert "eyes.png" in note
    assert str(harness.folder) not in note


@pytest.mark.parametrize("case", ["turned off", "empty mask"])
def test_there_is_no_provenance_if_it_is_turned_off_or_nothing_changed(
    harness: WorkerHarness, case: str
) -> None:
    off = case == "turned off"
    job = harness.add(
        image=harness.write_image("in.png"),
        mask=harness.write_mask("m.png", SIZE, *([BOX] if off else [])),
        output=harness.path("out/r.png"),
        provenance=not off,
    )
    harness.run(job)
    assert harness.job(job).state == "succeeded"
    assert xmp(harness.path("out/r.png")) == ""


@pytest.fixture
def flat(harness: WorkerHarness) -> str:
    """A uniform image, in which any result of the engine fails a gate."""
    Image.new("RGB", SIZE, (120, 120, 120)).save(harness.path("flat.png"))
    return harness.path("flat.png")


def test_a_result_that_fails_its_gate_is_not_published(harness: WorkerHarness, flat: str) -> None:
    job = run(harness, image=flat, gate="fail")
    row, (attempt,) = harness.job(job), harness.attempts(job)
    assert (row.state, row.error_code) in (("failed", "gate_seam"), ("failed", "gate_colour"))
    assert attempt.reseeds == 1
    assert row.score == json.loads(attempt.scores)["score"] < 0.5
    assert not Path(harness.path("out/r.png")).exists()


def test_a_result_for_review_is_published_and_selected_until_it_is_run_again(
    harness: WorkerHarness, flat: str
) -> None:
    job = run(harness, image=flat, gate="review")
    row = harness.job(job)
    assert row.state == "succeeded"
    assert row.review in ("gate_seam", "gate_colour")
    assert row.score < 0.5
    assert Path(harness.path("out/r.png")).exists()
    assert jobs.retry(harness.db, Selection(review=True)).count == 1
    assert (harness.job(job).review, harness.job(job).score) == (None, None)


def test_an_attempt_records_the_seed_of_its_result(harness: WorkerHarness) -> None:
    job = run(harness, seed=11, gate="review")
    (attempt,) = harness.attempts(job)
    result = pixels(harness.path("out/r.png"))[130, 130]
    assert result[0] == attempt.seed % 251
    assert harness.job(job).seed == 11


@pytest.mark.parametrize("invert", [False, True])
def test_holes_are_filled_only_if_they_are_repainted(harness: WorkerHarness, invert: bool) -> None:
    image = np.full((600, 700, 4), 200, np.uint8)
    image[..., 3] = 255
    image[100:200, 100:200, 3] = 0
    Image.fromarray(image).save(harness.path("holes.png"))
    job = harness.add(
        image=harness.path("holes.png"),
        mask="alpha",
        output=harness.path("out/r.png"),
        mask_invert=invert,
    )
    harness.run(job)
    alpha = pixels(harness.path("out/r.png"))[..., 3]
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
def test_errors_of_the_last_steps_are_raised_before_inpainting(
    harness: WorkerHarness, params: dict[str, Any], code: str
) -> None:
    job = harness.add(
        image=harness.write_image("in.png", mode="RGBA"),
        mask=harness.write_mask("mask.png", SIZE, BOX),
        output=harness.path("out/r"),
        **params,
    )
    harness.run(job)
    assert harness.job(job).error_code == code
    assert harness.worker.engine.works == []  # type: ignore[attr-defined]


def test_an_image_whose_holes_are_filled_needs_no_alpha(harness: WorkerHarness) -> None:
    image = np.full((600, 700, 4), 200, np.uint8)
    image[..., 3] = 255
    image[100:200, 100:200, 3] = 0
    Image.fromarray(image).save(harness.path("holes.png"))
    job = harness.add(
        image=harness.path("holes.png"), mask="alpha", output=harness.path("r.jpg"), format="jpeg"
    )
    harness.run(job)
    assert harness.job(job).state == "succeeded"
    with Image.open(harness.path("r.jpg")) as written:
        assert (written.format, written.mode) == ("JPEG", "RGB")
