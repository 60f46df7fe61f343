"""All methods on one model or more -> a cell for each of the grid -> table, picture and JSON."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tvaprune.errors import InputError
from tvaprune.files import prepare_folder
from tvaprune.flags.arguments import parse_comparison
from tvaprune.flags.settings import CompareSettings
from tvaprune.locks import holding_folders
from tvaprune.outputs import OF_A_COMPARISON, PAGE_NAME, check_replaced
from tvaprune.refusals import check_not_model, check_widths
from tvaprune.study.cells import Measurement
from tvaprune.study.grid import Grid
from tvaprune.study.page import comparison_page
from tvaprune.study.report import write_report
from tvaprune.text.sources import check_named


def main(arguments: list[str]) -> Path:
    """Parses the flags and compares."""
    return run_compare(parse_comparison(arguments))


@holding_folders()
def run_compare(settings: CompareSettings) -> Path:
    """Measures what is missing of the grid, then writes the table and the picture; returns their folder."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    output = Path(settings.output)
    for model in settings.models:
        for folder in (output, output / Path(model).name):  # that of its cells and masks
            check_not_model("output", folder, "models", model)
    prepare_folder("output", output, may_hold_files=True)
    check_replaced("output", output, OF_A_COMPARISON)
    grids = [Grid(settings, model) for model in settings.models]
    for grid in grids:
        if grid.missing:  # all are there before the first is measured
            with _naming("--models", "--model_name_or_path"):
                check_widths(grid.arguments(grid.missing[0]))
            _check_texts(settings)
    with tqdm(total=sum(len(grid.missing) for grid in grids), desc="cells", unit="cell") as progress:
        for grid in grids:
            if grid.missing:
                Measurement(grid).run(progress)
    write_report([content for grid in grids for content in grid.contents()], output)
    print((output / "compare.md").read_text(encoding="utf-8"))
    comparison_page(output).write(output / PAGE_NAME)
    print(f"in {output}: {' '.join(OF_A_COMPARISON)}")
    print(f"page: {output / PAGE_NAME}")
    return output


def _check_texts(settings: CompareSettings) -> None:
    with _naming("--dataset", "--dataset_name"):
        check_named(settings.dataset)
    with _naming("--other_texts", "--dataset_name"):
        for text in settings.other_texts:
            check_named(text)


@contextmanager
def _naming(flag: str, other: str) -> Iterator[None]:
    """Names this verb's flag in place of the other verbs' in what is refused."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(other, flag)) from error
