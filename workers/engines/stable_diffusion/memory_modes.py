"""Ways to need less of the device's memory, chosen at the start or taken one after another.

Each rung costs speed; ``vae_tiling`` also changes the picture a little. A rung taken because
memory ran out is left again after a while; one chosen at the start stays.
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

FALLBACKS: Mapping[Stage, tuple[MemoryMode, ...]] = {
    "unet": ("attention_slicing", "model_offload", "sequential_offload"),
    "vae": ("vae_slicing", "vae_tiling", "model_offload", "sequential_offload"),
    "text_encoder": ("model_offload", "sequential_offload"),
}
# accelerate cannot take apart weights that wrap several tensors.
NOT_QUANTIZED: frozenset[MemoryMode] = frozenset({"sequential_offload"})
LARGEST_TILE = 256  # pixels; half of SD2's window


class MemoryModes:
    """The model's parts on their device, in the modes that are on. For one thread."""

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
        """Whether weights move: graphs that were captured would read where they are no more."""
        return "model_offload" in self._undo or "sequential_offload" in self._undo

    @property
    def is_slicing(self) -> bool:
        """Whether attention goes row by row, for which no code can be compiled."""
        return "attention_slicing" in self._undo

    def bring_to_device(self, stage: Stage) -> None:
        """Brings one part to the device, the others away, where whole models are offloaded."""
        if "model_offload" not in self._undo or "sequential_offload" in self._undo:
            return
        for name, part in self._parts().items():
            if name != stage:
                move_module(part, torch.device("cpu"))
        move_module(self._parts()[stage], self._components.device)

    def enable_fallback(self, stage: Stage) -> bool:
        """Turns on the next mode that makes a stage need less; False where none is left."""
        left = [mode for mode in self._fallbacks(stage) if mode not in self._undo]
        if not left or "sequential_offload" in self._undo:
            return False
        self._turn_on(left[0])
        self._enabled_fallbacks.append(left[0])
        self._backoff.increase()
        log.warning("out of memory in %s; going on with %s", stage, left[0])
        return True

    def disable_fallback(self) -> bool:
        """Turns off the mode taken last, once it has been on for a while; True where it did."""
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
        self._undo[mode] = getattr(self, f"_{mode}")()

    def _attention_slicing(self) -> Callable[[], None]:
        unet = self._components.unet
        before = dict(unet.attn_processors)
        unet.set_attention_slice("auto")
        return lambda: unet.set_attn_processor(before)

    def _vae_slicing(self) -> Callable[[], None]:
        vae = self._components.vae
        vae.enable_slicing()
        undo: Callable[[], None] = vae.disable_slicing
        return undo

    def _vae_tiling(self) -> Callable[[], None]:
        """The VAE's own tiles are as large as its training pictures, which is no tiling at all."""
        vae = self._components.vae
        vae.enable_tiling()
        vae.tile_sample_min_size = min(vae.config.sample_size // 2, LARGEST_TILE)
        vae.tile_latent_min_size = vae.tile_sample_min_size // self._components.vae_factor
        undo: Callable[[], None] = vae.disable_tiling
        return undo

    def _model_offload(self) -> Callable[[], None]:
        self._move_all(torch.device("cpu"))
        return lambda: self._move_all(self._components.device)

    def _sequential_offload(self) -> Callable[[], None]:
        self._move_all(torch.device("cpu"))
        for part in self._parts().values():
            cpu_offload(part, self._components.device, offload_buffers=bool(part._parameters))

        def undo() -> None:
            for part in self._parts().values():
                remove_hook_from_module(part, recurse=True)
            if not self.is_offloading:
                self._move_all(self._components.device)

        return undo

    def _parts(self) -> Mapping[Stage, Any]:
        found = self._components
        return {"unet": found.unet, "vae": found.vae, "text_encoder": found.text_encoder}

    def _move_all(self, device: torch.device) -> None:
        for part in self._parts().values():
            move_module(part, device)
        release_memory()


def move_module(part: Any, device: torch.device) -> None:
    """``part.to``, which cannot take along what quantized weights wrap.

    It would exchange such a weight in place, and torch refuses that in inference mode and once
    compiled code refers to it; so they leave their modules meanwhile.
    """
    with torch.inference_mode(False), torch.no_grad():
        wrapping = [
            (module, name, weight)
            for module in part.modules()
            for name, weight in module._parameters.items()
            if hasattr(weight, "__tensor_flatten__")
        ]
        for module, name, _ in wrapping:
            module._parameters[name] = None
        part.to(device)
        for module, name, weight in wrapping:
            moved = weight.to(device)
            module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
