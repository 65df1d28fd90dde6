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
    choose_admissions,
    choose_rows,
    group_by_formula,
    rotate_served,
)
from workers.engines.stable_diffusion.components import Components, configure_kernels, one_line
from workers.engines.stable_diffusion.denoiser import Denoiser
from workers.engines.stable_diffusion.oom import is_out_of_memory
from workers.engines.stable_diffusion.region_state import (
    DenoisingRegion,
    PreparedRegion,
    prepare_region,
)
from workers.engines.stable_diffusion.results import (
    FutureResolver,
    fail_futures_on_error,
    to_inpaint_error,
)
from workers.engines.stable_diffusion.utilization import Utilization

log = logging.getLogger(__name__)

MAX_FORWARDS_BETWEEN_DECODES = 4  # forwards between two decodings while something is done


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
        self._utilization = Utilization()
        self._resolver = FutureResolver()
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
            prepared = prepare_region(work, future, self._components)
            with self._submitting:
                if self._closing.is_set():
                    raise Released("the engine is closed")
                self._inbox.put(prepared)
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
            if not self._start_denoiser():
                return
            while not self._closing.is_set():
                self._receive_submissions()
                with fail_futures_on_error(self._unfinished_regions()):
                    self._run_iteration()
        self._resolver.close()
        log.info(
            "%s on %s: in use for %.2f s, idle in between for %.1f%% of them",
            self._name,
            self._components.device,
            self._utilization.seconds,
            100 * self._utilization.idle_share,
        )
        with fail_futures_on_error((*self._unfinished_regions(), *self._drain_inbox())):
            raise Released("the engine was closed before the region was done")

    def _start_denoiser(self) -> bool:
        """Puts the model on its device, from the thread that will run it."""
        if self._components.device.type == "cuda":
            torch.cuda.set_device(self._components.device)
        is_deterministic = self._options.deterministic
        configure_kernels(self._components.device, is_deterministic=is_deterministic)
        try:
            self._ready.set_result(Denoiser(self._components, self._options))
        except Exception as error:  # noqa: BLE001
            self._resolver.close()
            self._ready.set_exception(to_engine_unavailable(error, self._components))
            return False
        self._denoiser = self._ready.result()
        return True

    def _unfinished_regions(self) -> list[PreparedRegion]:
        """Every region not answered yet that the device thread knows of."""
        return [*self._waiting, *(one.prepared for one in (*self._active, *self._finished))]

    def _receive_submissions(self) -> None:
        """Takes what was submitted; sleeps while there is nothing to do."""
        if not self._unfinished_regions():
            self._waiting.extend(_known(self._inbox.get()))
        self._waiting.extend(self._drain_inbox())

    def _drain_inbox(self) -> list[PreparedRegion]:
        prepared_regions: list[PreparedRegion] = []
        while not self._inbox.empty():
            prepared_regions.extend(_known(self._inbox.get()))
        return prepared_regions

    def _run_iteration(self) -> None:
        """One iteration: who stops, who joins, one forward, who is finished."""
        self._stop_interrupted()
        self._admit_waiting()
        self._run_forward()
        self._decode_finished()

    def _stop_interrupted(self) -> None:
        for prepared in self._unfinished_regions():
            with fail_futures_on_error((prepared,)):
                prepared.work.interruption.check()
        self._drop_done_futures()

    def _drop_done_futures(self) -> None:
        self._waiting = [prepared for prepared in self._waiting if not prepared.future.done()]
        self._active = [one for one in self._active if not one.prepared.future.done()]
        self._finished = [one for one in self._finished if not one.prepared.future.done()]

    def _admit_waiting(self) -> None:
        joining = choose_admissions(self._waiting, self._active, self._denoiser.max_rows)
        self._waiting = [prepared for prepared in self._waiting if prepared not in joining]
        for size in dict.fromkeys(prepared.window_size for prepared in joining):
            prepared_regions = [prepared for prepared in joining if prepared.window_size == size]
            with fail_futures_on_error(prepared_regions), self._utilization.measure():
                self._active.extend(self._denoiser.start(prepared_regions))

    def _run_forward(self) -> None:
        """Those it serves go to the back, so that no region waits for all of a canvas."""
        rows = choose_rows(self._active, self._denoiser.max_rows)
        if not rows:
            return
        predictions: list[Tensor] = []
        with (
            fail_futures_on_error(row.region.prepared for row in rows),
            self._utilization.measure(),
        ):
            predictions = self._denoiser.predict(rows)
        complete = [
            row.region
            for row, prediction in zip(rows, predictions, strict=False)
            if row.region.add_prediction(row, prediction)
        ]
        for group in group_by_formula(complete):
            with fail_futures_on_error(one.prepared for one in group), self._utilization.measure():
                self._denoiser.step(group)
        self._active = rotate_served(self._active, rows)
        self._drop_done_futures()
        self._forwards_since_decoding += 1

    def _decode_finished(self) -> None:
        """Decodes what is done, a full batch at once where that is worth a short wait."""
        done = [one for one in self._active if one.is_done]
        self._active = [one for one in self._active if not one.is_done]
        self._finished += done
        for size in dict.fromkeys(one.prepared.window_size for one in self._finished):
            group = [one for one in self._finished if one.prepared.window_size == size]
            if self._is_worth_decoding(group):
                self._decode(group)

    def _is_worth_decoding(self, group: list[DenoisingRegion]) -> bool:
        windows = sum(len(one.prepared.canvas.windows) for one in group)
        return (
            windows >= self._denoiser.max_vae_images(group[0].prepared.window_size)
            or not self._active
            or self._forwards_since_decoding >= MAX_FORWARDS_BETWEEN_DECODES
        )

    def _decode(self, group: list[DenoisingRegion]) -> None:
        self._forwards_since_decoding = 0
        with fail_futures_on_error(one.prepared for one in group):
            with self._utilization.measure():
                pictures = self._denoiser.decode(group)
            for one, picture in zip(group, pictures, strict=True):
                with fail_futures_on_error((one.prepared,)):
                    one.prepared.work.report.memory = self._denoiser.memory_report(
                        one.prepared.window_size
                    )
                    self._resolver.send(one.prepared, picture, self._denoiser.copy_streams)
        self._finished = [one for one in self._finished if one not in group]


def to_engine_unavailable(error: Exception, components: Components) -> InpaintError:
    """What starting the engine raises instead; a lost device may be back after a restart."""
    if isinstance(error, torch.AcceleratorError):
        return to_inpaint_error(error)
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


def _known(prepared: PreparedRegion | None) -> tuple[PreparedRegion, ...]:
    """``close`` wakes the thread with None."""
    return () if prepared is None else (prepared,)
