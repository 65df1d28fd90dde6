"""Weights of 8 bits: what they weigh, how near the picture stays, and what is refused."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import update
from torch import Tensor, nn

from shared.db.models import Attempt
from shared.errors import EngineUnavailable, OutOfMemory
from shared.settings import Quantization
from tests.workers.engines.stable_diffusion.samples import UNetWatch, engine, region
from tests.workers.worker_harness import WorkerHarness
from workers import replay
from workers.engines import load_engine
from workers.engines.options import EngineOptions, quantized_revision, recorded_quantization
from workers.engines.protocol import Pixels
from workers.engines.stable_diffusion import quantization
from workers.engines.stable_diffusion.components import Components, load_components
from workers.engines.stable_diffusion.library_logs import demote_expected_lines
from workers.engines.stable_diffusion.memory_modes import move_module
from workers.engines.stable_diffusion.quantization import (
    check_quantization,
    is_quantizable,
    quantize,
)
from workers.engines.stable_diffusion.unet_runner import UNetRunner

KINDS: tuple[Quantization, ...] = ("int8_weights", "int8", "fp8")
CUDA = torch.device("cuda", 0)

# int8 rounds a weight to a 254th of its row's largest, fp8 each number to a 16th of itself.
MEAN_CHANGE = {"int8_weights": 0.5, "int8": 2, "fp8": 12}  # of 255


@pytest.fixture
def any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies fp8 on the CPU too, if slowly; only torchao and we ask for a GPU."""
    monkeypatch.setattr(quantization, "_unsupported_reason", lambda options, device: None)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda _: None)


def parts(folder: Path, kind: Quantization, *, like: Quantization | None = None) -> Components:
    """The tiny pipeline on the CPU, in the dtype that ``like`` computes in."""
    dtype: Any = "bfloat16" if (like or kind) == "fp8" else "float32"
    return load_components(
        str(folder), None, EngineOptions(device="cpu", dtype=dtype, quantization=kind)
    )


def painted(found: Components, **values: Any) -> Pixels:
    with engine(found) as ours:
        return ours.submit(region(**values)).result(60)


def change(one: Pixels, other: Pixels) -> Any:
    return np.abs(one.astype(int) - other)


def inner(weight: Tensor) -> list[Tensor]:
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(weight, name) for name in names]


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", KINDS)
def test_a_number_takes_one_byte_in_the_attention_blocks_and_nowhere_else(
    tiny_model: Path, kind: Quantization
) -> None:
    unet = parts(tiny_model, kind).unet
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    linear = {name: one for name, one in unet.named_modules() if isinstance(one, nn.Linear)}
    quantized = {name for name, one in linear.items() if type(one.weight) is not nn.Parameter}
    assert {name for name in linear if "attentions" in name} == quantized
    for name in quantized:
        weight = linear[name].weight
        assert next(one for one in inner(weight) if one.shape == weight.shape).dtype == dtype
        rows = weight.shape[0]
        assert sum(one.nbytes for one in inner(weight)) <= weight.numel() + 5 * rows


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_stays_near_the_unquantized_one(tiny_model: Path, kind: Quantization) -> None:
    expected = painted(parts(tiny_model, "off", like=kind))
    assert 0 < change(painted(parts(tiny_model, kind)), expected).mean() <= MEAN_CHANGE[kind]


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", KINDS)
def test_regions_share_forwards_and_a_deterministic_engine_keeps_their_bits(
    tiny_model: Path, kind: Quantization
) -> None:
    work = region(num_inference_steps=4)
    company = [region(num_inference_steps=n, seed=n, picture=n) for n in (4, 6)]
    found = []
    for works in ([work], [work, *company]):
        own = parts(tiny_model, kind)
        watch = UNetWatch(own.unet)
        watch.gate.clear()
        with engine(own, deterministic=True, max_batch=8) as ours:
            futures = [ours.submit(one) for one in works]
            assert watch.entered.wait(30)
            watch.gate.set()
            results = [future.result(60) for future in futures]
        found.append(results[0])
    assert np.array_equal(*found)
    assert len(watch.rows) <= 4 + 6  # 14 one after another


