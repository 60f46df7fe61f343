"""Learns a pruning mask and measures the narrower model: `python tva_prune.py --model_name_or_path M ...`."""

import sys

from tvaprune import pipeline
from tvaprune.runtime import parse, run_command


def main() -> None:
    """Parses the flags and runs the stages."""
    pipeline.run_prune(parse(pipeline.ARGUMENT_CLASSES))


if __name__ == "__main__":
    sys.exit(run_command(main))
