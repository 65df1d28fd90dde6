"""Real photographs with synthetic damage: a watermarked catalog, old scans, contact sheets.

The photographs are the CC0 and public-domain ones in scikit-image's wheel, read from the
installed files: nothing is downloaded. The same call always writes the same pixels.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

Box = tuple[int, int, int, int]
Layer = Image.Image
"""An RGBA image of a mark alone, of the photograph's size."""

JPEG_QUALITY = 92
STUDIO = "SAMPLE STUDIO"


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A file to write: its source image, crop, scale and mark."""

    file: str
    source: str
    product: str
    mark: Callable[[tuple[int, int]], Layer]
    crop: Box | None = None
    scale: int = 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """An image on a contact sheet; ``mask`` is 255 where it was repainted."""

    name: str
    note: str
    before: Image.Image
    mask: Image.Image
    after: Image.Image


def write_catalog(folder: Path) -> Path:
    """Write eight watermarked product images, their masks and clean originals.

    Returns the manifest: columns id, image, mask, product, paths relative to it.
    """
    rows = []
    for number, photograph in enumerate(_catalog(), start=1):
        clean = _load(photograph)
        marked = _stamp(clean, photograph.mark(clean.size))
        _save_all(folder, photograph.file, clean=clean, damaged=marked, dilation_px=2)
        rows.append((f"sku-{number:03}", *_paths(photograph.file), photograph.product))
    return _write_manifest(folder, ("key", "image", "mask", "product"), rows)


def write_archive(folder: Path) -> Path:
    """Write four scans of old prints with scratches, creases, dust and torn corners.

    ``originals/`` holds the same faded prints undamaged. Returns the manifest: columns id,
    image, mask, era.
    """
    rows = []
    for number, (file, source, era, sepia) in enumerate(_ARCHIVE, start=1):
        random = np.random.default_rng(number)
        clean = _age(read_photograph(source), sepia=sepia, random=random)
        damaged = _stamp(clean, _damage(clean.size, random))
        _save_all(folder, file, clean=clean, damaged=damaged, dilation_px=1)
        rows.append((f"scan-{number:03}", *_paths(file), era))
    return _write_manifest(folder, ("key", "image", "mask", "era"), rows)


def read_photograph(name: str) -> Image.Image:
    """One of scikit-image's bundled images, for instance ``coffee.png``; L or RGB."""
    with resources.files("skimage.data").joinpath(name).open("rb") as file:
        return Image.open(file).copy()


def changed(before: Image.Image, after: Image.Image) -> Image.Image:
    """255 where two images of one size and mode differ, in any channel."""
    difference = np.asarray(ImageChops.difference(before, after))
    differs = difference if difference.ndim == 2 else difference.max(axis=2)
    return Image.fromarray(np.where(differs > 0, 255, 0).astype(np.uint8))


# --- the catalog ---------------------------------------------------------------------------


def _catalog() -> tuple[Photograph, ...]:
    return (
        Photograph(
            file="coffee.jpg", source="coffee.png", product="a cup of espresso", mark=_diagonal
        ),
        Photograph(file="cat.jpg", source="chelsea.png", product="a printed cat", mark=_corner),
        Photograph(
            file="space-suit.jpg", source="astronaut.png", product="a space suit", mark=_cross
        ),
        Photograph(
            file="helmet.png",
            source="astronaut.png",
            product="a black helmet",
            mark=_corner,
            crop=(272, 300, 512, 512),
            scale=2,
        ),
        Photograph(file="rocket.png", source="rocket.jpg", product="a model rocket", mark=_tiled),
        Photograph(file="retina.jpg", source="retina.jpg", product="an eye chart", mark=_diagonal),
        Photograph(
            file="stars.png", source="hubble_deep_field.jpg", product="a star map", mark=_cross
        ),
    )


