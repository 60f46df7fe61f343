"""The cells of a comparison, measured: every way of choosing units, each update of the weights, at several sparsities.

A cell is one (model, method, update, sparsity, seed). It is written to a file of its own as soon as it is measured, and
a cell that has its file is not measured again. All methods end in the same masks, plan and knife; what a method costs
is measured beside what it gives. All cells run in one process: loading torch takes longer than measuring one.
"""

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, set_seed

from tvaprune.choose.choose import DEFAULT_CALIBRATION_SAMPLES, choose_masks, in_basis, scored
from tvaprune.choose.rotation import wants_rotation
from tvaprune.choose.scores import check_scored
from tvaprune.choose.scores.kept import KeptRounds
from tvaprune.cut.narrow import narrow
from tvaprune.errors import InputError
from tvaprune.files import write_json
from tvaprune.flags.settings import VIB_ONCE
from tvaprune.identity import blocks_digest
from tvaprune.measure import hardware
from tvaprune.measure.memory import PeakMemory
from tvaprune.measure.perplexity import TextLoss, text_loss
from tvaprune.measure.zeroshot import OFFLINE_GROUP, Score, ZeroShot
from tvaprune.models.rotate import Rotation
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import describe_widths
from tvaprune.plan.masks import Masks, load_masks, read_record, save_masks
from tvaprune.plan.rotation import read_rotation, save_rotation
from tvaprune.report.results import Perplexities, plain
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.run import Run
from tvaprune.study.contents import RECORDED, perplexity_in_words
from tvaprune.study.grid import VIB, Cell, Grid
from tvaprune.study.kept_gates import KeptGates
from tvaprune.text.blocks import token_blocks

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class _Choice:
    """The masks of every target sparsity, their basis, and what an interrupted run would have gone on from."""

    masks: dict[float, Masks]
    rotation: Rotation | None
    kept: KeptRounds | KeptGates

    @classmethod
    def of(cls, run: Run, method: str, targets: Sequence[float], settings: Mapping[str, object]) -> "_Choice":
        """Trains gates or scores units once, and cuts at every target.

        Bonsai prunes unit by unit until the largest target is passed: the smaller ones lie on its way.
        """
        kept: KeptRounds | KeptGates
        gates = KeptGates(run.args.output_dir, settings) if method in (VIB, VIB_ONCE) else None
        if wants_rotation(run.args, run.model.config):
            run = dataclasses.replace(run, model=copy.deepcopy(run.model))
            run = in_basis(run, None if gates is None else gates.checkpoint)
        if gates is not None:
            (path,) = choose_masks(run, gates.checkpoint, gates).masks.values()
            masks, kept = load_masks(path), gates
        else:
            masks, kept = scored(run, run.train_blocks(DEFAULT_CALIBRATION_SAMPLES), max(targets))
        return cls({target: calibrate(masks, run.shape, target, run.rules) for target in targets}, run.rotation, kept)


