"""What a GPU makes of the engine and of plain diffusers: ``python -m tests.benchmarks.gpu``."""
