"""Hostile files against the image code: ``python -m tests.fuzz --minutes 10``."""
