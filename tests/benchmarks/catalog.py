"""A catalog through a real worker process, from an S3 server and back to it.

First photographs of 24 megapixels with a small mark, in images a minute, compared with the loop
over every tile of ``tile_loop.py``, of which only some tiles are run. Then many small photographs
on a simulated device, which takes the time of a GPU and leaves the cores to the job threads: for
how long is it idle because they are too slow?
"""

from __future__ import annotations

import argparse
import atexit
import io
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import torch
from PIL import Image

from shared import jobs
from shared.engines import engine_spec
from shared.jobs.queue import Queue
from tests import servers
from tests.benchmarks.side_by_side import print_row
from tests.benchmarks.simulated_device import Clock, simulate
from tests.benchmarks.tile_loop import PARAMS, TILE, paint_tile, pipeline, tile_boxes
from tests.tiny_pipeline import build
from tests.workers.worker_harness import WorkerHarness
from workers.engines.stable_diffusion import loaders as sd_loaders

Size = tuple[int, int]

LARGE, LARGE_MARK = (6000, 4000), (5200, 3600, 5600, 3750)
SMALL, SMALL_MARK = (1200, 900), (1100, 850, 1140, 870)
BUCKET = "catalog"
POLL_SECONDS = 0.05
IDLE = re.compile(r"device idle for (\S+)%")
SIMULATED = re.compile(r"simulated device: (\S+) s, idle (\S+)%, longest gaps (.*)")


def main() -> None:
    options = _arguments()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        model = build(folder / "model")
        shop = stack.enter_context(_open_shop(folder))
        engine = options.engine or f"diffusers:{model}"
        _compare_loop(shop, engine, model, options)
        if engine_spec(engine).is_trained:
            _watch_device(shop, engine, options)


def _arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photographs", type=int, default=6, help="how many of 24 megapixels")
    parser.add_argument("--tiles", type=int, default=3, help="tiles that the loop runs, of its 126")
    parser.add_argument("--jobs", type=int, default=100, help="how many on the simulated device")
    parser.add_argument("--tflops", type=float, default=50, help="speed of the simulated device")
    parser.add_argument("--engine", help="such as opencv; the tiny pipeline by default")
    parser.add_argument("--keep", type=Path, help="folder to keep a photograph and its mask in")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True)
class Shop:
    """The servers, and the job table."""

    folder: Path
    harness: WorkerHarness
    queue: Queue
    client: Any
    environment: dict[str, str]


@contextmanager
def _open_shop(folder: Path) -> Iterator[Shop]:
    with (
        servers.redis_server(folder) as redis,
        servers.s3_server(folder) as s3,
        servers.postgres_server(folder) as cluster,
    ):
        os.environ.update(s3)
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        url = servers.create_database(cluster.url)
        harness, queue = WorkerHarness(url, folder), Queue(redis.url)
        environment = {
            **os.environ,
            "INPAINT_DATABASE_URL": url,
            "INPAINT_BROKER_URL": redis.url,
            "INPAINT_ROOTS": str(folder),
            "INPAINT_HOME": str(folder / "home"),
        }
        yield Shop(
            folder=folder, harness=harness, queue=queue, client=client, environment=environment
        )
        queue.close()
        harness.close()


def _compare_loop(shop: Shop, engine: str, model: Path, options: Any) -> None:
    image, mask = _photograph(LARGE, LARGE_MARK)
    if options.keep:
        (options.keep / "photograph.jpg").write_bytes(image)
        (options.keep / "photograph.png").write_bytes(mask)
    params = {**vars(PARAMS), "width": TILE, "height": TILE}
    _submit(shop, engine, image, mask, count=options.photographs, prefix="large", **params)
    seconds, log = _run(shop, engine)
    ours = 60 * options.photographs / seconds
    print_row(
        f"{options.photographs} photographs of 24 megapixels", "images a minute", "windows each"
    )
    print_row(f"  ours, {engine.partition(':')[0]}", f"{ours:.1f}", 1)
    if not engine_spec(engine).is_trained:
        return
    boxes = tile_boxes(LARGE)
    theirs = 60 / _loop_seconds(image, mask, model, tiles=options.tiles)
    print_row(f"  tile loop ({options.tiles} tiles run)", f"{theirs:.2f}", len(boxes))
    print_row("  ratio", f"{ours / theirs:.0f}x")
    idle = IDLE.search(log)
    print_row("  the CPU as the device, idle", f"{idle[1]}%" if idle else "-")


def _watch_device(shop: Shop, engine: str, options: Any) -> None:
    image, mask = _photograph(SMALL, SMALL_MARK)
    _submit(shop, engine, image, mask, count=options.jobs, prefix="small", strength=1.0)
    seconds, log = _run(shop, engine, tflops=options.tflops)
    reported = SIMULATED.search(log)
    idle, gaps = (f"{reported[2]}%", reported[3]) if reported else ("-", "-")
    print_row(f"{options.jobs} photographs of 1200x900, 50 steps", "images a second", "device idle")
    print_row(f"  a device of {options.tflops:g} TFLOP/s", f"{options.jobs / seconds:.2f}", idle)
    print_row("  its longest gaps, ms", gaps)


