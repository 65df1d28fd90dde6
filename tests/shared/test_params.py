"""Parameters: the presets' values, the allowed ranges, and how a row's values are combined."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import ParameterError
from shared.params import (
    MAX_SEED,
    PARAMETERS,
    PROMPT_LIMIT,
    Params,
    PassSpec,
    find_parameter,
    further_inputs,
    with_values,
)
from shared.presets import RowPasses, find_presets, placeholders, presets, resolve

# guidance_scale, num_inference_steps and strength as the guide has them.
USES = {
    "ecommerce": (8.5, 70, 0.75),
    "photo-restoration": (7.0, 100, 0.65),
    "film": (10.0, 80, 0.9),
    "advertising": (9.5, 60, 0.85),
    "portrait": (6.5, 50, 0.55),
    "architecture": (9.0, 80, 0.85),
    "art": (11.0, 100, 0.9),
    "social": (8.0, 60, 0.8),
    "manuscript": (7.5, 90, 0.6),
    "automotive": (9.5, 85, 0.85),
}
QUALITIES = {"preview": (7.0, 20, 0.7), "high": (9.0, 100, 0.8), "creative": (12.0, 75, 0.9)}
NAMES = ("guidance_scale", "num_inference_steps", "strength")


def resolve_row(**changes: Any) -> Params:
    row: dict[str, Any] = {"engine": "sd2", "preset": None, "prompt": None}
    return resolve(**{**row, "values": {}, "columns": {}, **changes})


def error_message(**changes: Any) -> str:
    with pytest.raises(ParameterError) as caught:
        resolve_row(**changes)
    assert caught.value.code == "bad_parameter"
    return str(caught.value)


# --- presets ---------------------------------------------------------------------------------


def test_there_are_ten_uses_faces_in_two_passes_and_three_qualities() -> None:
    assert list(presets()) == [*USES, "faces", *QUALITIES]


@pytest.mark.parametrize(("name", "values"), [*USES.items(), *QUALITIES.items()])
def test_a_preset_sets_the_values_of_the_guide(name: str, values: tuple[float, int, float]) -> None:
    params = resolve_row(preset=name)
    assert tuple(getattr(params, parameter) for parameter in NAMES) == values


@pytest.mark.parametrize("name", USES)
def test_a_use_has_a_prompt_that_its_own_placeholders_fill(name: str) -> None:
    preset = presets()[name]
    assert set(placeholders(preset.prompt)) == set(preset.placeholders)
    params = resolve_row(preset=name)
    assert params.prompt
    assert not set("{}") & set(params.prompt)
    assert params.negative_prompt
    assert preset.use


def test_film_is_wide_and_everything_else_is_square() -> None:
    sizes = {
        name: (resolve_row(preset=name).width, resolve_row(preset=name).height) for name in USES
    }
    assert sizes.pop("film") == (1024, 576)
    assert set(sizes.values()) == {(512, 512)}


def test_presets_combine_and_the_later_one_wins_where_both_set_a_value() -> None:
    both = resolve_row(preset="ecommerce+preview", columns={"product": "a cup"})
    assert tuple(getattr(both, name) for name in NAMES) == QUALITIES["preview"]
    assert both.prompt.startswith("product photograph of a cup")
    assert resolve_row(preset="preview+ecommerce") == resolve_row(preset="ecommerce")
    assert find_presets(" film + high ") == (presets()["film"], presets()["high"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ecomerce", "preset: 'ecomerce' is not known; did you mean 'ecommerce'?"),
        ("film+prevew", "preset: 'prevew' is not known; did you mean 'preview'?"),
        ("zzz", "preset: 'zzz' is not known; known: ecommerce, photo-restoration, film"),
        ("film+", "preset: '' is not known"),
    ],
)
def test_an_unknown_preset_suggests_the_most_similar(name: str, message: str) -> None:
    assert message in error_message(preset=name)


# --- ranges ----------------------------------------------------------------------------------

INSIDE: list[tuple[str, str, Any]] = [
    ("guidance_scale", "1", 1.0),
    ("guidance_scale", "20", 20.0),
    ("cache_interval", "1", 1),
    ("cache_interval", "10", 10),
    ("num_inference_steps", "1", 1),
    ("num_inference_steps", "200", 200),
    ("num_inference_steps", " 50.0 ", 50),
    ("strength", "1e-9", 1e-9),
    ("strength", "1", 1.0),
    ("refine_strength", "0", 0.0),
    ("refine_strength", "1", 1.0),
    ("eta", "0", 0.0),
    ("eta", "1", 1.0),
    ("seed", "0", 0),
    ("seed", str(MAX_SEED), MAX_SEED),
    ("seed", "9007199254740993", 9007199254740993),
    ("width", "512", 512),
    ("width", "1024", 1024),
    ("height", "576", 576),
    ("mask_threshold", "1", 1),
    ("mask_threshold", "255", 255),
    ("mask_dilation", "0", 0),
    ("mask_feather", "256", 256),
    ("opencv_method", " telea ", "telea"),
    ("opencv_radius", "64", 64),
    ("scale", "0.25", 0.25),
    ("scale", "0", 0.0),
    ("mask_invert", "yes", True),
    ("mask_invert", "False", False),
    ("mask_fit", "bottom-right", "bottom-right"),
    ("text", "two\nlines", "two\nlines"),
    ("text_box", "0, 10,20,30", "0, 10,20,30"),
    ("text_color", "#ff000080", "#ff000080"),
    ("text_color", "rebeccapurple", "rebeccapurple"),
    ("postprocess", "my-faces.v2", "my-faces.v2"),
    ("format", "webp", "webp"),
    ("quality", "100", 100),
    ("provenance", "off", False),
    ("mode", "tile", "tile"),
    ("scheduler", "lcm", "lcm"),
    ("prompt", "  a cup  ", "a cup"),
    ("prompt", "x" * PROMPT_LIMIT, "x" * PROMPT_LIMIT),
    ("prompt", "和風\u3000の\u00a0photo 👩\u200d🎨", "和風\u3000の\u00a0photo 👩\u200d🎨"),
    ("negative_prompt", "", ""),
]

OUTSIDE = [
    *(("guidance_scale", text) for text in ("0.999", "20.001", "nan", "inf", "-inf", "", "high")),
    *(("num_inference_steps", text) for text in ("0", "201", "1.5", "nan", "inf", "1e400")),
    *(("cache_interval", text) for text in ("0", "11", "2.5")),
    *(("strength", text) for text in ("0", "-0.0", "1.0001", "nan")),
    *(("eta", text) for text in ("-0.001", "1.001", "nan")),
    *(("seed", text) for text in ("-1", str(MAX_SEED + 1), "0.5", "9" * 5000, "0x10")),
    *(("width", text) for text in ("448", "511", "513", "1088", "520")),
    *(("height", text) for text in ("448", "577", "1e9")),
    *(("mask_threshold", text) for text in ("0", "256")),
    *(("mask_dilation", text) for text in ("-1", "257")),
    *(("mask_feather", text) for text in ("-1", "257")),
    *(("opencv_radius", text) for text in ("0", "65")),
    *(("scale", text) for text in ("0.2", "65", "-1", "nan")),
    *(("mask_invert", text) for text in ("", "maybe", "2")),
    *(("mask_fit", text) for text in ("stretch", "")),
    *(("text_box", text) for text in ("1,2,3", "a,b,c,d", "1,2,3,-4", "")),
    *(("text_color", text) for text in ("#12", "rouge", "")),
    *(("postprocess", text) for text in ("a b", "", "x" * 101)),
    *(("format", text) for text in ("gif", "JPEG", "")),
    *(("quality", text) for text in ("0", "101")),
    ("text", "a\x00b"),
    *(("mode", text) for text in ("AUTO", "", "tiles")),
    *(("scheduler", text) for text in ("DDIM", "heun")),
    ("opencv_method", "ns"),
    *(
        ("prompt", text)
        for text in ("x" * (PROMPT_LIMIT + 1), "a\nb", "a\x00b", "a\x7fb", "\ud800")
    ),
]


@pytest.mark.parametrize(("name", "text", "value"), INSIDE)
def test_a_value_inside_its_range_is_read(name: str, text: str, value: Any) -> None:
    parsed = find_parameter(name).read(text)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(("name", "text"), OUTSIDE, ids=lambda text: ascii(text)[:20])
def test_a_value_outside_its_range_is_refused_with_what_is_allowed(name: str, text: str) -> None:
    with pytest.raises(ParameterError) as caught:
        find_parameter(name).read(text)
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    assert message.endswith(PARAMETERS[name].allowed)
    assert len(message) < 250


@pytest.mark.parametrize("value", [True, None, [1], {"a": 1}, b"1"])
def test_a_value_that_is_neither_text_nor_a_number_is_refused(value: object) -> None:
    with pytest.raises(ParameterError, match=r"num_inference_steps: .* is not allowed"):
        find_parameter("num_inference_steps").read(value)


def test_numbers_are_read_like_their_text() -> None:
    assert find_parameter("guidance_scale").read(7) == 7.0
    assert find_parameter("num_inference_steps").read(50.0) == 50
    with pytest.raises(ParameterError):
        find_parameter("num_inference_steps").read(float("nan"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stength", "'stength' is not a parameter; did you mean 'strength'?"),
        ("steps", "'steps' is not a parameter; known: mode, scale"),
        ("Seed", "'Seed' is not a parameter; did you mean 'seed'?"),
    ],
)
def test_an_unknown_parameter_suggests_the_most_similar(name: str, message: str) -> None:
    assert message in error_message(values={name: "1"})


# --- combining -------------------------------------------------------------------------


def test_without_values_the_documented_defaults_apply() -> None:
    assert resolve_row() == Params(mask_dilation=1, mask_feather=2)
    assert resolve_row(engine="opencv") == Params(mask_dilation=0, mask_feather=0)


def test_values_win_over_presets_and_presets_over_defaults() -> None:
    params = resolve_row(preset="ecommerce", values={"strength": "0.5", "mask_feather": 9})
    assert (params.strength, params.guidance_scale, params.mask_feather) == (0.5, 8.5, 9)


@pytest.mark.parametrize("scheduler", ["ddpm", "pndm", "euler", "euler_a", "dpmpp_2m", "lcm"])
def test_eta_is_allowed_only_with_ddim(scheduler: str) -> None:
    assert resolve_row(values={"eta": "0.3"}).eta == 0.3
    assert resolve_row(values={"eta": "0", "scheduler": scheduler}).scheduler == scheduler
    message = error_message(values={"eta": "0.3", "scheduler": scheduler})
    assert message == (
        f"eta: 0.3 has no meaning for scheduler {scheduler!r}; use 0, or scheduler ddim"
    )


def test_a_strength_leaves_at_least_one_step() -> None:
    assert resolve_row(values={"strength": "0.5", "num_inference_steps": "2"})
    assert error_message(values={"strength": "0.01", "num_inference_steps": "50"}) == (
        "strength: 0.01 of 50 num_inference_steps leaves no step; raise one of them"
    )


def test_refinement_takes_at_least_one_step() -> None:
    assert resolve_row(values={"refine_strength": "0.5", "num_inference_steps": "2"})
    assert error_message(values={"refine_strength": "0.4", "num_inference_steps": "2"}) == (
        "refine_strength: 0.4 of 2 num_inference_steps leaves no step; raise one of them"
    )


def test_changed_values_are_checked_against_the_others() -> None:
    with pytest.raises(ParameterError, match="eta"):
        with_values(Params(scheduler="euler"), {"eta": 0.5})
    assert with_values(Params(scheduler="euler"), {"eta": 0.5, "scheduler": "ddim"}).eta == 0.5


def test_columns_fill_the_prompt_and_win_over_the_presets_placeholders() -> None:
    params = resolve_row(preset="ecommerce", columns={"product": "a red cup", "unused": "x"})
    assert "a red cup" in params.prompt
    assert "neutral background" in params.prompt


def test_a_given_template_replaces_the_presets() -> None:
    params = resolve_row(preset="film", prompt="{{x}} of {thing}", columns={"thing": "a cup"})
    assert params.prompt == "{x} of a cup"
    assert params.guidance_scale == 10.0


def test_a_prompt_value_is_not_a_template() -> None:
    assert resolve_row(preset="film", values={"prompt": "a {curly} cup"}).prompt == "a {curly} cup"


def test_a_filled_prompt_may_contain_braces_and_is_not_filled_again() -> None:
    assert resolve_row(prompt="{a}", columns={"a": "{b}"}).prompt == "{b}"


@pytest.mark.parametrize("columns", [{}, {"thing": ""}])
def test_a_placeholder_without_a_text_is_named_in_the_error(columns: dict[str, str]) -> None:
    message = error_message(prompt="photo of {thing}", columns=columns)
    assert message == ("prompt: nothing fills {thing}; add a column 'thing' or another --prompt")


@pytest.mark.parametrize(
    "template", ["{", "}", "{a", "{0}", "{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>9}"]
)
def test_a_template_may_contain_only_plain_names(template: str) -> None:
    with pytest.raises(ParameterError, match=r"^prompt: "):
        placeholders(template)


def test_a_template_names_its_placeholders_in_order() -> None:
    assert placeholders("{b} and {a}, {{not}} {b}") == ("b", "a", "b")


def test_a_filled_prompt_is_checked_like_any_other() -> None:
    assert "prompt: " in error_message(prompt="{a}", columns={"a": "x\ny"})
    assert "prompt: " in error_message(prompt="{a}", columns={"a": "x" * (PROMPT_LIMIT + 1)})


def test_params_survive_json_and_equal_ones_have_equal_text() -> None:
    params = resolve_row(preset="art", values={"prompt": "é 画", "seed": 5})
    text = params.to_json()
    assert Params.from_json(text, seed=5) == params
    assert "seed" not in text
    assert text == Params.from_json(text, seed=6).to_json()


def test_optional_parameters_at_their_defaults_are_left_out_of_the_json() -> None:
    text = Params().to_json()
    assert '"text' not in text
    assert '"passes"' not in text
    assert '"mask_invert"' not in text
    assert '"cache_interval"' not in text
    assert '"cache_interval":3' in Params(cache_interval=3).to_json()
    assert '"refine_strength"' not in text
    assert '"mask_invert":true' in Params(mask_invert=True).to_json()


# --- passes ----------------------------------------------------------------------------------


def test_faces_have_the_two_passes_of_the_guide() -> None:
    params = resolve_row(preset="faces", passes=RowPasses(detail_mask="/eyes.png"))
    (whole_mask, whole), (detail_mask, detail) = params.all_passes()
    assert tuple(getattr(whole, name) for name in NAMES) == (8.0, 70, 0.8)
    assert tuple(getattr(detail, name) for name in NAMES) == (7.0, 50, 0.6)
    assert (whole_mask, detail_mask) == ("", "/eyes.png")
    assert "eyes and mouth" in detail.prompt
    assert detail.negative_prompt == whole.negative_prompt
    assert further_inputs(params.to_json()) == ("/eyes.png",)


def test_faces_without_a_detail_mask_are_refused() -> None:
    assert error_message(preset="faces").startswith("detail_mask: empty")
    assert error_message(passes=RowPasses(detail_prompt="eyes")).startswith("detail_mask: empty")


def test_options_and_later_presets_reach_the_second_pass() -> None:
    passes = RowPasses(detail_mask="/eyes.png")
    quick = resolve_row(preset="faces+preview", passes=passes, values={"strength": 0.9})
    values = [tuple(getattr(params, name) for name in NAMES) for _, params in quick.all_passes()]
    assert values == [(7.0, 20, 0.9), (7.0, 20, 0.9)]
    first = resolve_row(preset="preview+faces", passes=passes)
    assert first.all_passes()[1][1].num_inference_steps == 50


def test_a_detail_prompt_replaces_the_presets() -> None:
    passes = RowPasses(detail_mask="/eyes.png", detail_prompt="green eyes")
    assert resolve_row(preset="faces", passes=passes).all_passes()[1][1].prompt == "green eyes"
    assert resolve_row(prompt="a face", passes=RowPasses(detail_mask="/m")).all_passes()[1][
        1
    ].prompt == ("a face")


def test_the_first_pass_changes_the_row_and_the_others_follow_it() -> None:
    passes = [{"prompt": "a", "strength": 0.9}, {"mask": "/b.png", "num_inference_steps": "20"}]
    params = resolve_row(values={"seed": 3}, passes=RowPasses(passes=passes))
    (_, first), (mask, second) = params.all_passes()
    assert (first.prompt, first.strength, first.num_inference_steps) == ("a", 0.9, 50)
    assert (second.prompt, second.strength, second.num_inference_steps) == ("a", 0.9, 20)
    assert mask == "/b.png"
    assert params.passes == (PassSpec(mask="/b.png", values=(("num_inference_steps", 20),)),)
    assert Params.from_json(params.to_json(), seed=3) == params


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([{"seed": 1}], "passes: 'seed' cannot differ between passes"),
        ([{}, {"promt": "x"}], "did you mean 'prompt'?"),
        ([{}, {"strength": 2}], "strength: '2' is not allowed"),
        ([{}, {"eta": 0.5, "scheduler": "euler"}], "eta: 0.5 has no meaning"),
    ],
)
def test_a_pass_is_checked_like_a_row(passes: list[dict[str, Any]], message: str) -> None:
    assert message in error_message(passes=RowPasses(passes=passes))


def test_passes_and_a_detail_mask_cannot_be_combined() -> None:
    message = error_message(passes=RowPasses(passes=[{}], detail_mask="/m.png"))
    assert message == "passes: cannot be combined with detail_mask or detail_prompt"


def test_a_style_is_appended_to_the_prompt_of_every_pass() -> None:
    passes = RowPasses(passes=[{}, {"prompt": "eyes"}])
    params = resolve_row(prompt="a face", style="oil on canvas", passes=passes)
    assert [of_pass.prompt for _, of_pass in params.all_passes()] == [
        "a face, oil on canvas",
        "eyes, oil on canvas",
    ]
    assert resolve_row(values={"prompt": "x"}, style="ink").prompt == "x, ink"
    assert resolve_row(style="ink").prompt == "ink"


def test_a_template_may_contain_the_style_as_a_placeholder() -> None:
    assert resolve_row(prompt="{style} of a cup", style="ink").prompt == "ink of a cup"
    photo = resolve_row(preset="photo-restoration", style="studio style")
    assert photo.prompt.startswith("old photograph, studio style, continuous film grain")
    assert photo.prompt.count("studio style") == 1


def test_the_further_input_files_are_read_from_the_json() -> None:
    passes = (
        PassSpec(mask="box:0,0,1,1"),
        PassSpec(mask="alpha"),
        PassSpec(mask=""),
        PassSpec(mask="/b.png"),
    )
    params = Params(text_font="/font.ttf", passes=(*passes, PassSpec(mask="/b.png")))
    assert further_inputs(params.to_json()) == ("/b.png", "/font.ttf")
    assert further_inputs(Params(prompt='"passes" and "text_font"').to_json()) == ()
