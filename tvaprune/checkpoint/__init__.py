"""The pruned folder, out and in, and its card."""
