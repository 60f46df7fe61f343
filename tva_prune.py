"""Learns a pruning mask and measures the narrower model: `python tva_prune.py --model_name_or_path M ...`."""

import sys

from tvaprune.cli import run_command, run_verb
from tvaprune.flags.recipes import advice_of


def main() -> None:
    """Runs `tvaprune prune`."""
    run_verb("prune", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main, advice_of("prune", sys.argv[1:])))
