"""Recipes: a verb's flags as YAML. ``--config FILE`` reads one; the command line wins; every run writes its own.

``--preset NAME`` reads one of those beside this module.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tvaprune.errors import InputError, check_file
from tvaprune.flags.verbs import TARGETS, VERBS, flag_name, from_home, given_names

RECIPE_NAME = "recipe.yaml"
PRESETS = {path.stem: path for path in Path(__file__).with_name("presets").glob("*.yaml")}
OFF, ON = ("false", "f", "no", "n", "0"), ("true", "t", "yes", "y", "1")  # transformers' words for truth values
_AS_FLAGS = {"true": "True", "false": "False"}  # YAML's words for what a command line spells so


def expand(verb: str, arguments: list[str]) -> list[str]:
    """Returns a command line in which ``--config FILE`` is replaced by the file's flags, before those given.

    Raises:
        InputError: If there is no such preset, or the file cannot be read, is of another verb, or has a key that is no
            flag of this one.
    """
    rest, recipes = _parted(arguments)
    flags: list[str] = []
    for said, recipe in recipes:
        flags += _flags_of(verb, said, recipe, not set(TARGETS).isdisjoint(given_names(rest)))
    return flags + rest


@contextmanager
def naming_recipe(verb: str, arguments: list[str]) -> Iterator[None]:
    """Names the recipe in what is refused within, where the flag that is refused, the first, stands there alone."""
    try:
        yield
    except InputError as error:
        rest, recipes = _parted(arguments)
        flag = re.search(r"--([a-z_]+)", str(error))
        if flag is not None and flag[1] in VERBS[verb].flags - {"config", *given_names(rest)}:
            for said, recipe in reversed(recipes):  # the last that has it counts
                if flag[1] in given_names(_flags_of(verb, said, recipe, is_target_given=False)):
                    raise InputError(f"{said}: {error}") from error
        raise


def _parted(arguments: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns a command line without its recipes, and these: as they were said, and their files."""
    rest, recipes = [], []
    words = iter(arguments)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "--preset"):
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        recipes.append((f"{flag} {given}", given if flag == "--config" else _preset(given)))
    return rest, recipes


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise InputError(f"--preset {name}: there is none of this name; give {' or '.join(sorted(PRESETS))}")
    return str(PRESETS[name])


def _flags_of(verb: str, given: str, recipe: str, is_target_given: bool) -> list[str]:
    check_file(given, recipe, "a recipe.yaml")
    try:
        text = Path(recipe).read_text(encoding="utf-8")
        content = yaml.load(text, Loader=yaml.BaseLoader)  # all values are text: off and no are no booleans
        names = [key.value for key, _ in yaml.compose(text, yaml.BaseLoader).value] if isinstance(content, dict) else []
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{given}: is not YAML ({' '.join(str(error).split())[:120]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{given}: needs lines of `flag: value`")
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise InputError(f"{given}: {twice[0]} is there twice, and only the last would count; leave one out")
    if content.pop("verb", verb) != verb:
        raise InputError(f"{given}: is a recipe of another verb than {verb}; call the verb that it names")
    flags = []
    for key, value in content.items():
        if key not in VERBS[verb].flags:
            near = difflib.get_close_matches(str(key), VERBS[verb].flags, 1)
            raise InputError(f"{given}: {key!r} is no flag of {verb}{f'; perhaps {near[0]}' if near else ''}")
        if is_target_given and key in TARGETS:
            continue
        values = value if isinstance(value, list) else [value]
        if any(isinstance(item, dict | list) or item == "" for item in values):
            raise InputError(f"{given}: {key} needs a plain value, or a list of them")
        flags += [f"--{key}", *(_AS_FLAGS.get(text, text) for text in from_home(map(str, values)))]
    return flags


def recipe_of(verb: str, arguments: list[str]) -> dict[str, object]:
    """Returns a command line's flags as a recipe: of a flag given twice the last one counts."""
    recipe: dict[str, Any] = {"verb": verb}
    name: str | None = None
    values: list[str] = []
    for word in [*arguments, "--"]:
        if not word.startswith("--"):
            values.append(word)
            continue
        if name is not None:
            typed = [yaml.safe_load(value) if _is_plain(value) else value for value in values]
            is_off = name.startswith("no_") and name not in VERBS[verb].flags  # argparse's way of saying False
            name = name.removeprefix("no_") if is_off else name
            recipe.pop(name, None)
            recipe[name] = not is_off if not typed else typed[0] if len(typed) == 1 else typed
        name, value = flag_name(word), word.partition("=")[2]
        values = [value] if value else []
    return recipe


def is_on(recipe: Mapping[str, object], name: str) -> bool:
    """Tells whether a flag is given, and does not say False, or 0."""
    return str(recipe.get(name, False)).lower() not in OFF


def advice_of(verb: str, arguments: list[str]) -> str:
    """Returns what the user of an interrupted command is told; scores have no checkpoints, and may have left files."""
    method = recipe_of(verb, arguments).get("prune_method", "vib") if verb == "prune" else "vib"
    if method == "vib":
        return VERBS.get(verb, VERBS["prune"]).goes_on
    what = "goes on after its last round" if method == "bonsai" else "does it again"
    return f"the same command with --overwrite_output_dir {what}"


def _is_plain(value: str) -> bool:
    """Tells a number or a truth value, whose text YAML gives back as it was."""
    try:
        loaded = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError):  # a name may hold whatever YAML has a meaning for
        return False
    return isinstance(loaded, bool | int | float) and str(loaded) == value
