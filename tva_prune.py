"""Learns a pruning mask and measures the narrower model: `python tva_prune.py --model_name_or_path M ...`."""

import sys

from tvaprune.cli import run_command, run_verb


def main() -> None:
    """Runs `tvaprune prune`."""
    run_verb("prune", sys.argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
