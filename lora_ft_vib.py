"""Applies a mask (`--mask_loc`): measures, saves, fine-tunes the narrower model; or trains a mask (`--do_train`)."""

import sys
from pathlib import Path

from tvaprune import shipped
from tvaprune.errors import InputError
from tvaprune.pipeline import run_evaluate, run_prune, run_save
from tvaprune.recover import run_finetune
from tvaprune.run import Arguments
from tvaprune.runtime import run_command


def main() -> None:
    """Parses the flags and runs what they ask for."""
    args = Arguments.parse(shipped.complete(sys.argv[1:], Path(__file__).resolve().parent))
    has_mask = args.prune.mask_loc is not None
    if args.finetune.finetune and not has_mask:
        raise InputError("--finetune needs --mask_loc: fine-tuning begins with the model that a mask leaves")
    if has_mask and (args.training.do_train or args.finetune.finetune):
        run_finetune(args)
    elif args.training.do_train:
        run_prune(args)
    elif args.evaluation.do_zero_eval or (args.training.do_eval and has_mask):
        run_evaluate(args)
    elif args.prune.save_pruned is not None and has_mask:
        run_save(args)
    else:
        raise InputError(
            "nothing to do: give --do_eval, --do_zero_eval or --save_pruned with --mask_loc, or --do_train"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
