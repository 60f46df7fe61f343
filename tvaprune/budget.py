"""``--memory``: what must go in together, from sizes alone, and which settings make it fit.

The settings change how much is there at a time, and not what is computed: activations that are computed again, smaller
passes and as many more of them in a step, the unpruned model on the host during the refit, no timing of two models that
do not fit beside each other. What the user set stays as it is.

The bytes are those of the code, counted on fake tensors at the shapes of Llama-2-7B, Mistral-7B and Llama-3-8B, rounded
up. Letters: h hidden size, f MLP channels, v vocabulary, b bytes of a number.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tvaprune.flags.arguments import Arguments
from tvaprune.losses import CHUNK_TOKENS
from tvaprune.measure.perplexity import CHUNK_TOKENS as EVALUATION_CHUNK
from tvaprune.measure.perplexity import FORWARD_TOKENS
from tvaprune.models.parameters import dense_layers, dense_parameters
from tvaprune.models.shape import ModelShape

GIB = 2**30
DEFAULT_MEMORY = 40.0  # GiB
RESERVED = 2.0  # GiB: the context, workspaces, fragmentation
STEP_BYTES = 16  # of a trained number: itself, its gradient and AdamW's two moments, in float32
REFIT_SAMPLES = 128  # blocks that choose among fits


def memory_of(args: Arguments) -> float:
    """Returns ``--memory``, in GiB; by default 40, or what the GPU has where that is less."""
    if args.source.memory is not None:
        return args.source.memory
    device = args.training.device
    if device.type != "cuda":
        return DEFAULT_MEMORY
    return min(DEFAULT_MEMORY, torch.cuda.get_device_properties(device).total_memory / GIB)


@dataclass(frozen=True)
class Sizes:
    """What a run holds, in numbers.

    Attributes:
        shape: The unpruned model's sizes.
        pruned: The narrower model's parameters.
        itemsize: Bytes of a number of both.
    """

    shape: ModelShape
    pruned: int
    itemsize: int

    @classmethod
    def at_sparsity(cls, shape: ModelShape, sparsity: float, itemsize: int) -> "Sizes":
        """Returns the sizes before it is known what is kept."""
        return cls(shape, round(dense_parameters(shape) - sparsity * dense_layers(shape)), itemsize)

    @property
    def share(self) -> float:
        """Of the dense layers' parameters, those that are left."""
        return max(0.0, 1 - (dense_parameters(self.shape) - self.pruned) / dense_layers(self.shape))

    @property
    def dense_bytes(self) -> float:
        """Bytes of the unpruned model."""
        return dense_parameters(self.shape) * self.itemsize

    @property
    def pruned_bytes(self) -> float:
        """Bytes of the narrower model."""
        return self.pruned * self.itemsize

    @property
    def pass_bytes(self) -> float:
        """Bytes of an evaluation's pass: the widest layer's activations and residual streams, or a chunk's logits."""
        layer = FORWARD_TOKENS * (3 * max(self.shape.intermediate_size) + 4 * self.shape.hidden_size) * self.itemsize
        chunk = EVALUATION_CHUNK * self.shape.vocab_size * (self.itemsize + 8)
        return max(layer, chunk + FORWARD_TOKENS * self.shape.hidden_size * self.itemsize)

    def activations(self, tokens: int, checkpointing: bool, share: float = 1.0) -> float:
        """Returns the bytes of a training pass beside weights: what the backward pass needs, and a chunk of logits.

        Args:
            share: Of the dense model's MLP channels that are there.
        """
        shape = self.shape
        layer = self.itemsize * (21 * shape.hidden_size + 5.2 * share * max(shape.intermediate_size))
        each = self.itemsize * shape.hidden_size if checkpointing else layer
        logits = min(tokens, CHUNK_TOKENS) * shape.vocab_size * (14 + 4 * self.itemsize)
        return tokens * (shape.num_hidden_layers * each + layer * checkpointing) + logits

    def refit_bytes(self, offload: bool, tokens: int) -> float:
        """Returns the bytes of the refit: both models, both residual streams, and the moments of the widest layer."""
        widest, h = max(max(self.shape.intermediate_size), self.shape.hidden_size), self.shape.hidden_size
        moments = 8 * (5 * widest**2 + 4 * widest * h)
        layer = self.dense_bytes / self.shape.num_hidden_layers
        streams = 2 * tokens * h * self.itemsize
        return self.pruned_bytes + moments + (2 * layer if offload else self.dense_bytes + streams)

    def both_bytes(self) -> float:
        """Returns the bytes of timing both models side by side."""
        whole = FORWARD_TOKENS * self.shape.vocab_size * self.itemsize  # a plain forward pass gives all logits
        return self.dense_bytes + self.pruned_bytes + self.pass_bytes + whole

    def trained_bytes(self, rank: int | None, with_head: bool, share: float) -> float:
        """Returns the bytes of what is trained: float32, with its gradient and AdamW's moments.

        Args:
            rank: Of LoRA; None: all weights are trained, in their own precision.
            with_head: Whether a copy of the lm_head is trained; its gradient is there twice while it is added up.
            share: Of the dense model's heads and channels that are there.
        """
        if rank is None:
            return self.pruned * 4 * self.itemsize - self.pruned_bytes
        h, shape = self.shape.hidden_size, self.shape
        sums = 0.0
        for heads, channels in zip(shape.num_key_value_heads, shape.intermediate_size, strict=True):
            keys = heads * shape.head_dim
            sums += 4 * h + share * (2 * keys * (1 + shape.group_size)) + (2 + shape.gated_mlp) * (h + share * channels)
        return STEP_BYTES * rank * sums + with_head * (STEP_BYTES + 4 - self.itemsize) * h * shape.vocab_size


