"""Log lines that libraries emit on import and that an operator can ignore."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

log = logging.getLogger(__name__)

# Logger name -> text. diffusers imports torchao whenever it is installed.
EXPECTED_LINES: Mapping[str, str] = {
    # Kernels for mxfp8 and sparse weights, which this engine does not use; few GPUs load them.
    "torchao": "Failed to load ",
    # Kernels of torchao's own autotuner, which is off.
    "torchao.kernel.intmm": "Detected no triton",
    # torch will refuse the way in which torchao registers enums; torchao has to change that.
    "torch.utils._pytree": "is an Enum subclass and is now natively supported by torch.compile",
    # For weights stored quantized; this engine quantizes after loading.
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
}


@contextmanager
def demote_expected_lines() -> Iterator[None]:
    """Log EXPECTED_LINES at DEBUG under this module's logger; other lines pass unchanged."""
    filters = {name: partial(_demote, text) for name, text in EXPECTED_LINES.items()}
    for name, demote in filters.items():
        logging.getLogger(name).addFilter(demote)
    try:
        yield
    finally:
        for name, demote in filters.items():
            logging.getLogger(name).removeFilter(demote)


def _demote(text: str, record: logging.LogRecord) -> bool:
    """Logging filter: False drops the record."""
    if text not in record.getMessage():
        return True
    log.debug("%s: %s", record.name, record.getMessage())
    return False
