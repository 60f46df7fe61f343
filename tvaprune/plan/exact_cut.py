"""The threshold for an exact sparsity: which cut of the scores meets the target once widths are adjusted."""

from dataclasses import replace

import torch

from tvaprune.models.parameters import decoder_sparsity
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.masks import Masks
from tvaprune.plan.widths import NO_RULES, WidthRules, Widths, adjust_width

TOLERANCE = 0.005  # how far the saved mask's sparsity may be from the target
NEARBY_WIDTHS = 3  # multiples of T above and below the natural hidden width that the search for an exact target tries


def calibrate(
    masks: Masks,
    shape: ModelShape,
    target: float,
    rules: WidthRules = NO_RULES,
) -> Masks:
    """Shifts the log-variances so that the cut at 0, adjusted, comes as near to the target sparsity as can be.

    One threshold on ``log_alpha`` serves all units where it can. Where the step of one hidden width is larger than the
    tolerance, the hidden dims get a threshold of their own, the nearest that makes the target possible.

    Returns:
        New masks of the same means; `plan_from_masks` of them, with the same arguments, is the plan.
    """
    scores = _Scores(masks, Widths(shape, rules))
    common = scores.threshold(target)
    natural = scores.hidden_width(common)
    best, best_rank = (common, common), scores.rank(common, common, target)
    for steps in range(-NEARBY_WIDTHS, NEARBY_WIDTHS + 1):
        width = adjust_width(natural + steps * rules.dim_multiple, shape.hidden_size, rules.dim_multiple)
        rest = scores.threshold(target, width)
        hidden = scores.hidden_threshold(width, rest)
        rank = scores.rank(hidden, rest, target)
        if rank < best_rank:
            best, best_rank = (hidden, rest), rank
    return scores.shifted(*best)


class _Scores:
    """The sorted log_alpha of a model, to count quickly what a threshold keeps."""

    def __init__(self, masks: Masks, widths: Widths) -> None:
        self.masks = masks.plain()
        # Float64, so that a threshold between two float32 scores stands strictly between them.
        self.sorted = self.masks.log_alpha.map(lambda score: score.double().sort().values)
        self.widths = widths
        self.cuts = _between(torch.cat(tuple(self.sorted)).sort().values)

    def sparsity(self, width: int, threshold: float) -> float:
        """Returns the sparsity at a hidden width and a threshold for KV heads and MLP channels."""
        heads = self.widths.heads([_count(scores, threshold) for scores in self.sorted.attn])
        channels = self.widths.channels([_count(scores, threshold) for scores in self.sorted.inter])
        return float(decoder_sparsity(width, heads, channels, self.widths.shape))

    def threshold(self, target: float, width: int | None = None) -> float:
        """Returns the cut whose sparsity is nearest to the target; ``width`` None: it cuts the hidden dims too."""

        def sparsity(cut: float) -> float:
            return self.sparsity(self.hidden_width(cut) if width is None else width, cut)

        low, high = 0, len(self.cuts) - 1  # sparsity falls as the cut rises
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if sparsity(float(self.cuts[middle])) <= target else (middle + 1, high)
        return min(map(float, self.cuts[max(low - 1, 0) : low + 1]), key=lambda cut: abs(sparsity(cut) - target))

    def hidden_threshold(self, width: int, near: float) -> float:
        """Returns the cut nearest to ``near`` that keeps ``width`` hidden dims after adjustment."""
        if self.hidden_width(near) == width:
            return near
        cuts = [float(cut) for cut in _between(self.sorted.hidden)]
        fitting = [cut for cut in cuts if self.hidden_width(cut) == width]
        return min(fitting or [near], key=lambda cut: abs(cut - near))

    def rank(self, hidden: float, rest: float, target: float) -> tuple[float, float]:
        """Orders pairs of cuts: first by what they miss the target by beyond the tolerance, then by their distance."""
        miss = abs(self.sparsity(self.hidden_width(hidden), rest) - target)
        return (max(0.0, miss - TOLERANCE), abs(hidden - rest) + miss)

    def shifted(self, hidden: float, rest: float) -> Masks:
        """Returns the masks with 0 as the cut."""
        log_variance = self.masks.log_variance
        shifted = PerUnit(
            hidden=(log_variance.hidden.double() - hidden).float(),
            attn=tuple((v.double() - rest).float() for v in log_variance.attn),
            inter=tuple((v.double() - rest).float() for v in log_variance.inter),
        )
        return replace(self.masks, log_variance=shifted)

    def hidden_width(self, cut: float) -> int:
        """Returns the hidden width that a cut leaves."""
        return self.widths.hidden(_count(self.sorted.hidden, cut))


def _count(sorted_scores: torch.Tensor, threshold: float) -> int:
    return int(torch.searchsorted(sorted_scores, threshold))


def _between(scores: torch.Tensor) -> torch.Tensor:
    """Returns the cuts that tell sorted scores apart: below all, midway between neighbours, above all."""
    return torch.cat([scores[:1] - 1, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1]).unique()