@dataclass(frozen=True)
class _Option:
    """One way to run a training pass."""

    batch: int
    checkpointing: bool


def fit_gates(args: Arguments, sizes: Sizes) -> None:
    """Sets what lets gate training and what follows it fit, in place; says what it set."""

    def needs(option: _Option) -> float:
        return sizes.dense_bytes + sizes.activations(option.batch * args.data.block_size, option.checkpointing)

    lines = _fit_training(args, needs)
    _tell(args, [*lines, *_fit_refit(args, sizes)])


def fit_cut(args: Arguments, sizes: Sizes) -> None:
    """Sets what lets the cut fit."""
    _tell(args, _fit_refit(args, sizes))


def fit_tuning(args: Arguments, sizes: Sizes, rank: int | None, with_head: bool) -> None:
    """Sets what lets fine-tuning and the cut before it fit.

    Args:
        rank: Of LoRA; None: all weights are trained.
        with_head: Whether the lm_head is trained whole.
    """
    tokens, live = args.data.block_size, args.distill.distill and args.finetune.teacher_cache is None
    static = sizes.pruned_bytes + sizes.trained_bytes(rank, with_head, sizes.share) + live * sizes.dense_bytes

    def needs(option: _Option) -> float:
        return static + sizes.activations(option.batch * tokens, option.checkpointing, sizes.share)

    hint = "; --teacher_cache DIR leaves the unpruned model out" if live else ""
    lines = _fit_training(args, needs, hint)
    _tell(args, [*lines, *_fit_refit(args, sizes)])


def blocks_that_fit(args: Arguments, sizes: Sizes, most: int) -> int:
    """Returns how many blocks, halved from ``most`` on, a pass with gradients of the unpruned model may take."""
    while most > 1 and sizes.dense_bytes + sizes.activations(most * args.data.block_size, False) > _room(args):
        most //= 2
    return most


def both_fit(args: Arguments, sizes: Sizes) -> bool:
    """Tells whether the unpruned and the narrower model fit beside each other, as timing needs."""
    return sizes.both_bytes() <= _room(args)


def both_train(args: Arguments, sizes: Sizes, rank: int | None, with_head: bool) -> bool:
    """Tells whether training steps of both models fit beside each other, as timing them needs."""
    training, share = args.training, sizes.share
    tokens = training.per_device_train_batch_size * args.data.block_size
    trained = sum(sizes.trained_bytes(rank, with_head, part) for part in (1.0, share))
    step = sizes.activations(tokens, bool(training.activation_checkpointing))
    return sizes.dense_bytes + sizes.pruned_bytes + trained + step <= _room(args)


def _room(args: Arguments) -> float:
    if args.source.shard or args.source.device_map == "auto":  # spread over devices: what each holds is not told here
        return math.inf
    return (memory_of(args) - RESERVED) * GIB


def _fit_training(args: Arguments, needs: Callable[[_Option], float], hint: str = "") -> list[str]:
    """Takes the first way to run a pass that fits; the user's flags leave out the others."""
    training, given = args.training, args.recipe
    blocks = training.per_device_train_batch_size * training.gradient_accumulation_steps
    before = _Option(training.per_device_train_batch_size, bool(training.activation_checkpointing))
    options = list(_options(before, given))
    option = next((option for option in options if needs(option) <= _room(args)), options[-1])
    lines = []
    if option.checkpointing != before.checkpointing:
        training.activation_checkpointing = True
        lines.append("--activation_checkpointing True")
    if option.batch != before.batch:
        training.per_device_train_batch_size = option.batch
        training.gradient_accumulation_steps = blocks // option.batch
        lines.append(f"--per_device_train_batch_size {option.batch}")
        lines.append(f"--gradient_accumulation_steps {training.gradient_accumulation_steps}")
    if needs(option) > _room(args):
        kept = [f"--{name} {given[name]}" for name in _BATCH_FLAGS if name in given]
        asked = f" with {' and '.join(kept)}, as you gave" if kept else ""
        print(
            f"note: training needs about {needs(option) / GIB:.0f} GiB{asked}, and --memory {memory_of(args):g} leaves "
            f"{_room(args) / GIB:.0f}{hint}"
        )
    return lines


_BATCH_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing")


def _options(before: _Option, given: dict[str, Any]) -> Iterator[_Option]:
    """Yields the ways to run a pass, the quickest first."""
    batches = [before.batch]
    if not {"per_device_train_batch_size", "gradient_accumulation_steps"} & given.keys():
        while batches[-1] % 2 == 0:
            batches.append(batches[-1] // 2)
    settled = before.checkpointing or {"activation_checkpointing", "gradient_checkpointing"} & given.keys()
    for checkpointing in [before.checkpointing] if settled else [False, True]:
        for batch in batches:
            yield _Option(batch, checkpointing)


def _fit_refit(args: Arguments, sizes: Sizes) -> list[str]:
    prune = args.prune
    if prune.weight_update != "refit":
        return []
    tokens = (prune.refit_samples + REFIT_SAMPLES) * args.data.block_size
    if sizes.refit_bytes(prune.refit_offload, tokens) <= _room(args):
        return []
    if prune.refit_offload or "refit_offload" in args.recipe:
        needed = sizes.refit_bytes(prune.refit_offload, tokens) / GIB
        print(f"note: the refit needs about {needed:.0f} GiB, and --memory {memory_of(args):g} leaves "
              f"{_room(args) / GIB:.0f}; --weight_update fold needs less")  # fmt: skip
        return []
    prune.refit_offload = True
    return ["--refit_offload True"]


def _tell(args: Arguments, lines: list[str]) -> None:
    if lines:
        print(f"note: to fit --memory {memory_of(args):g}: {' '.join(lines)}")
