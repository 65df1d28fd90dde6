"""inpaint-submit in a process of its own; with ``--peak`` its peak memory in kB on stderr."""

from __future__ import annotations

import resource
import sys

from producer.cli.submit import submit

if __name__ == "__main__":
    peak = "--peak" in sys.argv
    args = [arg for arg in sys.argv[1:] if arg != "--peak"]
    try:
        submit(args)
    finally:
        if peak:
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
