"""The cells of a comparison: their flags, their files, and which of them an earlier run has measured already."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvaprune.choose.scores import PER_TARGET
from tvaprune.errors import InputError
from tvaprune.files import read_json
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.settings import VIB_ONCE, CompareSettings
from tvaprune.given import given_units
from tvaprune.plan.masks import read_record

VIB = "vib"
_SETTINGS = (
    "dataset", "other_texts", "split", "block_size", "train_samples", "calibration_samples", "max_eval_samples",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One place of a model's grid."""

    method: str
    weight_update: str
    target_sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the cell's file."""
        return f"{self.method}-{self.weight_update}-{self.target_sparsity}-{self.seed}"


class Grid:
    """The cells of one model, in the order in which they are measured.

    Args:
        args: The command's flags.
        model: Checkpoint folder or hub id.

    Attributes:
        given: The mask file of each sparsity, where gates were trained before.

    Raises:
        InputError: If a file in the output folder is no cell, or one of other settings, or a mask is missing.
    """

    def __init__(self, args: CompareSettings, model: str) -> None:
        self.args, self.model, self.given = args, model, given_masks(args)
        self.folder = Path(args.output) / Path(model).name
        self.cells = [
            Cell(method, update, sparsity, seed)
            for seed in args.seeds
            for method in args.methods
            for sparsity in args.sparsities
            for update in args.weight_updates
        ]
        self.missing = [cell for cell in self.cells if self.content(cell) is None]
        list(self.contents())  # what stands beside in the table
        self.known(self.dense_path(), self.settings())
        for cell in self.missing:  # a wrong flag fails before the work begins
            self.arguments(cell)

    def contents(self) -> Iterator[dict[str, object]]:
        """Yields the content of every cell that is there: those asked for, then what earlier runs measured beside."""
        asked = [self.path(cell) for cell in self.cells]
        others = sorted(set((self.folder / "cells").glob("*.json")) - set(asked))
        for path in (*asked, *others):
            content = self.known(path, self.settings())
            if content is not None:
                yield content

    def content(self, cell: Cell) -> Mapping[str, object] | None:
        """Returns a cell's content; ``None`` if it is not measured yet."""
        return self.known(self.path(cell), self.settings(cell))

    def path(self, cell: Cell) -> Path:
        """Returns the cell's file."""
        return self.folder / "cells" / f"{cell.name}.json"

    def dense_path(self, name: str = "dense") -> Path:
        """Returns the file of what is measured of the unpruned model."""
        return self.folder / f"{name}.json"

    def is_given(self, cell: Cell) -> bool:
        """Returns whether the cell's mask was learned before, and given."""
        return cell.method == VIB and bool(self.given)

    def mask_path(self, cell: Cell) -> Path:
        """Returns the file of the mask that the cell applies; all updates share it."""
        if self.is_given(cell):
            return self.given[cell.target_sparsity]
        return self.folder / "masks" / f"{cell.method}-{cell.target_sparsity}-{cell.seed}.pkl"

    def targets(self, cell: Cell) -> list[float]:
        """Returns the sparsities that the choice of a cell's units serves."""
        return [cell.target_sparsity] if cell.method in (VIB, *PER_TARGET) else sorted(self.args.sparsities)

    def training(self, cell: Cell) -> dict[str, float]:
        """Returns what vib_once trains its one set of gates to: the largest target, as ``--target_sparsity`` does."""
        return {"trained_to": max(self.args.sparsities)} if cell.method == VIB_ONCE else {}

    def is_scored(self, cell: Cell) -> bool:
        """Returns whether the zero-shot tasks are scored in a cell."""
        return cell.target_sparsity in self.args.zero_eval_sparsities and cell.seed in self.args.zero_eval_seeds

    def settings(self, cell: Cell | None = None) -> dict[str, object]:
        """Returns what must be the same for a file of an earlier run to serve."""
        settings: dict[str, Any] = {"model": self.model, "flags": self.args.flags}
        settings |= {name: getattr(self.args, name) for name in _SETTINGS}
        if cell is not None:
            settings["zero_eval_limit"] = self.args.zero_eval_limit if self.is_scored(cell) else None
            settings |= self.training(cell)
            if self.is_given(cell):
                settings["mask"] = self.mask_path(cell).name
        return settings

    def known(self, path: Path, settings: Mapping[str, object]) -> dict[str, object] | None:
        """Returns what an earlier run wrote to a file; ``None`` if it is not there.

        Raises:
            InputError: If the file cannot be read, or comes from other settings.
        """
        if not path.exists():
            return None
        try:
            content = dict(read_json(path))
            other = [name for name, value in settings.items() if content[name] != value]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a file of this comparison ({type(error).__name__}); remove it, or give another --output"
            ) from error
        if other:
            made = ", ".join(as_given(name, content[name]) for name in other)
            raise InputError(f"{path}: made with {made}; give the same flags, or another --output")
        return content

    def arguments(self, cell: Cell, choosing: bool = False) -> Arguments:
        """Returns the flags of a cell, as the verb `prune` takes them.

        Args:
            choosing: The flags of making its mask, where gates train on more blocks than an update is calibrated on.
        """
        args, trained = self.args, cell.method in (VIB, VIB_ONCE)
        values = {
            "model_name_or_path": self.model,
            "dataset_name": args.dataset,
            "prune_method": VIB if trained else cell.method,
            "target_sparsity": self.training(cell).get("trained_to", cell.target_sparsity),
            "weight_update": cell.weight_update,
            "seed": cell.seed,
            "block_size": args.block_size,
            "ctx_length": args.block_size,
            "refit_samples": args.calibration_samples,
            "max_train_samples": args.train_samples if trained and choosing else args.calibration_samples,
            "max_eval_samples": args.max_eval_samples,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": args.eval_batch_size,
            "output_dir": self.folder / "gates" / self.mask_path(cell).stem,
        }
        flags = [str(item) for name, value in values.items() for item in (f"--{name}", value)]
        return Arguments.parse([*flags, *args.flags], "prune")


