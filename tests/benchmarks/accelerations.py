"""Ways to compute less, on the CPU with the tiny pipeline: their speed and how the picture changes.

With random weights a change says that the picture is another one, not that it is a worse one.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import torch

from tests.benchmarks.gpu.cases import Bench
from tests.benchmarks.gpu.measuring import count_work, print_table
from tests.benchmarks.gpu.models import tiny
from tests.benchmarks.gpu.parts import accelerations

STEPS, SIDE = 50, 128


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    subject = replace(tiny(torch.device("cpu")), steps=STEPS, side=SIDE, max_batch=16)
    bench = Bench(subject, count_work(subject), seconds=0, compile="off")
    head, *rows = accelerations(bench)
    print_table(f"Accelerations, {STEPS} steps, {SIDE}x{SIDE}", head, rows)


if __name__ == "__main__":
    sys.exit(main())
