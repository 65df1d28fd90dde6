"""Suspect jobs run exclusively, all others together."""

from __future__ import annotations

import threading
from collections.abc import Callable

from workers.exclusive_lock import ExclusiveLock


def never() -> bool:
    return False


class Holder:
    """A thread that acquires the lock and holds it until ``release``."""

    def __init__(
        self, lock: ExclusiveLock, *, exclusive: bool, stop: Callable[[], bool] = never
    ) -> None:
        self.acquired: bool | None = None
        self.entered, self._go = threading.Event(), threading.Event()
        acquire = lock.exclusive if exclusive else lock.shared
        self._thread = threading.Thread(target=self._run, args=(acquire, stop))
        self._thread.start()

    def _run(self, acquire: Callable[..., object], stop: Callable[[], bool]) -> None:
        with acquire(stop=stop) as self.acquired:  # type: ignore[attr-defined]
            self.entered.set()
            self._go.wait(10)

    def release(self) -> None:
        self._go.set()
        self._thread.join(10)


def test_ordinary_jobs_run_together() -> None:
    lock = ExclusiveLock()
    holders = [Holder(lock, exclusive=False) for _ in range(3)]
    assert all(holder.entered.wait(5) for holder in holders)
    for holder in holders:
        holder.release()


def test_an_exclusive_job_waits_for_the_others_and_no_job_joins_it() -> None:
    lock = ExclusiveLock()
    first = Holder(lock, exclusive=False)
    assert first.entered.wait(5)
    suspect = Holder(lock, exclusive=True)
    assert not suspect.entered.wait(0.2)
    late = Holder(lock, exclusive=False)
    assert not late.entered.wait(0.2)  # the exclusive job was first
    first.release()
    assert suspect.entered.wait(5)
    assert not late.entered.wait(0.2)
    suspect.release()
    assert late.entered.wait(5)
    late.release()


def test_waiting_threads_give_up_when_the_worker_stops() -> None:
    lock, stopping = ExclusiveLock(), threading.Event()
    suspect = Holder(lock, exclusive=True)
    assert suspect.entered.wait(5)
    waiting = [Holder(lock, exclusive=value, stop=stopping.is_set) for value in (True, False)]
    stopping.set()
    assert all(holder.entered.wait(5) for holder in waiting)
    assert [holder.acquired for holder in waiting] == [False, False]
    for holder in (*waiting, suspect):
        holder.release()
    after = Holder(lock, exclusive=False)
    assert after.entered.wait(5)
    assert after.acquired is True
    after.release()
