"""What a rotation needs to keep a tied head the embedding: a stretched stream, and dims that stay axes of their own.

With a final gain ``g`` a tied head computes ``E diag(g) x``. Of a stream that is stretched by ``sqrt(g / c)`` it is
``c E' x'``, whatever ``E'`` and ``x'`` are turned by. What the norms divide by is then the stretched stream's root mean
square: every norm's output changes by one factor per token, and by nothing else. That factor is near a constant but for
dims that carry much and have an unlike gain. Those stay axes: neither stretched nor turned, each with its gain.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from tvaprune.losses import distillation_loss
from tvaprune.models.families import family_of
from tvaprune.models.logits import predictions
from tvaprune.models.rotate import norms_of
from tvaprune.models.shape import shape_of

COST, ROUNDED_COST = 1e-3, 3e-3  # what a tie may cost, in nats: KL of the dense predictions; 16 bits round by 2e-3
BLOCKS = 8  # that it is measured on
_SHARES = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the dims, tried as axes


@torch.no_grad()
def kept_tie(
    model: PreTrainedModel, energy: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the stretch of fewest axes whose cost is at most a limit, and which dims are axes; tells both.

    None, and a note: half of the dims as axes is not enough.

    Args:
        energy: What each dim carries of the normalised streams, shape ``(hidden_size,)``.
        ids: Blocks that the cost is measured on, shape ``(blocks, length)``.

    Returns:
        Shapes ``(hidden_size,)``; float64 and bool.
    """
    limit = COST if model.dtype == torch.float32 else ROUNDED_COST
    for stretch, axes, cost in tried(model, energy, ids):
        if cost <= limit:
            print(f"the tie is kept: {int(axes.sum())} of {len(axes)} hidden dims stay axes, at a KL of {cost:.2g}")
            return stretch, axes
    print(
        "note: --rotate auto turns nothing: keeping the tie of the embeddings would change the predictions by a KL of "
        f"{cost:.2g}, above {limit:g}; --rotate on unties them"
    )
    return None


@torch.no_grad()
def tried(
    model: PreTrainedModel, energy: torch.Tensor, ids: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, float]]:
    """Yields a stretch, its axes, and what it costs, each with more axes than the one before; as for `kept_tie`."""
    family = family_of(model.config)
    gain = model.get_parameter(f"{family.final_norm}.weight").detach().double().cpu() + family.norm_offset
    rows = ids[:BLOCKS].to(model.device).split(1)
    for share in _SHARES:
        stretch, axes = stretched(gain, energy.double().cpu(), round(share * len(gain)))
        yield stretch, axes, _cost(model, stretch, rows)


def stretched(gain: torch.Tensor, energy: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a stretch and its axes: ``count`` dims that it would change most, and all whose gain is not above 0.

    The rest shares the gain ``c``, by which the stream keeps its mean energy. Shapes ``(hidden_size,)``, float64.
    """
    unlike = energy * (gain / gain.median() - 1).abs()
    unlike = unlike.masked_fill(gain <= 0, torch.inf)
    axes = gain <= 0
    axes[unlike.argsort(descending=True)[:count]] = True
    rest = ~axes
    shared = (gain * energy)[rest].sum() / energy[rest].sum()
    stretch = torch.ones_like(gain)
    stretch[rest] = (gain[rest] / shared).sqrt()
    return stretch, axes


def _cost(model: PreTrainedModel, stretch: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> float:
    """Returns the mean KL of the predictions from those of a stretched stream."""
    costs = []
    for row in rows:
        whole, _ = predictions(model, input_ids=row, use_cache=False)
        with _stretched_norms(model, stretch):
            changed, _ = predictions(model, input_ids=row, use_cache=False)
        costs.append(distillation_loss(changed, whole))
    return float(torch.stack(costs).mean())


@contextmanager
def _stretched_norms(model: PreTrainedModel, stretch: torch.Tensor) -> Iterator[None]:
    """Lets every norm divide by the root mean square of the stretched stream."""

    def rescale(module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        own = args[0].float()
        other = own * stretch.to(own)
        factor = own.square().mean(-1, keepdim=True) / other.square().mean(-1, keepdim=True)
        return output * torch.where(factor.isfinite(), factor, 1.0).sqrt().to(output.dtype)

    names = norms_of(family_of(model.config), shape_of(model.config))
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(model.get_submodule(name).register_forward_hook(rescale))
        yield
