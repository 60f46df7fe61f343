"""What a run leaves: results.json, tables, pictures, the page."""

import sys

from tvaprune import VerbModule

sys.modules[__name__].__class__ = VerbModule  # `from tvaprune import report` is the verb, whatever came before
