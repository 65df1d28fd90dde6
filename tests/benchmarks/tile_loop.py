"""A 3000x2000 photograph with a small mark: ``auto`` compared with a loop over every tile.

The loop is what guides to Stable Diffusion 2 recommend for large images: tiles of 512 with an
overlap of 64, each resized to 512, passed to the pipeline, and the result pasted back. Both
sides use the same tiny pipeline, the same steps, guidance and strength.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from shared import masks
from shared.geometry import regions
from shared.images import decode, encode
from shared.params import Params
from tests.benchmarks.side_by_side import measure_alternately, measure_seconds, print_row
from tests.tiny_pipeline import build
from workers.engines import load_engine
from workers.engines.protocol import RegionWork
from workers.pipeline import compositing

SIZE, TILE, OVERLAP = (3000, 2000), 512, 64
MARK = (2400, 1700, 2600, 1760)
REPEATS = 3
PARAMS = Params(
    num_inference_steps=10, guidance_scale=7.5, strength=0.8, mask_dilation=1, mask_feather=2
)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        model = build(Path(name) / "model")
        source, mask = _photograph(Path(name))
        engine = load_engine(f"diffusers:{model}", device="cpu")
        theirs = pipeline(model)
        windows: list[int] = []
        tiles: list[int] = []
        pair = measure_alternately(
            lambda: measure_seconds(lambda: windows.append(_ours(engine, source, mask))),
            lambda: measure_seconds(lambda: tiles.append(_loop(theirs, source, mask))),
            repeats=REPEATS,
        )
        engine.close()
    print_row("3000x2000 with a small mark, seconds", "auto", "tile loop", "ratio")
    print_row("", f"{min(pair.ours):.2f}", f"{min(pair.theirs):.2f}", f"{pair.ratio:.1f}x")
    print_row("  pipeline windows", windows[0], tiles[0], f"{tiles[0] / windows[0]:.0f}x")


def _photograph(folder: Path) -> tuple[bytes, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (SIZE[1] // 8, SIZE[0] // 8, 3), np.uint8)
    Image.fromarray(noise).resize(SIZE).save(folder / "in.png", compress_level=1)
    mask = np.zeros((SIZE[1], SIZE[0]), np.uint8)
    mask[MARK[1] : MARK[3], MARK[0] : MARK[2]] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return (folder / "in.png").read_bytes(), (folder / "mask.png").read_bytes()


def pipeline(model: Path) -> Any:
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(model, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _ours(engine: Any, source: bytes, mask_source: bytes) -> int:
    whole = decode(source, max_pixels=10**8)
    mask = masks.apply_threshold(masks.decode_mask(mask_source, max_pixels=10**8), threshold=128)
    plan = regions.plan(mask, mode="auto", window=(TILE, TILE))
    futures = []
    for region in plan:
        image, cut_mask = compositing.cut(whole.rgb(), mask, region)
        work = RegionWork(image=image, mask=cut_mask, windows=region.windows, params=PARAMS, seed=1)
        futures.append(engine.submit(work))
    results = [future.result() for future in futures]
    encode(compositing.composite(whole, mask, plan, results, PARAMS))
    return sum(len(region.windows) for region in plan)


def _loop(pipeline: Any, source: bytes, mask_source: bytes) -> int:
    import io

    image = Image.open(io.BytesIO(source)).convert("RGB")
    mask = Image.open(io.BytesIO(mask_source))
    result = image.copy()
    count = 0
    for box in tile_boxes(SIZE):
        painted = paint_tile(pipeline, image.crop(box), mask.crop(box))
        result.paste(painted.resize((box[2] - box[0], box[3] - box[1])), box[:2])
        count += 1
    result.save(io.BytesIO(), format="PNG", compress_level=2)
    return count


def tile_boxes(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    return [
        (left, top, min(left + TILE, size[0]), min(top + TILE, size[1]))
        for top in range(0, size[1], TILE - OVERLAP)
        for left in range(0, size[0], TILE - OVERLAP)
    ]


def paint_tile(pipeline: Any, image: Image.Image, mask: Image.Image) -> Image.Image:
    size = (TILE, TILE)
    painted: Image.Image = pipeline(
        prompt="",
        image=image.resize(size),
        mask_image=mask.resize(size),
        num_inference_steps=PARAMS.num_inference_steps,
        guidance_scale=PARAMS.guidance_scale,
        strength=PARAMS.strength,
        height=TILE,
        width=TILE,
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    return painted


if __name__ == "__main__":
    sys.exit(main())
