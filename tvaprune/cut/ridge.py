"""Ridge least squares of a linear layer from second moments of its inputs and targets: pure.

    W' = (W C + lam W_0) (H + lam I)^-1,   C = sum x xhat^T,   H = sum xhat xhat^T

minimises ``sum |W x - W' xhat|^2 + lam |W' - W_0|^2`` (docs/method.md, section 6). Sums and solutions
are float64, as a Gram matrix squares the condition number; a batch's products float32 (TF32 by `--tf32 True`). A
constant input of 1 stands for a bias.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tvaprune.models.layers import ROWS


@dataclass
class Moments:
    """Second moments of one linear layer's inputs and targets.

    Attributes:
        inputs: ``H``, shape ``(features, features)``.
        cross: ``C``, shape ``(targets, features)``.
    """

    inputs: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def zeros(cls, features: int, targets: int, device: torch.device) -> "Moments":
        """Returns the moments of no token (float64: a Gram matrix squares the condition number)."""
        new = torch.zeros(features + targets, features, dtype=torch.float64, device=device)
        return cls(new[:features], new[features:])

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds tokens, shapes ``(..., features)`` and ``(..., targets)``."""
        inputs, targets = inputs.flatten(0, -2).float(), targets.flatten(0, -2).float()
        self.inputs += inputs.T @ inputs
        self.cross += targets.T @ inputs

    def error(self, weight: torch.Tensor) -> float:
        """Returns ``sum |y - W xhat|^2`` less ``sum |y|^2`` where ``cross`` is that of the outputs ``y``."""
        return float(((weight @ self.inputs - 2 * self.cross) * weight).sum())


@dataclass
class Ridge:
    """``H + lam I``, factored anew at every solution: of a wide MLP a factor is gigabytes, and one is there at a time.

    Args:
        inputs: ``H``, shape ``(features, features)``, float64.
        strength: ``lam`` relative to the mean diagonal of ``H``; infinite: the solution is its centre.
    """

    inputs: torch.Tensor
    strength: float

    def __post_init__(self) -> None:
        self.lam = self.strength * float(self.inputs.diagonal().mean())

    def _factor(self) -> torch.Tensor | None:
        """Returns the Cholesky factor; None: there is none."""
        if not (math.isfinite(self.lam) and self.lam > 0):  # inputs that are all 0 say nothing
            return None
        shifted = self.inputs.clone()
        shifted.diagonal().add_(self.lam)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return None if failed else factor

    def solve(self, centre: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        """Returns ``(cross + lam centre) (H + lam I)^-1``, float64.

        Args:
            centre: The weights that the solution is drawn to, shape ``(outputs, features)``.
            cross: The cross moments of the outputs, ``W C``, of the same shape.
        """
        factor = self._factor()
        if factor is None:
            return centre
        return torch.cholesky_solve((cross + self.lam * centre).T, factor).T


def nearest(errors: Sequence[float]) -> int:
    """Returns the place of the smallest error, of the first if there are more; NaN is larger than all."""
    return min(range(len(errors)), key=lambda i: errors[i] if math.isfinite(errors[i]) else math.inf)


def with_one(values: torch.Tensor, linear: Any) -> torch.Tensor:
    """Adds a feature of 1 where the linear has a bias."""
    return values if linear.bias is None else nn.functional.pad(values, (0, 1), value=1.0)


def augmented(linear: Any, rows: Any) -> torch.Tensor:
    """Returns rows of a linear's weight, its bias as one more column, in float64."""
    weight = linear.weight[rows].double()
    return weight if linear.bias is None else torch.cat([weight, linear.bias[rows].double().unsqueeze(1)], 1)


@dataclass
class Outputs:
    """Turns the cross moments of a dense linear's inputs into those of its outputs: ``W C``.

    Attributes:
        kept: The dense linear's rows that the pruned one has; None: all.
    """

    dense: Any
    kept: torch.Tensor | None

    def __call__(self, cross: torch.Tensor, rows: slice) -> torch.Tensor:
        """Returns the cross moments of some of the pruned linear's rows, shape ``(rows, features)``."""
        return augmented(self.dense, rows if self.kept is None else self.kept[rows]) @ cross


def fit_linear(
    linear: Any,
    ridges: Sequence[Ridge],
    fit: Moments,
    held: Moments,
    outputs: Callable[[torch.Tensor, slice], torch.Tensor] = torch.Tensor.__getitem__,
) -> float:
    """Sets a linear's weights to the solution of least held-out error, and returns its strength.

    Args:
        ridges: Of ``fit.inputs``, one for each strength.
        outputs: Turns ``cross`` into that of the linear's outputs, for some rows.
    """
    chunks = [slice(first, first + ROWS) for first in range(0, linear.out_features, ROWS)]
    errors = [0.0] * len(ridges)
    for rows in chunks:
        centre, cross = augmented(linear, rows), outputs(fit.cross, rows)
        own = Moments(held.inputs, outputs(held.cross, rows))
        errors = [e + own.error(ridge.solve(centre, cross)) for e, ridge in zip(errors, ridges, strict=True)]
    del centre, cross, own  # which make room for the solution's
    best = ridges[nearest(errors)]
    for rows in chunks:
        weight = best.solve(augmented(linear, rows), outputs(fit.cross, rows))
        if linear.bias is not None:
            linear.bias[rows] = weight[:, -1]
        linear.weight[rows] = weight[:, : linear.in_features]
    return best.strength
