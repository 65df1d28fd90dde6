"""Runs every benchmark that needs no GPU and prints its table."""

from tests.benchmarks import (
    accelerations,
    batching,
    catalog,
    compositing,
    fidelity,
    gates,
    host_side,
    job_cost,
    planning,
    publishing,
    quantization,
    recovery,
    submitting,
    tile_loop,
)
from tests.benchmarks.side_by_side import machine

print(machine())
for benchmark in (
    publishing,
    job_cost,
    planning,
    batching,
    host_side,
    accelerations,
    quantization,
    tile_loop,
    catalog,
    submitting,
    fidelity,
    gates,
    compositing,
):
    benchmark.main()
recovery.main()
