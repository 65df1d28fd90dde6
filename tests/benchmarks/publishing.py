"""Publishing: pipelined messages compared with a ``send_task`` loop."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shared.jobs.queue import TASK, Message, Queue, celery_app, queue_name
from tests import servers
from tests.benchmarks.side_by_side import measure_alternately, measure_seconds, print_row

OURS, THEIRS, REPEATS = 20_000, 2_000, 5  # messages per run, runs


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, servers.redis_server(Path(folder)) as redis:
        queue = Queue(redis.url)
        app = celery_app(redis.url, engines=["opencv"])
        messages = [Message(job=n, attempt=0, engine="opencv") for n in range(OURS)]
        name = queue_name("opencv")

        def theirs() -> None:
            for number in range(THEIRS):
                app.send_task(TASK, args=(number, 0), queue=name)

        pair = measure_alternately(
            lambda: measure_seconds(lambda: queue.publish(messages)) / OURS,
            lambda: measure_seconds(theirs) / THEIRS,
            repeats=REPEATS,
        )
        queue.close()
        app.close()
    print_row("publishing, messages a second", "ours", "send_task loop", "ratio")
    print_row(
        "", f"{1 / min(pair.ours):,.0f}", f"{1 / min(pair.theirs):,.0f}", f"{pair.ratio:.1f}x"
    )


if __name__ == "__main__":
    main()
