"""Applies a mask (`--mask_loc`): measures, saves, fine-tunes the narrower model; or trains a mask (`--do_train`)."""

import sys
from pathlib import Path

from tvaprune.cli import released, run_command, run_verb


def main() -> None:
    """Translates the released flags to a verb of `tvaprune` and runs it."""
    arguments = sys.argv[1:]
    if any(word.startswith("--do_zero_eval") for word in arguments):
        from tvaprune import shipped  # heavy, and a mistyped flag is to be told at once

        arguments = shipped.complete(arguments, Path(__file__).resolve().parent)
    run_verb(*released(arguments))


if __name__ == "__main__":
    sys.exit(run_command(main))
