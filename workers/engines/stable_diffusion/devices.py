"""Which CUDA devices this machine has; run as a program so that the launcher never loads torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class Devices:
    """cuda: the devices' names in torch's order. torch: its version, None where not installed."""

    cuda: tuple[str, ...]
    torch: str | None


def find_devices() -> Devices:
    """Loads torch; a machine without it has no devices."""
    try:
        import torch
    except ImportError:
        return Devices(cuda=(), torch=None)
    names = tuple(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
    return Devices(cuda=names, torch=str(torch.__version__))


if __name__ == "__main__":
    print(json.dumps(asdict(find_devices())))
