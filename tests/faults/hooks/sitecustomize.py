"""Python imports this first in every worker whose PYTHONPATH begins here."""

import sys

if "workers.worker_process" in sys.orig_argv:
    import tests.faults.inside  # noqa: F401
