"""``inpaint-worker`` processes for tests, over one database and one Redis."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shared.jobs.queue import Queue
from tests.workers.worker_harness import WorkerHarness

WAIT_SECONDS = 60


def wait_for(condition: Callable[[], bool], *, seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.05)


class Fleet:
    """``inpaint-worker`` processes over one database and one Redis."""

    def __init__(self, url: str, redis_url: str, folder: Path) -> None:
        self.harness = WorkerHarness(url, folder)
        self.queue = Queue(redis_url)
        self.environment = {
            **os.environ,
            "INPAINT_DATABASE_URL": url,
            "INPAINT_BROKER_URL": redis_url,
            "INPAINT_ROOTS": str(folder),
            "INPAINT_HOME": str(folder / "home"),
            "INPAINT_MAINTENANCE_SECONDS": "0.2",
            "INPAINT_LEASE_SECONDS": "3",
            "INPAINT_HEARTBEAT_SECONDS": "0.5",
        }
        self.folder = folder
        self.logs: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"worker-{len(self.processes)}.log"
        command = [sys.executable, "-m", "workers.supervisor", "--engine", "opencv", *options]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env=self.environment, stdout=file, stderr=file, cwd=self.folder
            )
        self.processes.append(process)
        self.logs.append(log)
        return process

    def log(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def is_ready(self) -> bool:
        return self.log().count("jobs at a time") >= len(self.processes)

    def add(
        self,
        count: int,
        *,
        size: tuple[int, int] = (64, 64),
        radius: int = 5,
        prefix: str = "",
    ) -> list[int]:
        """Jobs that repaint nearly all of an image; a larger size and radius take longer."""
        image = self.harness.write_image(f"{prefix}in.png", size)
        mask = self.harness.write_mask(f"{prefix}mask.png", size, (1, 1, size[0] - 1, size[1] - 1))
        return [
            self.harness.add(
                image=image,
                mask=mask,
                output=self.harness.path(f"{prefix}out/{number}.png"),
                engine="opencv",
                opencv_radius=radius,
            )
            for number in range(count)
        ]

    def states(self) -> list[str]:
        with self.harness.db.read() as connection:
            rows = connection.exec_driver_sql("SELECT state FROM jobs ORDER BY id").all()
        return [row[0] for row in rows]

    def children(self) -> list[int]:
        """Process ids of the worker processes, not of their supervisors."""
        ids = []
        for supervisor in self.processes:
            listed = subprocess.run(
                ["ps", "-o", "pid=", "--ppid", str(supervisor.pid)],
                capture_output=True,
                check=False,
            )
            ids += [int(pid) for pid in listed.stdout.split()]
        return ids

    def stop(self) -> None:
        """Sends SIGTERM to every supervisor that still runs, and waits for its end."""
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        self.stop()
        self.queue.close()
        self.harness.close()
