"""TVA-Prune: learned structured pruning of large language models into narrower, plain, dense checkpoints.

Importing it registers the pruned model types with transformers' Auto classes.
"""

__version__ = "0.1.0"

from tvaprune.auto_classes import register

register()
