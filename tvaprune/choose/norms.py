"""An RMSNorm that reads the kept dims only, and keeps no more than its input for the backward pass.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (NeurIPS 2019), eq. 4, over the dims that stay, as the
sliced model will have it. What it divides their squares' sum by is their number, or still the dense width, which the
cut then writes into the gain (`tvaprune.plan.edits`).
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class KeptDims:
    """Which dims a norm reads: of the hidden ones, or of the features of a layer's heads.

    Attributes:
        mask: 1 where a dim is kept, else 0; shape ``(dims,)``.
        share: ``mask`` over the number of kept dims.
        width: What the sum of squares is divided by, a scalar.
        square_share: ``mask / width``.
        epsilon_share: What the norm's epsilon counts, a scalar: the sliced norm adds it before its larger gain.
    """

    mask: torch.Tensor
    share: torch.Tensor
    width: torch.Tensor
    square_share: torch.Tensor
    epsilon_share: torch.Tensor

    @classmethod
    def of(cls, kept: torch.Tensor, width: int | None = None) -> "KeptDims":
        """Returns the dims where ``kept``, shape ``(dims,)``, is true; float32, as norms compute.

        Args:
            width: What the sum of squares is divided by; None: the number of kept dims.
        """
        mask = kept.float()
        count = mask.sum()
        over = count if width is None else torch.full_like(count, width)
        return cls(mask, mask / count, over, mask / over, count / over)


def centred_on_kept(x: torch.Tensor, kept: KeptDims) -> torch.Tensor:
    """Subtracts the kept dims' mean from them, which makes `kept_rms_norm` a LayerNorm; in float32 at least.

    Other dims stay what they are: 0 in a masked model, as if they were gone.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide - (wide * kept.share).sum(-1, keepdim=True) * kept.mask


def kept_rms_norm(
    x: torch.Tensor, weight: torch.Tensor, kept: KeptDims, epsilon: float, offset: float = 0.0, once: bool = False
) -> torch.Tensor:
    """Normalises all dims by the root of the kept ones' squares, summed and divided; ``weight`` is frozen.

    Args:
        x: Shape ``(..., hidden)``.
        weight: Shape ``(hidden,)``; the gain is ``offset + weight``.
        epsilon: What the mean square is raised by.
        once: Whether the result is rounded once, after the gain, not before it.
    """
    normed: torch.Tensor = _KeptNorm.apply(x, weight, kept, epsilon, offset, once)
    return normed


class _KeptNorm(torch.autograd.Function):
    # Results are written over what is no longer needed: on a CPU new memory takes longer than what is computed in it.

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, kept: KeptDims, epsilon: float, offset: float, once: bool
    ) -> torch.Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        spare = wide.square()
        mean_square = spare.mul_(kept.mask).sum(-1, keepdim=True) / kept.width
        root = torch.rsqrt(mean_square.add_(kept.epsilon_share, alpha=epsilon))
        ctx.save_for_backward(x, root, weight)
        ctx.share, ctx.offset, ctx.once = kept.square_share, offset, once
        result = spare if spare.dtype == x.dtype else torch.empty_like(x)
        if once:
            return torch.mul(wide * root, weight.to(root.dtype) + offset, out=result)
        torch.mul(wide, root, out=result)
        return result.mul_(weight) if weight.dtype == x.dtype else weight * result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, root, weight = ctx.saved_tensors
        gain = weight.to(root.dtype) + ctx.offset if ctx.once else weight
        of_normed, wide = (gradient * gain).to(root.dtype), x.to(root.dtype)
        spare = of_normed * wide
        of_root = spare.sum(-1, keepdim=True)
        # d root / d x_j = -root^3 x_j share_j
        straight, bent = of_normed.mul_(root), torch.mul(wide, ctx.share, out=spare)
        result = straight if straight.dtype == x.dtype else torch.empty_like(x)
        of_x = torch.addcmul(straight, bent, of_root * root.pow(3), value=-1, out=result)
        return of_x, None, None, None, None, None
