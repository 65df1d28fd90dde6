"""8-bit weights: their size, the change of the result, and what is refused."""

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
from tests.workers.engines.stable_diffusion.samples import UNetWatch, open_engine, region_work
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

# int8 rounds a weight to 1/254 of its row's maximum, fp8 each value to 1/16 of itself.
MEAN_CHANGE = {"int8_weights": 0.5, "int8": 2, "fp8": 12}  # of 255


@pytest.fixture
def any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow fp8 on the CPU: torch computes it slowly; only torchao and our check want a GPU."""
    monkeypatch.setattr(quantization, "_unsupported_reason", lambda options, device: None)
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda _: None)


def load_quantized(
    folder: Path, kind: Quantization, *, like: Quantization | None = None
) -> Components:
    """The tiny pipeline on the CPU, in the dtype that ``like`` computes in."""
    dtype: Any = "bfloat16" if (like or kind) == "fp8" else "float32"
    return load_components(
        str(folder), None, EngineOptions(device="cpu", dtype=dtype, quantization=kind)
    )


def run(components: Components, **values: Any) -> Pixels:
    with open_engine(components) as engine:
        return engine.submit(region_work(**values)).result(60)


def change(result: Pixels, expected: Pixels) -> Any:
    return np.abs(result.astype(int) - expected)


def inner_tensors(weight: Tensor) -> list[Tensor]:
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(weight, name) for name in names]


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", KINDS)
def test_only_weights_of_the_attention_blocks_take_one_byte_per_value(
    tiny_model: Path, kind: Quantization
) -> None:
    unet = load_quantized(tiny_model, kind).unet
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    linear = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear)}
    quantized = {name for name, layer in linear.items() if type(layer.weight) is not nn.Parameter}
    assert {name for name in linear if "attentions" in name} == quantized
    for name in quantized:
        weight = linear[name].weight
        assert (
            next(tensor for tensor in inner_tensors(weight) if tensor.shape == weight.shape).dtype
            == dtype
        )
        rows = weight.shape[0]
        assert sum(tensor.nbytes for tensor in inner_tensors(weight)) <= weight.numel() + 5 * rows


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_close_to_the_unquantized_models(tiny_model: Path, kind: Quantization) -> None:
    expected = run(load_quantized(tiny_model, "off", like=kind))
    assert 0 < change(run(load_quantized(tiny_model, kind)), expected).mean() <= MEAN_CHANGE[kind]


@pytest.mark.usefixtures("any_kind")
@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_results_are_bit_identical_in_any_batch(
    tiny_model: Path, kind: Quantization
) -> None:
    work = region_work(num_inference_steps=4)
    neighbours = [region_work(num_inference_steps=n, seed=n, image_seed=n) for n in (4, 6)]
    results = []
    for works in ([work], [work, *neighbours]):
        components = load_quantized(tiny_model, kind)
        watch = UNetWatch(components.unet)
        watch.gate.clear()
        with open_engine(components, deterministic=True, max_batch=8) as engine:
            futures = [engine.submit(work) for work in works]
            assert watch.entered.wait(30)
            watch.gate.set()
            first, *_ = [future.result(60) for future in futures]
        results.append(first)
    assert np.array_equal(*results)
    assert len(watch.rows) <= 4 + 6  # 14 if they ran one after another


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
def test_it_can_be_combined_with_other_engine_options(
    tiny_model: Path, kind: Any, options: dict[str, Any]
) -> None:
    expected = run(load_quantized(tiny_model, "off"))
    engine = load_engine(f"diffusers:{tiny_model}", device="cpu", quantization=kind, **options)
    result = engine.submit(region_work()).result(60)
    engine.close()
    assert change(result, expected).mean() <= MEAN_CHANGE[kind]


def test_it_can_be_combined_with_deepcache(tiny_model: Path) -> None:
    expected = run(load_quantized(tiny_model, "off"), cache_interval=2)
    result = run(load_quantized(tiny_model, "int8"), cache_interval=2)
    assert 0 < change(result, expected).mean() <= MEAN_CHANGE["int8"]


def test_sequential_offload_is_no_fallback_for_quantized_weights(tiny_model: Path) -> None:
    components = load_quantized(tiny_model, "int8")
    expected = run(components)
    watch = UNetWatch(components.unet)
    with open_engine(components) as engine:
        watch.before = run_out_of_memory
        with pytest.raises(OutOfMemory, match="does not fit the device in the UNet"):
            engine.submit(region_work()).result(60)
        watch.before = None
        work = region_work()
        result = engine.submit(work).result(60)
    assert work.report.memory == "batch 1, attention_slicing, model_offload"
    assert change(result, expected).mean() <= MEAN_CHANGE["int8"]


def run_out_of_memory(rows: int) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_compiled_code_stays_valid_after_the_weights_were_moved() -> None:
    compilations: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        compilations.append(1)
        return graph.forward

    block = nn.ModuleDict({"attentions": nn.Linear(32, 32)}).requires_grad_(False)
    quantize(block, EngineOptions(quantization="int8"), torch.device("cpu"))
    compiled = torch.compile(block["attentions"], backend=backend)
    inputs = torch.linspace(-1, 1, 64).reshape(2, 32)
    with torch.inference_mode():
        expected = compiled(inputs)
        move_module(block, torch.device("cpu"))
        assert torch.equal(compiled(inputs), expected)
        move_module(block, torch.device("meta"))
    assert block["attentions"].weight.device.type == "meta"
    assert compilations == [1]


def test_float16_becomes_bfloat16_in_the_unet_only(tiny_model: Path) -> None:
    components = load_quantized(tiny_model, "int8")
    assert components.unet_dtype == components.unet.dtype == torch.float32
    half = Components(**{**vars(components), "dtype": torch.float16})
    assert half.unet_dtype == torch.bfloat16
    assert Components(**{**vars(half), "quantization": "off"}).unet_dtype == torch.float16
    components.unet.to(torch.bfloat16)
    runner = UNetRunner(half, attention="auto", compile="off", graphs=False)
    embeddings = torch.zeros(1, 77, 32, dtype=torch.float16)
    with torch.inference_mode():
        noise = runner(torch.zeros(1, 9, 8, 8), torch.ones(1), embeddings)
    assert noise.dtype == torch.float32
    assert noise.isfinite().all()


def test_a_model_without_quantizable_layers_is_refused() -> None:
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
            "int8 cannot be combined with memory sequential_offload; use memory model_offload",
        ),
        ({"quantization": "int8", "dtype": "float16"}, "float16's range; use dtype auto or"),
        ({"quantization": "fp8", "dtype": "float32"}, "bfloat16; use dtype auto or bfloat16"),
    ],
)
def test_impossible_options_are_refused_before_any_file_is_read(
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
def test_options_that_a_gpu_does_not_support_are_refused(
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
def test_options_that_a_gpu_supports_are_accepted(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    check_quantization(EngineOptions(**options), CUDA)


def test_without_torchao_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'inpaint-batch\[quantization\]'"):
        load_engine("sd2", device="cpu", quantization="int8")


def test_a_revision_records_the_quantization() -> None:
    assert quantized_revision("sha256:ab", "off") == "sha256:ab"
    for kind in KINDS:
        assert recorded_quantization(quantized_revision("sha256:ab", kind)) == kind
    assert recorded_quantization("sha256:ab") == "off"
    assert recorded_quantization("4.11.0+cu130") == "off"


def test_a_replay_uses_the_recorded_quantization(tiny_model: Path, tmp_path: Path) -> None:
    name = f"diffusers:{tiny_model}"
    url = f"sqlite:///{tmp_path / 'inpaint.db'}"
    engine = load_engine(name, device="cpu", quantization="int8", deterministic=True)
    harness = WorkerHarness(
        url, tmp_path, engine, database_url=url, roots=(tmp_path,), deterministic=True
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
    engine.close()
    assert harness.attempts(job)[0].engine_revision.endswith("+int8")
    replayed = replay.replay(harness.worker.settings, job, device="cpu")
    assert (replayed["same"], replayed["differs"]) == (True, [])
    with harness.db.write() as connection:
        connection.execute(update(Attempt).values(engine_revision="sha256:ab+fp8"))
    message = f"job {job} ran with quantization fp8, which cannot be repeated here: .* CUDA device"
    with pytest.raises(EngineUnavailable, match=message):
        replay.replay(harness.worker.settings, job, device="cpu")
    harness.close()


def run_worker(*options: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "workers.supervisor", "--devices", "cpu", *options],
        env={**os.environ, "INPAINT_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_worker_reports_the_option_and_logs_no_library_warnings(
    tiny_model: Path, tmp_path: Path
) -> None:
    options = ("--engine", f"diffusers:{tiny_model}", "--quantization", "int8", "--check")
    process = run_worker(*options, home=tmp_path)
    assert process.returncode == 0
    assert process.stdout.endswith("+int8 on cpu\n")
    assert [line for line in process.stderr.splitlines() if " INFO " not in line] == []


def test_only_expected_library_lines_are_demoted_to_debug(caplog: pytest.LogCaptureFixture) -> None:
    torchao = logging.getLogger("torchao")
    own_level = caplog.at_level("DEBUG", "workers.engines.stable_diffusion.library_logs")
    with own_level, demote_expected_lines():
        torchao.warning("Failed to load %s", "x.so")
        torchao.warning("something else")
    torchao.warning("Failed to load again")
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["torchao: Failed to load x.so"] == "DEBUG"
    assert levels["something else"] == levels["Failed to load again"] == "WARNING"
