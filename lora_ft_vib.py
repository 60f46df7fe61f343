"""Applies a mask (`--mask_loc`): measures, saves, fine-tunes the narrower model; or trains a mask (`--do_train`)."""

import sys
from pathlib import Path

from tvaprune import shipped
from tvaprune.cli import released, run_command, run_verb


def main() -> None:
    """Translates the released flags to a verb of `tvaprune` and runs it."""
    verb, arguments = released(shipped.complete(sys.argv[1:], Path(__file__).resolve().parent))
    run_verb(verb, arguments)


if __name__ == "__main__":
    sys.exit(run_command(main))
