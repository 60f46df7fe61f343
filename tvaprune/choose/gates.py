"""The Variational Information Bottleneck gate: formulas, tensor -> tensor, and the product with what it gates.

Source: Dutta et al., TVA-Prune (ES-FoMo @ ICML 2024), eq. 2-5; Dai et al., VIBNet (ICML 2018). A unit's gate is
``z ~ N(mu, exp(logD))``; ``log_alpha`` is the log of its noise-to-signal ratio, and a unit is kept where it is below 0
(the paper's eq. 5 writes the inverse ratio; the released code and mask files use this sign).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tvaprune.plan.log_alpha import MU_EPSILON

# Devices that draw the same noise again for less than keeping it costs: a counter gives it in one kernel. A CPU draws
# forty times as slowly as it multiplies.
REDRAWING = frozenset({"cuda"})


@dataclass(frozen=True)
class Gates:
    """The gates of one place: their means and standard deviations ``exp(logD / 2)``, shape ``(units,)`` each."""

    mu: torch.Tensor
    deviation: torch.Tensor


def multiply(
    x: torch.Tensor, gates: Gates | torch.Tensor, per_token: bool = True, recomputes: bool = True
) -> torch.Tensor:
    """Multiplies by gates drawn anew (eq. 2), or by given ones.

    Backward it keeps ``x``, and the noise or where its generator stood, but neither the gates nor the product.

    Args:
        x: Shape ``(batch, length, units * features)``, the features of a unit side by side.
        gates: Given ones: of a shape that broadcasts to ``(batch, length, units)``.
        per_token: One draw a token, else one a window.
        recomputes: Whether an ``x`` that is a product, as of an MLP with a gate, is computed again backward: its
            factors are kept anyway. They are asked of autograd, which under checkpointing would go forward for them.

    Returns:
        The same shape and precision, with gradients to ``x`` and the gates, or their means and deviations.
    """
    units = gates.shape[-1] if isinstance(gates, torch.Tensor) else len(gates.mu)
    factors = _factors(x) if recomputes else ()
    has_features = x.shape[-1] > units  # most have none: no views, for which a GPU waits as for a kernel
    parted = x.unflatten(-1, (units, -1)) if has_features else x
    product: torch.Tensor
    if isinstance(gates, torch.Tensor):
        product = _FixedProduct.apply(parted, gates.to(x.dtype), *factors)
    else:
        leading = x.shape[:-1] if per_token else torch.Size((x.shape[0], 1))
        product = _Product.apply(parted, gates.mu, gates.deviation, leading, *factors)
    return product.flatten(-2) if has_features else product


def drawn(x: torch.Tensor, gates: Gates, per_token: bool) -> torch.Tensor:
    """Returns gates drawn for ``x`` (eq. 2), for where more than a product needs them.

    Args:
        x: Shape ``(batch, length, units * features)``.
        per_token: One draw a token, else one a window.

    Returns:
        Shape ``(batch, length or 1, units)``, of the gates' precision.
    """
    leading = x.shape[:-1] if per_token else torch.Size((x.shape[0], 1))
    noise = torch.randn(*leading, len(gates.mu), device=x.device, dtype=x.dtype)
    return torch.addcmul(gates.mu, noise, gates.deviation)


def _factors(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Returns the two tensors that ``x`` is the product of, as its backward pass keeps them; none where it is none."""
    kept = [getattr(x.grad_fn, name, None) for name in ("_saved_self", "_saved_other")]
    is_product = x.grad_fn is not None and x.grad_fn.name() == "MulBackward0"
    found = tuple(value for value in kept if isinstance(value, torch.Tensor) and value.shape == x.shape)
    return found if is_product and len(found) == len(kept) else ()


class _Product(torch.autograd.Function):
    """``x * z`` for ``x`` of shape ``(batch, length, units, features)``, or without the last where it is 1."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, mu: torch.Tensor, deviation: torch.Tensor, leading: torch.Size, *factors: Any
    ) -> torch.Tensor:
        ctx.shape, ctx.unused = x.shape, [None] * len(factors)
        ctx.size, ctx.state = torch.Size((*leading, len(mu))), None
        if x.device.type in REDRAWING:
            ctx.state = _default_generator(x.device).get_state()
        noise = torch.randn(ctx.size, device=x.device, dtype=x.dtype)
        ctx.save_for_backward(mu, deviation, None if ctx.state is not None else noise, *(factors or (x,)))
        return _sampled_times(x, mu, noise, deviation, torch.empty_like(noise))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        mu, deviation, noise, *kept = ctx.saved_tensors
        x = _multiplied(kept, ctx.shape)
        if noise is None:
            generator = torch.Generator(x.device).set_state(ctx.state)
            noise = torch.randn(ctx.size, generator=generator, device=x.device, dtype=x.dtype)
        of_z = gradient * x
        if x.dim() > noise.dim():
            of_z = of_z.sum(-1)
        of_mu = of_z.sum((0, 1), dtype=mu.dtype)
        of_deviation = of_z.mul_(noise).sum((0, 1), dtype=mu.dtype)  # noise of a window serves all its tokens
        spare = of_z if of_z.shape == noise.shape else torch.empty_like(noise)
        return _sampled_times(gradient, mu, noise, deviation, spare), of_mu, of_deviation, None, *ctx.unused


class _FixedProduct(torch.autograd.Function):
    """The same product for given gates."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gates: torch.Tensor, *factors: Any) -> torch.Tensor:
        ctx.shape, ctx.unused, ctx.has_features = x.shape, [None] * len(factors), x.dim() > 3
        ctx.save_for_backward(gates, *(factors or (x,)))
        return x * (gates.unsqueeze(-1) if ctx.has_features else gates)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gates, *kept = ctx.saved_tensors
        of_gates, z = gradient * _multiplied(kept, ctx.shape), gates
        if ctx.has_features:
            of_gates, z = of_gates.sum(-1), gates.unsqueeze(-1)
        return gradient * z, of_gates.sum_to_size(gates.shape), *ctx.unused


def _multiplied(kept: Sequence[torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Returns what was gated: it was kept, or its two factors were."""
    return kept[0] if len(kept) == 1 else (kept[0] * kept[1]).view(shape)


def _sampled_times(
    x: torch.Tensor, mu: torch.Tensor, noise: torch.Tensor, deviation: torch.Tensor, spare: torch.Tensor
) -> torch.Tensor:
    """Returns the product with the gates of a noise, in place of ``spare`` where the sizes allow.

    On a CPU new memory takes longer than what is computed in it.
    """
    z = torch.addcmul(mu, noise, deviation, out=spare)
    if x.dim() > z.dim():
        return z.unsqueeze(-1) * x
    return z.mul_(x) if z.shape == x.shape else z * x


def _default_generator(device: torch.device) -> torch.Generator:
    """Returns the generator that `torch.randn` draws from on a device."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


def keep_probability(log_alpha: torch.Tensor, beta: float) -> torch.Tensor:
    """Returns the expected keep probability ``sigmoid(-beta * log_alpha)``, elementwise."""
    return torch.sigmoid(-beta * log_alpha)


def information(mu: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Returns the gates' KL terms ``1/2 * log(1 + mu^2 / exp(logD))``, elementwise (eq. 3)."""
    return 0.5 * torch.log1p(mu.square() / (torch.exp(log_variance) + MU_EPSILON))