def as_given(name: str, value: Any) -> str:
    """Returns a setting of a file as its flag on the command line."""
    words = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    if name == "flags":  # those that every cell gets, by their own names
        return words or "no flags of prune"
    if name == "trained_to":
        return f"{words} the largest of --sparsities"
    flag = {"model": "models", "mask": "masks"}.get(name, name)
    return f"--{flag} {words}" if words else f"no --{flag}"


def given_masks(args: CompareSettings) -> dict[float, Path]:
    """Returns the mask file that was learned for each sparsity, by the records beside the files; none are asked for.

    Raises:
        InputError: If a file cannot be used with the model, or a sparsity has not one file, or nobody asks for them.
    """
    if args.masks and (len(args.models) > 1 or VIB not in args.methods):
        raise InputError(
            f"--masks: are {VIB}'s, of one model; --methods is {' '.join(args.methods)}, and --models has "
            f"{len(args.models)}: give one model, {VIB} among its methods"
        )
    found: dict[Any, Path] = {}
    for path in args.masks:
        try:
            given_units(Arguments.parse(["--model_name_or_path", args.models[0], "--mask_loc", path], "apply"))
        except InputError as error:
            raise InputError(str(error).replace("--mask_loc", "--masks")) from error
        target = read_record(path).get("target_sparsity")
        if target in found:
            raise InputError(f"--masks: {found[target]} and {path} are both of target_sparsity {target}: give one")
        found[target] = Path(path)
    if missing := [str(sparsity) for sparsity in args.sparsities if found and sparsity not in found]:
        raise InputError(
            f"--masks: the records beside them tell of target_sparsity {', '.join(map(str, found))}, and --sparsities "
            f"asks for {' '.join(missing)} too: give a mask of each"
        )
    return found
