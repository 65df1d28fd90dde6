"""What fills a region: the protocol, the OpenCV and diffusion engines, and how one is loaded.

Importing this package loads neither torch nor OpenCV; ``load_engine`` loads what it needs.
"""

from workers.engines.registry import load_engine

__all__ = ["load_engine"]
