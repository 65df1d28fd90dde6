"""Engines, which fill regions: their protocol, their options, OpenCV and Stable Diffusion.

Importing this package loads neither torch nor OpenCV; ``load_engine`` imports what it needs.
"""

from workers.engines.registry import load_engine

__all__ = ["load_engine"]
