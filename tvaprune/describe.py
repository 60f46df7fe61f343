"""`python -m tvaprune.describe MASK --model_name_or_path DIR`: what a mask keeps, from the model's config alone."""

import sys

from tvaprune import VerbModule
from tvaprune.cli import run_command
from tvaprune.stages.describe import main

sys.modules[__name__].__class__ = VerbModule  # `from tvaprune import describe` is the verb, whatever came before

if __name__ == "__main__":
    sys.exit(run_command(main))
