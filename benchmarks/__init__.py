"""What a request costs: `python -m benchmarks` compares, `python -m benchmarks.check` checks."""
