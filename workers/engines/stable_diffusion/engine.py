"""The diffusion engine: one device thread that advances every region it holds, step by step.

Continuous batching: regions with their own prompt, seed, steps, guidance, strength and
scheduler share UNet forwards, and join and leave at step boundaries.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

from shared.errors import EngineUnavailable, InpaintError, OutOfMemory, Released
from workers.engines.options import EngineOptions
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.batching import (
    choose_joining,
    group_steps,
    move_back,
    pick_rows,
)
from workers.engines.stable_diffusion.components import Components, choose_kernels, one_line
from workers.engines.stable_diffusion.denoiser import Denoiser
from workers.engines.stable_diffusion.oom import is_out_of_memory
from workers.engines.stable_diffusion.region_state import DenoisingRegion, PreparedRegion, draw_up
from workers.engines.stable_diffusion.results import ResultSender, as_product_error, fail_futures
from workers.engines.stable_diffusion.utilization import Usage

log = logging.getLogger(__name__)

LONGEST_WAIT = 4  # forwards between two decodings while something is done


class DiffusionEngine:
    """Fills regions with a Stable Diffusion inpainting model on one device."""

    def __init__(self, *, name: str, components: Components, options: EngineOptions) -> None:
        """Returns once the model is on its device and warm.

        Raises EngineUnavailable where it does not fit.
        """
        self._name = name
        self._components = components
        self._options = options
        self._inbox: SimpleQueue[PreparedRegion | None] = SimpleQueue()
        self._waiting: list[PreparedRegion] = []
        self._active: list[DenoisingRegion] = []
        self._finished: list[DenoisingRegion] = []
        self._forwards_since_decoding = 0
        self._usage = Usage()
        self._delivery = ResultSender()
        self._closing = threading.Event()
        self._submitting = threading.Lock()
        self._ready: Future[Denoiser] = Future()
        self._thread = threading.Thread(target=self._run, name="diffusion", daemon=True)
        self._thread.start()
        self._denoiser = self._ready.result()

    @property
    def name(self) -> str:
        return self._name

    @property
    def revision(self) -> str:
        """The hub's commit, or ``sha256:`` over the folder's content; ``+int8`` if quantized."""
        return self._components.revision

    @property
    def device(self) -> str:
        """``cpu``, or ``cuda:0 NVIDIA H200``."""
        device = self._components.device
        if device.type != "cuda":
            return str(device)
        return f"{device} {torch.cuda.get_device_name(device)}"

    @property
    def max_batch(self) -> int:
        """The most rows of one forward, as given or found."""
        return self._denoiser.max_batch

    def submit(self, work: RegionWork) -> Future[Pixels]:
        """Starts one region; the caller's thread turns its pixels into tensors.

        The future raises GateError (where the model computed no numbers), EngineError,
        OutOfMemory, the interruption's reason, or ParameterError where the scheduler cannot
        take the parameters. Raises ValueError where a window is not on the latents' grid, lies
        outside, or differs in size from the others.
        """
        future: Future[Pixels] = Future()
        future.set_running_or_notify_cancel()
        try:
            draft = draw_up(work, future, self._components)
            with self._submitting:
                if self._closing.is_set():
                    raise Released("the engine is closed")
                self._inbox.put(draft)
        except InpaintError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Stops at the next step; work not yet finished raises Released. Safe to repeat."""
        with self._submitting:
            self._closing.set()
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            if not self._prepare():
                return
            while not self._closing.is_set():
                self._receive()
                with fail_futures(self._held()):
                    self._advance()
        self._delivery.close()
        log.info(
            "%s on %s: in use for %.2f s, idle in between for %.1f%% of them",
            self._name,
            self._components.device,
            self._usage.seconds,
            100 * self._usage.idle_share,
        )
        with fail_futures((*self._held(), *self._drained())):
            raise Released("the engine was closed before the region was done")

    def _prepare(self) -> bool:
        """Puts the model on its device, from the thread that will run it."""
        if self._components.device.type == "cuda":
            torch.cuda.set_device(self._components.device)
        is_deterministic = self._options.deterministic
        choose_kernels(self._components.device, is_deterministic=is_deterministic)
        try:
            self._ready.set_result(Denoiser(self._components, self._options))
        except Exception as error:  # noqa: BLE001
            self._delivery.close()
            self._ready.set_exception(as_unavailable(error, self._components))
            return False
        self._denoiser = self._ready.result()
        return True

    def _held(self) -> list[PreparedRegion]:
        """Every region not answered yet that the device thread knows of."""
        return [*self._waiting, *(one.draft for one in (*self._active, *self._finished))]

    def _receive(self) -> None:
        """Takes what was submitted; sleeps while there is nothing to do."""
        if not self._held():
            self._waiting.extend(_known(self._inbox.get()))
        self._waiting.extend(self._drained())

    def _drained(self) -> list[PreparedRegion]:
        drafts: list[PreparedRegion] = []
        while not self._inbox.empty():
            drafts.extend(_known(self._inbox.get()))
        return drafts

    def _advance(self) -> None:
        """One iteration: who stops, who joins, one forward, who is finished."""
        self._stop_interrupted()
        self._admit()
        self._forward()
        self._finish()

    def _stop_interrupted(self) -> None:
        for draft in self._held():
            with fail_futures((draft,)):
                draft.work.interruption.check()
        self._drop_answered()

    def _drop_answered(self) -> None:
        self._waiting = [draft for draft in self._waiting if not draft.future.done()]
        self._active = [one for one in self._active if not one.draft.future.done()]
        self._finished = [one for one in self._finished if not one.draft.future.done()]

    def _admit(self) -> None:
        joining = choose_joining(self._waiting, self._active, self._denoiser.max_rows)
        self._waiting = [draft for draft in self._waiting if draft not in joining]
        for size in dict.fromkeys(draft.window_size for draft in joining):
            drafts = [draft for draft in joining if draft.window_size == size]
            with fail_futures(drafts), self._usage.running():
                self._active.extend(self._denoiser.begin(drafts))

    def _forward(self) -> None:
        """Those it serves go to the back, so that no region waits for all of a canvas."""
        rows = pick_rows(self._active, self._denoiser.max_rows)
        if not rows:
            return
        predictions: list[Tensor] = []
        with fail_futures(row.sequence.draft for row in rows), self._usage.running():
            predictions = self._denoiser.predict(rows)
        complete = [
            row.sequence
            for row, prediction in zip(rows, predictions, strict=False)
            if row.sequence.absorb(row, prediction)
        ]
        for group in group_steps(complete):
            with fail_futures(one.draft for one in group), self._usage.running():
                self._denoiser.step(group)
        self._active = move_back(self._active, rows)
        self._drop_answered()
        self._forwards_since_decoding += 1

    def _finish(self) -> None:
        """Decodes what is done, a full batch at once where that is worth a short wait."""
        done = [one for one in self._active if one.is_done]
        self._active = [one for one in self._active if not one.is_done]
        self._finished += done
        for size in dict.fromkeys(one.draft.window_size for one in self._finished):
            group = [one for one in self._finished if one.draft.window_size == size]
            if self._is_worth_decoding(group):
                self._decode(group)

    def _is_worth_decoding(self, group: list[DenoisingRegion]) -> bool:
        windows = sum(len(one.draft.canvas.windows) for one in group)
        return (
            windows >= self._denoiser.vae_rows(group[0].draft.window_size)
            or not self._active
            or self._forwards_since_decoding >= LONGEST_WAIT
        )

    def _decode(self, group: list[DenoisingRegion]) -> None:
        self._forwards_since_decoding = 0
        with fail_futures(one.draft for one in group):
            with self._usage.running():
                pictures = self._denoiser.decode(group)
            for one, picture in zip(group, pictures, strict=True):
                with fail_futures((one.draft,)):
                    one.draft.work.report.memory = self._denoiser.memory(one.draft.window_size)
                    self._delivery.send(one.draft, picture, self._denoiser.transfer)
        self._finished = [one for one in self._finished if one not in group]


def as_unavailable(error: Exception, components: Components) -> InpaintError:
    """What starting the engine raises instead; a lost device may be back after a restart."""
    if isinstance(error, torch.AcceleratorError):
        return as_product_error(error)
    device = components.device
    if is_out_of_memory(error) or isinstance(error, OutOfMemory):
        found = EngineUnavailable(
            f"the model does not fit on {device}; use a larger one, or memory model_offload"
        )
    else:
        found = EngineUnavailable(
            f"the model does not run on {device}: {type(error).__name__}: {one_line(error)}; "
            "try attention auto, compile off and quantization off"
        )
    found.__cause__ = error
    return found


def _known(draft: PreparedRegion | None) -> tuple[PreparedRegion, ...]:
    """``close`` wakes the thread with None."""
    return () if draft is None else (draft,)
