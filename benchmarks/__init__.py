"""The demo and the measurements: python -m benchmarks.demo, python -m benchmarks.core."""
