"""What the tool costs and is worth, and what must not change: commands, run as `python -m benchmarks.NAME`."""