def _photograph(size: Size, mark: tuple[int, int, int, int]) -> tuple[bytes, bytes]:
    """A JPEG of smooth colours with some grain, and its mask."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (size[1] // 16, size[0] // 16, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    grain = random.integers(-4, 5, (size[1], size[0], 1), np.int16)
    grey = np.zeros((size[1], size[0]), np.uint8)
    grey[mark[1] : mark[3], mark[0] : mark[2]] = 255
    image, mask = io.BytesIO(), io.BytesIO()
    pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(image, "JPEG", quality=92)
    Image.fromarray(grey).save(mask, "PNG")
    return image.getvalue(), mask.getvalue()


def _submit(
    shop: Shop, engine: str, image: bytes, mask: bytes, *, count: int, prefix: str, **params: Any
) -> None:
    shop.client.put_object(Bucket=BUCKET, Key=f"{prefix}/mask.png", Body=mask)
    for number in range(count):
        shop.client.put_object(Bucket=BUCKET, Key=f"{prefix}/{number}.jpg", Body=image)
        values = {**params, "seed": number, "gate": "off"}
        shop.harness.add(
            image=f"s3://{BUCKET}/{prefix}/{number}.jpg",
            mask=f"s3://{BUCKET}/{prefix}/mask.png",
            output=f"s3://{BUCKET}/{prefix}/out/{number}.jpg",
            engine=engine,
            **values,
        )
    jobs.dispatch(shop.harness.db, shop.queue, engine, bound=count)


def _run(shop: Shop, engine: str, *, tflops: float = 0) -> tuple[float, str]:
    """Seconds from the start of the first job to the end of the last, and the worker's log."""
    before = _count(shop, "succeeded")
    log = shop.folder / "worker.log"
    with log.open("w") as file:
        environment = {**shop.environment, "CATALOG_ENGINE": engine, "CATALOG_TFLOPS": str(tflops)}
        command = [sys.executable, "-m", "tests.benchmarks.catalog", "worker"]
        process = subprocess.Popen(command, env=environment, stderr=file)
        try:
            _await(process, log, lambda: _count(shop, "running") > 0 or not _unfinished(shop))
            start = time.perf_counter()
            _await(process, log, lambda: not _unfinished(shop))
            seconds = time.perf_counter() - start
        finally:
            process.terminate()
            process.wait(20)
    if failed := _count(shop, "failed"):
        raise RuntimeError(
            f"{failed} jobs failed; the worker's log ends with:\n{log.read_text()[-2000:]}"
        )
    assert _count(shop, "succeeded") > before
    return seconds, log.read_text()


def _await(process: subprocess.Popen[bytes], log: Path, ready: Any) -> None:
    while not ready():
        if process.poll() is not None:
            raise RuntimeError(f"the worker exited; its log ends with:\n{log.read_text()[-2000:]}")
        time.sleep(POLL_SECONDS)


def _unfinished(shop: Shop) -> int:
    return sum(_count(shop, state) for state in ("pending", "queued", "running"))


def _count(shop: Shop, state: str) -> int:
    with shop.harness.db.read() as connection:
        counted = connection.exec_driver_sql(f"SELECT count(*) FROM jobs WHERE state = '{state}'")
        return int(counted.scalar_one())


def _loop_seconds(image: bytes, mask: bytes, model: Path, *, tiles: int) -> float:
    """Seconds for one photograph: decoding, encoding, and the tiles run, scaled up to all."""
    pipe = pipeline(model)
    torch.set_num_threads(os.cpu_count() or 1)
    start = time.perf_counter()
    source = Image.open(io.BytesIO(image)).convert("RGB")
    marked = Image.open(io.BytesIO(mask))
    source.save(io.BytesIO(), format="JPEG", quality=92)
    file_seconds = time.perf_counter() - start
    boxes = tile_boxes(LARGE)
    result = source.copy()
    paint_tile(pipe, source.crop(boxes[0]), marked.crop(boxes[0]))  # warms up
    start = time.perf_counter()
    for box in boxes[:tiles]:
        painted = paint_tile(pipe, source.crop(box), marked.crop(box))
        result.paste(painted.resize((box[2] - box[0], box[3] - box[1])), box[:2])
    return file_seconds + (time.perf_counter() - start) * len(boxes) / tiles


def _work() -> None:
    """The product's worker process; with a simulated device if CATALOG_TFLOPS is not 0."""
    from workers.worker_process import main as worker

    name, tflops = os.environ["CATALOG_ENGINE"], float(os.environ["CATALOG_TFLOPS"])
    load, clocks = sd_loaders.load_diffusers, []

    def load_simulated(name: str, options: Any) -> Any:
        engine = load(name, options)
        clocks.append(simulate(engine, tflops=tflops))
        return engine

    torch.set_num_threads(1 if tflops else os.cpu_count() or 1)
    if tflops:
        sd_loaders.load_diffusers = load_simulated
    atexit.register(_print_clocks, clocks)
    os.environ |= {
        "INPAINT_MAX_BATCH": "32" if tflops else "16",
        "INPAINT_MEGAPIXEL_BUDGET": "300",
    }
    worker(["--engine", name, "--device", "cpu", "--name", "bench", "--worker", "bench-1"])


def _print_clocks(clocks: list[Clock]) -> None:
    for clock in clocks:
        seconds = clock.free_at - (clock.first or clock.free_at)
        gaps = ", ".join(f"{1000 * gap:.0f}" for gap in sorted(clock.gaps)[:-6:-1])
        figures = f"{seconds:.1f} s, idle {100 * clock.idle_share:.1f}%, longest gaps {gaps}"
        print(f"simulated device: {figures}", file=sys.stderr)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        _work()
    else:
        main()
