"""Log lines of libraries' imports that say nothing to whoever runs a worker."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

log = logging.getLogger(__name__)

# Where torchao is installed, diffusers imports it, asked or not.
EXPECTED_LINES: Mapping[str, str] = {
    # Kernels for mxfp8 and for sparse weights, of which we use none; they load on some GPUs only.
    "torchao": "Failed to load ",
    # Kernels tuned by torchao's own autotuner, which is off.
    "torchao.kernel.intmm": "Detected no triton",
    # How torchao registers its enums, which torch is going to refuse: for torchao's authors.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
    # For weights that were saved quantized; ours are read whole and quantized afterwards.
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


@contextmanager
def demote_expected_lines() -> Iterator[None]:
    """Logs these lines, and no others of their loggers, at DEBUG under our own name."""
    filters = {name: partial(_demote, text) for name, text in EXPECTED_LINES.items()}
    for name, keep in filters.items():
        logging.getLogger(name).addFilter(keep)
    try:
        yield
    finally:
        for name, keep in filters.items():
            logging.getLogger(name).removeFilter(keep)


def _demote(text: str, record: logging.LogRecord) -> bool:
    if text not in record.getMessage():
        return True
    log.debug("%s: %s", record.name, record.getMessage())
    return False
