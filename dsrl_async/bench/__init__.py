"""Benchmarks: `python -m dsrl_async.bench NAME`."""
