"""Applies a mask (`--mask_loc`): measures, saves, fine-tunes the narrower model; or trains a mask (`--do_train`)."""

import sys
from pathlib import Path

from tvaprune import shipped
from tvaprune.cli import run_command
from tvaprune.errors import InputError
from tvaprune.run import Arguments
from tvaprune.stages.apply import run_apply
from tvaprune.stages.finetune import run_finetune
from tvaprune.stages.prune import run_prune


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
    elif args.evaluation.do_zero_eval or (has_mask and (args.training.do_eval or args.prune.save_pruned is not None)):
        run_apply(args)
    else:
        raise InputError(
            "nothing to do: give --do_eval, --do_zero_eval or --save_pruned with --mask_loc, or --do_train"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
