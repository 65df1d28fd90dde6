"""One UNet forward: compiled where asked, on CUDA replayed as a graph for each batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.settings import Attention, Compile
from workers.engines.attention import kernel
from workers.engines.diffusers_loading import Components
from workers.engines.transfer import new_stream

WARM_UPS = 3
COMPILE_MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Captured:
    """A graph, the tensors it reads and the one it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Forward:
    """Predicts noise for a batch. For one thread, the one that made the first call."""

    def __init__(
        self, components: Components, *, attention: Attention, compile: Compile, graphs: bool
    ) -> None:
        self._components = components
        self._attention = attention
        self._unet: Run = components.unet
        self._is_compiled = compile != "off"
        if self._is_compiled:
            self._unet = torch.compile(components.unet, mode=COMPILE_MODES[compile])
        self._has_graphs = graphs and components.device.type == "cuda"
        self._captured: dict[torch.Size, Captured] = {}
        self._pool: Any = None

    @property
    def wants_buckets(self) -> bool:
        """Whether a new batch size costs more than rows that are thrown away."""
        return self._is_compiled or self._has_graphs

    def __call__(
        self, inputs: Tensor, timesteps: Tensor, embeddings: Tensor, *, is_moving: bool = False
    ) -> Tensor:
        """(N, C, h, w) float32 from (N, 2C + 1, h, w), (N,) and (N, tokens, embedding).

        is_moving: the weights come and go, so that neither a graph nor compiled code holds.
        """
        given = (self._laid_out(inputs), timesteps, embeddings)
        with kernel(self._attention):
            if is_moving:
                found = self._call(self._components.unet, *given)
            elif self._has_graphs:
                found = self._replay(given)
            else:
                found = self._call(self._unet, *given)
        return found.to(torch.float32, copy=True)  # the next replay overwrites a graph's output

    def forget(self) -> None:
        """Drops the graphs and hands back their memory."""
        self._captured.clear()
        self._pool = None

    def _laid_out(self, inputs: Tensor) -> Tensor:
        """In the model's dtype, and on CUDA in its weights' memory layout."""
        if self._components.device.type == "cuda":
            return inputs.to(self._components.dtype, memory_format=torch.channels_last)
        return inputs.to(self._components.dtype)

    def _call(self, run: Any, inputs: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        if self._is_compiled and len(inputs) > 1:
            for tensor in (inputs, timesteps, embeddings):
                torch._dynamo.mark_dynamic(tensor, 0)
        found = run(inputs, timesteps, encoder_hidden_states=embeddings, return_dict=False)
        return found[0]  # type: ignore[no-any-return]

    def _replay(self, given: tuple[Tensor, ...]) -> Tensor:
        captured = self._captured.get(given[0].shape)
        if captured is None:
            captured = self._captured[given[0].shape] = self._capture(given)
        for place, tensor in zip(captured.inputs, given, strict=True):
            place.copy_(tensor)
        captured.graph.replay()
        return captured.output

    def _capture(self, given: tuple[Tensor, ...]) -> Captured:
        """Warm-up runs on another stream first: they compile, and choose cuDNN's algorithms.

        All graphs share one pool of memory: never two of them are under way, and what one
        wrote is copied before the next.
        """
        device = self._components.device
        inputs = tuple(tensor.clone() for tensor in given)
        graph = torch.cuda.CUDAGraph()
        with _trying_convolutions():
            side = new_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self._call(self._unet, *inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            # Other threads may allocate meanwhile, which only this error mode allows.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = self._call(self._unet, *inputs)
        self._pool = self._pool or graph.pool()
        return Captured(graph=graph, inputs=inputs, output=output)


@contextmanager
def _trying_convolutions() -> Iterator[None]:
    """cuDNN times its algorithms and takes the fastest; each shape pays for that once.

    Not where a deterministic engine has asked for the same ones each time.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
