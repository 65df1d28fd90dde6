"""A row becomes a job, or a list of everything that is wrong with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from producer.manifest import ManifestRow, Problem
from producer.resolve import RowDefaults, RowResolver
from shared.engines import engine_name
from shared.errors import ParameterError
from shared.jobs.submissions import NewJob
from shared.params import Params
from shared.storage import Storage

DEFAULTS = RowDefaults(manifest="/data/m.csv", output="/data/m-out", engine="sd2")
ON_S3 = replace(DEFAULTS, manifest="s3://bucket/jobs/m.csv", output="s3://bucket/jobs/m-out")
STORE = Storage(roots=[Path("/data"), Path("/more")], buckets=("bucket",))


def resolve_row(defaults: RowDefaults = DEFAULTS, **cells: str) -> NewJob | list[Problem]:
    row = ManifestRow(line=2, cells={"image": "a.png", "mask": "b.png", **cells})
    return RowResolver(defaults, STORE).resolve(row)


def resolve_job(defaults: RowDefaults = DEFAULTS, **cells: str) -> NewJob:
    job = resolve_row(defaults, **cells)
    assert isinstance(job, NewJob), job
    return job


def resolve_problems(defaults: RowDefaults = DEFAULTS, **cells: str) -> list[str]:
    problems = resolve_row(defaults, **cells)
    assert isinstance(problems, list), problems
    assert {problem.line for problem in problems} == {2}
    return [problem.text for problem in problems]


def params_of(job: NewJob) -> Params:
    return Params.from_json(job.params, seed=job.seed)


# --- locations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defaults", "cells", "expected"),
    [
        (DEFAULTS, {}, ("/data/a.png", "/data/b.png", "/data/m-out/a.png")),
        (
            DEFAULTS,
            {"image": "in/x/a.png"},
            ("/data/in/x/a.png", "/data/b.png", "/data/m-out/a.png"),
        ),
        (DEFAULTS, {"output": "r/c.jpg"}, ("/data/a.png", "/data/b.png", "/data/r/c.jpg")),
        (
            DEFAULTS,
            {"image": "s3://bucket/k+%2F.png"},
            ("s3://bucket/k+%2F.png", "/data/b.png", "/data/m-out/k+%2F.png"),
        ),
        (
            ON_S3,
            {},
            ("s3://bucket/jobs/a.png", "s3://bucket/jobs/b.png", "s3://bucket/jobs/m-out/a.png"),
        ),
        (
            ON_S3,
            {"image": "/more/a.png", "mask": "alpha"},
            ("/more/a.png", "alpha", "s3://bucket/jobs/m-out/a.png"),
        ),
        (
            replace(DEFAULTS, output="/more/out", has_output=True),
            {"output": "c.png"},
            ("/data/a.png", "/data/b.png", "/more/out/c.png"),
        ),
        (
            replace(DEFAULTS, output="s3://bucket", has_output=True),
            {},
            ("/data/a.png", "/data/b.png", "s3://bucket/a.png"),
        ),
    ],
)
def test_relative_names_are_resolved_against_the_manifest_s_folder(
    defaults: RowDefaults, cells: dict[str, str], expected: tuple[str, str, str]
) -> None:
    job = resolve_job(defaults, **cells)
    assert (job.image, job.mask, job.output) == expected


@pytest.mark.parametrize("mask", ["alpha", "box:1,2,3,4", "box:-5,0,3,4"])
def test_a_mask_may_be_alpha_or_a_box(mask: str) -> None:
    assert resolve_job(mask=mask).mask == mask


def test_a_row_without_a_mask_gets_the_mask_for_all_rows() -> None:
    defaults = replace(DEFAULTS, mask="/data/all.png")
    row = ManifestRow(line=2, cells={"image": "a.png"})
    job = RowResolver(defaults, STORE).resolve(row)
    assert isinstance(job, NewJob)
    assert job.mask == "/data/all.png"
    assert resolve_job(defaults).mask == "/data/b.png"


@pytest.mark.parametrize(
    ("cells", "text"),
    [
        ({"image": ""}, "image: empty; name the image"),
        ({"mask": ""}, "mask: empty; name the mask, or alpha, or box:left,top,right,bottom"),
        ({"mask": "box:1,2,3"}, "mask: 'box:1,2,3' is not a box; write box:left,top,right,bottom"),
        ({"mask": "box:1,2,3,x"}, "mask: 'box:1,2,3,x' is not a box"),
        ({"mask": "box:5,2,5,4"}, "mask: 'box:5,2,5,4' is empty"),
        ({"image": "http://h/a.png"}, "image: 'http://h/a.png': http:// is not supported"),
        ({"image": "../a.png"}, "image: '../a.png': '..' is refused"),
        (
            {"image": "/etc/a.png"},
            "image: '/etc/a.png' is outside the allowed folders (/data, /more); add its",
        ),
        ({"mask": "s3://no/b.png"}, "mask: 's3://no/b.png': 'no' is not a bucket name"),
        ({"mask": "s3://other/b.png"}, "mask: 's3://other/b.png': bucket 'other' is not allowed"),
        ({"image": "in/"}, "image: 'in/' is a folder; name the file"),
        ({"output": "out/"}, "output: 'out/' is a folder; name the file"),
        ({"output": "a.png"}, "output: '/data/a.png' is also an input; choose another output"),
        ({"output": "./b.png"}, "output: '/data/b.png' is also an input"),
        ({"output": "/etc/c.png"}, "output: '/etc/c.png' is outside the allowed folders"),
        ({"engine": "sd3"}, "engine: 'sd3' is not known; use sd2, opencv or diffusers:"),
        ({"priority": "high"}, "priority: 'high' is not allowed; use a whole number from -1000"),
        ({"priority": "1001"}, "priority: '1001' is not allowed"),
        ({"seed": "-1"}, "seed: '-1' is not allowed"),
        ({"preset": "flim"}, "preset: 'flim' is not known; did you mean 'film'?"),
        ({"strength": "2"}, "strength: '2' is not allowed; use a number"),
        ({"mode": "fulll"}, "mode: 'fulll' is not allowed; use one of auto, full, tile"),
        ({"eta": "0.5", "scheduler": "euler"}, "eta: 0.5 has no meaning for scheduler 'euler'"),
    ],
)
def test_a_bad_cell_is_named_with_its_value_and_the_remedy(
    cells: dict[str, str], text: str
) -> None:
    given = {"image": "a.png", "mask": "b.png", **cells}
    row = ManifestRow(line=2, cells={name: value for name, value in given.items() if value})
    problems = RowResolver(DEFAULTS, STORE).resolve(row)
    assert isinstance(problems, list)
    assert [problem.text for problem in problems] == [problems[0].text]
    assert problems[0].text.startswith(text)


def test_everything_wrong_with_a_row_is_reported_together() -> None:
    problems = resolve_problems(
        image="../a.png", seed="x", engine="sd3", strength="7", priority="p"
    )
    assert [text.split(":")[0] for text in problems] == [
        "image",
        "engine",
        "priority",
        "seed",
        "strength",
    ]


def test_a_secret_in_a_location_is_not_printed() -> None:
    (text,) = resolve_problems(image="s3://key:hush@bucket/a.png")
    assert "hush" not in text


# --- parameters ------------------------------------------------------------------------------


def test_a_cell_wins_over_an_option_and_an_option_over_the_preset() -> None:
    defaults = replace(
        DEFAULTS, preset="ecommerce", values={"strength": 0.6, "guidance_scale": 5.0}, priority=4
    )
    job = resolve_job(defaults, strength="0.7", priority="-3", engine="opencv", preset="film")
    assert params_of(job).strength == 0.7
    assert params_of(job).guidance_scale == 5.0
    assert params_of(job).num_inference_steps == 80
    assert (job.priority, job.engine) == (-3, "opencv")
    assert resolve_job(defaults).priority == 4


def test_columns_fill_the_prompt_row_by_row() -> None:
    defaults = replace(DEFAULTS, prompt="photo of {product}")
    assert params_of(resolve_job(defaults, product="a cup")).prompt == "photo of a cup"
    assert params_of(resolve_job(defaults, product="a pot")).prompt == "photo of a pot"
    assert resolve_problems(defaults) == [
        "prompt: nothing fills {product}; add a column 'product' or another --prompt"
    ]


def test_a_prompt_column_replaces_the_template() -> None:
    defaults = replace(DEFAULTS, prompt="photo of {product}")
    assert params_of(resolve_job(defaults, prompt="as {is}")).prompt == "as {is}"


def test_the_columns_of_every_template_are_known() -> None:
    known = replace(DEFAULTS, prompt="{thing} {seed}").known_placeholders()
    assert {"thing", "product", "era", "scene"} <= known
    assert "seed" not in known


def test_a_derived_seed_is_the_same_for_the_same_row() -> None:
    first, again, other = resolve_job(), resolve_job(), resolve_job(image="c.png")
    assert first == again
    assert 0 <= first.seed < 2**32
    assert first.seed != other.seed


def test_a_seed_is_taken_from_the_row_then_from_the_defaults() -> None:
    defaults = replace(DEFAULTS, values={"seed": 5})
    assert (
        resolve_job(defaults).seed,
        resolve_job(defaults, seed="9").seed,
        resolve_job(seed="0").seed,
    ) == (5, 9, 0)


def test_a_given_seed_makes_another_content_key_than_an_equal_derived_seed() -> None:
    derived = resolve_job()
    assert resolve_job(seed=str(derived.seed)).content_key != derived.content_key


@pytest.mark.parametrize(
    ("same", "cells"),
    [
        (True, {"key": "sku-1"}),
        (True, {"priority": "9"}),
        (True, {"strength": "0.80"}),
        (True, {"image": "./a.png"}),
        (False, {"strength": "0.81"}),
        (False, {"prompt": "a cup"}),
        (False, {"mask": "alpha"}),
        (False, {"output": "c.png"}),
        (False, {"engine": "opencv"}),
        (False, {"seed": "1"}),
    ],
)
def test_rows_have_equal_content_keys_if_they_ask_for_the_same_work(
    same: bool, cells: dict[str, str]
) -> None:
    assert (resolve_job().content_key == resolve_job(**cells).content_key) is same


def test_the_parameter_cache_distinguishes_rows_by_every_deciding_cell() -> None:
    """One resolver for all rows, as in a run: its cache must not mix them up."""
    resolver = RowResolver(DEFAULTS, STORE)

    def resolved_params(**cells: str) -> dict[str, Any]:
        job = resolver.resolve(
            ManifestRow(line=2, cells={"image": "a.png", "mask": "b.png", **cells})
        )
        assert isinstance(job, NewJob)
        decoded: dict[str, Any] = json.loads(job.params)
        return decoded

    for cells in (
        {},
        {"strength": "0.5"},
        {"guidance_scale": "5"},
        {"preset": "film"},
        {"engine": "opencv"},
        {"preset": "ecommerce", "product": "cup"},
        {"preset": "ecommerce", "product": "pot"},
        {"key": "other"},
        {},
    ):
        assert resolved_params(**cells) == json.loads(resolve_job(**cells).params)


# --- engines ---------------------------------------------------------------------------------


def test_one_engine_has_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    assert engine_name("sd2") == "sd2"
    assert engine_name("diffusers:owner/name@rev") == "diffusers:owner/name@rev"
    for text in ("diffusers:model", "diffusers:./link", f"diffusers:{tmp_path}/model/"):
        assert engine_name(text) == f"diffusers:{tmp_path.resolve()}/model"


@pytest.mark.parametrize("text", ["", "SD2", "diffusers", "diffusers:", "onnx:x"])
def test_an_unknown_engine_is_refused(text: str) -> None:
    with pytest.raises(ParameterError, match="use sd2, opencv or diffusers:"):
        engine_name(text)


def test_an_output_is_named_after_a_format_that_can_be_written() -> None:
    (text,) = resolve_problems(image="a.png", mask="m.png", output="out/a.gif")
    assert "'a.gif': .gif is not a format that can be written; use .jpg" in text
    assert isinstance(resolve_row(image="a.png", mask="m.png", output="out/A.WebP"), NewJob)
    assert isinstance(resolve_row(image="a.png", mask="m.png", output="out/sku-1"), NewJob)


def test_a_result_behind_a_symlink_cannot_replace_an_input(tmp_path: Path) -> None:
    folder = tmp_path.resolve()
    (folder / "images").mkdir()
    (folder / "out").symlink_to("images")
    defaults = replace(DEFAULTS, manifest=f"{folder}/m.csv", output=f"{folder}/out")
    resolver = RowResolver(defaults, Storage(roots=[folder], buckets=()))
    row = ManifestRow(line=2, cells={"image": "images/a.png", "mask": "alpha"})
    (problem,) = resolver.resolve(row)  # type: ignore[misc]
    assert "is also an input" in problem.text


def test_every_wrong_parameter_of_a_row_is_named() -> None:
    problems = resolve_problems(strength="2", eta="nan", num_inference_steps="0", seed="-1")
    assert [text.partition(":")[0] for text in sorted(problems)] == [
        "eta",
        "num_inference_steps",
        "seed",
        "strength",
    ]


# --- passes, text, format --------------------------------------------------------------------


def test_masks_of_passes_are_relative_to_the_manifest_and_the_first_replaces_the_row_s() -> None:
    passes = [{"mask": "face.png", "prompt": "a face"}, {"mask": "eyes.png", "strength": 0.6}]
    job = resolve_job(passes=json.dumps(passes))
    assert job.mask == "/data/face.png"
    (_, first), (eyes, second) = params_of(job).all_passes()
    assert (first.prompt, eyes) == ("a face", "/data/eyes.png")
    assert (second.prompt, second.strength) == ("a face", 0.6)


def test_a_detail_mask_is_a_second_pass() -> None:
    job = resolve_job(preset="faces", detail_mask="in/eyes.png", detail_prompt="green eyes")
    assert [mask for mask, _ in params_of(job).all_passes()] == ["", "/data/in/eyes.png"]
    assert params_of(job).all_passes()[1][1].prompt == "green eyes"
    on_s3 = resolve_job(ON_S3, detail_mask="eyes.png")
    assert params_of(on_s3).passes[0].mask == "s3://bucket/jobs/eyes.png"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"passes": "[{]"}, "passes: not JSON: "),
        ({"passes": "{}"}, "passes: write a list of objects"),
        ({"passes": "[]"}, "passes: write a list of objects"),
        ({"passes": "[1]"}, "passes: write a list of objects"),
        ({"passes": json.dumps([{}] * 9)}, "passes: 9 are too many; use at most 8"),
        ({"passes": '[{"mask": "../m.png"}]'}, "'..' is refused"),
        ({"detail_mask": "http://x/m.png"}, "http:// is not supported"),
        ({"text_font": "/etc/font.ttf"}, "/etc/font.ttf"),
        ({"detail_prompt": "eyes"}, "detail_mask: empty"),
    ],
)
def test_a_bad_pass_is_named(cells: dict[str, str], message: str) -> None:
    assert any(message in text for text in resolve_problems(**cells))


def test_a_style_column_wins_over_the_option() -> None:
    defaults = replace(DEFAULTS, prompt="a cup", style="ink")
    assert params_of(resolve_job(defaults)).prompt == "a cup, ink"
    assert params_of(resolve_job(defaults, style="oil")).prompt == "a cup, oil"


def test_a_font_is_relative_to_the_manifest() -> None:
    assert (
        params_of(resolve_job(text="A", text_font="fonts/a.ttf")).text_font == "/data/fonts/a.ttf"
    )


@pytest.mark.parametrize(
    ("cells", "output"),
    [
        ({"format": "webp"}, "/data/m-out/a.webp"),
        ({"format": "jpeg"}, "/data/m-out/a.jpg"),
        ({"format": "jpeg", "image": "b.JPEG"}, "/data/m-out/b.JPEG"),
        ({"format": "png", "image": "scan.2"}, "/data/m-out/scan.2.png"),
        ({"format": "tiff", "output": "r/x.tif"}, "/data/r/x.tif"),
        ({"format": "tiff", "output": "r/x"}, "/data/r/x"),
    ],
)
def test_a_format_names_the_output(cells: dict[str, str], output: str) -> None:
    assert resolve_job(**cells).output == output


def test_a_format_for_all_rows_names_their_outputs_too() -> None:
    defaults = replace(DEFAULTS, values={"format": "png"})
    assert resolve_job(defaults, image="a.jpg").output == "/data/m-out/a.png"


def test_a_name_that_contradicts_its_format_is_refused() -> None:
    (text,) = resolve_problems(output="x.png", format="jpeg")
    assert text == "output: 'x.png' contradicts format jpeg; drop one of them"


def test_passes_that_are_not_json_are_reported_once() -> None:
    (text,) = resolve_problems(passes="[{]")
    assert text.startswith("passes: not JSON")
