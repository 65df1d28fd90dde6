"""Benchmarks measure and print; tests assert. ``python -m tests.benchmarks`` runs them all.

Each compares two implementations in one process, alternately, and prints their ratio.
"""
