"""One UNet forward: in the fastest way found, on CUDA replayed as a graph for each batch size."""

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
COMPILE_MODES = {"max-autotune": "max-autotune-no-cudagraphs"}
ATTENTION_CANDIDATES: Mapping[str, tuple[Attention, ...]] = {
    "cuda": ("auto", "flash", "cudnn", "efficient")
}

UNetCallable = Callable[..., Any]
UNetInputs = tuple[Tensor, Tensor, Tensor]  # inputs, timesteps, embeddings


class KernelChoice(NamedTuple):
    """How a forward may be computed."""

    attention: Attention
    is_compiled: bool = False

    def __str__(self) -> str:
        return f"attention {self.attention}{', compiled' if self.is_compiled else ''}"


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A graph, the tensors it reads and the one it writes."""

    graph: torch.cuda.CUDAGraph
    inputs: UNetInputs
    output: Tensor

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.output


@dataclass(kw_only=True)
class GraphPool:
    """The device memory that graphs share, once there is one of them."""

    handle: Any = None


class UNetRunner:
    """Predicts noise for a batch. For one thread, the one that made the first call."""

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
        """kind: what a forward computes. pool: shared with the other kinds' graphs.

        deterministic: nothing is chosen by measuring, which may choose otherwise next time.
        stopwatch: the seconds of a call; None takes the device's own clock.
        """
        self._components = components
        self._model: UNetCallable = unet_for_kind(components.unet, kind)
        self._compile: Compile = "off" if deterministic and compile == "auto" else compile
        device = components.device.type
        self._attentions: tuple[Attention, ...] = (attention,)
        if attention == "auto" and not deterministic:
            self._attentions = ATTENTION_CANDIDATES.get(device, self._attentions)
        self._stopwatch = stopwatch or stopwatch_for(components.device)
        self._has_graphs = graphs and device == "cuda"
        self._kernel_choices: dict[torch.Size, KernelChoice] = {}
        self._captured: dict[torch.Size, CapturedGraph] = {}
        self._pool = pool or GraphPool()

    @property
    def needs_buckets(self) -> bool:
        """Whether a new batch size costs more than rows that are thrown away."""
        return self._compile != "off" or self._has_graphs

    def __call__(
        self,
        inputs: Tensor,
        timesteps: Tensor,
        embeddings: Tensor,
        *,
        is_offloading: bool = False,
        is_attention_sliced: bool = False,
    ) -> Tensor:
        """(N, C, h, w) float32 from (N, 2C + 1, h, w), (N,) and (N, tokens, embedding).

        The state follows as further channels: of the output where it is kept, of the inputs
        where it is reused. is_moving: the weights come and go, so that neither a graph nor
        compiled code holds. is_sliced: attention goes row by row, which does not compile.
        """
        embeddings = embeddings.to(self._components.unet_dtype)
        given = (self._to_unet_layout(inputs), timesteps, embeddings)
        choice = (
            KernelChoice(self._attentions[0])
            if is_offloading or is_attention_sliced
            else self._kernel_choice(given)
        )
        if self._has_graphs and not is_offloading:
            found = self._replay_graph(choice, given)
        else:
            found = self._run_model(choice, given)
        return found.to(torch.float32, copy=True)  # the next replay overwrites a graph's output

    def drop_graphs(self) -> None:
        """Drops the graphs and hands back their memory."""
        self._captured.clear()
        self._pool.handle = None

    def _to_unet_layout(self, inputs: Tensor) -> Tensor:
        """In the UNet's dtype, and on CUDA in its weights' memory layout."""
        if self._components.device.type == "cuda":
            return inputs.to(self._components.unet_dtype, memory_format=torch.channels_last)
        return inputs.to(self._components.unet_dtype)

    def _kernel_choice(self, given: UNetInputs) -> KernelChoice:
        """How forwards of this window size run: found at the first of them, then kept."""
        size = given[0].shape[2:]
        if size not in self._kernel_choices:
            self._kernel_choices[size] = self._autotune(given)
        return self._kernel_choices[size]

    def _autotune(self, given: UNetInputs) -> KernelChoice:
        """Attention first, on the plain model: compiled code keeps the kernel it was made with."""
        choice = self._choose_fastest([KernelChoice(name) for name in self._attentions], given)
        if self._compile == "off":
            return choice
        log.info("compiling for windows of %s latents: minutes, the first time", _size(given))
        compiled = KernelChoice(choice.attention, is_compiled=True)
        return (
            self._choose_fastest([choice, compiled], given) if self._compile == "auto" else compiled
        )

    def _choose_fastest(self, choices: Sequence[KernelChoice], given: UNetInputs) -> KernelChoice:
        if len(choices) == 1:
            return choices[0]
        found = choose_fastest(choices, partial(self._build_candidate, given), self._stopwatch)
        release_memory()  # of the graphs that were tried
        log.info("windows of %s latents: %s", _size(given), found)
        return found

    def _build_candidate(self, given: UNetInputs, choice: KernelChoice) -> Callable[[], Tensor]:
        if self._has_graphs:
            return self._capture(choice, given).replay
        return partial(self._run_model, choice, given)

    def _run_model(self, choice: KernelChoice, given: UNetInputs) -> Tensor:
        inputs, timesteps, embeddings = given
        run = self._model
        if choice.is_compiled:
            run = self._compiled
            if len(inputs) > 1:
                for tensor in given:
                    torch._dynamo.mark_dynamic(tensor, 0)
        with attention_kernel(choice.attention):
            found = run(inputs, timesteps, encoder_hidden_states=embeddings, return_dict=False)
        return found[0]  # type: ignore[no-any-return]

    @cached_property
    def _compiled(self) -> UNetCallable:
        mode = COMPILE_MODES.get(self._compile)
        return torch.compile(self._model, mode=mode)

    def _replay_graph(self, choice: KernelChoice, given: UNetInputs) -> Tensor:
        shape = given[0].shape
        if shape not in self._captured:
            captured = self._capture(choice, given)
            self._captured[shape] = captured
            self._pool.handle = self._pool.handle or captured.graph.pool()
        captured = self._captured[shape]
        for place, tensor in zip(captured.inputs, given, strict=True):
            place.copy_(tensor)
        return captured.replay()

    def _capture(self, choice: KernelChoice, given: UNetInputs) -> CapturedGraph:
        """Warm-up runs on another stream first: they compile, and choose cuDNN's algorithms.

        All graphs of every kind share one pool of memory: never two of them are under way, and
        what one wrote is copied before the next.
        """
        device = self._components.device
        inputs, timesteps, embeddings = given
        own = (inputs.clone(), timesteps.clone(), embeddings.clone())
        graph = torch.cuda.CUDAGraph()
        with _benchmark_convolutions():
            side = new_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_RUNS):
                    self._run_model(choice, own)
            torch.cuda.current_stream(device).wait_stream(side)
            mode = "thread_local"  # other threads may allocate meanwhile, which no other allows
            with torch.cuda.graph(graph, pool=self._pool.handle, capture_error_mode=mode):
                output = self._run_model(choice, own)
        return CapturedGraph(graph=graph, inputs=own, output=output)


def _size(given: UNetInputs) -> str:
    height, width = given[0].shape[2:]
    return f"{width}x{height}"


@contextmanager
def _benchmark_convolutions() -> Iterator[None]:
    """cuDNN times its algorithms and takes the fastest; each shape pays for that once.

    Not where a deterministic engine has asked for the same ones each time.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
