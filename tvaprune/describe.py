"""`python -m tvaprune.describe MASK --model_name_or_path DIR`: what a mask keeps, from the model's config alone."""

import sys

from tvaprune.cli import run_command
from tvaprune.stages.describe import main

if __name__ == "__main__":
    sys.exit(run_command(main))