class Measurement:
    """The missing cells of one model, which is loaded once.

    Raises:
        InputError: If the model or a text cannot be had, or a method does not cut the model.
    """

    def __init__(self, grid: Grid) -> None:
        self.grid, self.args = grid, grid.args
        args = grid.arguments(grid.missing[0])
        data, evaluation = args.data, args.evaluation
        self.tasks = None
        if any(map(grid.is_scored, grid.missing)):  # the harness takes seconds to import
            names = evaluation.zero_eval_tasks or [OFFLINE_GROUP]
            self.tasks = ZeroShot(names, data.data_dir, evaluation.num_fewshot, self.args.zero_eval_limit)
        self.base = Run.load(args, trains=True)
        for cell in grid.missing:
            check_scored(cell.method, self.base.shape)
        self._last: Run | None = None
        self.texts = {
            name: token_blocks(self.base.tokenizer, name, self.args.split, self.base.window, data.max_eval_samples,
                               data_dir=data.data_dir, bos=self.base.bos)
            for name in (self.args.dataset, *self.args.other_texts)
        }  # fmt: skip
        texts = {name: blocks_digest(blocks) for name, blocks in self.texts.items()}
        self.contents: dict[str, object] = {"model": self.base.digest, "texts": texts}
        for cell in grid.cells:
            if (content := grid.content(cell)) is not None:
                self._check(grid.path(cell), content, cell)

    def run(self, progress: Any) -> None:
        """Measures every missing cell, writes it to its file and prints a line.

        Raises:
            InputError: If the data of a zero-shot task cannot be had.
        """
        if self.tasks is not None:  # tasks whose data is missing end the command before any work
            self._dense_scores()
        for cell in self.grid.missing:
            started = time.perf_counter()
            content = self.measure(cell)
            write_json(content, self.grid.path(cell))
            values = ", ".join(f"{text} {perplexity_in_words(content, text, PRUNED)}" for text in self.texts)
            name = f"{self.grid.folder.name} {cell.method} {cell.weight_update} {cell.target_sparsity} seed {cell.seed}"
            progress.write(f"{name}: {values} ({time.perf_counter() - started:.1f} s)")
            progress.update()

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Returns a cell's content: everything that repeats it, and all that is measured."""
        choice, dense = self._choice(cell), self._dense()
        mask, run = self.grid.mask_path(cell), self._run(cell)
        run = self._turned(run, read_rotation(mask, choice.get("rotation"), run.shape.hidden_size))
        plan = run.plan(load_masks(mask))
        (pruned, details), seconds, memory = self._timed(lambda: narrow(run, plan, keep_dense=True))
        started = time.perf_counter()
        losses = {text: text_loss(pruned, blocks, self.args.eval_batch_size) for text, blocks in self.texts.items()}
        measuring = time.perf_counter() - started
        zero_shot = None
        if self.grid.is_scored(cell):
            zero_shot = {DENSE: self._dense_scores(), PRUNED: self._zero_shot(pruned)}
        return {
            **self.grid.settings(cell),
            **dataclasses.asdict(cell),
            "contents": self._contents(cell),
            "learned_on": self._learned_on(cell),
            **details,
            "sparsity": plan.sparsity,
            "widths": describe_widths(plan),
            "windows": {text: len(blocks) for text, blocks in self.texts.items()},
            "perplexity": {text: plain(Perplexities.of(dense[text], losses[text])) for text in self.texts},
            "zero_shot": zero_shot,
            "seconds": {"choosing": choice["seconds"], "update": seconds, "perplexity": measuring},
            "peak_memory": {"choosing": choice["peak_memory"], "update": memory},
            "hardware": hardware.describe_device(run.args.training.device),
            "versions": hardware.versions(),
            "command": hardware.command_line(),
        }

    def _choice(self, cell: Cell) -> Mapping[str, object]:
        """Makes the cell's mask if it is not there, and returns its basis and its cost: none where it was given."""
        path = self.grid.mask_path(cell)
        if self.grid.is_given(cell):
            return {"rotation": read_record(path).get("rotation"), "seconds": None, "peak_memory": None}
        settings = self.grid.settings() | {"method": cell.method, "seed": cell.seed} | self.grid.training(cell)
        known = self.grid.known(path.with_suffix(".json"), settings)
        if known is not None and path.is_file():
            self._check(path, known)
            return known
        self._last = None  # what it takes is no cost of the choice
        run, targets = self._run(cell, choosing=True), self.grid.targets(cell)
        content = settings | {"contents": self.contents, "targets": targets}
        choice, seconds, memory = self._timed(lambda: _Choice.of(run, cell.method, targets, dict(content)))
        content |= {"seconds": choice.kept.seconds + seconds, "peak_memory": memory}
        content["rotation"] = None if choice.rotation is None else choice.rotation.digest
        for target, mask in choice.masks.items():
            path = self.grid.mask_path(dataclasses.replace(cell, target_sparsity=target))
            path.parent.mkdir(parents=True, exist_ok=True)
            if choice.rotation is not None:
                save_rotation(choice.rotation, path.parent)
            save_masks(mask, path)
            write_json(content, path.with_suffix(".json"))
        choice.kept.discard()
        return content

    def _contents(self, cell: Cell | None = None) -> dict[str, object]:
        """Returns the digests of what is compared and measured on, whatever its name."""
        if cell is None or not self.grid.is_given(cell):
            return self.contents
        return self.contents | {"mask": hashlib.sha256(self.grid.mask_path(cell).read_bytes()).hexdigest()[:16]}

    def _check(self, path: Path, content: Mapping[str, object], cell: Cell | None = None) -> None:
        """Refuses a file of an earlier run whose model, texts or mask were others; those of old do not say."""
        found, wanted = content.get("contents"), self._contents(cell)
        other = [name for name, value in wanted.items() if isinstance(found, dict) and found.get(name) != value]
        if other:
            raise InputError(
                f"{path}: made when its {' and '.join(other)} held something else; give another --output, or remove "
                f"{self.grid.folder}"
            )

    def _learned_on(self, cell: Cell) -> dict[str, object] | None:
        """Returns what the record of a given mask tells of its training; None: the comparison's own settings do."""
        if not self.grid.is_given(cell):
            return None
        record = read_record(self.grid.mask_path(cell))
        return {name: record.get(name) for name in RECORDED}

    def _once(self, name: str, part: str, limit: int | None, work: Callable[[], dict[str, object]]) -> dict[str, Any]:
        """Returns what is measured of the unpruned model, from its file if an earlier run measured that part."""
        path, settings = self.grid.dense_path(name), self.grid.settings() | {"zero_eval_limit": limit}
        content = self.grid.known(path, settings)
        if content is not None:
            self._check(path, content)
        if content is None or part not in content:  # files of old have no windows
            content = settings | {"contents": self.contents} | work()
            write_json(content, path)
        return content

    def _dense(self) -> dict[str, TextLoss]:
        """Returns what the unpruned model makes of every text: each cell's gaps are paired with its windows."""

        def measure() -> dict[str, object]:
            started = time.perf_counter()
            losses = {text: self.base.dense_loss(blocks) for text, blocks in self.texts.items()}
            return {
                "perplexity": {text: loss.perplexity for text, loss in losses.items()},
                "mean_loss": {text: loss.mean for text, loss in losses.items()},
                "window_losses": {text: loss.windows.tolist() for text, loss in losses.items()},
                "seconds": time.perf_counter() - started,
            }

        found = self._once("dense", "window_losses", None, measure)
        means, windows = found["mean_loss"], found["window_losses"]
        return {text: TextLoss(means[text], torch.tensor(windows[text], dtype=torch.float64)) for text in self.texts}

    def _dense_scores(self) -> dict[str, Any]:
        """Returns what the unpruned model scores on the tasks."""
        limit = self.args.zero_eval_limit
        return self._once("dense_zero_shot", "tasks", limit, lambda: self._zero_shot(self.base.model))

    def _zero_shot(self, model: PreTrainedModel) -> dict[str, object]:
        """Scores a model on the tasks."""
        assert self.tasks is not None
        started, found = time.perf_counter(), {}

        def keep(task: str, name: str, score: Score) -> None:
            found[task] = score

        missing = self.tasks.run({PRUNED: model}, self.base.tokenizer, keep)
        if missing:  # an average of fewer would stand beside others of all
            raise InputError(
                f"--zero_eval_tasks: {', '.join(missing)} could not run (see above): a comparison averages all that it "
                "names; give --data_dir with their data, or leave them out"
            )
        return {
            "average": sum(score.value for score in found.values()) / len(found),
            "num_examples": sum(score.settings["num_examples"] for score in found.values()),
            "tasks": {task: score.value for task, score in found.items()},
            "seconds": time.perf_counter() - started,
        }

    def _run(self, cell: Cell, choosing: bool = False) -> Run:
        """Returns a run of the loaded model with a cell's flags, its draws as if it ran alone."""
        set_seed(cell.seed)
        self.base.dense_model()  # which a refit may have left on the CPU
        return dataclasses.replace(self.base, args=self.grid.arguments(cell, choosing))

    def _turned(self, run: Run, rotation: Rotation | None) -> Run:
        """Returns a run in the basis of its mask, on a copy of the model; the last one is kept while it serves."""
        last, digest = self._last, None if rotation is None else rotation.digest
        if last is None or last.rotation is None or last.rotation.digest != digest:
            self._last = last = None  # before the next one is made
        if rotation is None:
            return run
        if self._last is None:
            self._last = dataclasses.replace(run, model=copy.deepcopy(run.model)).turned(rotation)
        self._last.dense_model()
        return dataclasses.replace(run, model=self._last.model, rotation=rotation)

    def _timed(self, work: Callable[[], Result]) -> tuple[Result, float, int]:
        """Returns the result of some work, its seconds and its peak memory in bytes."""
        started = time.perf_counter()
        with PeakMemory(self.base.args.training.device) as memory:
            result = work()
        return result, time.perf_counter() - started, memory.peak