def _load(photograph: Photograph) -> Image.Image:
    image = read_photograph(photograph.source)
    image = image.crop(photograph.crop) if photograph.crop else image
    size = (image.width * photograph.scale, image.height * photograph.scale)
    return image.resize(size, Image.Resampling.LANCZOS) if photograph.scale > 1 else image


def _diagonal(size: tuple[int, int]) -> Layer:
    """The studio's name large across the image, from corner to corner."""
    width, height = size
    text = _lettering(STUDIO, 0.085 * math.hypot(*size))
    turned = text.rotate(
        math.degrees(math.atan2(height, width)), Image.Resampling.BICUBIC, expand=True
    )
    layer = Image.new("RGBA", size)
    layer.paste(turned, ((width - turned.width) // 2, (height - turned.height) // 2))
    return _fade(layer, 0.5)


def _corner(size: tuple[int, int]) -> Layer:
    """Logo and name at the bottom right, a web address at the top left."""
    unit = min(size)
    badge, address = _badge(0.1 * unit), _lettering("samplestudio.example", 0.045 * unit)
    layer, margin = Image.new("RGBA", size), round(0.04 * unit)
    layer.paste(badge, (size[0] - badge.width - margin, size[1] - badge.height - margin))
    layer.paste(address, (margin, margin))
    return _fade(layer, 0.7)


def _tiled(size: tuple[int, int]) -> Layer:
    """The name small, slanted and repeated, every other line set off by half."""
    word = _lettering(STUDIO, 0.045 * min(size)).rotate(24, Image.Resampling.BICUBIC, expand=True)
    layer = Image.new("RGBA", size)
    step_x, step_y = round(word.width * 1.35), round(word.height * 1.5)
    for line, top in enumerate(range(step_y // 4, size[1], step_y)):
        for left in range(-step_x // 2 * (line % 2), size[0], step_x):
            layer.alpha_composite(*_inside(word, (left, top)))
    return _fade(layer, 0.5)


def _cross(size: tuple[int, int]) -> Layer:
    """Hairlines from corner to corner; the logo and a number in the gap in the middle."""
    unit, factor = min(size), 4
    large = Image.new("L", (size[0] * factor, size[1] * factor))
    draw, width = ImageDraw.Draw(large), max(factor, round(unit * factor / 260))
    for start, end in (((0, 0), large.size), ((0, large.height), (large.width, 0))):
        draw.line((*start, *end), fill=200, width=width)
    gap, centre = 0.17 * unit * factor, (large.width / 2, large.height / 2)
    draw.ellipse((centre[0] - gap, centre[1] - gap, centre[0] + gap, centre[1] + gap), fill=0)
    layer = _white(large.resize(size, Image.Resampling.LANCZOS))
    badge, number = _logo(0.2 * unit), _lettering("no. 48 213", 0.04 * unit)
    for mark, down in ((badge, -0.02), (number, 0.115)):
        left, top = (size[0] - mark.width) // 2, (size[1] - mark.height) // 2 + round(down * unit)
        layer.alpha_composite(mark, (left, top))
    return _fade(layer, 0.6)


def _badge(height_px: float) -> Layer:
    logo, name = _logo(height_px), _lettering(STUDIO, 0.5 * height_px)
    badge = Image.new("RGBA", (logo.width + name.width + round(0.1 * height_px), logo.height))
    badge.paste(logo, (0, 0))
    badge.paste(name, (badge.width - name.width, (logo.height - name.height) // 2))
    return badge


def _logo(height_px: float) -> Layer:
    """A camera's iris: a ring and six blades."""
    factor, side = 8, round(height_px)
    large = Image.new("L", (side * factor, side * factor))
    draw, radius, line = ImageDraw.Draw(large), large.width * 0.46, round(large.width * 0.06)
    middle = large.width / 2
    box = (middle - radius, middle - radius, middle + radius, middle + radius)
    draw.ellipse(box, outline=255, width=line)
    for blade in range(6):
        rim, inner = blade * math.pi / 3, (blade + 1.6) * math.pi / 3
        draw.line(
            (
                middle + radius * math.cos(rim),
                middle + radius * math.sin(rim),
                middle + 0.45 * radius * math.cos(inner),
                middle + 0.45 * radius * math.sin(inner),
            ),
            fill=255,
            width=line,
        )
    return _shade(large.resize((side, side), Image.Resampling.LANCZOS))


def _lettering(text: str, height_px: float) -> Layer:
    """White letters with a soft shadow; ``height_px`` is the font's size."""
    font = ImageFont.load_default(size=max(9.0, height_px))
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text))
    pad = max(2, round(height_px / 10))
    alpha = Image.new("L", (right - left + 2 * pad, bottom - top + 2 * pad))
    ImageDraw.Draw(alpha).text((pad - left, pad - top), text, fill=255, font=font)
    return _shade(alpha)


def _shade(alpha: Image.Image) -> Layer:
    """White by ``alpha`` over a faint dark edge a pixel down and to the right."""
    shadow = Image.new("RGBA", alpha.size, (0, 0, 0, 0))
    shadow.putalpha(ImageChops.offset(alpha, 1, 1).point(lambda value: value * 2 // 5))
    return Image.alpha_composite(shadow, _white(alpha))


def _white(alpha: Image.Image) -> Layer:
    layer = Image.new("RGBA", alpha.size, "white")
    layer.putalpha(alpha)
    return layer


def _fade(layer: Layer, opacity: float) -> Layer:
    layer.putalpha(layer.getchannel("A").point(lambda value: round(value * opacity)))
    return layer


def _inside(mark: Layer, corner: tuple[int, int]) -> tuple[Layer, tuple[int, int]]:
    """Crops what would lie left of 0: ``alpha_composite`` takes no negative corner."""
    left, top = corner
    return mark.crop((max(0, -left), 0, mark.width, mark.height)), (max(0, left), top)


# --- the archive ---------------------------------------------------------------------------

_ARCHIVE = (
    ("cameraman.png", "camera.png", "1950s", False),
    ("portrait.tif", "astronaut.png", "1930s", True),
    ("launch.png", "rocket.jpg", "1960s", False),
    ("cat.tif", "chelsea.png", "1920s", True),
)
_SEPIA = ("#1c120b", "#8a6a45", "#efe0c0")


def _age(image: Image.Image, *, sepia: bool, random: np.random.Generator) -> Image.Image:
    """A faded print: grey or sepia, low contrast, paler to one side, with film grain."""
    grey = np.asarray(image.convert("L"), dtype=np.float32)
    height, width = grey.shape
    across = np.linspace(0, 1, width)[None, :] * np.linspace(0.4, 1, height)[:, None]
    grain = random.normal(0, 4, grey.shape)
    faded = 38 + grey * (0.78 - 0.2 * across) + 34 * across + grain
    aged = Image.fromarray(faded.clip(0, 255).astype(np.uint8))
    return ImageOps.colorize(aged, _SEPIA[0], _SEPIA[2], mid=_SEPIA[1]) if sepia else aged


def _damage(size: tuple[int, int], random: np.random.Generator) -> Layer:
    """Scratches, two creases, dust, hairs and a torn corner, drawn four times as large."""
    factor = 4
    large = (size[0] * factor, size[1] * factor)
    light, dark = Image.new("L", large), Image.new("L", large)
    for _ in range(5):
        _scratch(ImageDraw.Draw(light), large, random)
    for upright in (True, False):
        _crease(light, dark, upright=upright, random=random)
    _dust(ImageDraw.Draw(light), large, random)
    _tear(ImageDraw.Draw(light), large, random)
    layer = _white(light.resize(size, Image.Resampling.BOX))
    shadow = Image.new("RGBA", size, (20, 14, 10, 0))
    shadow.putalpha(dark.resize(size, Image.Resampling.BOX))
    return Image.alpha_composite(shadow, layer)


def _scratch(draw: ImageDraw.ImageDraw, size: tuple[int, int], random: np.random.Generator) -> None:
    """A thin bright line, nearly straight, with gaps where the emulsion held."""
    start = random.uniform((0.05, 0.02), (0.95, 0.5)) * size
    length, angle = random.uniform(0.25, 0.7) * size[1], random.normal(math.pi / 2, 0.25)
    steps = np.linspace(0, 1, 60)
    bend = np.sin(steps * math.pi) * random.normal(0, 0.03) * length
    xs = start[0] + steps * length * math.cos(angle) + bend
    ys = start[1] + steps * length * math.sin(angle)
    width = int(random.integers(3, 7))
    for step in range(59):
        if random.random() < 0.88:
            line = (xs[step], ys[step], xs[step + 1], ys[step + 1])
            draw.line(line, fill=int(random.integers(170, 250)), width=width)


def _crease(
    light: Image.Image, dark: Image.Image, *, upright: bool, random: np.random.Generator
) -> None:
    """A fold right across: cracked white paper along it and a shadow on one side."""
    width, height = light.size
    length, across = (height, width) if upright else (width, height)
    along = np.linspace(0, length, 120)
    wander = np.cumsum(random.normal(0, 2.2, 120)) + random.uniform(0.25, 0.75) * across
    flip = (lambda p: (p[1], p[0])) if upright else (lambda p: p)
    points = [flip((float(a), float(w))) for a, w in zip(along, wander, strict=True)]
    shifted = [(x + 5, y + 5) for x, y in points]
    ImageDraw.Draw(dark).line(shifted, fill=90, width=8)
    for start, end in itertools.pairwise(points):
        strength = int(random.choice((0, 150, 225), p=(0.15, 0.35, 0.5)))
        ImageDraw.Draw(light).line((*start, *end), fill=strength, width=int(random.integers(4, 11)))


def _dust(draw: ImageDraw.ImageDraw, size: tuple[int, int], random: np.random.Generator) -> None:
    for _ in range(90):
        x, y = random.uniform(0, 1, 2) * size
        radius = float(random.gamma(2.0, 1.8)) + 1.5
        box = (x - radius, y - radius * random.uniform(0.6, 1), x + radius, y + radius)
        draw.ellipse(box, fill=int(random.integers(150, 240)))
    for _ in range(6):
        x, y, reach = *(random.uniform(0, 1, 2) * size), random.uniform(30, 90)
        start = float(random.uniform(0, 360))
        box = (x, y, x + reach, y + reach)
        draw.arc(box, start, start + random.uniform(60, 200), fill=215, width=4)


def _tear(draw: ImageDraw.ImageDraw, size: tuple[int, int], random: np.random.Generator) -> None:
    """The lower left corner is gone; the scanner's white lid shows."""
    width, height = (random.uniform(0.07, 0.12) * edge for edge in size)
    steps = np.linspace(0, 1, 14)
    rough = random.normal(0, 0.012 * size[0], 14)
    edge = [
        (float(s * width + r), float(size[1] - (1 - s) * height + r))
        for s, r in zip(steps, rough, strict=True)
    ]
    draw.polygon([(0, edge[0][1]), *edge, (edge[-1][0], size[1]), (0, size[1])], fill=255)


# --- files ---------------------------------------------------------------------------------


def _stamp(image: Image.Image, layer: Layer) -> Image.Image:
    """The image under the layer, in the image's own mode."""
    return Image.alpha_composite(image.convert("RGBA"), layer).convert(image.mode)


def _save_all(
    folder: Path, file: str, *, clean: Image.Image, damaged: Image.Image, dilation_px: int
) -> None:
    """Write ``originals/``, ``images/`` and ``masks/``: the damaged pixels and a margin."""
    mask = changed(clean, damaged).filter(ImageFilter.MaxFilter(2 * dilation_px + 1))
    for name, image in (("originals", clean), ("images", damaged), ("masks", mask)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        _save(image, folder / name / (Path(file).stem + ".png" if name == "masks" else file))


def _save(image: Image.Image, path: Path) -> None:
    options: dict[str, Any] = {}
    if path.suffix == ".jpg":
        options = {"quality": JPEG_QUALITY}
    elif path.suffix == ".tif":
        options = {"compression": "tiff_lzw", "dpi": (300, 300)}
    image.save(path, **options)


def _paths(file: str) -> tuple[str, str]:
    return f"images/{file}", f"masks/{Path(file).stem}.png"


def _write_manifest(folder: Path, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Path:
    path = folder / "manifest.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


# --- contact sheets ------------------------------------------------------------------------

_CELL, _GAP, _MARGIN, _CAPTION, _HEADER = 296, 12, 24, 26, 40
_COLUMNS = ("before", "mask", "after", "before, enlarged", "after, enlarged")
_PAPER, _INK, _FAINT, _OVERLAY = "#f7f6f3", "#222222", "#8a8780", (230, 0, 126)


def contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG, 1576 px wide, with a row per image: before, mask, after, enlarged damage."""
    strips = [_strip(row) for row in rows]
    width = 2 * _MARGIN + len(_COLUMNS) * _CELL + (len(_COLUMNS) - 1) * _GAP
    height = _HEADER + sum(strip.height + _GAP for strip in strips) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    for number, title in enumerate(_COLUMNS):
        _write(sheet, (_MARGIN + number * (_CELL + _GAP), 14), title, size=15, colour=_FAINT)
    top = _HEADER
    for strip in strips:
        sheet.paste(strip, (_MARGIN, top))
        top += strip.height + _GAP
    sheet.save(path)


def _strip(row: Row) -> Image.Image:
    before, after = row.before.convert("RGB"), row.after.convert("RGB")
    zoom = _densest(row.mask)
    cells = [
        _fit(before),
        _fit(_overlay(before, row.mask)),
        _fit(after),
        _enlarge(before, zoom),
        _enlarge(after, zoom),
    ]
    strip = Image.new(
        "RGB", (len(cells) * (_CELL + _GAP), _CAPTION + max(c.height for c in cells)), _PAPER
    )
    _write(strip, (0, 4), row.name, size=15, colour=_INK)
    _write(strip, (_CELL + _GAP, 4), row.note, size=15, colour=_FAINT)
    for number, cell in enumerate(cells):
        strip.paste(cell, (number * (_CELL + _GAP), _CAPTION))
    return strip


def _densest(mask: Image.Image) -> Box:
    """The box of a quarter of the image's sides that holds the most mask."""
    width, height = max(1, mask.width // 4), max(1, mask.height // 4)
    sums = np.pad(np.asarray(mask, dtype=np.int64) // 255, ((1, 0), (1, 0))).cumsum(0).cumsum(1)
    high = sums[height:] - sums[:-height]
    held = high[:, width:] - high[:, :-width]
    top, left = np.unravel_index(int(held.argmax()), held.shape)
    return int(left), int(top), int(left) + width, int(top) + height


def _overlay(image: Image.Image, mask: Image.Image) -> Image.Image:
    tint = Image.blend(image, Image.new("RGB", image.size, _OVERLAY), 0.85)
    return Image.composite(tint, image, mask)


def _fit(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (_CELL, _CELL), Image.Resampling.LANCZOS)


def _enlarge(image: Image.Image, box: Box) -> Image.Image:
    cell = _fit(image).size
    return image.crop(box).resize(cell, Image.Resampling.BICUBIC)


def _write(
    sheet: Image.Image, corner: tuple[int, int], text: str, *, size: int, colour: str
) -> None:
    font = ImageFont.load_default(size=size)
    ImageDraw.Draw(sheet).text(corner, text, fill=colour, font=font)
