"""The model's components (UNet, VAE, text encoder, tokenizer), loaded from its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from shared.errors import EngineUnavailable, ParameterError, one_line
from shared.params import Params
from shared.settings import Quantization
from workers.engines.options import Dtype, EngineOptions, quantized_revision
from workers.engines.stable_diffusion.model_files import ModelFiles, find_model, read_json
from workers.engines.stable_diffusion.quantization import check_quantization, quantize, unet_dtype
from workers.engines.stable_diffusion.schedulers import build_scheduler

DTYPES: Mapping[Dtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class Components:
    """A model, and where and how it runs.

    scheduler_config: the model's own; every scheduler is built from it. device: where the model
    runs; the modules start on the host. dtype: of all components but a quantized UNet.
    quantization: of the UNet's weights, also part of the revision.
    """

    vae: Any
    unet: Any
    text_encoder: Any
    tokenizer: Any
    scheduler_config: Mapping[str, Any]
    revision: str
    device: torch.device
    dtype: torch.dtype
    quantization: Quantization = "off"

    @property
    def unet_dtype(self) -> torch.dtype:
        return unet_dtype(self.dtype, self.quantization)

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent along a side: 8 for SD2."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        """4 for SD2."""
        return int(self.vae.config.latent_channels)

    @property
    def scaling_factor(self) -> float:
        """The latents are the VAE's times this factor, which gives them unit variance."""
        return float(self.vae.config.scaling_factor)


def load_components(model: str, revision: str | None, options: EngineOptions) -> Components:
    """Find the model and read its weights into host memory.

    Raises EngineUnavailable with one line that names the remedy.
    """
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    check_quantization(options, device)
    files = find_model(model, revision)
    try:
        return _load(files, device, dtype, options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise EngineUnavailable(
            f"{model} cannot be loaded on {device}: {one_line(error)}; "
            "if its files are damaged, fetch it again"
        ) from error


def choose_device(name: str) -> torch.device:
    """Raises EngineUnavailable if the device is unknown, unsupported or not present."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineUnavailable(f"device {name!r} is not known; use auto, cpu or cuda:N") from error
    if device.type == "cpu":
        # torch.device("cpu:0") does not equal torch.device("cpu").
        return torch.device("cpu")
    if device.type != "cuda":
        raise EngineUnavailable(f"device {name!r} is not supported; use auto, cpu or cuda:N")
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise EngineUnavailable(
            f"device {name!r}: torch {torch.__version__} sees {count} CUDA devices; "
            "check the driver and CUDA_VISIBLE_DEVICES, or use device cpu"
        )
    return torch.device("cuda", index)


def choose_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """``auto`` is float16 on CUDA and float32 on the CPU.

    SD2 was published in float16. Its 11-bit significand keeps results eight times closer to
    float32 than bfloat16 does at the same speed, and the latents stay float32 in any case.
    """
    if name != "auto":
        return DTYPES[name]
    return torch.float16 if device.type == "cuda" else torch.float32


def configure_kernels(device: torch.device, *, is_deterministic: bool) -> None:
    """Set process-wide torch flags for CUDA: TF32, and deterministic kernels if required.

    Call it before the process first computes on the device.
    """
    if device.type != "cuda":
        return
    # TF32: float32 products at several times the speed; half precision is unaffected.
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = is_deterministic
    if is_deterministic:
        # cuBLAS reads it once, when it starts; without it split-K sums vary in their order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def _load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, options: EngineOptions
) -> Components:
    _silence_libraries()
    quantization = options.quantization
    unet = _load_weights(UNet2DConditionModel, files, "unet", unet_dtype(dtype, quantization))
    unet = _to_channels_last(unet, device)
    # On the host, so that the device never holds the unquantized weights.
    if quantization != "off":
        quantize(unet, options, device)
    text_encoder = _load_weights(CLIPTextModel, files, "text_encoder", dtype)
    return Components(
        vae=_to_channels_last(_load_weights(AutoencoderKL, files, "vae", dtype), device),
        unet=unet,
        text_encoder=text_encoder,
        tokenizer=_load_tokenizer(files, text_encoder),
        scheduler_config=_read_scheduler_config(files),
        revision=quantized_revision(files.revision, quantization),
        device=device,
        dtype=dtype,
        quantization=quantization,
    )


def _silence_libraries() -> None:
    """No progress bars and no warnings: errors in the files are raised as EngineUnavailable."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    diffusers_logging.disable_progress_bar()
    for library_logging in (transformers_logging, diffusers_logging):
        library_logging.set_verbosity_error()


def _load_weights(model_class: Any, files: ModelFiles, component: str, dtype: torch.dtype) -> Any:
    """Raises EngineUnavailable if the files lack a weight."""
    folder = Path(files.path) / component
    model, loading_info = model_class.from_pretrained(
        folder,
        dtype=dtype,
        variant=files.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    # from_pretrained would leave a missing weight at its random initial value.
    if missing := sorted(loading_info["missing_keys"]):
        raise EngineUnavailable(
            f"{folder}: {len(missing)} of the model's weights are missing, {missing[0]} for one; "
            "fetch the model again"
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(files: ModelFiles, text_encoder: Any) -> Any:
    """Raises EngineUnavailable if it has tokens that the text encoder does not know."""
    tokenizer = CLIPTokenizer.from_pretrained(files.path / "tokenizer")
    vocabulary_size = text_encoder.config.vocab_size
    if len(tokenizer) > vocabulary_size:
        raise EngineUnavailable(
            f"{files.path}: the tokenizer has {len(tokenizer)} tokens and the text encoder "
            f"{vocabulary_size}; they belong to different models"
        )
    return tokenizer


def _read_scheduler_config(files: ModelFiles) -> Mapping[str, Any]:
    """Raises EngineUnavailable if the default scheduler cannot be built from it."""
    config = read_json(files.path / "scheduler" / "scheduler_config.json")
    try:
        build_scheduler(config, Params().scheduler)
    except ParameterError as error:
        raise EngineUnavailable(f"{files.path}: {error}") from error
    return config


def _to_channels_last(model: Any, device: torch.device) -> Any:
    """On CUDA half-precision convolutions run in channels_last; other layouts are transposed."""
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model
