"""Benchmarks measure and print; tests assert. ``python -m tests.benchmarks`` runs them all.

Each compares two ways of doing the same in one run, in turns, and prints their ratio.
"""
