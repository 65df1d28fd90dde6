from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont, features

from shared.errors import ParameterError
from workers.pipeline import text_layout
from workers.pipeline.text_layout import MIN_SIZE_PX, TextLayout, typeset, unescape
from workers.pipeline.text_overlay import built_in_font

DEJAVU = built_in_font()
SMALL = ImageFont.load_default(20).font_bytes  # little more than ASCII
WIDE = (10_000, 1000)
NEEDS_RAQM = pytest.mark.skipif(not features.check("raqm"), reason="no FriBiDi")


def laid_out(
    text: str, *, size: int = 20, box: tuple[int, int] = WIDE, font: bytes = DEJAVU
) -> TextLayout:
    layout = typeset(text, font=font, size=size, box=box)
    assert layout is not None
    return layout


def lines(text: str, *, width: int) -> list[str]:
    return [line.text for line in laid_out(text, box=(width, 1000)).lines]


def error_of(text: str, **options: object) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        laid_out(text, **options)  # type: ignore[arg-type]
    return caught.value


# Lines


def test_words_wrap_to_the_width_of_the_box() -> None:
    assert lines("one two three four", width=95) == ["one two", "three", "four"]
    assert lines("one two three four", width=10_000) == ["one two three four"]


@pytest.mark.parametrize("text", ["up\ndown", r"up\ndown", "up\r\ndown", "up\u2028down"])
def test_a_line_break_may_be_written_in_several_ways(text: str) -> None:
    assert lines(text, width=500) == ["up", "down"]


def test_a_doubled_backslash_is_one_backslash() -> None:
    assert unescape(r"C:\\new\nline \t") == "C:\\new\nline \\t"


def test_an_empty_line_keeps_its_height() -> None:
    apart, together = laid_out("a\n\na"), laid_out("a\na")
    assert apart.size[1] - together.size[1] == apart.line_height


def test_a_hyphen_ends_a_line_but_a_minus_does_not() -> None:
    assert lines("wash-and-wear", width=80) == ["wash-", "and-", "wear"]
    assert lines("from -25", width=60) == ["from", "-25"]


def test_ideographs_break_anywhere_but_before_closing_marks() -> None:
    pieces = list(text_layout._split("「日本。」ー語の小っ話 ok"))
    assert pieces == ["「日", "本。」ー", "語", "の", "小っ", "話 ", "ok"]


@NEEDS_RAQM
def test_the_first_letter_decides_the_direction_of_all_its_lines() -> None:
    layout = laid_out("שלום iPhone iPhone iPhone", box=(80, 1000))
    assert {line.direction for line in layout.lines} == {"rtl"}
    assert laid_out("iPhone שלום").lines[0].direction == "ltr"


# Size


@pytest.mark.parametrize(
    "text", ["Sale", "one two three\nfour", pytest.param("مرحبا بالعالم", marks=NEEDS_RAQM)]
)
def test_size_0_is_the_largest_size_that_fits(text: str) -> None:
    box = (150, 60)
    layout = laid_out(text, size=0, box=box)
    assert layout.size[0] <= box[0]
    assert layout.size[1] <= box[1]
    assert error_of(text, size=int(layout.font.size) + 1, box=box).code == "text_does_not_fit"


def test_the_error_for_a_size_that_does_not_fit_names_one_that_does() -> None:
    error = error_of("one two three", size=60, box=(150, 60))
    largest = int(laid_out("one two three", size=0, box=(150, 60)).font.size)
    assert error.code == "text_does_not_fit"
    assert f"the largest size that fits is {largest};" in str(error)
    laid_out("one two three", size=largest, box=(150, 60))


def test_text_too_small_to_read_is_not_drawn() -> None:
    error = error_of("far too many words " * 50, size=0, box=(60, 30))
    assert error.code == "text_does_not_fit"
    assert f"{MIN_SIZE_PX} or more" in str(error)


@pytest.mark.parametrize(
    "text",
    ["jf", "ffi", "//_|"]
    + [pytest.param(text, marks=NEEDS_RAQM) for text in ("Ǻg̃ Z̃̓", "مرحبا", "שָׁלוֹם")],
)
@pytest.mark.parametrize("size", [9, 31])
def test_the_measured_ink_is_the_drawn_ink(text: str, size: int) -> None:
    layout = laid_out(text, size=size)
    image = layout.render("left", layout.size[0])
    whole = bytes(layout.font.getmask(text, direction=layout.lines[0].direction))
    assert np.asarray(image).sum(dtype=int) == sum(whole) > 0


def test_lines_are_spaced_by_the_fonts_metrics() -> None:
    layout = laid_out("a\na", size=20)
    assert layout.line_height == sum(layout.font.getmetrics())
    assert 20 <= layout.line_height <= 30


def test_no_unreadable_size_is_proposed() -> None:
    assert "the largest size" not in str(error_of("far too many words " * 50, size=9, box=(60, 30)))


# Glyphs


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Tea 茶", "U+8336 CJK UNIFIED IDEOGRAPH-8336"),
        ("nuqta a\u093c", "U+093C DEVANAGARI SIGN NUKTA"),
        ("bell \a", "U+0007 a control character"),
    ],
)
def test_a_missing_glyph_is_an_error_that_names_the_character(text: str, name: str) -> None:
    error = error_of(text)
    assert error.code == "text_glyph_missing"
    assert name in str(error)
    assert "'DejaVu Sans'" in str(error)
    assert "text_font" in str(error)


def test_another_font_has_other_glyphs() -> None:
    assert error_of("шкаф", font=SMALL).code == "text_glyph_missing"
    assert laid_out("cupboard…", font=SMALL).lines


@NEEDS_RAQM
@pytest.mark.parametrize("text", ["a\u00a0b\u2003c\u202fd", "a\u200bb", "x\ufe0f", "a\tb"])
def test_spaces_and_joiners_need_no_glyph(text: str) -> None:
    assert laid_out(text, font=SMALL).lines


def test_an_accent_is_composed_with_its_letter() -> None:
    assert laid_out("e\u0301\tx").lines[0].text == "é x"


@NEEDS_RAQM
def test_a_letter_may_be_composed_of_glyphs_that_the_font_has() -> None:
    assert laid_out("\u06c0").lines  # DejaVu Sans has only heh and hamza


@NEEDS_RAQM
def test_letters_join_in_scripts_that_need_it() -> None:
    joined = laid_out("ببب", size=40).size[0]
    apart = laid_out("ب\u200cب\u200cب", size=40).size[0]
    assert joined < apart


def test_a_script_that_needs_shaping_is_refused_without_raqm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text_layout, "_has_raqm", lambda: False)
    error = error_of("مرحبا")
    assert error.code == "text_layout_missing"
    assert "libfribidi0" in str(error)
    assert laid_out("Ελλάδα, Київ, é e\u0301").lines


def test_a_blank_text_has_no_layout() -> None:
    assert typeset(" \n ", font=DEJAVU, size=0, box=WIDE) is None
