"""Stable Diffusion v2 inpainting: the only package that imports torch and diffusers."""
