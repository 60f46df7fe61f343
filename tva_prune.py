"""Learns a pruning mask and measures the narrower model: `python tva_prune.py --model_name_or_path M ...`."""

import sys

from tvaprune.pipeline import run_prune
from tvaprune.run import Arguments
from tvaprune.runtime import run_command

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_prune(Arguments.parse())))