@pytest.mark.parametrize("kind", ["int8_weights", "int8"])
@pytest.mark.parametrize(
    "options",
    [
        {"attention": "sliced"},
        {"attention": "math"},
        {"memory": ("attention_slicing",)},
        {"memory": ("vae_slicing", "model_offload")},
    ],
)
def test_other_choices_of_the_engine_go_with_it(
    tiny_model: Path, kind: Any, options: dict[str, Any]
) -> None:
    expected = painted(parts(tiny_model, "off"))
    ours = load_engine(f"diffusers:{tiny_model}", device="cpu", quantization=kind, **options)
    found = ours.submit(region()).result(60)
    ours.close()
    assert change(found, expected).mean() <= MEAN_CHANGE[kind]


def test_steps_that_reuse_deep_features_go_with_it(tiny_model: Path) -> None:
    expected = painted(parts(tiny_model, "off"), cache_interval=2)
    found = painted(parts(tiny_model, "int8"), cache_interval=2)
    assert 0 < change(found, expected).mean() <= MEAN_CHANGE["int8"]


def test_the_ladder_ends_where_weights_cannot_be_taken_apart(tiny_model: Path) -> None:
    own = parts(tiny_model, "int8")
    expected = painted(own)
    watch = UNetWatch(own.unet)
    with engine(own) as ours:
        watch.before = refuse
        with pytest.raises(OutOfMemory, match="does not fit the device in the UNet"):
            ours.submit(region()).result(60)
        watch.before = None
        work = region()
        found = ours.submit(work).result(60)
    assert work.report.memory == "batch 1, attention_slicing, model_offload"
    assert change(found, expected).mean() <= MEAN_CHANGE["int8"]


