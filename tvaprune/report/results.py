"""`results.json` is this dataclass: what repeats a run, and what each stage measured.

A part that no stage filled is left out of the file; a number that is none (NaN, infinity) is null. A run writes its own
results whole: of an older file nothing stays but zero-shot scores of the same model and mask, where a stage reads them.
"""

import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tvaprune.cut.reconstruct import Reconstruction
from tvaprune.cut.refit import RefitReport
from tvaprune.errors import InputError, reason
from tvaprune.files import read_json, write_json
from tvaprune.measure.perplexity import TextLoss
from tvaprune.measure.speed import SpeedUp
from tvaprune.models.shape import ModelShape
from tvaprune.outputs import RESULTS_NAME
from tvaprune.plan.keep_plan import KeepPlan, describe_widths
from tvaprune.recover.training import Tuning
from tvaprune.run import Run
from tvaprune.text.protocols import EvaluationText

VERSION = 2
_REPLACE = "give another --save_loc, or --overwrite_output_dir to replace it"
Part = TypeVar("Part")


@dataclass(frozen=True)
class KeptWidths:
    """What a plan keeps; per layer where it is a list."""

    hidden_size: int
    num_key_value_heads: list[int]
    intermediate_size: list[int]
    decoder_sparsity: float
    num_parameters: int
    dim_multiple: int

    @classmethod
    def of(cls, plan: KeepPlan) -> "KeptWidths":
        """Returns the widths of a plan."""
        return cls(**describe_widths(plan))


@dataclass(frozen=True)
class RefitBlocks:
    """The blocks that a refit fits."""

    dataset_name: str
    block_size: int
    refit_samples: int
    seed: int


@dataclass(frozen=True)
class Parameters:
    """All parameters, embeddings and lm_head included."""

    dense: int
    pruned: int


@dataclass
class PerplexityErrors:
    """Standard errors by the windows, as `TextLoss` says: of perplexities, and of gaps in log perplexity to the dense.

    A gap's is paired by window, so smaller than what the two perplexities' would make.
    """

    dense: float
    pruned: float
    gap: float
    finetuned: float | None = None
    finetuned_gap: float | None = None


@dataclass
class Perplexities:
    """Of every model at hand, on the same windows; ``stderr``: None of a single window, and in results of old."""

    dense: float
    pruned: float
    finetuned: float | None = None
    stderr: PerplexityErrors | None = None

    @classmethod
    def of(cls, dense: TextLoss, pruned: TextLoss) -> "Perplexities":
        """Returns what two models make of the same windows."""
        errors = dense.perplexity_stderr, pruned.perplexity_stderr, pruned.gap_stderr(dense)
        found = PerplexityErrors(*errors) if None not in errors else None  # type: ignore[arg-type]
        return cls(dense.perplexity, pruned.perplexity, stderr=found)

    def error(self, name: str) -> float | None:
        """Returns a standard error by its name; None: it was not measured."""
        found: float | None = getattr(self.stderr, name, None)
        return found

    def add_finetuned(self, tuned: TextLoss, dense: TextLoss) -> None:
        """Adds the fine-tuned model's."""
        self.finetuned = tuned.perplexity
        if self.stderr is not None:
            self.stderr.finetuned, self.stderr.finetuned_gap = tuned.perplexity_stderr, tuned.gap_stderr(dense)


@dataclass(frozen=True)
class ModelPerplexity:
    """Of a model as it is, where nothing was cut; ``stderr`` by the windows: None of a single one."""

    value: float
    stderr: float | None = None


@dataclass(frozen=True)
class Refit(RefitReport):
    """What the refit did, on how many blocks, and what the whole update took, a reconstruction after it included."""

    calibration_blocks: int
    held_out_blocks: int
    seconds: float


