"""TVA-Prune: learned structured pruning of large language models into narrower, plain, dense checkpoints."""

__version__ = "0.1.0"
