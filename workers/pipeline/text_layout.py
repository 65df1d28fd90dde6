"""Text layout: which glyphs a font has, where lines break, how large a text fits into its box.

Pillow's FreeType draws; its Raqm joins and orders letters in scripts that need it. Sizes are
pixels per em. A text is measured by its ink, not by the font's line height, so that it can be
as large as the box allows.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, features

from shared.errors import ParameterError, TextDoesNotFit, TextGlyphMissing, TextLayoutMissing

MIN_SIZE_PX = 5  # smaller text cannot be read
MAX_SIZE_PX = 4096  # also the maximum of the parameter text_size

_ABSENT = "\U0010ffff"  # a noncharacter, so fonts draw their box for missing glyphs
_SPACES = " \u2000-\u2006\u2008-\u200b\u3000"
# Scripts without spaces, where a line may end after nearly every character.
_UNSPACED = re.compile(
    "[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff]"
)
_NOT_FIRST = frozenset("ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of text. ink: (left, top, right, bottom) relative to the baseline's left end.

    direction: ltr or rtl; None without Raqm, because Pillow's basic layout rejects a direction.
    """

    text: str
    direction: str | None
    ink: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        return self.ink[2] - self.ink[0]


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """A text broken into lines at one size. line_height: pixels from baseline to baseline."""

    font: ImageFont.FreeTypeFont
    lines: tuple[Line, ...]
    line_height: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the ink."""
        return max(line.width for line in self.lines), self.bottom - self.top

    @property
    def top(self) -> int:
        """The ink's first row, relative to the first baseline."""
        return min(n * self.line_height + line.ink[1] for n, line in enumerate(self.lines))

    @property
    def bottom(self) -> int:
        return max(n * self.line_height + line.ink[3] for n, line in enumerate(self.lines))

    def render(self, align: str, width: int) -> Image.Image:
        """Draw the ink as a grey image of that width and the ink's height; 255 = covered."""
        image = Image.new("L", (width, self.bottom - self.top))
        canvas = ImageDraw.Draw(image)
        for number, line in enumerate(self.lines):
            left = {"left": 0, "center": (width - line.width) // 2}.get(align, width - line.width)
            origin = (left - line.ink[0], number * self.line_height - self.top)
            canvas.text(
                origin,
                line.text,
                fill=255,
                font=self.font,
                anchor="ls",
                direction=line.direction,
            )
        return image


def typeset(text: str, *, font: bytes, size: int, box: tuple[int, int]) -> TextLayout | None:
    """Break a text into lines at the given size, or at the largest that fits if size is 0.

    box: (width, height). Returns None for a text without visible characters. Raises
    TextDoesNotFit, TextGlyphMissing, TextLayoutMissing, and OSError if FreeType cannot use
    the font.
    """
    paragraphs = [_normalise(paragraph) for paragraph in unescape(text).splitlines()]
    if not any(paragraphs):
        return None
    _check_shaping(paragraphs)
    _check_glyphs(font, "".join(paragraphs))
    if size:
        layout = _lay_out(paragraphs, font, size, box)
        if layout is None:
            raise _does_not_fit(box, size, _find_largest(paragraphs, font, size - 1, box))
        return layout
    layout = _find_largest(paragraphs, font, min(2 * box[1], MAX_SIZE_PX), box)
    if layout is None or layout.font.size < MIN_SIZE_PX:
        raise _does_not_fit(box, size, layout)
    return layout


def unescape(text: str) -> str:
    r"""Replace ``\n`` written as two characters by a line break, and ``\\`` by one backslash.

    CSV cells and command lines cannot hold a line break easily.
    """
    return re.sub(r"\\([\\n])", lambda match: "\n" if match[1] == "n" else "\\", text)


def _normalise(paragraph: str) -> str:
    # Composed: fonts often have é but not the combining accent.
    return unicodedata.normalize("NFC", paragraph.replace("\t", " ")).strip()


def _does_not_fit(box: tuple[int, int], size: int, largest: TextLayout | None) -> ParameterError:
    remedy = "make text_box larger or the text shorter"
    fitting = 0 if largest is None else largest.font.size
    if size and fitting >= MIN_SIZE_PX:
        remedy = f"the largest size that fits is {fitting:g}; use it, or {remedy}"
    return TextDoesNotFit(
        f"text_size: the text does not fit its box of {box[0]}x{box[1]} pixels at "
        f"{size or f'a readable size, {MIN_SIZE_PX} or more'}; {remedy}"
    )


# --- glyphs ----------------------------------------------------------------------------------


def _has_raqm() -> bool:
    return bool(features.check("raqm"))


def _check_shaping(paragraphs: list[str]) -> None:
    """Raises TextLayoutMissing for scripts that would be drawn wrongly without Raqm."""
    for character in "".join(paragraphs):
        is_right_to_left = unicodedata.bidirectional(character) in ("R", "AL", "AN")
        is_combining = unicodedata.category(character).startswith("M")
        if (is_right_to_left or is_combining) and not _has_raqm():
            raise TextLayoutMissing(
                f"text: {_describe(character)} needs Pillow's Raqm layout, which this worker "
                "lacks; install FriBiDi (Debian's libfribidi0) there"
            )


def _check_glyphs(font: bytes, text: str) -> None:
    """Raises TextGlyphMissing naming the first character that the font has no glyph for."""
    # Drawn one by one without shaping: each is then its own glyph or the box for missing ones.
    basic = ImageFont.truetype(io.BytesIO(font), 24, layout_engine=ImageFont.Layout.BASIC)
    absent = _draw_glyph(basic, _ABSENT)
    for character in dict.fromkeys(text):
        parts = unicodedata.normalize("NFD", character)
        if _is_invisible(character) or _draw_glyph(basic, character) != absent:
            continue
        # Raqm composes a letter from the glyphs of its parts.
        has_parts = absent not in [_draw_glyph(basic, part) for part in parts]
        if _has_raqm() and parts != character and has_parts:
            continue
        raise TextGlyphMissing(
            f"text: the font {basic.getname()[0]!r} has no glyph for {_describe(character)}; "
            "give a text_font that has one"
        )


def _draw_glyph(font: ImageFont.FreeTypeFont, character: str) -> tuple[float, bytes]:
    return font.getlength(character), bytes(font.getmask(character))


def _is_invisible(character: str) -> bool:
    """Whether the character needs no glyph: spaces, and controls that Raqm hides itself."""
    is_control = unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
    return character == " " or (_has_raqm() and (character.isspace() or is_control))


def _describe(character: str) -> str:
    name = unicodedata.name(character, "a control character")
    return f"{character!r} (U+{ord(character):04X} {name})"


# --- size and lines --------------------------------------------------------------------------


def _find_largest(
    paragraphs: list[str], font: bytes, limit: int, box: tuple[int, int]
) -> TextLayout | None:
    """The layout at the largest size up to the limit that fits; None if no size does."""
    # Bisection assumes that a text that fits at one size fits at every smaller one.
    largest, low, high = None, 1, limit
    while low <= high:
        middle = (low + high) // 2
        layout = _lay_out(paragraphs, font, middle, box)
        if layout is None:
            high = middle - 1
        else:
            largest, low = layout, middle + 1
    return largest


def _lay_out(
    paragraphs: list[str], font: bytes, size: int, box: tuple[int, int]
) -> TextLayout | None:
    """The text in lines no wider than the box; None if it does not fit."""
    face = ImageFont.truetype(io.BytesIO(font), size)
    line_height = max(sum(face.getmetrics()), 1)
    lines = [line for text in paragraphs for line in _break_lines(text, face, box[0])]
    layout = TextLayout(font=face, lines=tuple(lines), line_height=line_height)
    return layout if layout.size[0] <= box[0] and layout.size[1] <= box[1] else None


def _break_lines(paragraph: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[Line]:
    """Greedy line breaking; a piece that cannot be broken may be wider than ``width``."""
    direction = _find_direction(paragraph)
    line = _measure("", font, direction)
    text = ""
    for piece in _split(paragraph):
        longer = _measure(text + piece, font, direction)
        if text and longer.width > width:
            yield line
            text, longer = "", _measure(piece, font, direction)
        text, line = text + piece, longer
    yield line


def _measure(text: str, font: ImageFont.FreeTypeFont, direction: str | None) -> Line:
    text = text.rstrip()
    left, top, right, bottom = font.getbbox(text, anchor="ls", direction=direction)
    ink = (int(left), int(top), int(right), int(bottom))
    return Line(text=text, direction=direction, ink=ink)


def _find_direction(paragraph: str) -> str | None:
    """The direction of the first strong character: Unicode Standard Annex 9, rules P2 and P3."""
    if not _has_raqm():
        return None
    classes = (unicodedata.bidirectional(character) for character in paragraph)
    first = next((strong for strong in classes if strong in ("L", "R", "AL")), "L")
    return "ltr" if first == "L" else "rtl"


def _split(paragraph: str) -> Iterator[str]:
    """Split into unbreakable pieces, each with the spaces that follow it."""
    start = 0
    for index in range(1, len(paragraph)):
        if _may_break(paragraph[index - 1], paragraph[index]):
            yield paragraph[start:index]
            start = index
    yield paragraph[start:]


def _may_break(before: str, after: str) -> bool:
    """The common cases of Unicode Standard Annex 14: spaces, hyphens, ideographs."""
    if re.match(f"[{_SPACES}]", after):
        return False
    if re.match(f"[{_SPACES}]", before):
        return True
    if before in "-\u2010\u2013\u2014":
        return after.isalpha()  # not before a digit: the hyphen may be a minus sign
    if not (_UNSPACED.match(before) or _UNSPACED.match(after)):
        return False
    closes = unicodedata.category(after) in ("Pe", "Pf", "Po", "Mn", "Mc", "Me", "Lm")
    opens = unicodedata.category(before) in ("Ps", "Pi")
    return not (closes or opens or after in _NOT_FIRST)
