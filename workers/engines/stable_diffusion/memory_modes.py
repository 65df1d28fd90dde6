"""Memory modes: ways to run the model in less device memory, chosen at the start or as fallbacks.

Each mode costs speed; ``vae_tiling`` also changes the image slightly. A fallback that was turned
on because memory ran out is turned off again after a back-off; a mode chosen at the start stays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module

from shared.settings import MemoryMode
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.oom import Backoff, is_out_of_memory, release_memory

log = logging.getLogger(__name__)

Stage = Literal["unet", "vae", "text_encoder"]

# In the order in which they are tried: the cheapest first.
FALLBACKS: Mapping[Stage, tuple[MemoryMode, ...]] = {
    "unet": ("attention_slicing", "model_offload", "sequential_offload"),
    "vae": ("vae_slicing", "vae_tiling", "model_offload", "sequential_offload"),
    "text_encoder": ("model_offload", "sequential_offload"),
}
# accelerate cannot offload a weight that wraps several tensors, as torchao's do.
NOT_QUANTIZED: frozenset[MemoryMode] = frozenset({"sequential_offload"})
MAX_TILE_PX = 256  # half of SD2's window


class MemoryModes:
    """Places the model's components on the device according to the active modes. For one thread."""

    def __init__(
        self,
        components: Components,
        chosen: Iterable[MemoryMode],
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._components = components
        self._undo: dict[MemoryMode, Callable[[], None]] = {}
        self._enabled_fallbacks: list[MemoryMode] = []
        self._backoff = backoff or Backoff()
        for mode in chosen:
            self._turn_on(mode)
        if not self.is_offloading:
            self._move_all(components.device)

    @property
    def active(self) -> tuple[MemoryMode, ...]:
        return tuple(self._undo)

    @property
    def is_offloading(self) -> bool:
        """Whether weights move between forward passes, so that no CUDA graph may refer to them."""
        return "model_offload" in self._undo or "sequential_offload" in self._undo

    @property
    def is_slicing(self) -> bool:
        """Whether attention runs slice by slice, which torch.compile does not support."""
        return "attention_slicing" in self._undo

    def bring_to_device(self, stage: Stage) -> None:
        """With model_offload: move this component to the device and the others to the host."""
        if "model_offload" not in self._undo or "sequential_offload" in self._undo:
            return
        for name, module in self._modules().items():
            if name != stage:
                move_module(module, torch.device("cpu"))
        move_module(self._modules()[stage], self._components.device)

    def enable_fallback(self, stage: Stage) -> bool:
        """Turn on the next mode that reduces a stage's memory; False if there is none left."""
        remaining = [mode for mode in self._fallbacks(stage) if mode not in self._undo]
        # sequential_offload is the last resort, also if it was chosen at the start.
        if not remaining or "sequential_offload" in self._undo:
            return False
        self._turn_on(remaining[0])
        self._enabled_fallbacks.append(remaining[0])
        self._backoff.increase()
        log.warning("out of memory in %s; continuing with %s", stage, remaining[0])
        return True

    def disable_fallback(self) -> bool:
        """Turn off the latest fallback once the back-off is over; True if one was turned off."""
        if not self._enabled_fallbacks or not self._backoff.is_over:
            return False
        self._backoff.restart()
        mode = self._enabled_fallbacks.pop()
        try:
            self._undo.pop(mode)()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            release_memory()
            self._turn_on(mode)
            self._enabled_fallbacks.append(mode)
            return False
        return True

    def _fallbacks(self, stage: Stage) -> list[MemoryMode]:
        excluded = frozenset() if self._components.quantization == "off" else NOT_QUANTIZED
        return [mode for mode in FALLBACKS[stage] if mode not in excluded]

    def _turn_on(self, mode: MemoryMode) -> None:
        turn_on: Mapping[MemoryMode, Callable[[], Callable[[], None]]] = {
            "attention_slicing": self._slice_attention,
            "vae_slicing": self._slice_vae,
            "vae_tiling": self._tile_vae,
            "model_offload": self._offload_models,
            "sequential_offload": self._offload_layers,
        }
        self._undo[mode] = turn_on[mode]()

    def _slice_attention(self) -> Callable[[], None]:
        unet = self._components.unet
        processors = dict(unet.attn_processors)
        unet.set_attention_slice("auto")
        return lambda: unet.set_attn_processor(processors)

    def _slice_vae(self) -> Callable[[], None]:
        vae = self._components.vae
        vae.enable_slicing()
        undo: Callable[[], None] = vae.disable_slicing
        return undo

    def _tile_vae(self) -> Callable[[], None]:
        vae = self._components.vae
        vae.enable_tiling()
        # The default tile is the VAE's training size, as large as a window: no tiling at all.
        vae.tile_sample_min_size = min(vae.config.sample_size // 2, MAX_TILE_PX)
        vae.tile_latent_min_size = vae.tile_sample_min_size // self._components.vae_factor
        undo: Callable[[], None] = vae.disable_tiling
        return undo

    def _offload_models(self) -> Callable[[], None]:
        self._move_all(torch.device("cpu"))
        return lambda: self._move_all(self._components.device)

    def _offload_layers(self) -> Callable[[], None]:
        self._move_all(torch.device("cpu"))
        for module in self._modules().values():
            cpu_offload(module, self._components.device, offload_buffers=bool(module._parameters))

        def undo() -> None:
            for module in self._modules().values():
                remove_hook_from_module(module, recurse=True)
            if not self.is_offloading:
                self._move_all(self._components.device)

        return undo

    def _modules(self) -> Mapping[Stage, Any]:
        components = self._components
        return {
            "unet": components.unet,
            "vae": components.vae,
            "text_encoder": components.text_encoder,
        }

    def _move_all(self, device: torch.device) -> None:
        for module in self._modules().values():
            move_module(module, device)
        release_memory()


def move_module(module: Any, device: torch.device) -> None:
    """``module.to(device)`` for modules with quantized weights too.

    Module.to swaps a weight that wraps other tensors in place, which torch refuses in inference
    mode and once compiled code refers to it. So these weights are detached from their modules
    during the call and moved one by one.
    """
    with torch.inference_mode(False), torch.no_grad():
        wrapper_weights = [
            (layer, name, weight)
            for layer in module.modules()
            for name, weight in layer._parameters.items()
            if hasattr(weight, "__tensor_flatten__")
        ]
        for layer, name, _ in wrapper_weights:
            layer._parameters[name] = None
        module.to(device)
        for layer, name, weight in wrapper_weights:
            moved = weight.to(device)
            layer._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
