"""Speed of the engine and of plain diffusers on a GPU: ``python -m tests.benchmarks.gpu``."""
