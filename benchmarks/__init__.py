"""Measurements of the whole product with real processes: `python -m benchmarks --help`."""
