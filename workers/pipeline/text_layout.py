"""Type: which glyphs a font has, where lines break, how large a text can be in its box.

Pillow's FreeType draws; its Raqm joins letters and orders them where a script asks for that.
Sizes are pixels to the em. A text is measured by its ink, not by the font's line height, so
that it can be as large as the box allows.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, features

from shared.errors import ParameterError

MIN_SIZE_PX = 5
MAX_SIZE_PX = 4096  # also what the parameter text_size allows

_ABSENT = "\U0010ffff"  # never a character, so it is drawn as the font's box for missing ones
_SPACES = " \u2000-\u2006\u2008-\u200b\u3000"
# Scripts without spaces, where a line may end after nearly every character.
_UNSPACED = re.compile(
    "[\u3000-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff]"
)
_NOT_FIRST = frozenset("ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶ")


@dataclass(frozen=True, kw_only=True)
class Line:
    """text, drawn from its baseline's left end. ink: (left, top, right, bottom) around there.

    direction: ltr or rtl; None without Raqm, which alone knows what to do with it.
    """

    text: str
    direction: str | None
    ink: tuple[int, int, int, int]

    @property
    def width(self) -> int:
        return self.ink[2] - self.ink[0]


@dataclass(frozen=True, kw_only=True)
class TextLayout:
    """A text set in one size. pitch: pixels from baseline to baseline."""

    font: ImageFont.FreeTypeFont
    lines: tuple[Line, ...]
    line_height: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the ink."""
        return max(line.width for line in self.lines), self.bottom - self.top

    @property
    def top(self) -> int:
        return min(n * self.line_height + line.ink[1] for n, line in enumerate(self.lines))

    @property
    def bottom(self) -> int:
        return max(n * self.line_height + line.ink[3] for n, line in enumerate(self.lines))

    def image(self, align: str, width: int) -> Image.Image:
        """The ink as a grey image, that wide and as high as it must be; 255 = covered."""
        image = Image.new("L", (width, self.bottom - self.top))
        canvas = ImageDraw.Draw(image)
        for number, line in enumerate(self.lines):
            left = {"left": 0, "center": (width - line.width) // 2}.get(align, width - line.width)
            place = (left - line.ink[0], number * self.line_height - self.top)
            canvas.text(
                place,
                line.text,
                fill=255,
                font=self.font,
                anchor="ls",
                direction=line.direction,
            )
        return image


def typeset(text: str, *, font: bytes, size: int, box: tuple[int, int]) -> TextLayout | None:
    """The text, broken into lines, at its size; at the largest that fits for size 0.

    box: (width, height). None where nothing is to be drawn. Raises ParameterError with code
    ``text_does_not_fit``, ``text_glyph_missing`` or ``text_layout_missing``; OSError for a font
    that FreeType cannot use.
    """
    paragraphs = [_cleaned(one) for one in unescape(text).splitlines()]
    if not any(paragraphs):
        return None
    _check_shaping(paragraphs)
    _check_glyphs(font, "".join(paragraphs))
    if size:
        setting = _set(paragraphs, font, size, box)
        if setting is None:
            raise _does_not_fit(box, size, _largest(paragraphs, font, size - 1, box))
        return setting
    setting = _largest(paragraphs, font, min(2 * box[1], MAX_SIZE_PX), box)
    if setting is None or setting.font.size < MIN_SIZE_PX:
        raise _does_not_fit(box, size, setting)
    return setting


def unescape(text: str) -> str:
    r"""``\n`` written as two characters, as in CSV or on a command line, starts a new line too.

    ``\\`` stands for one backslash.
    """
    return re.sub(r"\\([\\n])", lambda match: "\n" if match[1] == "n" else "\\", text)


def _cleaned(paragraph: str) -> str:
    """Composed, because a font often has é and not the accent alone."""
    return unicodedata.normalize("NFC", paragraph.replace("\t", " ")).strip()


def _does_not_fit(box: tuple[int, int], size: int, largest: TextLayout | None) -> ParameterError:
    remedy = "make text_box larger or the text shorter"
    fitting = 0 if largest is None else largest.font.size
    if size and fitting >= MIN_SIZE_PX:
        remedy = f"the largest size that fits is {fitting:g}; use it, or {remedy}"
    return ParameterError(
        f"text_size: the text does not fit its box of {box[0]}x{box[1]} pixels at "
        f"{size or f'a readable size, {MIN_SIZE_PX} or more'}; {remedy}",
        code="text_does_not_fit",
    )


# Glyphs


def _raqm() -> bool:
    return bool(features.check("raqm"))


def _check_shaping(paragraphs: list[str]) -> None:
    """Raises ParameterError for a script that would come out wrong without Raqm."""
    for character in "".join(paragraphs):
        joins = unicodedata.bidirectional(character) in ("R", "AL", "AN")
        if (joins or unicodedata.category(character).startswith("M")) and not _raqm():
            raise ParameterError(
                f"text: {_shown(character)} needs Pillow's Raqm layout, which this worker lacks; "
                "install FriBiDi (Debian's libfribidi0) there",
                code="text_layout_missing",
            )


def _check_glyphs(font: bytes, text: str) -> None:
    """Raises ParameterError naming the first character that the font has no glyph for.

    Drawn one by one without shaping, so that each is its glyph or the box for missing ones.
    """
    plain = ImageFont.truetype(io.BytesIO(font), 24, layout_engine=ImageFont.Layout.BASIC)
    absent = _drawn(plain, _ABSENT)
    for character in dict.fromkeys(text):
        parts = unicodedata.normalize("NFD", character)
        if _draws_nothing(character) or _drawn(plain, character) != absent:
            continue
        if _raqm() and parts != character and absent not in [_drawn(plain, c) for c in parts]:
            continue
        raise ParameterError(
            f"text: the font {plain.getname()[0]!r} has no glyph for {_shown(character)}; "
            "give a text_font that has one",
            code="text_glyph_missing",
        )


def _drawn(font: ImageFont.FreeTypeFont, character: str) -> tuple[float, bytes]:
    return font.getlength(character), bytes(font.getmask(character))


def _draws_nothing(character: str) -> bool:
    """Spaces, and characters that only steer the layout, which Raqm supplies or hides itself."""
    steers = unicodedata.category(character) == "Cf" or "\ufe00" <= character <= "\ufe0f"
    return character == " " or (_raqm() and (character.isspace() or steers))


def _shown(character: str) -> str:
    name = unicodedata.name(character, "a control character")
    return f"{character!r} (U+{ord(character):04X} {name})"


# Size and lines


def _largest(
    paragraphs: list[str], font: bytes, limit: int, box: tuple[int, int]
) -> TextLayout | None:
    """By bisection: a text that fits at one size is taken to fit at every smaller one."""
    found, low, high = None, 1, limit
    while low <= high:
        middle = (low + high) // 2
        setting = _set(paragraphs, font, middle, box)
        if setting is None:
            high = middle - 1
        else:
            found, low = setting, middle + 1
    return found


def _set(paragraphs: list[str], font: bytes, size: int, box: tuple[int, int]) -> TextLayout | None:
    """The text in lines no wider than the box; None where it does not fit."""
    face = ImageFont.truetype(io.BytesIO(font), size)
    line_height = max(sum(face.getmetrics()), 1)
    lines = [line for one in paragraphs for line in _broken(one, face, box[0])]
    setting = TextLayout(font=face, lines=tuple(lines), line_height=line_height)
    return setting if all(a <= b for a, b in zip(setting.size, box, strict=True)) else None


def _broken(paragraph: str, font: ImageFont.FreeTypeFont, width: int) -> Iterator[Line]:
    """As much on each line as fits; what cannot be broken may be wider."""
    direction = _direction(paragraph)
    line = _line("", font, direction)
    text = ""
    for piece in _pieces(paragraph):
        longer = _line(text + piece, font, direction)
        if text and longer.width > width:
            yield line
            text, longer = "", _line(piece, font, direction)
        text, line = text + piece, longer
    yield line


def _line(text: str, font: ImageFont.FreeTypeFont, direction: str | None) -> Line:
    text = text.rstrip()
    left, top, right, bottom = font.getbbox(text, anchor="ls", direction=direction)
    ink = (int(left), int(top), int(right), int(bottom))
    return Line(text=text, direction=direction, ink=ink)


def _direction(paragraph: str) -> str | None:
    """That of the first letter that has one: Unicode Standard Annex 9, rules P2 and P3."""
    if not _raqm():
        return None
    kinds = (unicodedata.bidirectional(character) for character in paragraph)
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "L")
    return "ltr" if first == "L" else "rtl"


def _pieces(paragraph: str) -> Iterator[str]:
    """What has to stay on one line, with the spaces after it."""
    start = 0
    for place in range(1, len(paragraph)):
        if _may_break(paragraph[place - 1], paragraph[place]):
            yield paragraph[start:place]
            start = place
    yield paragraph[start:]


def _may_break(before: str, after: str) -> bool:
    """The common part of Unicode Standard Annex 14: after spaces, hyphens, round ideographs."""
    if re.match(f"[{_SPACES}]", after):
        return False
    if re.match(f"[{_SPACES}]", before):
        return True
    if before in "-\u2010\u2013\u2014":
        return after.isalpha()
    if not (_UNSPACED.match(before) or _UNSPACED.match(after)):
        return False
    closes = unicodedata.category(after) in ("Pe", "Pf", "Po", "Mn", "Mc", "Me", "Lm")
    opens = unicodedata.category(before) in ("Ps", "Pi")
    return not (closes or opens or after in _NOT_FIRST)
