"""Learns a pruning mask and measures the narrower model: `python tva_prune.py --model_name_or_path M ...`."""

import sys

from tvaprune.cli import run_command
from tvaprune.run import Arguments
from tvaprune.stages.prune import run_prune

if __name__ == "__main__":
    sys.exit(run_command(lambda: run_prune(Arguments.parse())))
