"""What a score may look at: the model, the calibration text, and what flows into chosen projections.

KV heads and MLP channels write through the output and down projections; most scores are read off their inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.choose.scores.kept import KeptRounds
from tvaprune.errors import InputError
from tvaprune.models.families import family_of
from tvaprune.models.layout import Block, layout_of
from tvaprune.models.shape import ModelShape, shape_of


@dataclass(frozen=True)
class Calibration:
    """What a score may look at.

    Attributes:
        model: The unpruned model.
        blocks: Calibration windows.
        target: Share of the decoder layers' parameters that will go.
        seed: Of a method's draws.
        batch_size: Windows per forward pass.
        kept: Where a method of many rounds keeps what it has after each, and goes on from; None: nowhere.
    """

    model: PreTrainedModel
    blocks: Dataset
    target: float
    seed: int
    batch_size: int
    kept: KeptRounds | None = None

    @property
    def shape(self) -> ModelShape:
        """The unpruned model's sizes."""
        return shape_of(self.model.config)

    def batches(self, description: str | None) -> Iterator[torch.Tensor]:
        """Yields token ids of shape ``(batch, length)`` on the model's device; ``None`` shows no progress bar.

        Of several processes each gets its share: what is summed over them is to be added up.
        """
        device = next(self.model.parameters()).device
        starts = ranks.share(range(0, len(self.blocks), self.batch_size))
        for start in tqdm(starts, desc=description, disable=description is None, leave=False, unit="batch"):
            yield self.blocks[start : start + self.batch_size]["input_ids"].to(device)


def output_projections(model: PreTrainedModel) -> list[tuple[Any, Any]]:
    """Returns each layer's output and down projections: what its KV heads and its MLP channels write through."""
    pairs = both_blocks(model)
    return [(model.get_submodule(attention.writer), model.get_submodule(mlp.writer)) for attention, mlp in pairs]


def both_blocks(model: PreTrainedModel) -> list[tuple[Block, Block]]:
    """Returns each layer's attention and MLP.

    Raises:
        InputError: If a layer lacks one, or has experts.
    """
    layout = layout_of(family_of(model.config), shape_of(model.config))
    pairs = list(zip(layout.attention, layout.mlp, strict=True))
    whole = [(attn, mlp) for attn, mlp in pairs if attn is not None and mlp is not None and mlp.mixture is None]
    if len(whole) < len(pairs):
        raise InputError(
            f"--prune_method: {len(pairs) - len(whole)} layers of the model have no attention or no MLP, or have "
            "experts, and the one-shot scores compare the two layer by layer: use --prune_method vib"
        )
    return whole


class InputSums:
    """Running sums over the inputs of one linear layer; shapes ``(in_features,)``, float64."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.total = torch.zeros(linear.in_features, dtype=torch.float64, device=linear.weight.device)
        self.squares = torch.zeros_like(self.total)
        self.count = 0

    def add(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Forward pre-hook: adds a batch, shape ``(batch, length, in_features)``."""
        x = args[0].detach().flatten(0, -2).double()
        self.total += x.sum(0)
        self.squares += x.square().sum(0)
        self.count += len(x)

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each feature."""
        return self.total / self.count

    @property
    def variance(self) -> torch.Tensor:
        """Variance of each feature around its mean."""
        return (self.squares / self.count - self.mean.square()).clamp(min=0)

    def wanda(self) -> torch.Tensor:
        """Returns Wanda's ``|W| * ||x||`` averaged over the rows of each column; the norm is per token."""
        return self.linear.weight.double().abs().mean(0) * (self.squares / self.count).sqrt()


class _AllRead(Exception):
    """The last linear layer of interest has its input: the rest of the forward pass is not needed."""


@torch.inference_mode()
def read_inputs(calibration: Calibration, linears: Sequence[Any], description: str | None) -> list[InputSums]:
    """Returns the input sums of linear layers, given in the order of the forward pass."""

    def stop(module: nn.Module, args: object) -> None:
        raise _AllRead

    with summed_inputs(linears) as sums, linears[-1].register_forward_pre_hook(stop):
        for ids in calibration.batches(description):
            with suppress(_AllRead):
                calibration.model(input_ids=ids, use_cache=False)
    return sums


@contextmanager
def summed_inputs(linears: Sequence[Any]) -> Iterator[list[InputSums]]:
    """Yields sums of what comes into linear layers within; at the end they are those of all processes."""
    sums = [InputSums(linear) for linear in linears]
    with ExitStack() as hooks:
        for entry in sums:
            hooks.enter_context(entry.linear.register_forward_pre_hook(entry.add))
        yield sums
    for entry in sums:
        ranks.add_up(entry.total, entry.squares)
        entry.count = int(ranks.total(entry.count)[0])
