"""The sparsity controller: a target that rises, and two multipliers that hold the expected sparsity to it.

Source: Xia et al., CoFi (ACL 2022): ``lambda_1 (s - t) + lambda_2 (s - t)^2``, the multipliers by gradient ascent.
"""

from collections.abc import Sequence

import torch
from torch import nn

from tvaprune import gates
from tvaprune.families import ModelShape
from tvaprune.param_count import decoder_sparsity
from tvaprune.units import PerUnit


class Lagrangian(nn.Module):
    """The two multipliers, which start at 0 and are maximised while the gates are minimised."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda_1 = nn.Parameter(torch.zeros(()))
        self.lambda_2 = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: torch.Tensor, target: float) -> torch.Tensor:
        """Returns the penalty for an expected sparsity (a scalar) away from the target."""
        gap = sparsity - target
        return self.lambda_1 * gap + self.lambda_2 * gap.square()


def target_at(step: int, num_warmup_steps: int, start: float, target: float) -> float:
    """Returns the target sparsity of a step: from ``start`` linearly to ``target``, then constant."""
    if step >= num_warmup_steps:
        return target
    return start + (target - start) * step / num_warmup_steps


def beta_at(step: int, num_steps: int, start: float, end: float, share: float) -> float:
    """Returns the sharpness of the keep probability at a step.

    At ``log_alpha = -9`` and a beta of 10 the penalty's gradient on a gate is nil; a beta that rises geometrically over
    the first ``share`` of the steps lets it reach every gate from the start (method: section 10).
    """
    progress = min(1.0, step / max(1.0, share * num_steps))
    return float(start * (end / start) ** progress)


def expected_sparsity(log_alpha: PerUnit, beta: float, shape: ModelShape) -> torch.Tensor:
    """Returns the decoder's sparsity at the expected numbers of kept units, a scalar with gradient."""

    def expected(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [gates.keep_probability(value, beta).sum() for value in values]

    (hidden,) = expected([log_alpha.hidden])
    sparsity: torch.Tensor = decoder_sparsity(hidden, expected(log_alpha.attn), expected(log_alpha.inter), shape)
    return sparsity
