"""Where to inpaint: boxes and windows from a mask. No image pixels, no I/O."""
