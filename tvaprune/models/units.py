"""One tensor per kind of prunable unit: the shape that gates, masks, scores and plans share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tvaprune.models.shape import ModelShape


@dataclass(frozen=True)
class PerUnit:
    """A value for every prunable unit of a model.

    Attributes:
        hidden: Shape ``(hidden_size,)``: one set for the whole model.
        attn: Per layer, shape ``(KV heads of the layer,)``: a KV head with the query heads that share it.
        inter: Per layer, shape ``(MLP channels of the layer,)``.
    """

    hidden: torch.Tensor
    attn: tuple[torch.Tensor, ...]
    inter: tuple[torch.Tensor, ...]

    @classmethod
    def full(cls, shape: ModelShape, value: float) -> "PerUnit":
        """Returns the same value for every unit of a model (float32, CPU)."""
        return cls(
            hidden=torch.full((shape.hidden_size,), value),
            attn=tuple(torch.full((heads,), value) for heads in shape.num_key_value_heads),
            inter=tuple(torch.full((channels,), value) for channels in shape.intermediate_size),
        )

    @classmethod
    def of(cls, flat: torch.Tensor, shape: ModelShape) -> "PerUnit":
        """Returns the views of one tensor that holds the values of all units in the order of `__iter__`."""
        tensors = flat.split([shape.hidden_size, *shape.num_key_value_heads, *shape.intermediate_size])
        layers = shape.num_hidden_layers
        return cls(hidden=tensors[0], attn=tensors[1 : 1 + layers], inter=tensors[1 + layers :])

    def flat(self) -> torch.Tensor:
        """Returns the values of all units in one tensor, which `of` parts again."""
        return torch.cat(tuple(self))

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Yields the tensors: hidden, then the layers' attn, then the layers' inter."""
        yield self.hidden
        yield from self.attn
        yield from self.inter

    def map(self, function: Callable[..., torch.Tensor], *others: "PerUnit") -> "PerUnit":
        """Applies ``function`` to each tensor, with the tensors of ``others`` at the same place."""
        return PerUnit(
            hidden=function(self.hidden, *(other.hidden for other in others)),
            attn=tuple(map(function, self.attn, *(other.attn for other in others))),
            inter=tuple(map(function, self.inter, *(other.inter for other in others))),
        )

    def fits(self, shape: ModelShape) -> bool:
        """Tells whether the values are those of a model of this shape."""
        return (
            tuple(self.hidden.shape) == (shape.hidden_size,)
            and tuple(v.numel() for v in self.attn) == shape.num_key_value_heads
            and tuple(v.numel() for v in self.inter) == shape.intermediate_size
        )

    def describe(self) -> str:
        """Returns the sizes in a few words, for messages."""
        heads = sorted({len(v) for v in self.attn})
        channels = sorted({len(v) for v in self.inter})
        return f"{len(self.hidden)} hidden, {len(self.attn)} layers of {heads} KV heads and {channels} MLP channels"


def head_features(kv_heads: torch.Tensor, features: int) -> torch.Tensor:
    """Returns the indices of the features of KV heads, ``features`` each, in order; shape ``(heads * features,)``."""
    return (kv_heads.unsqueeze(1) * features + torch.arange(features, device=kv_heads.device)).flatten()
