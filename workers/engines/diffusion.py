"""The diffusion engine: one device thread that advances every region it holds, step by step.

Continuous batching: regions with their own prompt, seed, steps, guidance, strength and
scheduler share UNet forwards, and join and leave at step boundaries.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue

import torch
from torch import Tensor

from shared.errors import EngineError, InpaintError, OutOfMemory, Released
from workers.engines.batching import choose_joining, move_back, pick_rows
from workers.engines.denoiser import Denoiser
from workers.engines.diffusers_loading import Components
from workers.engines.memory import is_out_of_memory
from workers.engines.protocol import Pixels, RegionWork
from workers.engines.sequence import Draft, Sequence, draw_up, to_pixels


class DiffusionEngine:
    """Fills regions with a Stable Diffusion inpainting model on one device."""

    def __init__(
        self, *, name: str, components: Components, max_batch: int, vae_batch: int | None = None
    ) -> None:
        """Both batches count rows and shrink where memory runs out.

        vae_batch: by default ``max_batch`` on CUDA, and 1 on the CPU, where more is no faster
        and one at a time gives the same bits whatever the neighbours.
        """
        self._name = name
        self._components = components
        if vae_batch is None:
            vae_batch = 1 if components.device.type == "cpu" else max_batch
        self._denoiser = Denoiser(components, max_rows=max_batch, vae_rows=vae_batch)
        self._max_batch = max_batch
        self._inbox: SimpleQueue[Draft | None] = SimpleQueue()
        self._waiting: list[Draft] = []
        self._active: list[Sequence] = []
        self._closing = threading.Event()
        self._submitting = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="diffusion", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        return self._name

    @property
    def revision(self) -> str:
        """The hub's commit, or ``sha256:`` over the folder's content."""
        return self._components.revision

    @property
    def device(self) -> str:
        """``cpu``, or ``cuda:0 NVIDIA H200``."""
        device = self._components.device
        if device.type != "cuda":
            return str(device)
        return f"{device} {torch.cuda.get_device_name(device)}"

    def submit(self, work: RegionWork) -> Future[Pixels]:
        """Starts one region; the caller's thread turns its pixels into tensors.

        The future raises EngineError (code ``engine_nan`` where the model computed no
        numbers), OutOfMemory, the interruption's reason, or ParameterError where the
        scheduler cannot take the parameters. Raises ValueError where a window is not on the
        latents' grid, lies outside, or differs in size from the others.
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
        if self._components.device.type == "cuda":
            torch.cuda.set_device(self._components.device)
        with torch.inference_mode():
            while not self._closing.is_set():
                self._receive()
                with telling((*self._waiting, *(one.draft for one in self._active))):
                    self._advance()
        with telling((*self._waiting, *(one.draft for one in self._active), *self._drained())):
            raise Released("the engine was closed before the region was done")

    def _receive(self) -> None:
        """Takes what was submitted; sleeps while there is nothing to do."""
        if not self._active and not self._waiting:
            self._waiting.extend(_known(self._inbox.get()))
        self._waiting.extend(self._drained())

    def _drained(self) -> list[Draft]:
        drafts: list[Draft] = []
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
        for draft in (*self._waiting, *(one.draft for one in self._active)):
            with telling((draft,)):
                draft.work.interruption.check()
        self._waiting = [draft for draft in self._waiting if not draft.future.done()]
        self._drop_answered()

    def _drop_answered(self) -> None:
        self._active = [one for one in self._active if not one.draft.future.done()]

    def _admit(self) -> None:
        joining = choose_joining(self._waiting, self._active, self._max_batch)
        self._waiting = [draft for draft in self._waiting if draft not in joining]
        for size in dict.fromkeys(draft.window_size for draft in joining):
            drafts = [draft for draft in joining if draft.window_size == size]
            with telling(drafts):
                self._active.extend(self._denoiser.begin(drafts))

    def _forward(self) -> None:
        """Those it serves go to the back, so that no region waits for all of a canvas."""
        rows = pick_rows(self._active, self._denoiser.max_rows)
        if not rows:
            return
        predictions: list[Tensor] = []
        with telling(row.sequence.draft for row in rows):
            predictions = self._denoiser.predict(rows)
        for row, prediction in zip(rows, predictions, strict=False):
            with telling((row.sequence.draft,)):
                row.sequence.absorb(row, prediction)
        self._active = move_back(self._active, rows)
        self._drop_answered()

    def _finish(self) -> None:
        done = [one for one in self._active if one.is_done]
        for size in dict.fromkeys(one.draft.window_size for one in done):
            group = [one for one in done if one.draft.window_size == size]
            with telling(one.draft for one in group):
                pictures = self._denoiser.decode(group)
                for one, picture in zip(group, pictures, strict=True):
                    answer(one.draft, picture)
        self._drop_answered()


def answer(draft: Draft, picture: Tensor) -> None:
    """Gives the future its pixels, or EngineError ``engine_nan`` where there are none.

    picture: (3, H, W) float32.
    """
    with telling((draft,)):
        if not torch.isfinite(picture).all():  # latents that are no numbers end here, too
            raise EngineError(
                "the model computed values that are no numbers; try dtype bfloat16 or float32",
                code="engine_nan",
            )
        draft.future.set_result(to_pixels(picture, draft))


@contextmanager
def telling(drafts: Iterable[Draft]) -> Iterator[None]:
    """Whatever is raised inside goes to these regions' futures, and no further.

    An exception that left the device thread would leave every future waiting for ever.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001
        for draft in drafts:
            if not draft.future.done():
                draft.future.set_exception(as_product_error(error))


def as_product_error(error: Exception) -> InpaintError:
    """OutOfMemory, or EngineError naming the exception; ``device_lost`` needs a new process."""
    if isinstance(error, InpaintError):
        return error
    if is_out_of_memory(error):
        return OutOfMemory("the device's memory ran out; use a smaller window or max_batch")
    text = " ".join(str(error).split())[:300]
    code = "device_lost" if isinstance(error, torch.AcceleratorError) else None
    found = EngineError(f"{type(error).__name__}: {text}", code=code)
    found.__cause__ = error
    return found


def _known(draft: Draft | None) -> tuple[Draft, ...]:
    """``close`` wakes the thread with None."""
    return () if draft is None else (draft,)
