"""List this machine's CUDA devices.

The supervisor runs this module as a program (JSON on stdout), so that it never loads torch itself.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Devices:
    """cuda: device names in torch's order. torch: its version, None if it is not installed."""

    cuda: tuple[str, ...]
    torch: str | None


def find_devices() -> Devices:
    """Load torch and list its CUDA devices; none if torch is not installed."""
    try:
        import torch
    except ImportError:
        return Devices(cuda=(), torch=None)
    names = tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return Devices(cuda=names, torch=str(torch.__version__))


if __name__ == "__main__":
    print(json.dumps(asdict(find_devices())))
