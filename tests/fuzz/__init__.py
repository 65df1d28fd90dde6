"""Hostile files against the picture code: ``python -m tests.fuzz --minutes 10``."""
