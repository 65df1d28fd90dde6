"""Engine names: which load, and the one-line error of those that do not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.errors import EngineUnavailable
from shared.settings import Settings
from tests.tiny_pipeline import build, change_config, tokenizer
from tests.workers.engines.stable_diffusion.samples import region_work
from workers.engines import load_engine
from workers.engines.options import engine_options
from workers.engines.stable_diffusion.components import configure_kernels
from workers.engines.stable_diffusion.loaders import split_revision


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def load_error(name: str | Path, **options: object) -> str:
    """The one-line message of the EngineUnavailable that loading raises."""
    engine = f"diffusers:{name}" if isinstance(name, Path) else name
    with pytest.raises(EngineUnavailable) as caught:
        load_engine(engine, **{"device": "cpu", **options})  # type: ignore[arg-type]
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.retryable is False
    return text


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_a_pipeline_folder_loads_as_an_engine(tiny_model: Path) -> None:
    name = f"diffusers:{tiny_model}"
    engine = load_engine(name, device="cpu")
    try:
        assert engine.name == name
        assert engine.device == "cpu"
        assert engine.revision.startswith("sha256:")
        assert engine.submit(region_work()).result(60).shape == (64, 64, 3)
    finally:
        engine.close()


def test_the_revision_depends_on_the_weights_and_the_configuration(
    tiny_model: Path, copy: Path, tmp_path: Path
) -> None:
    from workers.engines.stable_diffusion.model_files import find_model

    original = find_model(str(tiny_model), None).revision
    assert find_model(str(build(tmp_path / "again")), None).revision == original
    change_config(copy, "scheduler/scheduler_config.json", beta_end=0.02)
    assert find_model(str(copy), None).revision != original


def test_the_package_and_the_opencv_engine_do_not_import_torch() -> None:
    code = (
        "import sys; from workers.engines import load_engine; before = 'cv2' in sys.modules;"
        "load_engine('opencv'); print(before, 'torch' in sys.modules, 'diffusers' in sys.modules)"
    )
    assert run_python(code).split() == ["False", "False", "False"]


@pytest.mark.parametrize(
    ("module", "engine", "extra"),
    [("cv2", "opencv", "opencv"), ("torch", "sd2", "worker"), ("diffusers", "sd2", "worker")],
)
def test_a_missing_library_is_named_with_the_extra_that_installs_it(
    module: str, engine: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n.startswith(("workers.engines.", module + "."))]:
        if name != "workers.engines.registry":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    text = load_error(engine)
    assert text.startswith(f"{module} is not installed")
    assert text.endswith(f"pip install 'inpaint-batch[{extra}]'")


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    assert load_error("opencvv") == "engine 'opencvv' is not known; did you mean 'opencv'?"
    assert "known: sd2, opencv, diffusers:" in load_error("flux")
    assert load_error("./sd2") == "engine './sd2' is not known; write 'diffusers:./sd2'"
    assert "names no model" in load_error("diffusers:")
    assert "names no model" in load_error("diffusers:@main")
    assert "max_batch: 0" in load_error("opencv", max_batch=0)


def test_the_error_for_the_model_that_left_the_hub_names_its_mirror() -> None:
    text = load_error("diffusers:stabilityai/stable-diffusion-2-inpainting")
    assert "left the hub in November 2025" in text
    assert "sd2-community/stable-diffusion-2-inpainting" in text


def test_a_revision_follows_the_last_at_sign(tmp_path: Path) -> None:
    assert split_revision("owner/model") == ("owner/model", None)
    assert split_revision("owner/model@v2") == ("owner/model", "v2")
    folder = tmp_path / "at@home"
    folder.mkdir()
    assert split_revision(str(folder)) == (str(folder), None)
    assert split_revision(f"{folder}@v2") == (str(folder), "v2")


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path, copy: Path) -> None:
    assert "no such folder" in load_error(tmp_path / "absent")
    assert "no model_index.json" in load_error(tmp_path)
    assert "has no revision 'v2'" in load_error(f"diffusers:{copy}@v2")


def test_pickled_weights_are_refused(copy: Path) -> None:
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    text = load_error(copy)
    assert "only pickled weights" in text
    assert "save_pretrained" in text
    weights.with_suffix(".bin").unlink()
    assert "no .safetensors weights" in load_error(copy)


def test_weights_in_half_precision_only_are_used(copy: Path) -> None:
    for path in copy.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    engine = load_engine(f"diffusers:{copy}", device="cpu")
    assert engine.submit(region_work()).result(60).shape == (64, 64, 3)
    engine.close()


def test_a_model_that_is_not_for_inpainting_is_refused(copy: Path) -> None:
    change_config(copy, "unet/config.json", in_channels=4)
    assert "has 4 input channels, not 9; use an inpainting model" in load_error(copy)


def test_unsupported_architectures_are_refused(copy: Path) -> None:
    change_config(copy, "unet/config.json", time_cond_proj_dim=256)
    assert "needs time_cond_proj_dim" in load_error(copy)
    change_config(copy, "model_index.json", vae=["diffusers", "AsymmetricAutoencoderKL"])
    assert "vae is ['diffusers', 'AsymmetricAutoencoderKL'], not AutoencoderKL" in load_error(copy)


def test_custom_pipeline_code_is_never_run(copy: Path) -> None:
    (copy / "unet" / "own.py").write_text("raise SystemExit('ran')")
    assert "custom pipeline code (unet/own.py) is never run" in load_error(copy)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_the_error_for_a_git_lfs_pointer_names_the_command_to_run(copy: Path, part: str) -> None:
    weights = next((copy / part).glob("*.safetensors"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert load_error(copy) == (
        f"{weights}: a Git LFS pointer, not the weights; run git lfs pull in {copy}"
    )


def test_damaged_files_are_refused(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "fetch it again" in load_error(copy)
    (copy / "unet" / "config.json").write_text("{")
    assert "unet/config.json" in load_error(copy)


def test_components_of_different_models_are_refused(copy: Path) -> None:
    change_config(copy, "unet/config.json", cross_attention_dim=48)
    text = load_error(copy)
    assert "embeddings have 32 values and the UNet reads 48" in text
    change_config(copy, "text_encoder/config.json", hidden_size=48)
    assert "cannot be loaded on cpu" in load_error(copy)


@pytest.mark.parametrize(
    ("file", "weight"),
    [
        ("text_encoder/model.safetensors", "token_embedding.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ],
)
def test_missing_weights_are_refused_and_not_left_random(
    copy: Path, file: str, weight: str
) -> None:
    weights = load_file(copy / file)
    del weights[next(name for name in weights if name.endswith(weight))]
    save_file(weights, copy / file, metadata={"format": "pt"})
    assert "1 of the model's weights are missing" in (text := load_error(copy))
    assert weight in text


def test_a_vae_with_the_weight_names_of_old_checkpoints_is_complete(copy: Path) -> None:
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for name in [name for name in weights if ".attentions." in name]:
        for new_part, old_part in old.items():
            if f".{new_part}." in name:
                weights[name.replace(new_part, old_part)] = weights.pop(name)
    assert any("proj_attn" in name for name in weights)
    save_file(weights, path, metadata={"format": "pt"})
    load_engine(f"diffusers:{copy}", device="cpu").close()


def test_a_configuration_that_no_job_could_use_is_refused(copy: Path) -> None:
    change_config(copy, "vae/config.json", scaling_factor=None)
    assert "scaling_factor is None" in load_error(copy)
    change_config(copy, "vae/config.json", scaling_factor=0.18215)
    for key, value in (("beta_schedule", "odd"), ("prediction_type", "odd")):
        change_config(copy, "scheduler/scheduler_config.json", **{key: value})
        assert "cannot be built from the model's scheduler_config.json" in load_error(copy)


def test_a_tokenizer_without_its_configuration_truncates_to_the_encoders_length(
    copy: Path,
) -> None:
    (copy / "tokenizer" / "tokenizer_config.json").unlink()
    engine = load_engine(f"diffusers:{copy}", device="cpu")
    assert engine.submit(region_work(prompt="a cat " * 99)).result(60).shape == (64, 64, 3)
    engine.close()


def test_the_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    larger = tokenizer()
    larger.add_tokens(["zebra"])
    larger.save_pretrained(copy / "tokenizer")
    assert "114 tokens and the text encoder 113" in load_error(copy)


def test_a_missing_tokenizer_is_refused(copy: Path) -> None:
    shutil.rmtree(copy / "tokenizer")
    assert "no tokenizer" in load_error(copy)


@pytest.mark.parametrize(("dtype", "max_difference"), [("float16", 4), ("bfloat16", 32)])
def test_half_precision_stays_near_full_precision(
    tiny_model: Path, dtype: str, max_difference: int
) -> None:
    results = []
    for name in ("float32", dtype):
        engine = load_engine(f"diffusers:{tiny_model}", device="cpu", dtype=name)  # type: ignore[arg-type]
        results.append(engine.submit(region_work()).result(60).astype(int))
        engine.close()
    assert 0 < abs(results[0] - results[1]).max() <= max_difference


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without_it_is_refused(tiny_model: Path) -> None:
    assert "sees 0 CUDA devices" in load_error(tiny_model, device="cuda:0")


def test_unusable_devices_and_attention_kernels_are_refused(tiny_model: Path) -> None:
    assert "device 'gpu' is not known" in load_error(tiny_model, device="gpu")
    assert "device 'mps' is not supported" in load_error(tiny_model, device="mps")
    assert "xformers needs a CUDA device" in load_error(tiny_model, attention="xformers")
    sliced = load_error(tiny_model, attention="sliced", compile="default")
    assert sliced == "attention sliced does not compile; use attention auto or compile off"


def test_compiled_code_is_cached_in_the_settings_home_unless_the_user_sets_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "set to be restored")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    engine_options(Settings(home=tmp_path), "cpu")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")
    engine_options(Settings(home=tmp_path / "other"), "cpu")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled")


@pytest.fixture
def kernel_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "set to be restored")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.deterministic
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.deterministic = before[1]


@pytest.mark.usefixtures("kernel_flags")
@pytest.mark.parametrize("is_deterministic", [False, True])
def test_cuda_uses_tf32_and_deterministic_kernels_if_asked(*, is_deterministic: bool) -> None:
    configure_kernels(torch.device("cuda"), is_deterministic=is_deterministic)
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cudnn.deterministic is is_deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is is_deterministic


@pytest.mark.usefixtures("kernel_flags")
def test_the_cpu_uses_full_precision() -> None:
    configure_kernels(torch.device("cpu"), is_deterministic=True)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cudnn.deterministic


def test_devices_are_counted_without_importing_torch() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "workers.engines.stable_diffusion.devices"],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    devices = json.loads(printed)
    assert devices["torch"] == torch.__version__
    assert len(devices["cuda"]) == torch.cuda.device_count()
    code = (
        "import sys; sys.modules['torch'] = None; import runpy;"
        "runpy.run_module('workers.engines.stable_diffusion.devices', run_name='__main__')"
    )
    assert json.loads(run_python(code)) == {"cuda": [], "torch": None}
