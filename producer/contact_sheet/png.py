"""The contact sheet as one image: the worst cards, two per row, to print or to send."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from producer.contact_sheet.cards import Card

# A longer image is beyond what many viewers open.
MAX_CARDS = 60
COLUMNS, CELL_PX, GAP_PX, MARGIN_PX, CAPTION_PX = 2, 224, 6, 28, 46
# A card has up to four cells: before and after, whole and close-up.
CARD_PX = 4 * CELL_PX + 3 * GAP_PX
PAPER, INK, SOFT, POOR, REVIEW = "#f4f3f0", "#1d1c1a", "#68645d", "#c8372d", "#8a4bd0"


def draw(title: str, cards: Sequence[Card]) -> Image.Image:
    """Return the sheet, RGB, with the cards in reading order."""
    tiles = [_draw_card(card) for card in cards]
    rows = [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)]
    heights = [max(tile.height for tile in row) for row in rows]
    width = COLUMNS * CARD_PX + (COLUMNS + 1) * MARGIN_PX
    height = 2 * MARGIN_PX + CAPTION_PX + sum(height + MARGIN_PX for height in heights)
    sheet = Image.new("RGB", (width, height), PAPER)
    corner = (MARGIN_PX, MARGIN_PX)
    _draw_line(sheet, corner, title, size=24, colour=INK, width=width - 2 * MARGIN_PX)
    top = MARGIN_PX + CAPTION_PX
    for row, row_height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            sheet.paste(tile, (MARGIN_PX + column * (CARD_PX + MARGIN_PX), top))
        top += row_height + MARGIN_PX
    return sheet


def _draw_card(card: Card) -> Image.Image:
    views = [card.whole, card.close_up] if card.close_up else [card.whole]
    images = [image for view in views for image in (view.before, view.after) if image is not None]
    cells = [_fit_cell(image) for image in images]
    height = CAPTION_PX + max((cell.height for cell in cells), default=0)
    tile = Image.new("RGB", (CARD_PX, height), PAPER)
    name, remark, colour = _caption(card)
    _draw_line(tile, (0, 0), name, size=16, colour=INK, width=CARD_PX)
    _draw_line(tile, (0, 21), remark, size=14, colour=colour, width=CARD_PX)
    for column, cell in enumerate(cells):
        tile.paste(cell, (column * (CELL_PX + GAP_PX), CAPTION_PX))
    return tile


def _caption(card: Card) -> tuple[str, str, str]:
    """Return name, remark and the remark's colour."""
    job = card.job
    name = f"{job.key or ''}  job {job.job}".strip()
    if job.state == "failed":
        return name, f"failed: {job.error_code}  {job.error_message or ''}", POOR
    score = "no score" if job.score is None else f"score {job.score:.2f}"
    if job.review:
        return name, f"{score}  to be reviewed: {job.review}", REVIEW
    return name, "  ".join([score, *card.notes]), SOFT


def _fit_cell(image: Image.Image) -> Image.Image:
    small = ImageOps.contain(image, (CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
    if small.mode != "RGBA":
        return small
    background = Image.new("RGB", small.size, "white")
    background.paste(small, mask=small.getchannel("A"))
    return background


def _draw_line(
    sheet: Image.Image, corner: tuple[int, int], text: str, *, size: int, colour: str, width: int
) -> None:
    """Draw one line of text; what does not fit into ``width`` is replaced by an ellipsis."""
    font = ImageFont.load_default(size=size)
    line = "".join(c if c.isprintable() else " " for c in text)[:400]
    shown = line
    while shown and font.getlength(shown + ("..." if shown != line else "")) > width:
        shown = shown[: len(shown) * 9 // 10]
    shown += "" if shown == line else "..."
    ImageDraw.Draw(sheet).text(corner, shown, fill=colour, font=font)
