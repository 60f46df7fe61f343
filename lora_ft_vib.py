"""Applies a mask (`--mask_loc`): measures (`--do_eval`, `--do_zero_eval`), saves (`--save_pruned`); or trains one."""

import sys
from pathlib import Path

from tvaprune import shipped
from tvaprune.errors import InputError
from tvaprune.pipeline import run_evaluate, run_prune, run_save
from tvaprune.run import Arguments
from tvaprune.runtime import run_command


def main() -> None:
    """Parses the flags and runs what they ask for."""
    args = Arguments.parse(shipped.complete(sys.argv[1:], Path(__file__).resolve().parent))
    has_mask = args.prune.mask_loc is not None
    if args.training.do_train and has_mask:
        raise InputError("--do_train with --mask_loc is fine-tuning, which is not here yet: leave one of them out")
    if args.training.do_train:
        run_prune(args)
    elif args.evaluation.do_zero_eval or (args.training.do_eval and has_mask):
        run_evaluate(args)
    elif args.prune.save_pruned is not None and has_mask:
        run_save(args)
    else:
        raise InputError(
            "nothing to do: give --do_eval, --do_zero_eval or --save_pruned with --mask_loc, or --do_train without it"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
