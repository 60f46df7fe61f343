"""`tvaprune report DIR ...`: the results page of what runs left in folders, several side by side.

``--prompts`` asks the models of the runs first, where they were saved.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from tvaprune.errors import InOneLine, InputError, reason
from tvaprune.files import CONFIG_NAME
from tvaprune.flags.recipes import RECIPE_NAME
from tvaprune.measure.generations import Answers, answers
from tvaprune.models.load import load_model
from tvaprune.outputs import PAGE_NAME, RESULTS_NAME, wrote
from tvaprune.report.folders import RunFolder, read_runs, write_generations
from tvaprune.report.page import Page
from tvaprune.report.runs import page_of
from tvaprune.report.zero_shot import DENSE, FINETUNED, PRUNED
from tvaprune.study.page import comparison_page, is_comparison


def report(folders: Sequence[Path], output: Path | None = None, prompts: bool = False) -> Path:
    """Writes the page of some folders and returns it.

    Args:
        folders: Of runs, or one of a comparison.
        prompts: Whether the models that the runs saved are given the same prompts first.
        output: The page's file; None: ``report.html`` in the only folder, or in the working folder.

    Raises:
        InputError: If a folder holds no results of this version, or the page cannot be written, or would replace
            another file.
    """
    if not folders:
        raise InputError("report: no folder was given; give those of runs, or that of a comparison")
    compared = [folder for folder in folders if is_comparison(folder)]
    if compared and len(folders) > 1:
        raise InputError(f"report: {compared[0]} is of a comparison, which has a page of its own; give it alone")
    if compared and prompts:
        raise InputError(f"--prompts: {compared[0]} is of a comparison, which saves no models; give a run's folder")
    for run in read_runs(folders) if prompts else ():
        _ask(run)
    page = comparison_page(compared[0]) if compared else _page(read_runs(folders))
    path = output or (folders[0] if len(folders) == 1 else Path()) / PAGE_NAME
    if path.is_dir():
        raise InputError(f"--output {path}: is a folder; give the page's file")
    if path.exists() and not wrote(path, PAGE_NAME):
        raise InputError(f"--output {path}: is there, and no page of this tool; give a new file")
    try:
        page.write(path)
    except OSError as error:
        raise InputError(f"--output {path}: cannot be written ({reason(error)}); give another file") from error
    return path


def _ask(run: RunFolder) -> None:
    """Lets a run's models continue the prompts, one model after the other, and writes what they say beside its results.

    Raises:
        InputError: If the narrower model was not saved, or a model cannot be loaded.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, said = {DENSE: run.results.model} | _saved(run), dict[str, Answers]()
    for name, path in models.items():
        said[name] = answers(*load_model(str(path), "auto", device))
    write_generations(run.path, run.results.command, said)


def _saved(run: RunFolder) -> dict[str, Path]:
    """Returns the folders of the models that a run saved, by what the page calls them."""
    try:
        recipe = dict(yaml.safe_load(run.recipe or "") or {})
        output, pruned = (Path(recipe.get(name) or run.path) for name in ("output_dir", "save_pruned"))
    except (yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{run.path / RECIPE_NAME}: is no recipe ({reason(error)}); run it again") from error
    of_target = pruned / run.path.name  # where a run had several
    places: dict[str, tuple[Path, ...]] = {PRUNED: (of_target, pruned, output / "pruned")}
    if run.results.finetune is not None:
        places[FINETUNED] = (output / "merged",)
    found = {name: next((p for p in some if (p / CONFIG_NAME).is_file()), None) for name, some in places.items()}
    if missing := [name for name, path in found.items() if path is None]:
        raise InputError(
            f"--prompts: {run.path}: its {' and its '.join(missing)} model is not where its recipe says; run it again, "
            "with --save_pruned DIR, or leave --prompts out"
        )
    return {name: path for name, path in found.items() if path is not None}


def _page(runs: Sequence[RunFolder]) -> Page:
    try:
        return page_of(runs)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # files changed by hand
        raise InputError(
            f"{', '.join(str(run.path) for run in runs)}: what is in {RESULTS_NAME} is not what a run measures "
            f"({reason(error)}); run it again, or give another folder"
        ) from error


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the verb's flags."""
    found = InOneLine(prog="tvaprune report", description=__doc__)
    found.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="a run's output folder (or --save_loc); "
                        "or a comparison's")  # fmt: skip
    found.add_argument("--output", type=Path, help=f"the page's file; default: {PAGE_NAME} in the only folder, or "
                        "in the working folder where there are several")  # fmt: skip
    found.add_argument("--prompts", action="store_true", help="let the dense model, and those that the run saved, "
                        "continue eight prompts first; the page then says where they part")  # fmt: skip
    return found


def main(arguments: list[str]) -> Path:
    """Parses the flags, writes the page and prints where it is."""
    args = parser().parse_args(arguments)
    path = report(args.folders, args.output, args.prompts)
    print(f"page: {path}")
    return path
