"""The Variational Information Bottleneck gate: pure formulas, tensor -> tensor.

Source: Dutta et al., TVA-Prune (ES-FoMo @ ICML 2024), eq. 2-5; Dai et al., VIBNet (ICML 2018). A unit's gate is
``z ~ N(mu, exp(logD))``; ``log_alpha`` is the log of its noise-to-signal ratio, and a unit is kept where it is below 0
(the paper's eq. 5 writes the inverse ratio; the released code and mask files use this sign).
"""

import torch

from tvaprune.plan.log_alpha import MU_EPSILON


def sample(mu: torch.Tensor, log_variance: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """Draws gates (eq. 2), one independent draw for each place of ``leading``.

    Args:
        mu: Means, shape ``(units,)``.
        log_variance: Log-variances, shape ``(units,)``.
        leading: ``(batch, length)``: one a token.

    Returns:
        Gates of shape ``(*leading, units)``.
    """
    noise = torch.randn(*leading, *mu.shape, device=mu.device, dtype=mu.dtype)
    return torch.addcmul(mu, noise, torch.exp(log_variance / 2))


def keep_probability(log_alpha: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the expected keep probability ``sigmoid(-beta * log_alpha)``, elementwise."""
    return torch.sigmoid(-beta * log_alpha)


def information_loss(mu: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Returns the gate's KL term ``1/2 * sum log(1 + mu^2 / exp(logD))``, a scalar (eq. 3)."""
    return 0.5 * torch.log1p(mu.square() / (torch.exp(log_variance) + MU_EPSILON)).sum()
