"""Injects faults into worker processes: Python imports this module first if it is on the path."""

import sys

if "workers.worker_process" in sys.orig_argv:
    import tests.faults.worker_faults  # noqa: F401
