"""One command: its flags by the stage they belong to, the loaded model, and what follows from both."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from tvaprune import runtime
from tvaprune.config import (
    RELEASED_MAX_WINDOW,
    DataArguments,
    DistillArguments,
    EvalArguments,
    FinetuneArguments,
    ModelArguments,
    PruneArguments,
)
from tvaprune.data import token_blocks
from tvaprune.families import ModelShape, shape_of
from tvaprune.plan import default_dim_multiple
from tvaprune.runtime import FinetuneRunArguments, RunArguments

CHOICE_SAMPLES = 128  # validation blocks: enough to tell masks apart


@dataclass
class Arguments:
    """One command's flags, by the stage they belong to."""

    source: ModelArguments
    data: DataArguments
    prune: PruneArguments
    distill: DistillArguments
    finetune: FinetuneArguments
    evaluation: EvalArguments
    training: RunArguments

    @classmethod
    def parse(cls, arguments: list[str] | None = None) -> "Arguments":
        """Parses flags; ``None``: the command line's."""
        stages = (ModelArguments, DataArguments, PruneArguments, DistillArguments, FinetuneArguments, EvalArguments)
        flags = runtime.peek((*stages, RunArguments), arguments)
        is_finetuning = flags.mask_loc is not None and (flags.do_train or flags.finetune)
        return cls(*runtime.parse((*stages, FinetuneRunArguments if is_finetuning else RunArguments), arguments))

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and masks go."""
        return Path(str(self.training.output_dir))

    @property
    def save_loc(self) -> Path:
        """Where results go."""
        return Path(self.evaluation.save_loc or str(self.training.output_dir))

    def at(self, target: float) -> "Arguments":
        """Returns the flags of one of several targets, with folders of its own."""
        args, name = copy.copy(self), f"sparsity_{target:g}"
        args.prune, args.evaluation = copy.copy(args.prune), copy.copy(args.evaluation)
        args.training = copy.copy(args.training)
        args.prune.target_sparsity = [target]
        if args.prune.save_pruned is not None:
            args.prune.save_pruned = str(Path(args.prune.save_pruned) / name)
        args.evaluation.save_loc = str(self.save_loc / name)
        args.training.output_dir = str(self.output_dir / name)
        return args

    def each_target(self) -> dict[float, "Arguments"]:
        """Returns the flags of every target, in ascending order; a single one keeps the folders as they are."""
        targets = sorted(set(self.prune.target_sparsity))
        return {targets[0]: self} if len(targets) == 1 else {target: self.at(target) for target in targets}


@dataclass
class Run:
    """One command's flags, the loaded model and what follows from both."""

    args: Arguments
    model: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, args: Arguments) -> "Run":
        """Loads the model that the flags name."""
        set_seed(args.training.seed)
        device = args.training.device
        return cls(args, *runtime.load_model(args.source.model_name_or_path, args.source.dtype, device))

    @property
    def shape(self) -> ModelShape:
        """The unpruned model's sizes."""
        return shape_of(self.model.config)

    @property
    def dim_multiple(self) -> int:
        """The multiple of widths; 1 where the adjustment is off."""
        given = self.args.prune.dim_multiple
        return max(1, default_dim_multiple(self.shape.hidden_size) if given is None else given)

    @property
    def plan_options(self) -> tuple[int, int, bool, int]:
        """What the widths must satisfy: the arguments of `plan_from_masks` and `calibrate`."""
        prune = self.args.prune
        return self.dim_multiple, int(prune.keep_one_kv_head), prune.uniform, prune.tensor_parallel

    @property
    def window(self) -> int:
        """Tokens of an evaluation window."""
        return self.args.data.ctx_length or min(self.model.config.max_position_embeddings, RELEASED_MAX_WINDOW)

    def blocks(self, split: str, size: int, count: int | None) -> Dataset:
        """Returns token blocks of a split of the run's text; evaluation windows are the same whatever the seed."""
        data, seed = self.args.data, self.args.training.seed if split == "train" else 0
        return token_blocks(self.tokenizer, data.dataset_name, split, size, count, seed, data.data_dir)

    def train_blocks(self, default_count: int) -> Dataset:
        """Returns the blocks that gates are trained or units are scored on."""
        return self.blocks("train", self.args.data.block_size, self.args.data.max_train_samples or default_count)

    def choice_blocks(self) -> Dataset:
        """Returns the validation blocks that masks are compared on, whatever split is reported in the end."""
        count = min(self.args.data.max_eval_samples or CHOICE_SAMPLES, CHOICE_SAMPLES)
        return self.blocks("validation", self.args.data.block_size, count)

    def refit_blocks(self) -> Dataset:
        """Returns the training blocks whose statistics the refit fits."""
        return self.blocks("train", self.args.data.block_size, self.args.prune.refit_samples)

    def at(self, target: float) -> "Run":
        """Returns the run of one of several targets: the same model, folders of its own."""
        return Run(self.args.at(target), self.model, self.tokenizer)

    def record(self) -> dict[str, Any]:
        """Returns what repeats the run."""
        return {
            "model": self.args.source.model_name_or_path,
            "prune_method": self.args.prune.prune_method,
            "dataset_name": self.args.data.dataset_name,
            "block_size": self.args.data.block_size,
            "target_sparsity": max(self.args.prune.target_sparsity),
            "seed": self.args.training.seed,
            "hardware": runtime.describe_device(self.args.training.device),
            "versions": runtime.versions(),
            "command": runtime.command_line(),
        }
