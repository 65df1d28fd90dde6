"""Python imports this first in every worker whose PYTHONPATH begins here."""

import sys

if "workers.tasks" in sys.orig_argv:
    import tests.faults.inside  # noqa: F401
