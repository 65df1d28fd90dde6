"""From a model's name to its components on the device, ready for the step loop."""

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

from shared.errors import EngineUnavailable, ParameterError
from shared.params import Params
from shared.settings import Quantization
from workers.engines.options import Dtype, EngineOptions, quantized_revision
from workers.engines.stable_diffusion.model_files import ModelFiles, find_model, read_json
from workers.engines.stable_diffusion.quantization import check_quantization, quantize, unet_dtype
from workers.engines.stable_diffusion.schedulers import build_scheduler

NAMED_DTYPES: Mapping[Dtype, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class Components:
    """A model and where it is to run; sizes are the model's own.

    vae_factor: image pixels to a latent's side. latent_channels: C. scaling_factor: of the
    latents. scheduler_config: the model's, from which every scheduler is built. dtype: of all
    but a quantized UNet. quantization: of the UNet's weights, named in the revision too.
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
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)


def load_components(model: str, revision: str | None, options: EngineOptions) -> Components:
    """Finds the model and reads its weights, on the host as yet.

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
    """Raises EngineUnavailable where a CUDA device was asked for and is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EngineUnavailable(f"device {name!r} is not known; use auto, cpu or cuda:N") from error
    if device.type == "cpu":
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
    """float16 on CUDA, float32 on the CPU, unless one is named.

    SD2 was published in float16, and its 11-bit significand keeps results eight times
    closer to float32 than bfloat16's at the same speed; the latents stay float32 anyway.
    """
    if name != "auto":
        return NAMED_DTYPES[name]
    return torch.float16 if device.type == "cuda" else torch.float32


def configure_kernels(device: torch.device, *, is_deterministic: bool) -> None:
    """For this process, before it computes on the device: TF32, and none that vary where asked."""
    if device.type != "cuda":
        return
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = is_deterministic
    if is_deterministic:  # read by cuBLAS when it starts
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, options: EngineOptions
) -> Components:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    diffusers_logging.disable_progress_bar()
    for logging in (transformers_logging, diffusers_logging):
        logging.set_verbosity_error()  # what is amiss with the files, one line of ours says
    quantization = options.quantization
    own_dtype = unet_dtype(dtype, quantization)
    unet = _to_channels_last(_load_weights(UNet2DConditionModel, files, "unet", own_dtype), device)
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


def _load_weights(kind: Any, files: ModelFiles, part: str, dtype: torch.dtype) -> Any:
    """Raises EngineUnavailable where the files lack a weight: it would be left at random."""
    folder = Path(files.path) / part
    model, found = kind.from_pretrained(
        folder,
        dtype=dtype,
        variant=files.variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):
        raise EngineUnavailable(
            f"{folder}: {len(missing)} of the model's weights are missing, {missing[0]} for one; "
            "fetch the model again"
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(files: ModelFiles, text_encoder: Any) -> Any:
    """Raises EngineUnavailable where it has tokens that the text encoder does not know."""
    tokenizer = CLIPTokenizer.from_pretrained(files.path / "tokenizer")
    known = text_encoder.config.vocab_size
    if len(tokenizer) > known:
        raise EngineUnavailable(
            f"{files.path}: the tokenizer has {len(tokenizer)} tokens and the text encoder "
            f"{known}; they are not of one model"
        )
    return tokenizer


def _read_scheduler_config(files: ModelFiles) -> Mapping[str, Any]:
    """Raises EngineUnavailable where no scheduler can be built from it."""
    config = read_json(files.path / "scheduler" / "scheduler_config.json")
    try:
        build_scheduler(config, Params().scheduler)
    except ParameterError as error:
        raise EngineUnavailable(f"{files.path}: {error}") from error
    return config


def _to_channels_last(model: Any, device: torch.device) -> Any:
    """For CUDA in the layout that half-precision convolutions want; others transpose each time."""
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model
