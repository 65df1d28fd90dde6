"""An axis-aligned box of pixels."""

from __future__ import annotations

from typing import NamedTuple


class Box(NamedTuple):
    """Half open, in pixels of the frame that its owner names."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    @property
    def is_empty(self) -> bool:
        """Whether it holds no pixel; edges in the wrong order count as empty."""
        return self.width <= 0 or self.height <= 0

    def clipped(self, size: tuple[int, int]) -> Box:
        """The part inside an image of (width, height); empty if there is none."""
        return Box(
            max(self.left, 0), max(self.top, 0), min(self.right, size[0]), min(self.bottom, size[1])
        )

    def moved(self, dx: int, dy: int) -> Box:
        return Box(self.left + dx, self.top + dy, self.right + dx, self.bottom + dy)
