"""One command's flags, by the stage they belong to, on top of transformers' TrainingArguments."""

import copy
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.integrations import get_available_reporting_integrations

from tvaprune import ranks
from tvaprune.errors import InOneLine, InputError
from tvaprune.flags.ranges import AUTO, CHOICES, check_ranges
from tvaprune.flags.recipes import recipe_of
from tvaprune.flags.settings import (
    RELEASED_BATCH,
    CompareSettings,
    DataSettings,
    DistillSettings,
    EvalSettings,
    FinetuneSettings,
    ModelSettings,
    PruneSettings,
    SampleSettings,
    flag,
)
from tvaprune.flags.verbs import ALWAYS, TARGETS, VERBS, check_flags, given_names

EVAL_STEPS = 50


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments with this project's defaults.

    Attributes:
        eval_steps_given: Whether `eval_steps` is the user's own.
    """

    output_dir: str = flag("out", "Folder of checkpoints, masks and the log.")
    overwrite_output_dir: bool = flag(False, "Replace what an earlier run left in the output folder.")
    num_train_epochs: float = flag(1.0, "Passes over the training blocks.")
    per_device_train_batch_size: int = flag(1, "Blocks a device takes at a step.")
    per_device_eval_batch_size: int = flag(0, "Windows of a forward pass; 0: as many as make 8,192 tokens, at most 8.")
    eval_strategy: str = flag("steps", "When masks are scored.")
    eval_steps: float | None = flag(
        None,
        f"Steps between two scorings of the mask; default: {EVAL_STEPS}, or as many more as keep "
        "scoring to a quarter of the training's work.",
    )
    save_steps: float = flag(100, "Steps between two checkpoints.")
    save_total_limit: int | None = flag(2, "Checkpoints kept.")
    logging_steps: float = flag(10, "Steps between two logs.")
    disable_tqdm: bool | None = flag(False, "Print logs as lines in place of a progress bar.")
    dataloader_pin_memory: bool = flag(
        torch.cuda.is_available(), "Pin the memory of batches; default: where there is a GPU."
    )
    report_to: str | None = flag("none", "Where logs go: none, tensorboard, wandb, ...")
    resume_from_checkpoint: str | None = flag(None, "Go on with an interrupted run: True, or a checkpoint's folder.")

    def __post_init__(self) -> None:
        """Checks the ranges; keeps `--do_eval` as given: transformers sets it wherever `eval_strategy` is not no.

        One process is one device: transformers would spread its batches over all GPUs by copies of the model.
        """
        check_ranges(self)
        self.eval_steps_given = self.eval_steps is not None
        if self.eval_steps is None:
            self.eval_steps = EVAL_STEPS
        given = self.do_eval
        _check_devices(self)
        super().__post_init__()
        self.do_eval = given
        if self.world_size != ranks.launched():
            raise InputError(
                f"the launcher started {ranks.launched()} processes and the training sees {self.world_size}: start it "
                "by torchrun or accelerate launch, on a machine with as many GPUs, or with --use_cpu True"
            )
        self._n_gpu = min(self.n_gpu, 1)
        known = get_available_reporting_integrations() if self.report_to else []
        missing = [name for name in self.report_to or [] if name not in known]
        if missing:
            raise InputError(f"--report_to {' '.join(missing)}: is not installed; install it, or give another or none")


def _check_devices(args: RunArguments) -> None:
    """Lets several processes run on the CPU of a machine without a GPU; refuses more of them than there are GPUs.

    A GPU that has no float64 (Apple's) is left alone.
    """
    if torch.backends.mps.is_available() and not (torch.cuda.is_available() or args.use_cpu):
        args.use_cpu = True
        print("note: working on the CPU: this GPU knows no float64, in which moments are summed")
    if ranks.launched() == 1:
        return
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"WORLD_SIZE is {ranks.launched()} and no launcher numbers this process (RANK, LOCAL_RANK): start the "
            "command by torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    here, gpus = ranks.launched_here(), torch.cuda.device_count()
    if args.use_cpu:
        return
    if gpus == 0 and not torch.accelerator.is_available():
        args.use_cpu = True
    elif 0 < gpus < here:
        raise InputError(f"--nproc_per_node {here}: the machine has {gpus} GPUs; start a process for each, or fewer")


@dataclass
class FinetuneRunArguments(RunArguments):
    """The same with the released defaults of fine-tuning, and the best adapter kept."""

    learning_rate: float = flag(1e-4, "Learning rate.")
    num_train_epochs: float = flag(2.0, "Passes over the training blocks.")
    per_device_train_batch_size: int = flag(8, "Blocks a device takes at a time.")
    gradient_accumulation_steps: int = flag(0, f"Batches a step; 0: as many as make {RELEASED_BATCH} blocks.")
    eval_strategy: str = flag("steps", "When the validation perplexity is measured.")
    eval_steps: float | None = flag(0.1, "Steps between two validation perplexities, or share.")
    save_steps: float = flag(0.1, "Steps between two checkpoints, or share of the run.")
    logging_steps: float = flag(1, "Steps between two logs.")
    load_best_model_at_end: bool = flag(True, "Keep the best adapter, not the last.")
    metric_for_best_model: str | None = flag("perplexity", "What best means.")
    greater_is_better: bool | None = flag(False, "Whether more of it is better.")
    restore_callback_states_from_checkpoint: bool = flag(True, "Go on with the count of early stopping.")

    def __post_init__(self) -> None:
        """Resolves the accumulation, once the number of devices is known."""
        super().__post_init__()
        if self.gradient_accumulation_steps == 0:
            blocks = self.train_batch_size * self.world_size
            self.gradient_accumulation_steps = max(1, round(RELEASED_BATCH / blocks))


class _Parser(InOneLine, HfArgumentParser):
    """Reads classes of flags; a truth value's flag alone means True, whatever its default."""

    def __init__(self, classes: tuple[Any, ...], **options: object) -> None:
        super().__init__(classes, allow_abbrev=False, **options)
        for action in self._actions:
            if action.type is string_to_bool and action.nargs is None:  # transformers' way where the default is None
                action.nargs, action.const = "?", True


def parse(classes: tuple[object, ...], arguments: list[str] | None = None, **options: object) -> tuple[Any, ...]:
    """Parses the command line into dataclasses.

    Args:
        options: Of argparse's parser.

    Raises:
        InputError: If a flag is unknown, or a value cannot be used.
    """
    try:
        *found, rest = _Parser(classes, **options).parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # TrainingArguments' own checks
        raise InputError(" ".join(str(error).split())) from error
    if rest:
        raise InputError(f"{rest[0]!r} belongs to no flag: give --FLAG VALUE, one with spaces in quotes; see --help")
    return tuple(found)


# Flags of prune that a comparison says in words of its own.
OF_CELLS = {
    "model_name_or_path": "models", "dataset_name": "dataset", "eval_split": "split", "prune_method": "methods",
    "weight_update": "weight_updates", "seed": "seeds", "ctx_length": "block_size", "output_dir": "output",
    "refit_samples": "calibration_samples", "max_train_samples": "train_samples",
    "per_device_eval_batch_size": "eval_batch_size", "do_zero_eval": "zero_eval_sparsities",
} | dict.fromkeys(TARGETS, "sparsities")  # fmt: skip
# What no cell does: it saves no model and times none, and goes on by itself.
IN_NO_CELL = ("save_pruned", "save_loc", "overwrite_output_dir", "resume_from_checkpoint", "protocol", "speed_batches",
              "prompt_tokens", "compare_dense", "write_out")  # fmt: skip


def parse_comparison(arguments: list[str]) -> CompareSettings:
    """Parses the flags of a comparison; what is no flag of its own goes to every cell, as a flag of prune.

    Raises:
        InputError: If a flag is none of prune's either, or a value cannot be used.
    """
    parser = _Parser(
        (CompareSettings,), prog="tvaprune compare", description=str(CompareSettings.__doc__).split("\n")[0]
    )
    for action in parser._actions:
        if action.dest in ("zero_eval_sparsities", "zero_eval_seeds", "other_texts"):
            action.nargs = "*"
    settings, flags = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
    check_flags("prune", flags)
    recipe = recipe_of("prune", flags)
    if others := [name for name in OF_CELLS if name in recipe]:
        raise InputError(f"--{others[0]}: a comparison has --{OF_CELLS[others[0]]} for it; give that")
    if idle := [name for name in IN_NO_CELL if name in recipe]:
        raise InputError(f"--{idle[0]}: does nothing in a comparison, which saves tables alone; leave it out")
    if recipe.get("dim_multiple") == AUTO:
        raise InputError("--dim_multiple auto: one number must serve all cells; let prune measure it, and give it here")
    settings.flags = flags
    found: CompareSettings = settings
    return found


def parse_sampling(arguments: list[str]) -> SampleSettings:
    """Parses the flags of text that a model writes.

    Raises:
        InputError: If a flag is unknown, or a value cannot be used.
    """
    found: SampleSettings
    (found,) = parse((SampleSettings,), arguments, prog="tvaprune sample", description=SampleSettings.__doc__)
    return found


STAGES = (ModelSettings, DataSettings, PruneSettings, DistillSettings, FinetuneSettings, EvalSettings)


def help_text(verb: str, parser: HfArgumentParser, named: Collection[str] = ()) -> str:
    """Returns a verb's flags: those that users set first, those that few need, the training arguments that act.

    Args:
        named: Flags to say all of, and of no other anything; none: all flags, the latter two kinds in a line each.
    """
    actions = {action.dest: action for action in parser._actions}
    row, lines = VERBS[verb], [f"tvaprune {verb}: {VERBS[verb].help}"]
    lines.append("  --config FILE: read flags from a recipe.yaml; those on the command line win")
    if verb == "prune":
        lines.append("  --preset paper: read those that make the paper's method, likewise")
    if not named:
        lines.append(
            f"  --help --{row.expert[0]}: say all of a flag, where the list below ends in ...; in brackets: defaults"
        )
    for title, names, is_short in (
        ("", row.first, False),
        ("for experts", (*row.expert, *ALWAYS), True),
        ("training arguments of transformers", row.training, True),
    ):
        shown = [actions[name] for name in names if name in actions and (not named or name in named)]
        if not shown:
            continue
        lines.append(f"\n{title}:" if title else "")
        for action in shown:
            is_cut = is_short and not named
            choices = f" {{{','.join(map(str, action.choices))}}}" if action.choices and not is_cut else ""
            values = action.default if isinstance(action.default, list) else [action.default]
            default = " ".join(str(value) for value in values if value not in (None, False, ""))
            name = f"--{action.dest}{choices}" + f" ({default})" * bool(default)
            said = " ".join((action.help or "").replace("%%", "%").split())
            said = f"One of {', '.join(CHOICES[action.dest])}." if action.dest in CHOICES else said
            if is_cut:
                said = shorten(said, 118 - 3 - len(name) - 2, placeholder=" ...")
            lines += wrap(f"{name}: {said}", 118, initial_indent="  ", subsequent_indent="      ")
    return "\n".join(lines)


@dataclass
class Arguments:
    """One command's flags, by the stage they belong to."""

    source: ModelSettings
    data: DataSettings
    prune: PruneSettings
    distill: DistillSettings
    finetune: FinetuneSettings
    evaluation: EvalSettings
    training: RunArguments
    recipe: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, arguments: list[str], verb: str) -> "Arguments":
        """Parses a verb's flags; ``--help`` prints them and ends the program.

        Raises:
            InputError: If a flag does not act in the verb, or a value cannot be used.
        """
        # accelerate's word for the same: its own way would shard what is trained, too
        if os.environ.pop("ACCELERATE_USE_FSDP", "false").lower() == "true" and "shard" in VERBS[verb].flags:
            arguments = [*arguments, "--shard", "True"]
        classes: tuple[Any, ...] = (*STAGES, FinetuneRunArguments if verb == "finetune" else RunArguments)
        if {"--help", "-h"} & set(arguments):
            print(help_text(verb, _Parser(classes), set(given_names(arguments)) & set(VERBS[verb].flags)))
            raise SystemExit(0)
        args = cls(*parse(classes, arguments))
        args.recipe = recipe_of(verb, arguments)
        if args.is_spread:  # a time would be that of the way between GPUs
            args.evaluation.speed_batches = 0
        return args

    @property
    def is_spread(self) -> bool:
        """Whether the model's layers lie on several GPUs."""
        return self.source.shard or self.source.device_map == "auto"

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
        args, name = copy.copy(self), f"sparsity_{target}"  # whole: targets that differ in the last digit are two
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
