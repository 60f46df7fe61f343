"""The end of a command: a user's mistake is one line and exit code 2, an interruption says how to go on."""

import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging

from tvaprune.errors import InputError

EXIT_INPUT = 2
EXIT_INTERRUPTED = 130
GOES_ON = "--resume_from_checkpoint True goes on from the last checkpoint"


def run_command(command: Callable[[], None], goes_on: str = GOES_ON) -> int:
    """Runs a command and returns its exit code; a user's mistake ends in one line.

    Args:
        goes_on: What an interrupted user is told.
    """
    logging.set_verbosity_error()
    try:
        command()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print(f"interrupted; {goes_on}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
