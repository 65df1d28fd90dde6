"""UNet forward passes: autotuned kernels, torch.compile, and on CUDA one graph per batch size."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shared.settings import Attention, Compile
from workers.engines.stable_diffusion.attention import attention_kernel
from workers.engines.stable_diffusion.autotune import Stopwatch, choose_fastest, stopwatch_for
from workers.engines.stable_diffusion.components import Components
from workers.engines.stable_diffusion.deepcache import ForwardKind, unet_for_kind
from workers.engines.stable_diffusion.host_device_copy import new_stream
from workers.engines.stable_diffusion.oom import release_memory

log = logging.getLogger(__name__)

WARM_UP_RUNS = 3
# This class captures the CUDA graphs itself.
COMPILE_MODES = {"max-autotune": "max-autotune-no-cudagraphs"}
ATTENTION_CANDIDATES: Mapping[str, tuple[Attention, ...]] = {
    "cuda": ("auto", "flash", "cudnn", "efficient")
}

UNetCallable = Callable[..., Any]


class UNetInputs(NamedTuple):
    """sample: (N, 2C + 1, h, w). timesteps: (N,). embeddings: (N, tokens, embedding)."""

    sample: Tensor
    timesteps: Tensor
    embeddings: Tensor

    @property
    def window_size(self) -> torch.Size:
        """(height, width) in latents."""
        return self.sample.shape[2:]


class KernelChoice(NamedTuple):
    """How a forward pass is computed."""

    attention: Attention
    is_compiled: bool = False

    def __str__(self) -> str:
        return f"attention {self.attention}{', compiled' if self.is_compiled else ''}"


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A CUDA graph with the tensors that it reads and the one that it overwrites."""

    graph: torch.cuda.CUDAGraph
    inputs: UNetInputs
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


@dataclass(kw_only=True)
class GraphPool:
    """The memory pool that graphs share; None until the first one is captured."""

    handle: Any = None


