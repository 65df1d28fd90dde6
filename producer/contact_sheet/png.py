"""The contact sheet as a picture: the worst cards, two a row, to print or to send."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from producer.contact_sheet.cards import Card

CARDS = 60  # more would make a picture that few programs open
COLUMNS, CELL, GAP, MARGIN, CAPTION = 2, 224, 6, 28, 46
PAPER, INK, SOFT, POOR, REVIEW = "#f4f3f0", "#1d1c1a", "#68645d", "#c8372d", "#8a4bd0"


def draw(title: str, cards: Sequence[Card]) -> Image.Image:
    """RGB, the cards in reading order; before and after, whole and close up."""
    tiles = [_tile(card) for card in cards]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    wide = 4 * CELL + 3 * GAP
    width = COLUMNS * wide + (COLUMNS + 1) * MARGIN
    height = 2 * MARGIN + CAPTION + sum(max(t.height for t in row) + MARGIN for row in rows)
    sheet = Image.new("RGB", (width, height), PAPER)
    _write(sheet, (MARGIN, MARGIN), title, size=24, colour=INK, width=width - 2 * MARGIN)
    top = MARGIN + CAPTION
    for row in rows:
        for column, tile in enumerate(row):
            sheet.paste(tile, (MARGIN + column * (wide + MARGIN), top))
        top += max(tile.height for tile in row) + MARGIN
    return sheet


def _tile(card: Card) -> Image.Image:
    views = [card.whole, card.close_up] if card.close_up else [card.whole]
    images = [image for view in views for image in (view.before, view.after) if image is not None]
    cells = [_cell(image) for image in images]
    width = 4 * CELL + 3 * GAP
    tile = Image.new("RGB", (width, CAPTION + max((c.height for c in cells), default=0)), PAPER)
    name, remark, colour = _caption(card)
    _write(tile, (0, 0), name, size=16, colour=INK, width=width)
    _write(tile, (0, 21), remark, size=14, colour=colour, width=width)
    for place, cell in enumerate(cells):
        tile.paste(cell, (place * (CELL + GAP), CAPTION))
    return tile


def _caption(card: Card) -> tuple[str, str, str]:
    job = card.job
    name = f"{job['key'] or ''}  job {job['id']}".strip()
    if job["state"] == "failed":
        return name, f"failed: {job['error_code']}  {job['error_message'] or ''}", POOR
    score = "no score" if job["score"] is None else f"score {job['score']:.2f}"
    if job["review"]:
        return name, f"{score}  to be reviewed: {job['review']}", REVIEW
    return name, "  ".join([score, *card.notes]), SOFT


def _cell(image: Image.Image) -> Image.Image:
    small = ImageOps.contain(image, (CELL, CELL), Image.Resampling.LANCZOS)
    if small.mode != "RGBA":
        return small
    ground = Image.new("RGB", small.size, "white")
    ground.paste(small, mask=small.getchannel("A"))
    return ground


def _write(
    sheet: Image.Image, corner: tuple[int, int], text: str, *, size: int, colour: str, width: int
) -> None:
    """One line, cut off where the width ends."""
    font = ImageFont.load_default(size=size)
    line = "".join(c if c.isprintable() else " " for c in text)[:400]
    cut = line
    while cut and font.getlength(cut + ("..." if cut != line else "")) > width:
        cut = cut[: len(cut) * 9 // 10]
    ImageDraw.Draw(sheet).text(corner, cut if cut == line else cut + "...", fill=colour, font=font)
