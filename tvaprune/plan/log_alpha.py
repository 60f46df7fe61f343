"""A gate's score and its inverse: the log of the noise-to-signal ratio by which units stay or go.

Source: Dutta et al., TVA-Prune (ES-FoMo @ ICML 2024), eq. 5, with the sign of the released code and mask files: a unit
is kept where ``log_alpha`` is below 0.
"""

import torch

MU_EPSILON = 1e-8  # of the released tool: keeps log_alpha finite for a mean of 0


def log_alpha_of(mu: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Returns ``logD - log(mu^2)``, of the shape of both; below 0 the unit is kept."""
    return log_variance - torch.log(mu.square() + MU_EPSILON)


def log_variance_at(mu: torch.Tensor, log_alpha: torch.Tensor) -> torch.Tensor:
    """Returns the ``logD`` that gives gates of means ``mu`` this ``log_alpha``: the inverse of `log_alpha_of`."""
    return log_alpha + torch.log(mu.square() + MU_EPSILON)
