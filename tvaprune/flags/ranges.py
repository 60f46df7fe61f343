"""The range of every numeric flag, and the values of those that take words, as data: checked before any work.

Each class of flags checks itself when it is made, so a command line and a call from Python are refused alike.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from tvaprune.errors import InputError


@dataclass(frozen=True)
class Range:
    """What a number must be, for the test and in words."""

    words: str
    holds: Callable[[float], bool]


def _at_least(least: int, words: str) -> Range:
    return Range(words, lambda value: value >= least and value == int(value))


ANY = Range("a finite number", lambda value: True)
POSITIVE = Range("a number above 0", lambda value: value > 0)
WEIGHT = Range("a weight of 0 or more", lambda value: value >= 0)
DURATION = Range("a number of 0 or more", lambda value: value >= 0)
SHARE = Range("a share from 0 to below 1", lambda value: 0 <= value < 1)
TARGET = Range(
    "a number between 0 and 1, such as 0.5: it is the share of the decoder's parameters that goes",
    lambda value: 0 < value < 1,
)
SPEED_UP = Range("a number above 1, such as 1.5: how many times as fast", lambda value: value > 1)
RESERVED_MEMORY = 2.0  # GiB of --memory: what settings leave free, for what torch itself takes and for fragmentation
MEMORY = Range("a number of GiB above 2, which stay free", lambda value: value > RESERVED_MEMORY)
COUNT = _at_least(1, "a number above 0, a whole one")
COUNT_OR_NONE = _at_least(0, "a whole number of 0 or more")
TOKENS = _at_least(2, "at least 2 tokens: one is predicted from the other")
CORES = os.cpu_count() or 1
WORKERS = Range(f"a whole number from 0 to this machine's {CORES} cores", lambda value: value in range(CORES + 1))
SEED = Range("a whole number from 0 to 4294967295", lambda value: 0 <= value < 2**32 and value == int(value))

RANGES = {
    name: found
    for found, names in {
        ANY: ("initial_log_variance",),
        POSITIVE: (
            "vib_learning_rate", "reg_learning_rate", "beta", "beta_start", "distill_temp", "lora_alpha_ratio",
            "epoch_f", "num_train_epochs", "learning_rate", "adam_epsilon", "eval_steps", "save_steps",
            "logging_steps", "temperature",
        ),
        WEIGHT: (
            "kl_factor", "att_mul", "inter_mul", "emb_mult", "gate_ce_weight", "distill_ce_loss_alpha",
            "distill_hidden_alpha", "weight_decay",
        ),
        DURATION: ("lagrangian_warmup_epochs", "warmup_steps", "eval_delay", "max_grad_norm"),
        SHARE: ("settle_share", "lora_dropout", "adam_beta1", "adam_beta2"),
        TARGET: ("target_sparsity", "sparsities", "zero_eval_sparsities"),
        SPEED_UP: ("target_speedup",),
        MEMORY: ("memory",),
        TOKENS: ("block_size", "ctx_length"),
        COUNT: (
            "max_train_samples", "max_eval_samples", "tensor_parallel", "refit_samples", "lora_r", "teacher_top_k",
            "early_stopping_patience", "zero_eval_limit", "max_steps", "per_device_train_batch_size",
            "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit", "torch_empty_cache_steps",
            "dataloader_prefetch_factor", "train_samples", "calibration_samples", "eval_batch_size", "threads",
            "tokens", "page", "batch_size",
        ),
        COUNT_OR_NONE: ("dim_multiple", "speed_batches", "prompt_tokens", "num_fewshot"),
        WORKERS: ("dataloader_num_workers",),
        SEED: ("seed", "data_seed", "seeds", "zero_eval_seeds"),
    }.items()
    for name in names
}  # fmt: skip
# A schedule that needs settings of its own, or the metric of every evaluation, would end in the middle of the work.
CHOICES = {
    "lr_scheduler_type": (
        "linear", "cosine", "cosine_with_restarts", "constant", "constant_with_warmup", "inverse_sqrt",
    ),
    "save_strategy": ("no", "steps", "epoch"),
}  # fmt: skip


AUTO = "auto"  # of a number that is measured
NUMBERS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_AMOUNT = re.compile(r"(\d+(?:\.\d+)?)\s?([a-z]*)", re.ASCII)


def amount(name: str, value: str, units: dict[str, float]) -> float:
    """Returns the value of a flag that takes a number with a unit, such as ``100M`` or ``6GB``.

    Args:
        units: By name, in small letters; the number is multiplied by its unit's.

    Raises:
        InputError: If it is no such number, or nothing.
    """
    found = _AMOUNT.fullmatch(value.strip().lower())
    total = float(found[1]) * units.get(found[2], 0) if found else 0
    if not total:
        example = "100M or 1.5B parameters" if units is NUMBERS else "6GB or 5.5GiB"
        raise InputError(f"--{name} is {value}: give an amount above 0 with its unit, such as {example}")
    return total


def number_or(word: str, name: str, value: int | str | None) -> int | str | None:
    """Returns the value of a flag that takes a whole number or one word; a command line gives both as text.

    Raises:
        InputError: If it is neither.
    """
    if not isinstance(value, str) or value == word:
        return value
    try:
        return int(value)
    except ValueError as error:
        raise InputError(f"--{name} is {value}: give {RANGES[name].words}, or {word}") from error


def check_ranges(settings: Any) -> None:
    """Checks every field of a class of flags that has a range or a choice; a field's own default is always in it.

    Raises:
        InputError: If a value is out of it, NaN and infinity included.
    """
    for entry in fields(settings):
        given = getattr(settings, entry.name)
        if given in (None, AUTO) or given == entry.default:
            continue
        if entry.name in RANGES:
            for value in given if isinstance(given, list) else [given]:
                _check(entry.name, value, RANGES[entry.name])
        word = str(getattr(given, "value", given))
        if entry.name in CHOICES and word not in CHOICES[entry.name]:
            raise InputError(f"--{entry.name} is {word}: give one of {', '.join(CHOICES[entry.name])}")


def _check(name: str, value: Any, wanted: Range) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value) and wanted.holds(value)):
        raise InputError(f"--{name} is {value}: give {wanted.words}")