@dataclass(frozen=True)
class Difference:
    """One model's score minus another's over the same examples, with its standard error."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskScore:
    """One model's score on one task: the headline metric, all others, and what repeats it.

    ``data_set`` is a hub id, or the name of a text of this machine; None in results of old.
    """

    metric: str
    value: float
    stderr: float | None
    chance: float | None
    metrics: dict[str, float]
    num_examples: int
    num_fewshot: int
    limit: int | None
    version: str | float | None
    data_set: str | None = None


@dataclass
class TaskResults:
    """The scores of one run on one task; ``model`` is the only one where nothing was pruned."""

    model: TaskScore | None = None
    dense: TaskScore | None = None
    pruned: TaskScore | None = None
    finetuned: TaskScore | None = None
    difference: Difference | None = None
    recovered: Difference | None = None


@dataclass(frozen=True)
class Average:
    """The mean over the tasks that have an accuracy; ``stderr``: None where a task has none, as of one example."""

    value: float
    stderr: float | None
    num_tasks: int


@dataclass(frozen=True)
class ScoringRun:
    """What repeats the last zero-shot evaluation, which may have come after the rest."""

    seed: int
    hardware: str
    versions: dict[str, str]
    command: str


@dataclass
class ZeroShotResults:
    """Zero-shot scores: those of every task that was ever scored for this model, and the last run's averages."""

    run: ScoringRun | None = None
    tasks: dict[str, TaskResults] = field(default_factory=dict)
    average: dict[str, Average] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class Results:
    """What a run was and what it measured: the first fields repeat it, the others are filled as its stages go.

    Attributes:
        model_digest: Of the dense model's config and weights.
        target_sparsity: What a mask was cut at; None: a mask or a plan was given.
        mask: The mask file that was cut; None: a plan was given, or the dense model was scored.
        plan: The plan file that was given in its place.
        rotation: The digest of what the residual stream was turned by; None: it is as it came.
        units: The digest of what is kept, and with which factors.
        dtype: The precision that was computed in.
        sparsity_definition: What ``widths.decoder_sparsity`` is a share of.
    """

    model: str
    model_digest: str
    prune_method: str
    dataset_name: str
    block_size: int
    target_sparsity: float | None
    seed: int
    hardware: str
    versions: dict[str, str]
    command: str
    mask: str | None
    version: int = VERSION
    plan: str | None = None
    rotation: str | None = None
    units: str | None = None
    dtype: str | None = None
    weight_update: str | None = None
    widths: KeptWidths | None = None
    calibration: RefitBlocks | None = None
    protocol: EvaluationText | None = None
    shape: ModelShape | None = None
    sparsity_definition: str | None = None
    parameters: Parameters | None = None
    perplexity: Perplexities | None = None
    model_perplexity: ModelPerplexity | None = None
    speed_up: SpeedUp | None = None
    refit: Refit | None = None
    reconstruct: Reconstruction | None = None
    training_speed_up: SpeedUp | None = None
    finetune: Tuning | None = None
    zero_shot: ZeroShotResults | None = None

    @classmethod
    def begin(cls, run: Run, plan: KeepPlan | None, mask: str | None, target: float | None = None) -> "Results":
        """Returns what is known before anything is measured.

        Args:
            plan: What is cut; None: the dense model is scored.
            target: The sparsity that the mask was made for, in the run that made it.
        """
        prune = run.args.prune
        results = cls(**run.record() | {"target_sparsity": target, "mask": mask}, dtype=run.precision)
        if plan is not None:
            results.plan, results.weight_update = prune.plan, prune.weight_update
            results.widths, results.units = KeptWidths.of(plan), plan.digest
            if prune.refits:
                data, seed = run.args.data, run.args.training.seed
                results.calibration = RefitBlocks(data.dataset_name, data.block_size, prune.refit_samples, seed)
        return results

    @property
    def trained_gates(self) -> bool:
        """Whether the run that these are of trained the gates: a mask or a plan was given to any other."""
        return self.target_sparsity is not None and self.prune_method == "vib"

    def note_update(self, update: Mapping[str, object]) -> None:
        """Takes what the weight update did, as `cut.narrow.narrow` tells it or a file kept it."""
        parts = dict(update)
        self.refit = _read(Refit, parts["refit"]) if "refit" in parts else None
        self.reconstruct = _read(Reconstruction, parts["reconstruct"]) if "reconstruct" in parts else None

    def differing(self, other: "Results") -> list[str]:
        """Returns the fields that say that two results are not of the same pruned model.

        Those of old tell their units by the file that was cut alone, and no precision.
        """
        known = [name for name in ("units", "dtype") if None not in (getattr(self, name), getattr(other, name))]
        units = () if "units" in known else ("mask", "plan")
        same = ("model", "model_digest", "rotation", *units, *known, "weight_update", "calibration", "widths")
        return [name for name in same if getattr(self, name) != getattr(other, name)]

    def content(self) -> dict[str, object]:
        """Returns what the file holds: plain values, without the parts that no stage filled."""
        content: dict[str, Any] = plain(self)
        return content

    def write(self, folder: Path) -> None:
        """Writes the file, whole, in the place of an older one."""
        write_json(self.content(), folder / RESULTS_NAME)

    @classmethod
    def read(cls, folder: Path, remedy: str = _REPLACE) -> "Results | None":
        """Returns what an earlier run left in a folder; None where there is no file.

        Args:
            remedy: What the user is told to do about a file that cannot be read.

        Raises:
            InputError: If the file is damaged, or of another version of this tool.
        """
        path = folder / RESULTS_NAME
        if not path.exists():
            return None
        try:
            content = read_json(path)
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            return _read(cls, content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: cannot be read as results of version {VERSION} ({reason(error)}); {remedy}"
            ) from error


def plain(value: object) -> Any:
    """Returns a value as JSON takes it: dataclasses without the parts that nobody filled, no NaN or infinity."""
    if is_dataclass(value):
        parts = [(entry, getattr(value, entry.name)) for entry in fields(value)]
        return {entry.name: plain(part) for entry, part in parts if part is not None or entry.default is not None}
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(kind: type[Part], value: object) -> Part:
    """Returns a value of JSON as a field of some type holds it."""
    found: Any = _typed(kind, value)
    return found


def _typed(kind: object, value: Any) -> object:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        others = [part for part in inner if part is not types.NoneType]
        return value if value is None or len(others) > 1 else _typed(others[0], value)
    if isinstance(kind, type) and is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _typed(kinds[name], part) for name, part in value.items()})
    if origin in (list, tuple):
        return origin(_typed(inner[0], part) for part in value)
    if origin is dict:
        return {key: _typed(inner[1], part) for key, part in value.items()}
    return math.nan if kind is float and value is None else value
