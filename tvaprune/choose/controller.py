"""The sparsity controller: a target that rises, and two multipliers that hold the expected sparsity to it.

Source: Xia et al., CoFi (ACL 2022): ``lambda_1 (s - t) + lambda_2 (s - t)^2``, the multipliers by gradient ascent.
"""

from collections.abc import Sequence

import torch
from torch import nn

from tvaprune.choose import gates
from tvaprune.models.parameters import all_layers, counted_parameters, layer_parameters
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit


class Lagrangian(nn.Module):
    """The two multipliers, which start at 0 and are maximised while the gates are minimised."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda_1 = nn.Parameter(torch.zeros(()))
        self.lambda_2 = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: torch.Tensor, target: float, spread: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Returns the penalty for an expected sparsity (a scalar) away from the target.

        Args:
            spread: What `expected_spread` says of layers that must be equally wide: it vanishes as the gap must.
        """
        gap = sparsity - target
        return self.lambda_1 * gap + self.lambda_2 * (gap.square() + spread)


def target_at(step: int, num_warmup_steps: int, start: float, target: float) -> float:
    """Returns the target sparsity of a step: from ``start`` linearly to ``target``, then constant."""
    if step >= num_warmup_steps:
        return target
    return start + (target - start) * step / num_warmup_steps


def beta_at(step: int, num_steps: int, start: float, end: float) -> float:
    """Returns the sharpness of the keep probability at a step.

    At ``log_alpha = -9`` and a beta of 10 the penalty's gradient on a gate is nil; a beta that rises geometrically over
    the choosing steps lets it reach every gate from the start.
    """
    progress = min(1.0, step / max(1, num_steps))
    return float(start * (end / start) ** progress)


def expected_sparsity(log_alpha: PerUnit, beta: float, shape: ModelShape) -> torch.Tensor:
    """Returns the decoder's sparsity at the expected numbers of kept units, a scalar with gradient."""

    def expected(*values: torch.Tensor) -> torch.Tensor:
        return gates.keep_probability(torch.cat(values), beta).sum()

    kept = expected(log_alpha.hidden), expected(*log_alpha.attn), expected(*log_alpha.inter)
    sparsity: torch.Tensor = 1 - all_layers(*kept, shape) / counted_parameters(shape)
    return sparsity


def expected_spread(log_alpha: PerUnit, beta: float, shape: ModelShape) -> torch.Tensor:
    """Returns how far the layers are from being equally wide, a scalar with gradient; 0 where they are.

    The variance over the layers of the expected parameters of the attention, and of the MLP, as shares of a full layer:
    the square of a sparsity, as the gap to the target is. Layers that have no such units are not among them.
    """
    full = counted_parameters(shape) / shape.num_hidden_layers

    def share(kv_heads: torch.Tensor | float, channels: torch.Tensor | float) -> torch.Tensor:
        share: torch.Tensor = layer_parameters(shape.hidden_size, kv_heads, channels, shape) / full
        return share

    def expected(layers: Sequence[torch.Tensor]) -> torch.Tensor:
        there = [gates.keep_probability(value, beta).sum() for value in layers if len(value)]
        return torch.stack(there or [log_alpha.hidden.new_zeros(())])

    heads, channels = expected(log_alpha.attn), expected(log_alpha.inter)
    return share(heads, 0.0).var(correction=0) + share(0.0, channels).var(correction=0)