class UNetRunner:
    """Predicts the noise of a batch. For one thread, the one that makes the first call."""

    def __init__(
        self,
        components: Components,
        *,
        attention: Attention,
        compile: Compile,
        graphs: bool,
        deterministic: bool = False,
        kind: ForwardKind = "full",
        pool: GraphPool | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        """kind: of all its forward passes. pool: shared with the runners of the other kinds.

        deterministic: no autotuning, which may choose another kernel next time.
        stopwatch: returns the seconds of a call; None uses the device's own clock.
        """
        self._components = components
        self._model: UNetCallable = unet_for_kind(components.unet, kind)
        self._compile: Compile = "off" if deterministic and compile == "auto" else compile
        device = components.device.type
        self._attentions: tuple[Attention, ...] = (attention,)
        if attention == "auto" and not deterministic:
            self._attentions = ATTENTION_CANDIDATES.get(device, self._attentions)
        self._stopwatch = stopwatch or stopwatch_for(components.device)
        self._uses_graphs = graphs and device == "cuda"
        self._kernel_choices: dict[torch.Size, KernelChoice] = {}
        self._captured: dict[torch.Size, CapturedGraph] = {}
        self._pool = pool or GraphPool()

    @property
    def needs_buckets(self) -> bool:
        """Whether a new batch size costs more than the padding to a known one."""
        return self._compile != "off" or self._uses_graphs

    def __call__(
        self,
        sample: Tensor,
        timesteps: Tensor,
        embeddings: Tensor,
        *,
        is_offloading: bool = False,
        is_attention_sliced: bool = False,
    ) -> Tensor:
        """Return (N, C, h, w) float32 from (N, 2C + 1, h, w), (N,) and (N, tokens, embedding).

        Cached features are further channels: of the output for cache_write, of the sample for
        cache_read. is_offloading: weights move between calls, so neither a graph nor compiled
        code is used. is_attention_sliced: torch.compile does not support it.
        """
        inputs = UNetInputs(
            sample=self._to_unet_layout(sample),
            timesteps=timesteps,
            embeddings=embeddings.to(self._components.unet_dtype),
        )
        if is_offloading or is_attention_sliced:
            choice = KernelChoice(self._attentions[0])
        else:
            choice = self._kernel_choice(inputs)
        if self._uses_graphs and not is_offloading:
            output = self._replay_graph(choice, inputs)
        else:
            output = self._run_model(choice, inputs)
        # Always a copy: the next replay overwrites a graph's output.
        return output.to(torch.float32, copy=True)

    def drop_graphs(self) -> None:
        """Delete the captured graphs and give up their memory pool."""
        self._captured.clear()
        self._pool.handle = None

    def _to_unet_layout(self, sample: Tensor) -> Tensor:
        """Convert to the UNet's dtype, and on CUDA to its weights' memory format."""
        if self._components.device.type == "cuda":
            return sample.to(self._components.unet_dtype, memory_format=torch.channels_last)
        return sample.to(self._components.unet_dtype)

    def _kernel_choice(self, inputs: UNetInputs) -> KernelChoice:
        """The choice for this window size, autotuned at its first call."""
        size = inputs.window_size
        if size not in self._kernel_choices:
            self._kernel_choices[size] = self._autotune(inputs)
        return self._kernel_choices[size]

    def _autotune(self, inputs: UNetInputs) -> KernelChoice:
        # Attention first, on the plain model: compiled code keeps the kernel it was traced with.
        choice = self._choose_fastest([KernelChoice(name) for name in self._attentions], inputs)
        if self._compile == "off":
            return choice
        log.info("compiling for windows of %s latents; the first time takes minutes", _size(inputs))
        compiled = KernelChoice(choice.attention, is_compiled=True)
        if self._compile == "auto":
            return self._choose_fastest([choice, compiled], inputs)
        return compiled

    def _choose_fastest(self, choices: Sequence[KernelChoice], inputs: UNetInputs) -> KernelChoice:
        if len(choices) == 1:
            return choices[0]
        fastest = choose_fastest(choices, partial(self._build_candidate, inputs), self._stopwatch)
        release_memory()  # of the candidates' graphs
        log.info("windows of %s latents: %s", _size(inputs), fastest)
        return fastest

    def _build_candidate(self, inputs: UNetInputs, choice: KernelChoice) -> Callable[[], Tensor]:
        if self._uses_graphs:
            return self._capture(choice, inputs).replay
        return partial(self._run_model, choice, inputs)

    def _run_model(self, choice: KernelChoice, inputs: UNetInputs) -> Tensor:
        model = self._model
        if choice.is_compiled:
            model = self._compiled
            # torch specialises on a batch of 1 in any case and refuses to mark it as dynamic.
            if len(inputs.sample) > 1:
                for tensor in inputs:
                    torch._dynamo.mark_dynamic(tensor, 0)
        with attention_kernel(choice.attention):
            outputs = model(
                inputs.sample,
                inputs.timesteps,
                encoder_hidden_states=inputs.embeddings,
                return_dict=False,
            )
        return outputs[0]  # type: ignore[no-any-return]

    @cached_property
    def _compiled(self) -> UNetCallable:
        mode = COMPILE_MODES.get(self._compile)
        return torch.compile(self._model, mode=mode)

    def _replay_graph(self, choice: KernelChoice, inputs: UNetInputs) -> Tensor:
        """Replay the graph of this batch shape; capture it first if there is none yet."""
        shape = inputs.sample.shape
        if shape not in self._captured:
            captured = self._capture(choice, inputs)
            self._captured[shape] = captured
            self._pool.handle = self._pool.handle or captured.graph.pool()
        captured = self._captured[shape]
        for graph_input, tensor in zip(captured.inputs, inputs, strict=True):
            graph_input.copy_(tensor)
        return captured.replay()

    def _capture(self, choice: KernelChoice, inputs: UNetInputs) -> CapturedGraph:
        """Warm up on a side stream, then capture a graph on copies of the inputs.

        All graphs of all kinds share one memory pool: no two of them ever run at the same time,
        and the output of one is copied before the next replay.
        """
        device = self._components.device
        graph_inputs = UNetInputs(*(tensor.clone() for tensor in inputs))
        graph = torch.cuda.CUDAGraph()
        with _benchmark_convolutions():
            side_stream = new_stream(device)
            side_stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side_stream):
                # Compilation and cuDNN's search for algorithms cannot happen during capture.
                for _ in range(WARM_UP_RUNS):
                    self._run_model(choice, graph_inputs)
            torch.cuda.current_stream(device).wait_stream(side_stream)
            # thread_local: job threads may pin memory meanwhile, which other modes forbid.
            mode = "thread_local"
            with torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode=mode):
                output = self._run_model(choice, graph_inputs)
        return CapturedGraph(graph=graph, inputs=graph_inputs, output=output)


def _size(inputs: UNetInputs) -> str:
    height, width = inputs.window_size
    return f"{width}x{height}"


@contextmanager
def _benchmark_convolutions() -> Iterator[None]:
    """Let cuDNN time its algorithms and use the fastest; each shape pays for that once.

    Off in a deterministic engine, which must use the same algorithms each time.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
