"""Evaluates a mask (`--do_eval`, `--do_zero_eval`, `--mask_loc K`) or trains one (`--do_train --prune_method vib`)."""

import sys
from pathlib import Path

from tvaprune import pipeline, shipped
from tvaprune.errors import InputError
from tvaprune.runtime import parse, run_command


def main() -> None:
    """Parses the flags and runs what they ask for."""
    arguments = parse(pipeline.ARGUMENT_CLASSES, shipped.complete(sys.argv[1:], Path(__file__).resolve().parent))
    prune, evaluation, training = arguments[2], arguments[-2], arguments[-1]
    if training.do_train and prune.mask_loc is None:
        pipeline.run_prune(arguments)
    elif evaluation.do_zero_eval or (training.do_eval and prune.mask_loc is not None):
        pipeline.run_evaluate(arguments)
    else:
        raise InputError("nothing to do: give --do_eval or --do_zero_eval with --mask_loc, or --do_train without it")


if __name__ == "__main__":
    sys.exit(run_command(main))
