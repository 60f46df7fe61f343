"""The comparison: every way of choosing units, each update of the weights, at several sparsities and seeds.

A cell is one (model, method, update, sparsity, seed). It is written to a file of its own as soon as it is measured, and
a cell that has its file is not measured again. All methods end in the same masks, plan and knife; what a method costs
is measured beside what it gives. All cells run in one process: loading torch takes longer than measuring one.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from compare_grid import VIB, VIB_ONCE, Cell, Grid
from compare_report import DENSE, PRUNED, write_report
from tqdm.auto import tqdm
from transformers import PreTrainedModel, set_seed

from tvaprune.choose.choose import DEFAULT_CALIBRATION_SAMPLES, choose_masks
from tvaprune.choose.scores import SCORES, score_masks
from tvaprune.cli import run_command
from tvaprune.cut.narrow import narrow
from tvaprune.errors import InputError
from tvaprune.files import prepare_folder, write_json
from tvaprune.measure import hardware
from tvaprune.measure.memory import PeakMemory
from tvaprune.measure.perplexity import perplexity
from tvaprune.measure.zeroshot import OFFLINE_GROUP, Score, ZeroShot
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import describe_widths, plan_from_masks
from tvaprune.plan.masks import Masks, load_masks, save_masks
from tvaprune.run import Run
from tvaprune.text.blocks import token_blocks

MINIATURES = ("mistral_saves_tva/mini_mistral", "llama3_saves_tva/mini_llama3")
METHODS = (VIB, VIB_ONCE, *SCORES)
Result = TypeVar("Result")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; what is no flag of ours goes to every run, as a flag of `tva_prune.py`."""
    parser = argparse.ArgumentParser(
        description="Compares methods of pruning on one model or more; other flags are those of tva_prune.py.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MINIATURES), help="checkpoint folders or hub ids")
    add("--dataset", default="python_docs", help="text that units are chosen by and that is tested first")
    add("--second_text", default="package_readmes", help="text from another source, tested only")
    add(
        "--split",
        choices=["validation", "test"],
        default="test",
        help="of both texts; choose nothing on the test split",
    )
    add("--methods", nargs="+", choices=METHODS, default=[VIB, *SCORES], metavar="METHOD",
        help=f"of {', '.join(METHODS)}; vib trains gates for each sparsity, vib_once to the largest only")  # fmt: skip
    add("--weight_updates", nargs="+", default=["fold", "refit"], help="instant weight updates")
    add("--sparsities", nargs="+", type=float, default=[0.2, 0.35, 0.5, 0.65], help="shares of the decoder to remove")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the calibration blocks and of training")
    add("--output", type=Path, default=Path("out/compare"), help="folder of cells, table and picture")
    add("--block_size", type=int, default=256, help="tokens of a block and of an evaluation window")
    add("--train_samples", type=int, default=1200, help="blocks that gates are trained on")
    add("--calibration_samples", type=int, default=128, help="blocks of the one-shot scores and of the update")
    add("--max_eval_samples", type=int, default=256, help="windows of each text, at most")
    add("--eval_batch_size", type=int, default=8, help="windows of a forward pass")
    add("--zero_eval_limit", type=int, default=50, help="examples of each zero-shot task")
    add("--zero_eval_sparsities", nargs="*", type=float, default=[0.5], help="where zero-shot tasks are scored too")
    add("--zero_eval_seeds", nargs="*", type=int, default=[0], help="the seeds of these cells")
    add("--threads", type=int, default=None, help="CPU threads; default: as many as torch takes")
    args, flags = parser.parse_known_args(arguments)
    args.flags = flags
    names = [Path(model).name for model in args.models]
    if len(set(names)) < len(names):
        raise InputError(f"--models {' '.join(args.models)}: two have the same name; give each once")
    if args.dataset == args.second_text:
        raise InputError(f"--second_text {args.second_text}: is the --dataset too; give a text from another source")
    return args


def main() -> None:
    """Measures what is missing of the grid, then writes the table and the picture."""
    args = parse()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prepare_folder("output", args.output, may_hold_files=True)
    grids = [Grid(args, model) for model in args.models]
    with tqdm(total=sum(len(grid.missing) for grid in grids), desc="cells", unit="cell") as progress:
        for grid in grids:
            if grid.missing:
                Measurement(grid).run(progress)
    write_report([content for grid in grids for content in grid.contents()], args.output)
    print((args.output / "compare.md").read_text(encoding="utf-8"))
    print(f"in {args.output}: compare.json compare.md compare.png")


class Measurement:
    """The missing cells of one model, which is loaded once.

    Raises:
        InputError: If the model or a text cannot be had.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.args = grid, grid.args
        self.base = Run.load(grid.arguments(grid.missing[0]))
        data = self.base.args.data
        self.tasks = None
        if any(map(grid.is_scored, grid.missing)):  # the harness takes seconds to import
            self.tasks = ZeroShot([OFFLINE_GROUP], data.data_dir, limit=self.args.zero_eval_limit)
        self.texts = {
            name: token_blocks(self.base.tokenizer, name, self.args.split, self.base.window, data.max_eval_samples,
                               data_dir=data.data_dir)
            for name in (self.args.dataset, self.args.second_text)
        }  # fmt: skip

    def run(self, progress: Any) -> None:
        """Measures every missing cell, writes it to its file and prints a line."""
        for cell in self.grid.missing:
            started = time.perf_counter()
            content = self.measure(cell)
            write_json(content, self.grid.path(cell))
            values = ", ".join(f"{text} {value[PRUNED]:.2f}" for text, value in content["perplexity"].items())
            name = f"{self.grid.folder.name} {cell.method} {cell.weight_update} {cell.target_sparsity} seed {cell.seed}"
            progress.write(f"{name}: {values} ({time.perf_counter() - started:.1f} s)")
            progress.update()

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's content: everything that repeats it, and all that is measured."""
        choice = self._choice(cell)
        dense = self._once("dense", None, lambda: self._perplexities(self.base.model))["perplexity"]
        run = self._run(cell)
        plan = plan_from_masks(load_masks(self.grid.mask_path(cell)), run.shape, run.rules)
        (pruned, details), seconds, memory = self._timed(lambda: narrow(run, plan, keep_dense=True))
        measured, limit = self._perplexities(pruned), self.args.zero_eval_limit
        zero_shot = None
        if self.grid.is_scored(cell):
            scores = self._once("dense_zero_shot", limit, lambda: self._zero_shot(self.base.model))
            zero_shot = {DENSE: scores, PRUNED: self._zero_shot(pruned)}
        return {
            **self.grid.settings(cell),
            **dataclasses.asdict(cell),
            **details,
            "sparsity": plan.sparsity,
            "widths": describe_widths(plan),
            "windows": {text: len(blocks) for text, blocks in self.texts.items()},
            "perplexity": {text: {DENSE: dense[text], PRUNED: measured["perplexity"][text]} for text in self.texts},
            "zero_shot": zero_shot,
            "seconds": {"choosing": choice["seconds"], "update": seconds, "perplexity": measured["seconds"]},
            "peak_memory": {"choosing": choice["peak_memory"], "update": memory},
            "hardware": hardware.describe_device(run.args.training.device),
            "versions": hardware.versions(),
            "command": hardware.command_line(),
        }

    def _choice(self, cell: Cell) -> dict[str, Any]:
        """Makes the cell's mask if it is not there, and returns what that cost."""
        path = self.grid.mask_path(cell)
        settings = self.grid.settings() | {"method": cell.method, "seed": cell.seed} | self.grid.training(cell)
        known = self.grid.known(path.with_suffix(".json"), settings)
        if known is not None and path.is_file():
            return known
        run, targets = self._run(cell, choosing=True), self.grid.targets(cell)
        masks, seconds, memory = self._timed(lambda: _masks_of(run, cell.method, targets))
        content = settings | {"targets": targets, "seconds": seconds, "peak_memory": memory}
        for target, mask in masks.items():
            path = self.grid.mask_path(dataclasses.replace(cell, target_sparsity=target))
            path.parent.mkdir(parents=True, exist_ok=True)
            save_masks(mask, path)
            write_json(content, path.with_suffix(".json"))
        return content

    def _once(self, name: str, limit: int | None, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what is measured of the unpruned model, from its file if an earlier run measured it."""
        path, settings = self.grid.folder / f"{name}.json", self.grid.settings() | {"zero_eval_limit": limit}
        content = self.grid.known(path, settings)
        if content is None:
            content = settings | work()
            write_json(content, path)
        return content

    def _perplexities(self, model: PreTrainedModel) -> dict[str, Any]:
        """Measures a model on both texts."""
        started = time.perf_counter()
        values = {text: perplexity(model, blocks, self.args.eval_batch_size) for text, blocks in self.texts.items()}
        return {"perplexity": values, "seconds": time.perf_counter() - started}

    def _zero_shot(self, model: PreTrainedModel) -> dict[str, Any]:
        """Scores a model on the offline tasks."""
        assert self.tasks is not None
        started, found = time.perf_counter(), {}

        def keep(task: str, name: str, score: Score) -> None:
            found[task] = score

        self.tasks.run({PRUNED: model}, self.base.tokenizer, keep, self.args.block_size)
        return {
            "average": sum(score.value for score in found.values()) / len(found),
            "num_examples": sum(score.settings["num_examples"] for score in found.values()),
            "tasks": {task: score.value for task, score in found.items()},
            "seconds": time.perf_counter() - started,
        }

    def _run(self, cell: Cell, choosing: bool = False) -> Run:
        """Returns a run of the loaded model with a cell's flags, its draws as if it ran alone."""
        set_seed(cell.seed)
        return dataclasses.replace(self.base, args=self.grid.arguments(cell, choosing))

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float, int]:
        """Returns the result of some work, its seconds and its peak memory in bytes."""
        started = time.perf_counter()
        with PeakMemory(self.base.args.training.device) as memory:
            result = work()
        return result, time.perf_counter() - started, memory.peak


def _masks_of(run: Run, method: str, targets: Sequence[float]) -> dict[float, Masks]:
    """Trains gates or scores units once, and cuts at every target sparsity.

    Bonsai prunes unit by unit until the largest target is passed: the smaller ones lie on its way.
    """
    if method in (VIB, VIB_ONCE):
        (path,) = choose_masks(run).masks.values()
        masks = load_masks(path)
    else:
        blocks = run.train_blocks(DEFAULT_CALIBRATION_SAMPLES)
        masks = score_masks(run.model, method, blocks, max(targets), run.args.training.seed)
    return {target: calibrate(masks, run.shape, target, run.rules) for target in targets}


if __name__ == "__main__":
    sys.exit(run_command(main, "the same command goes on where it was"))
