"""How an engine runs: device, precision, batch size, memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, cast, get_args

from shared.settings import Attention, Compile, MemoryMode, Quantization, Settings

Dtype = Literal["auto", "float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Options of all engines; the OpenCV engine ignores them.

    device: ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
    max_batch: the maximum of rows of one UNet forward pass; a window with guidance takes two.
    None: the largest number that fits into memory.
    attention: the kernel. ``auto``: on CUDA the fastest as measured, else torch's choice;
    ``sliced`` trades speed for memory.
    compile: the mode of ``torch.compile`` for the UNet; ``auto``: if it is measured to be faster.
    graphs: on CUDA, replay each batch size as a CUDA graph.
    quantization: 8-bit weights in the UNet's attention blocks; ``int8`` and ``fp8`` also compute
    their matrix products in 8 bits. It is part of the engine's revision.
    memory: memory-saving modes that are on from the start; others follow on out-of-memory.
    vae_batch: the maximum of images of one VAE forward pass; None: chosen by the engine.
    deterministic: every forward pass has ``max_batch`` rows (8 if None) and nothing is chosen by
    measurement, so that results are bit-identical whatever else is in the batch.
    """

    device: str = "auto"
    max_batch: int | None = 8
    vae_batch: int | None = None
    dtype: Dtype = "auto"
    attention: Attention = "auto"
    compile: Compile = "off"
    graphs: bool = True
    quantization: Quantization = "off"
    memory: tuple[MemoryMode, ...] = ()
    deterministic: bool = False


def engine_options(settings: Settings, device: str) -> EngineOptions:
    """The options in the settings. Compiled code is cached in the settings' home folder."""
    # torch reads the variable when it first compiles; a value set by the user stays.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.home / "compiled"))
    return EngineOptions(
        device=device,
        max_batch=None if settings.max_batch == "auto" else settings.max_batch,
        attention=settings.attention,
        compile=settings.compile,
        quantization=settings.quantization,
        memory=settings.memory,
        deterministic=settings.deterministic,
    )


def quantized_revision(revision: str, quantization: Quantization) -> str:
    """Append the quantization, because it changes results: ``sha256:...+int8``."""
    return revision if quantization == "off" else f"{revision}+{quantization}"


def recorded_quantization(revision: str) -> Quantization:
    """The quantization in a recorded revision; ``off`` if it has none."""
    suffix = revision.rpartition("+")[2]
    return cast(Quantization, suffix) if suffix in get_args(Quantization) else "off"
