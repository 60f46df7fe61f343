"""Evaluates a mask (`--mask_loc K --do_eval`), writes the pruned model (`--save_pruned DIR`), or trains a mask."""

import sys

from tvaprune.errors import InputError
from tvaprune.pipeline import Arguments, run_evaluate, run_prune, run_save
from tvaprune.runtime import run_command


def main() -> None:
    """Parses the flags and runs what they ask for."""
    args = Arguments.parse()
    if args.training.do_train and args.prune.mask_loc is None:
        run_prune(args)
    elif args.training.do_eval and args.prune.mask_loc is not None:
        run_evaluate(args)
    elif args.prune.save_pruned is not None and args.prune.mask_loc is not None:
        run_save(args)
    else:
        raise InputError("nothing to do: give --do_eval or --save_pruned with --mask_loc, or --do_train without it")


if __name__ == "__main__":
    sys.exit(run_command(main))
