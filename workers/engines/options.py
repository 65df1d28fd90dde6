"""How an engine is asked to run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, cast, get_args

from shared.settings import Attention, Compile, MemoryMode, Quantization, Settings

Dtype = Literal["auto", "float16", "bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine runs, whatever it is; the OpenCV engine uses none of it.

    device: ``auto`` (the first CUDA device, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
    max_batch: most rows of one UNet forward; a window with guidance takes two. None finds the
    largest that fits.
    attention: the kernel; ``auto`` is the fastest by measurement on CUDA, else torch's own
    choice; ``sliced`` trades speed for memory.
    compile: whether the UNet goes through ``torch.compile``, and how long it may search;
    ``auto`` where it is faster by measurement.
    graphs: on CUDA, replay each batch size as one CUDA graph.
    quantization: 8 bits for the weights of the UNet's attention blocks; ``int8`` and ``fp8``
    compute their products with 8 bits too. Part of the engine's revision.
    memory: modes that are on from the start; others follow where memory runs out.
    vae_batch: most pictures of one VAE pass; None chooses.
    deterministic: every forward has ``max_batch`` rows (8 if None), so that a region's pixels
    are the same to the last bit alone and beside any others; nothing is chosen by measurement.
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
    """What the settings ask for; what one process compiles, the next one finds in their home."""
    # Read by torch when it first compiles.
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
    """``sha256:...+int8``: other weights, other pixels, another revision."""
    return revision if quantization == "off" else f"{revision}+{quantization}"


def recorded_quantization(revision: str) -> Quantization:
    """What a recorded revision says; ``off`` where it says nothing."""
    suffix = revision.rpartition("+")[2]
    return cast(Quantization, suffix) if suffix in get_args(Quantization) else "off"
