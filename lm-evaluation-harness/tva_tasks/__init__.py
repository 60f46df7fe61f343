"""Offline zero-shot tasks: a folder that the lm-evaluation-harness includes (``--include_path``)."""
