"""The command line: a verb, its flags, its stage; and the end of a command.

``--help`` and what is refused by name answer before anything heavy is imported. A user's mistake is one line and exit
code 2, and so is a full disk; an interruption says how to go on. A reader that closes the output early ends nothing.
Of several processes the first that ends says why, and all end with its exit code.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from tvaprune import endings, ranks
from tvaprune.errors import InputError, one_line, out_of_memory, program, reason
from tvaprune.flags.recipes import OFF, ON, advice_of, expand, is_on, naming_recipe, recipe_of
from tvaprune.flags.verbs import MODES, VERBS, check_flags, from_home, underscored
from tvaprune.garbage import uncollected

EXIT_INPUT = 2
EXIT_SIGNAL = 128  # plus the signal's number
EXIT_LOST = 1  # an error of the program, or another process of the run that was killed


def run_command(command: Callable[[], object], advice: str = VERBS["prune"].goes_on) -> int:
    """Runs a command and returns its exit code; a user's mistake, or memory that ran out, ends in one line.

    Args:
        advice: What an interrupted user is told.
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # of a hub that is away it would tell at every try
    os.environ.setdefault("DATASETS_VERBOSITY", "critical")  # of a file that cannot be read it would tell before us
    name = Path(program()[-1]).name
    try:
        with endings.unclosed(), endings.watched(), ranks.quiet():
            command()
            ranks.finish()
    except InputError as error:
        return _end(EXIT_INPUT, f"{name}: {one_line(str(error))}")
    except KeyboardInterrupt as error:
        return _end(EXIT_SIGNAL + getattr(error, "number", signal.SIGINT), f"interrupted; {advice}")
    except Exception as error:
        full, memory = endings.full_disk(error), out_of_memory(error)
        if full is not None or memory is not None:
            return _end(EXIT_INPUT, f"{name}: {memory if full is None else f'{full}; {advice}'}")
        if ranks.lost(error):
            return _end(EXIT_LOST, f"{name}: another process of the run is gone ({reason(error)}); {advice}")
        if ranks.launched() == 1:
            raise
        return _end(EXIT_LOST, "".join(traceback.format_exception(error)))
    return 0


def _end(code: int, line: str) -> int:
    """Says why a command ends, unless another process of the run did, and returns the exit code of all."""
    if not ranks.ends_first():
        return ranks.code_told(otherwise=code)
    endings.close_bars()
    print(line, file=sys.stderr, flush=True)
    ranks.told(code)
    return code


def run_verb(verb: str, arguments: list[str], also: tuple[str, ...] = ()) -> Any:
    """Runs a verb and returns what its stage does; the one way in, for command lines and calls from Python.

    Args:
        also: Flags that are accepted beside the verb's own: the released scripts' modes.

    Raises:
        InputError: If the flags cannot be used.
    """
    ranks.check_numbers()
    arguments = from_home(arguments)
    module, _, function = VERBS[verb].entry.partition(":")
    if not VERBS[verb].first:  # a verb with a parser of its own
        if ranks.launched() > 1:
            raise InputError(f"{verb} runs in one process: call it without torchrun or accelerate launch")
        with uncollected():
            stage = import_module(module)
        return getattr(stage, function)(arguments)
    with naming_recipe(verb, arguments):
        arguments = expand(verb, arguments)
        check_flags(verb, arguments, also)
        with uncollected():  # a tenth of a start
            from transformers.utils import logging

            from tvaprune.flags.conditions import parse

            logging.set_verbosity_error()
            parsed = parse(verb, arguments)
            stage = import_module(module)
        ranks.agree(parsed.recipe)
        return getattr(stage, function)(parsed)


def main() -> int:
    """Runs ``tvaprune VERB ...`` and returns its exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        return run_command(lambda: print(_usage()))
    return run_command(lambda: _run(words[0], words[1:]), advice_of(words[0], words[1:]))


def _run(verb: str, arguments: list[str]) -> None:
    if verb not in VERBS:
        raise InputError(f"'{verb}' is no verb: give one of {', '.join(VERBS)}; --help says what each does")
    asks = {"--help", "-h"} & set(arguments)
    run_verb(verb, arguments if asks else [*VERBS[verb].given, *arguments])


def _usage() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {verb.help}" for name, verb in VERBS.items())
    return f"usage: tvaprune VERB --FLAG VALUE ...\n\n{verbs}\n\ntvaprune VERB --help lists the verb's flags."


def released(arguments: list[str]) -> tuple[str, list[str]]:
    """Translates a command line of `lora_ft_vib.py` to a verb and its flags.

    Raises:
        InputError: If it asks for nothing, or for fine-tuning without a mask.
    """
    words = [underscored(word) for word in arguments]
    recipe = recipe_of("finetune", [word for word in words if word != "-h"])
    asks = {name for name in recipe if is_on(recipe, name)}
    has_mask = bool({"mask_loc", "plan"} & asks)
    rest = _without(words, tuple(f"--{name}" for name in MODES if name != "do_eval"))
    if "finetune" in asks and not has_mask:
        raise InputError("--finetune needs --mask_loc (or --plan): fine-tuning begins with the model that it leaves")
    if has_mask and asks & {"do_train", "finetune"}:
        return "finetune", _without(rest, ("--do_eval",))
    if "do_train" in asks:
        return "prune", _without(rest, ("--do_eval",))
    if "do_zero_eval" in asks or (has_mask and asks & {"do_eval", "save_pruned"}) or {"--help", "-h"} & set(words):
        return "apply", rest
    raise InputError(
        "nothing to do: give --do_eval, --do_zero_eval or --save_pruned with --mask_loc (or --plan), or --do_train"
    )


def _without(arguments: list[str], names: tuple[str, ...]) -> list[str]:
    """Returns a command line without some truth-valued flags and their values."""
    kept: list[str] = []
    skips = False
    for word in arguments:
        if skips and word.lower() in (*ON, *OFF):
            skips = False
            continue
        skips = word in names
        if not skips and word.split("=", 1)[0] not in names:
            kept.append(word)
    return kept
