"""A pruned checkpoint in other formats, each verified against the checkpoint after it is written."""

import sys

from tvaprune import VerbModule

sys.modules[__name__].__class__ = VerbModule  # `from tvaprune import export` is the verb, whatever came before
