"""Timings of the ops beside torch eager and torch.compile: `python -m benchmarks.run --device cpu|cuda`."""
