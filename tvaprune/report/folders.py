"""What a run left in a folder, read back for the page; a folder that a run did not leave is refused in one line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvaprune.errors import InputError
from tvaprune.files import read_json, write_json
from tvaprune.flags.recipes import RECIPE_NAME
from tvaprune.measure.generations import PROMPTS, Answers
from tvaprune.outputs import FINETUNE_LOG, GENERATIONS_NAME, RESULTS_NAME, TRAINING_LOG
from tvaprune.report.results import Results

_ANEW = "run it again, or give another folder"
Row = Mapping[str, float]


@dataclass(frozen=True)
class Generations:
    """What each model adds to some prompts, greedily, in pieces of text, one for a token."""

    prompts: tuple[str, ...]
    models: Mapping[str, tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class RunFolder:
    """One run.

    Attributes:
        name: By which the page calls it.
        gates: The log of its gate training, and the file that it is from; None where it trained none.
        tuning: The log of its fine-tuning.
        recipe: The flags that repeat it.
    """

    name: str
    path: Path
    results: Results
    gates: tuple[Path, list[Row]] | None
    tuning: list[Row] | None
    recipe: str | None
    generations: Generations | None

    @classmethod
    def read(cls, path: Path, name: str) -> "RunFolder":
        """Returns what a run left in a folder. Of its files only those that are its own count, not an older run's.

        Raises:
            InputError: If it holds no results, those of another version, or a file that cannot be read.
        """
        results = Results.read(path, _ANEW)
        if results is None:
            raise InputError(f"{path}: holds no {RESULTS_NAME}; give the folder of a run or of a comparison")
        place = path.resolve()  # "." has no name
        places = (place, place.parent) if place.name.startswith("sparsity_") else (place,)  # targets share a training
        logs = (place / TRAINING_LOG for place in places)
        log = next((file for file in logs if file.is_file()), None) if results.trained_gates else None
        tuned = path / FINETUNE_LOG
        recipe = path / RECIPE_NAME
        return cls(
            name, path, results,
            None if log is None else (log.resolve(), _log(log)),
            _log(tuned) if results.finetune is not None and tuned.is_file() else None,
            recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None,
            _generations(path / GENERATIONS_NAME, results.command),
        )  # fmt: skip


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Returns the runs of some folders; one that holds several targets, ``sparsity_*``, counts as these.

    Raises:
        InputError: If a folder holds no results that can be read.
    """
    found = [run for folder in folders for run in _runs_in(folder)]
    names = [folder.resolve().name for folder in found]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in found]
    return [RunFolder.read(folder, name) for folder, name in zip(found, names, strict=True)]


def _runs_in(folder: Path) -> list[Path]:
    if (folder / RESULTS_NAME).exists():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"sparsity_*/{RESULTS_NAME}")) or [folder]


def _log(path: Path) -> list[Row]:
    content = _read(path)
    rows = content.get("log") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise InputError(f"{path}: is no log of a training; {_ANEW}")
    return rows


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and "step" in row and all(isinstance(one, int | float | None) for one in row.values())


def write_generations(folder: Path, command: str, models: Mapping[str, Answers]) -> None:
    """Writes what models said beside the results of a run.

    Args:
        command: The run's: the page of another's results leaves it out.
        models: By what the page calls them, the dense one first.
    """
    write_json({"command": command, "prompts": PROMPTS, "models": models}, folder / GENERATIONS_NAME)


def _generations(path: Path, command: str) -> Generations | None:
    """Returns what the models of a run's command said, from its ``{"command", "prompts", "models"}``.

    ``models`` has for each name, and for each prompt, the pieces of text.
    """
    if not path.is_file():
        return None
    content = _read(path)
    try:
        if content["command"] != command:
            return None  # of a run whose place this one took
        prompts = tuple(map(str, content["prompts"]))
        models = {
            str(name): tuple(tuple(map(str, said)) for said in every) for name, every in content["models"].items()
        }
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: does not say what models added to prompts; {_ANEW}") from error
    if any(len(every) != len(prompts) for every in models.values()):
        raise InputError(f"{path}: not every model was given all prompts; {_ANEW}")
    return Generations(prompts, models)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({type(error).__name__}); {_ANEW}") from error
