"""Stable Diffusion v2 inpainting: the only package that imports torch and diffusers.

``loaders`` builds a ``DiffusionEngine`` (``engine``), whose device thread loops over scheduling
(``batching``), the model's forward passes (``denoiser``, ``unet_runner``) and decoding.
"""
