"""The diffusion engine: a device thread that denoises all of its regions step by step.

Continuous batching: regions with their own prompt, seed, steps, guidance, strength and scheduler
share UNet forward passes, and join and leave at step boundaries.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from queue import SimpleQueue

import torch
from torch import Tensor

from shared.errors import EngineUnavailable, InpaintError, OutOfMemory, Released, one_line
from workers.engines.options import EngineOptions
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.stable_diffusion.batching import (
    choose_admissions,
    choose_rows,
    group_by_formula,
    rotate_served,
)
from workers.engines.stable_diffusion.components import Components, configure_kernels
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

# A finished region waits for at most so many forward passes for others to fill its VAE batch.
MAX_FORWARDS_BEFORE_DECODE = 4


class DiffusionEngine:
    """Fills regions with a Stable Diffusion inpainting model on one device.

    A region moves from the inbox to waiting, active and finished. Only the device thread touches
    these lists and the model.
    """

    def __init__(self, *, name: str, components: Components, options: EngineOptions) -> None:
        """Return once the model is on its device and warmed up.

        Raises EngineUnavailable if it does not fit or does not run.
        """
        self._name = name
        self._components = components
        self._options = options
        self._inbox: SimpleQueue[PreparedRegion | None] = SimpleQueue()
        self._waiting: list[PreparedRegion] = []
        self._active: list[DenoisingRegion] = []
        self._finished: list[DenoisingRegion] = []
        self._forwards_since_decode = 0
        self._utilization = Utilization()
        self._resolver = FutureResolver()
        self._closing = threading.Event()
        self._submit_lock = threading.Lock()
        self._started: Future[Denoiser] = Future()
        self._thread = threading.Thread(target=self._run, name="diffusion", daemon=True)
        self._thread.start()
        self._denoiser = self._started.result()

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
        """The most rows of one UNet forward pass, as configured or measured."""
        return self._denoiser.max_batch

    def submit(self, work: RegionWork) -> Future[Pixels]:
        """Queue one region; its pixels become tensors on the caller's thread.

        The future raises GateNotFinite, EngineError, OutOfMemory, the interruption's reason, or
        ParameterError if the scheduler does not support the parameters. Raises ValueError if a
        window is not on the latents' grid, lies outside, or differs in size from the others.
        """
        future: Future[Pixels] = Future()
        future.set_running_or_notify_cancel()
        try:
            prepared = prepare_region(work, future, self._components)
            # Without the lock, a region could enter the inbox after the thread's last look.
            with self._submit_lock:
                if self._closing.is_set():
                    raise Released("the engine is closed")
                self._inbox.put(prepared)
        except InpaintError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Stop at the next step; unfinished work raises Released. Safe to repeat."""
        with self._submit_lock:
            self._closing.set()
        self._inbox.put(None)  # wakes the thread
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            if not self._start_denoiser():
                return
            while not self._closing.is_set():
                self._receive_submissions()
                # An unexpected error fails all regions of the engine; the thread survives it.
                with fail_futures_on_error(self._unfinished_regions()):
                    self._run_iteration()
        self._resolver.close()
        log.info(
            "%s on %s: in use for %.2f s, device idle for %.1f%% of it",
            self._name,
            self._components.device,
            self._utilization.seconds,
            100 * self._utilization.idle_share,
        )
        with fail_futures_on_error((*self._unfinished_regions(), *self._drain_inbox())):
            raise Released("the engine was closed before the region was done")

    def _start_denoiser(self) -> bool:
        """Place and warm up the model on the thread that will run it; False if that fails."""
        if self._components.device.type == "cuda":
            # The current device is a property of the thread.
            torch.cuda.set_device(self._components.device)
        configure_kernels(self._components.device, is_deterministic=self._options.deterministic)
        try:
            self._denoiser = Denoiser(self._components, self._options)
        except Exception as error:  # noqa: BLE001
            self._resolver.close()
            self._started.set_exception(to_start_error(error, self._components))
            return False
        self._started.set_result(self._denoiser)
        return True

    def _unfinished_regions(self) -> list[PreparedRegion]:
        """Every region that has left the inbox and has no result yet."""
        denoising = (*self._active, *self._finished)
        return [*self._waiting, *(region.prepared for region in denoising)]

    def _receive_submissions(self) -> None:
        """Move the inbox to the waiting list; block while there is nothing to do."""
        if not self._unfinished_regions():
            self._waiting += [region for region in [self._inbox.get()] if region is not None]
        self._waiting += self._drain_inbox()

    def _drain_inbox(self) -> list[PreparedRegion]:
        regions: list[PreparedRegion] = []
        while not self._inbox.empty():
            if (prepared := self._inbox.get()) is not None:
                regions.append(prepared)
        return regions

    def _run_iteration(self) -> None:
        self._stop_interrupted()
        self._admit_waiting()
        self._run_forward()
        self._decode_finished()

    def _stop_interrupted(self) -> None:
        # Each in a context of its own: one interruption must not fail the others.
        for prepared in self._unfinished_regions():
            with fail_futures_on_error((prepared,)):
                prepared.work.interruption.check()
        self._drop_failed()

    def _drop_failed(self) -> None:
        """Forget the regions whose futures hold an exception."""
        self._waiting = [prepared for prepared in self._waiting if not prepared.future.done()]
        self._active = [region for region in self._active if not region.prepared.future.done()]
        self._finished = [region for region in self._finished if not region.prepared.future.done()]

    def _admit_waiting(self) -> None:
        admitted = choose_admissions(self._waiting, self._active, self._denoiser.max_rows)
        self._waiting = [prepared for prepared in self._waiting if prepared not in admitted]
        for size in dict.fromkeys(prepared.window_size for prepared in admitted):
            group = [prepared for prepared in admitted if prepared.window_size == size]
            with fail_futures_on_error(group), self._utilization.measure():
                self._active.extend(self._denoiser.start(group))

    def _run_forward(self) -> None:
        """Run one UNet forward pass, and a scheduler step for each region that it completes."""
        rows = choose_rows(self._active, self._denoiser.max_rows)
        if not rows:
            return
        predictions: list[Tensor] = []
        served = (row.region.prepared for row in rows)
        with fail_futures_on_error(served), self._utilization.measure():
            predictions = self._denoiser.predict(rows)
        # predictions is empty if memory ran out or the pass failed.
        complete = [
            row.region
            for row, prediction in zip(rows, predictions, strict=False)
            if row.region.add_prediction(row, prediction)
        ]
        self._step(complete)
        # Regions that failed in this pass must not get rows in the next one.
        self._active = rotate_served(self._active, rows)
        self._drop_failed()
        self._forwards_since_decode += 1

    def _step(self, regions: list[DenoisingRegion]) -> None:
        for group in group_by_formula(regions):
            prepared = (region.prepared for region in group)
            with fail_futures_on_error(prepared), self._utilization.measure():
                self._denoiser.step(group)

    def _decode_finished(self) -> None:
        """Decode the finished regions, by window size, once their batch is worth a VAE batch."""
        self._finished += [region for region in self._active if region.is_done]
        self._active = [region for region in self._active if not region.is_done]
        for size in dict.fromkeys(region.prepared.window_size for region in self._finished):
            group = [region for region in self._finished if region.prepared.window_size == size]
            if self._is_worth_decoding(group):
                self._decode(group)

    def _is_worth_decoding(self, group: list[DenoisingRegion]) -> bool:
        windows = sum(len(region.prepared.canvas.windows) for region in group)
        return (
            windows >= self._denoiser.max_vae_images(group[0].prepared.window_size)
            or not self._active
            or self._forwards_since_decode >= MAX_FORWARDS_BEFORE_DECODE
        )

    def _decode(self, group: list[DenoisingRegion]) -> None:
        self._forwards_since_decode = 0
        with fail_futures_on_error(region.prepared for region in group):
            with self._utilization.measure():
                images = self._denoiser.decode(group)
            for region, image in zip(group, images, strict=True):
                self._send(region.prepared, image)
        self._finished = [region for region in self._finished if region not in group]

    def _send(self, prepared: PreparedRegion, image: Tensor) -> None:
        with fail_futures_on_error((prepared,)):
            prepared.work.report.memory = self._denoiser.memory_report(prepared.window_size)
            self._resolver.resolve(prepared, image, self._denoiser.copy_streams)


def to_start_error(error: Exception, components: Components) -> InpaintError:
    """Convert what starting the engine raised to EngineUnavailable, which names the remedy.

    A lost device stays DeviceLost: a restarted process may find it again.
    """
    if isinstance(error, torch.AcceleratorError):
        return to_inpaint_error(error)
    device = components.device
    if is_out_of_memory(error) or isinstance(error, OutOfMemory):
        converted = EngineUnavailable(
            f"the model does not fit on {device}; use a larger device, or memory model_offload"
        )
    else:
        converted = EngineUnavailable(
            f"the model does not run on {device}: {type(error).__name__}: {one_line(error)}; "
            "try attention auto, compile off and quantization off"
        )
    converted.__cause__ = error
    return converted
