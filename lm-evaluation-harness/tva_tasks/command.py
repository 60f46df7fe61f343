"""`tva_lm_eval`: the harness's own command with this folder among its tasks.

lm-eval 0.4.13 looks for tasks in its own folder and in ``--include_path``; it reads no entry points of other packages.
"""

import sys
from pathlib import Path

from lm_eval.__main__ import cli_evaluate

SUBCOMMANDS = ("run", "ls", "validate")


def with_tasks(arguments: list[str]) -> list[str]:
    """Returns the harness's arguments, this folder included unless they name another."""
    if any(argument.split("=", 1)[0] == "--include_path" for argument in arguments):
        return arguments
    subcommand = arguments[0] if arguments and arguments[0] in SUBCOMMANDS else None
    if not arguments or (subcommand is None and arguments[0] in ("-h", "--help")):
        return arguments
    return [*arguments, "--include_path", str(Path(__file__).parent)]


def main() -> None:
    """Runs the harness."""
    sys.argv[1:] = with_tasks(sys.argv[1:])
    cli_evaluate()
