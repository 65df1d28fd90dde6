"""From the bytes of an image to the bytes of its result."""
