"""Submitting a million rows: rows a second and peak memory, with SQLite and with PostgreSQL.

python -m tests.benchmarks.submitting [ROWS]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests import servers
from tests.benchmarks.side_by_side import print_row

ROWS = 1_000_000


def main(rows: int = ROWS) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        manifest = _manifest(folder / "catalog.csv", rows)
        with servers.redis_server(folder) as redis, servers.postgres_server(folder) as cluster:
            urls = {
                "SQLite": f"sqlite:///{folder / 'jobs.db'}",
                "PostgreSQL": servers.create_database(cluster.url),
            }
            print_row(f"submitting {rows:,} rows", "rows a second", "peak memory, MB", "seconds")
            for kind, url in urls.items():
                _measure(kind, manifest, rows, url, redis.url)


def _manifest(path: Path, rows: int) -> Path:
    with path.open("w") as file:
        file.write("key,image,mask,product\n")
        for n in range(rows):
            file.write(f"sku-{n:07d},images/{n % 1000:03d}/{n}.jpg,masks/{n}.png,product {n}\n")
    return path


def _measure(kind: str, manifest: Path, rows: int, url: str, redis_url: str) -> None:
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "INPAINT_DATABASE_URL": url,
        "INPAINT_BROKER_URL": redis_url,
    }
    subprocess.run([scripts / "inpaint-jobs", "upgrade"], env=environment, check=True, stdout=-3)
    command = ["inpaint-submit", str(manifest), "--engine", "sd2", "--preset", "ecommerce"]
    start = time.perf_counter()
    child = os.posix_spawn(
        scripts / "inpaint-submit",
        [*command, "--json"],
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
    )
    # wait4 gives this child's peak memory; RUSAGE_CHILDREN would include the upgrade's.
    _, status, usage = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    if status:
        raise SystemExit(f"inpaint-submit exited with status {status}")
    print_row(
        f"  {kind}", f"{rows / seconds:,.0f}", f"{usage.ru_maxrss / 1024:,.0f}", f"{seconds:.1f}"
    )


if __name__ == "__main__":
    main(*(int(argument.replace("_", "")) for argument in sys.argv[1:]))
