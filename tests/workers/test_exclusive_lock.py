"""Suspects run alone, everything else side by side."""

from __future__ import annotations

import threading
from collections.abc import Callable

from workers.exclusive_lock import ExclusiveLock


def never() -> bool:
    return False


class Runner:
    """A thread that takes a turn and keeps it until it is told to go."""

    def __init__(
        self, turns: ExclusiveLock, *, alone: bool, stop: Callable[[], bool] = never
    ) -> None:
        self.came: list[bool] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(turns, alone, stop))
        self._thread.start()

    def _run(self, turns: ExclusiveLock, alone: bool, stop: Callable[[], bool]) -> None:
        with turns.turn(alone=alone, stop=stop) as came:
            self.came.append(came)
            self.entered.set()
            self.go.wait(10)

    def end(self) -> None:
        self.go.set()
        self._thread.join(10)


def test_ordinary_jobs_run_side_by_side() -> None:
    turns = ExclusiveLock()
    runners = [Runner(turns, alone=False) for _ in range(3)]
    assert all(runner.entered.wait(5) for runner in runners)
    for runner in runners:
        runner.end()


def test_a_suspect_waits_for_the_others_and_nobody_joins_it() -> None:
    turns = ExclusiveLock()
    first = Runner(turns, alone=False)
    assert first.entered.wait(5)
    suspect = Runner(turns, alone=True)
    assert not suspect.entered.wait(0.2)
    late = Runner(turns, alone=False)
    assert not late.entered.wait(0.2)  # a suspect that waits goes first
    first.end()
    assert suspect.entered.wait(5)
    assert not late.entered.wait(0.2)
    suspect.end()
    assert late.entered.wait(5)
    late.end()


def test_whoever_waits_for_its_turn_leaves_when_the_worker_stops() -> None:
    turns, stopping = ExclusiveLock(), threading.Event()
    suspect = Runner(turns, alone=True)
    assert suspect.entered.wait(5)
    waiting = [Runner(turns, alone=alone, stop=stopping.is_set) for alone in (True, False)]
    stopping.set()
    assert all(runner.entered.wait(5) for runner in waiting)
    assert [runner.came for runner in waiting] == [[False], [False]]
    for runner in (*waiting, suspect):
        runner.end()
    after = Runner(turns, alone=False)
    assert after.entered.wait(5)
    after.end()