def refuse(rows: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_compiled_code_outlives_a_stay_of_the_weights_elsewhere() -> None:
    made: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    block = nn.ModuleDict({"attentions": nn.Linear(32, 32)}).requires_grad_(False)
    quantize(block, EngineOptions(quantization="int8"), torch.device("cpu"))
    run = torch.compile(block["attentions"], backend=backend)
    given = torch.linspace(-1, 1, 64).reshape(2, 32)
    with torch.inference_mode():
        expected = run(given)
        move_module(block, torch.device("cpu"))
        assert torch.equal(run(given), expected)
        move_module(block, torch.device("meta"))
    assert block["attentions"].weight.device.type == "meta"
    assert made == [1]


def test_half_precision_becomes_bfloat16_in_the_unet_alone(tiny_model: Path) -> None:
    own = parts(tiny_model, "int8")
    assert own.unet_dtype == own.unet.dtype == torch.float32
    half = Components(**{**vars(own), "dtype": torch.float16})
    assert half.unet_dtype == torch.bfloat16
    assert Components(**{**vars(half), "quantization": "off"}).unet_dtype == torch.float16
    own.unet.to(torch.bfloat16)
    run = UNetRunner(half, attention="auto", compile="off", graphs=False)
    words = torch.zeros(1, 77, 32, dtype=torch.float16)
    with torch.inference_mode():
        found = run(torch.zeros(1, 9, 8, 8), torch.ones(1), words)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


def test_a_model_without_such_layers_is_refused() -> None:
    unet = nn.ModuleDict({"attentions": nn.Linear(24, 24), "other": nn.Linear(32, 32)})
    options = EngineOptions(quantization="int8")
    with pytest.raises(EngineUnavailable, match="no layers to quantize; use quantization off"):
        quantize(unet, options, torch.device("cpu"))
    assert is_quantizable(nn.Linear(32, 48), "mid_block.attentions.0.proj_in")
    assert not is_quantizable(nn.Conv2d(32, 32, 1), "mid_block.attentions.0.proj_in")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quantization": "fp8"}, "fp8 needs a CUDA device; use int8_weights, int8 or off"),
        (
            {"quantization": "int8", "memory": ("sequential_offload",)},
            "int8 does not go with memory sequential_offload; use memory model_offload",
        ),
        ({"quantization": "int8", "dtype": "float16"}, "float16's range; use dtype auto or"),
        ({"quantization": "fp8", "dtype": "float32"}, "bfloat16; use dtype auto or bfloat16"),
    ],
)
def test_what_cannot_run_is_refused_before_a_weight_is_read(
    tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(EngineUnavailable, match=text):
        load_engine(f"diffusers:{tmp_path / 'absent'}", device="cpu", **options)


@pytest.mark.parametrize(
    ("capability", "options", "text"),
    [
        ((8, 0), {"quantization": "fp8"}, r"8\.9, and cuda:0 has 8\.0; use int8_weights$"),
        ((7, 5), {"quantization": "int8_weights"}, r"8\.0, and cuda:0 has 7\.5; use off$"),
        ((9, 0), {"quantization": "int8"}, "on CUDA needs compiled code and a named kernel"),
        ((9, 0), {"quantization": "int8", "compile": "auto"}, "use compile default"),
        ((9, 0), {"quantization": "int8", "compile": "default"}, "attention flash"),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    options: dict[str, Any],
    text: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with pytest.raises(EngineUnavailable, match=text):
        check_quantization(EngineOptions(**options), CUDA)


@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "fp8"},
        {"quantization": "int8_weights", "memory": ("model_offload",)},
        {"quantization": "int8", "compile": "default", "attention": "flash"},
        {"quantization": "int8", "compile": "max-autotune", "deterministic": True},
    ],
)
def test_what_a_new_gpu_can_do_is_let_through(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_quantization(EngineOptions(**options), CUDA)


def test_without_torchao_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'inpaint-batch\[quantization\]'"):
        load_engine("sd2", device="cpu", quantization="int8")


def test_a_revision_carries_it() -> None:
    assert quantized_revision("sha256:ab", "off") == "sha256:ab"
    for kind in KINDS:
        assert recorded_quantization(quantized_revision("sha256:ab", kind)) == kind
    assert recorded_quantization("sha256:ab") == "off"
    assert recorded_quantization("4.11.0+cu130") == "off"


def test_a_replay_quantizes_as_the_record_says(tiny_model: Path, tmp_path: Path) -> None:
    name = f"diffusers:{tiny_model}"
    url = f"sqlite:///{tmp_path / 'inpaint.db'}"
    ours = load_engine(name, device="cpu", quantization="int8", deterministic=True)
    harness = WorkerHarness(
        url, tmp_path, ours, database_url=url, roots=(tmp_path,), deterministic=True
    )
    size = (160, 160)
    job = harness.add(
        image=harness.write_image("in.png", size),
        mask=harness.write_mask("mask.png", size, (32, 32, 96, 96)),
        output=harness.path("out.png"),
        engine=name,
        **{"num_inference_steps": 2, "width": 128, "height": 128},
    )
    harness.run(job, engine=name)
    ours.close()
    assert harness.attempts(job)[0].engine_revision.endswith("+int8")
    found = replay.replay(harness.worker.settings, job, device="cpu")
    assert (found["same"], found["differs"]) == (True, [])
    with harness.db.write() as connection:
        connection.execute(update(Attempt).values(engine_revision="sha256:ab+fp8"))
    message = f"job {job} ran with quantization fp8, which cannot be repeated here: .* CUDA device"
    with pytest.raises(EngineUnavailable, match=message):
        replay.replay(harness.worker.settings, job, device="cpu")
    harness.close()


def worker(*options: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "workers.supervisor", "--devices", "cpu", *options],
        env={**os.environ, "INPAINT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_worker_takes_the_option_says_so_and_nothing_of_its_libraries(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = ("--engine", f"diffusers:{tiny_model}", "--quantization", "int8", "--check")
    ran = worker(*options, home=tmp_path)
    assert ran.returncode == 0
    assert ran.stdout.endswith("+int8 on cpu\n")
    assert [line for line in ran.stderr.splitlines() if " INFO " not in line] == []


def test_only_the_lines_that_are_expected_go_to_debug(caplog: pytest.LogCaptureFixture) -> None:
    torchao = logging.getLogger("torchao")
    ours = caplog.at_level("DEBUG", "workers.engines.stable_diffusion.library_logs")
    with ours, demote_expected_lines():
        torchao.warning("Failed to load %s", "x.so")
        torchao.warning("something else")
    torchao.warning("Failed to load again")
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["torchao: Failed to load x.so"] == "DEBUG"
    assert levels["something else"] == levels["Failed to load again"] == "WARNING"
