"""Masks -> keep plan: which units stay and by what their weights are multiplied. Every way of choosing ends here.

The threshold for an exact sparsity, the dimension adjustment (TVA-Prune, eq. 4-5), and the plan as JSON.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tvaprune.errors import InputError
from tvaprune.families import ModelShape
from tvaprune.masks import Masks
from tvaprune.param_count import decoder_sparsity, total_parameters
from tvaprune.units import PerUnit
from tvaprune.widths import Widths, adjust_width

TOLERANCE = 0.005  # how far the saved mask's sparsity may be from the target
NEARBY_WIDTHS = 3  # multiples of T above and below the natural hidden width that the search for an exact target tries
NARROW_HIDDEN_SIZE = 1024


def default_dim_multiple(hidden_size: int) -> int:
    """Returns the multiple that widths are adjusted to: 128 (tensor cores), 8 for miniature models."""
    return 128 if hidden_size >= NARROW_HIDDEN_SIZE else 8


@dataclass(frozen=True)
class KeepPlan:
    """What is kept of a model.

    Attributes:
        kept: Ascending indices of the kept units (int64).
        scale: The factor of each kept unit, aligned with ``kept`` (float32).
        shape: The unpruned model's sizes.
        dim_multiple: What hidden and MLP widths were adjusted to; 1 is no adjustment.
    """

    kept: PerUnit
    scale: PerUnit
    shape: ModelShape
    dim_multiple: int

    @property
    def hidden_size(self) -> int:
        """Kept hidden dims."""
        return len(self.kept.hidden)

    @property
    def num_key_value_heads(self) -> tuple[int, ...]:
        """Kept KV heads per layer."""
        return tuple(len(indices) for indices in self.kept.attn)

    @property
    def intermediate_size(self) -> tuple[int, ...]:
        """Kept MLP channels per layer."""
        return tuple(len(indices) for indices in self.kept.inter)

    @property
    def sparsity(self) -> float:
        """Share of the decoder layers' parameters that goes."""
        return float(decoder_sparsity(self.hidden_size, self.num_key_value_heads, self.intermediate_size, self.shape))

    @property
    def num_parameters(self) -> int:
        """All parameters that stay, embeddings and lm_head included."""
        return total_parameters(self.hidden_size, self.num_key_value_heads, self.intermediate_size, self.shape)

    def full_scale(self) -> PerUnit:
        """Returns the factors at the unpruned sizes, 0 where a unit goes: what the masked model multiplies by."""
        zeros = PerUnit.full(self.shape, 0.0)
        return zeros.map(lambda full, kept, scale: full.index_copy(0, kept, scale), self.kept, self.scale)

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, under a temporary name first."""
        layers = range(self.shape.num_hidden_layers)
        content = {
            "shape": asdict(self.shape),
            "dim_multiple": self.dim_multiple,
            "sparsity": self.sparsity,
            "hidden": {"kept": self.kept.hidden.tolist(), "scale": self.scale.hidden.tolist()},
            "attn": [{"kept": self.kept.attn[i].tolist(), "scale": self.scale.attn[i].tolist()} for i in layers],
            "inter": [{"kept": self.kept.inter[i].tolist(), "scale": self.scale.inter[i].tolist()} for i in layers],
        }
        temporary = path.with_name(f".{path.name}.part")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)

    def _check(self) -> None:
        """Raises `ValueError` unless every layer is there, with ascending indices and a factor for each."""
        full = PerUnit.full(self.shape, 0.0)
        layers = (len(self.kept.attn), len(self.scale.attn), len(self.kept.inter), len(self.scale.inter))
        if set(layers) != {self.shape.num_hidden_layers}:
            raise ValueError("layers are missing")
        for kept, scale, units in zip(self.kept, self.scale, full, strict=True):
            inside = not len(kept) or (kept[0] >= 0 and kept[-1] < len(units))
            if len(kept) != len(scale) or not inside or not bool((kept.diff() > 0).all()):
                raise ValueError("indices are not those of the model's units")

    @classmethod
    def load(cls, path: Path) -> "KeepPlan":
        """Reads a plan.

        Raises:
            InputError: If the file is no plan.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))

            def units(name: str, dtype: torch.dtype) -> PerUnit:
                attn, inter = ([torch.tensor(row[name], dtype=dtype) for row in content[k]] for k in ("attn", "inter"))
                return PerUnit(torch.tensor(content["hidden"][name], dtype=dtype), tuple(attn), tuple(inter))

            shape = ModelShape(**content["shape"])
            plan = cls(units("kept", torch.int64), units("scale", torch.float32), shape, content["dim_multiple"])
            plan._check()
            return plan
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a keep plan ({type(error).__name__}); give the plan.json of a run"
            ) from error


def plan_from_masks(
    masks: Masks,
    shape: ModelShape,
    dim_multiple: int = 1,
    min_key_value_heads: int = 0,
    uniform: bool = False,
    tensor_parallel: int = 1,
) -> KeepPlan:
    """Cuts at ``log_alpha = 0``, then adjusts the widths: the units of smallest ``log_alpha`` fill or leave (eq. 5).

    Args:
        min_key_value_heads: KV heads that every layer keeps at least; 0 lets a layer lose its attention.
        uniform: Every layer keeps as many KV heads, and as many channels: its own best.
        tensor_parallel: KV heads and channels are multiples of this in every layer.

    Raises:
        InputError: If ``tensor_parallel`` does not divide the unpruned widths.
    """

    def counts(scores: Sequence[torch.Tensor]) -> list[int]:
        return [int((log_alpha < 0).sum()) for log_alpha in scores]

    def indices(log_alpha: torch.Tensor, width: int) -> torch.Tensor:
        return torch.argsort(log_alpha, stable=True)[:width].sort().values

    detached = Masks(*(values.map(lambda v: v.detach().float().cpu()) for values in (masks.mu, masks.log_variance)))
    scores = detached.log_alpha
    widths = Widths(shape, dim_multiple, min_key_value_heads, uniform, tensor_parallel)
    kept = PerUnit(
        hidden=indices(scores.hidden, widths.hidden(*counts([scores.hidden]))),
        attn=tuple(map(indices, scores.attn, widths.heads(counts(scores.attn)))),
        inter=tuple(map(indices, scores.inter, widths.channels(counts(scores.inter)))),
    )
    return KeepPlan(kept, detached.mu.map(torch.Tensor.__getitem__, kept), shape, dim_multiple)


def calibrate(
    masks: Masks,
    shape: ModelShape,
    target: float,
    dim_multiple: int = 1,
    min_key_value_heads: int = 0,
    uniform: bool = False,
    tensor_parallel: int = 1,
) -> Masks:
    """Shifts the log-variances so that the cut at 0, adjusted, comes as near to the target sparsity as can be.

    One threshold on ``log_alpha`` serves all units where it can. Where the step of one hidden width is larger than the
    tolerance, the hidden dims get a threshold of their own, the nearest that makes the target possible.

    Returns:
        New masks of the same means; `plan_from_masks` of them, with the same arguments, is the plan.
    """
    scores = _Scores(masks, Widths(shape, dim_multiple, min_key_value_heads, uniform, tensor_parallel))
    common = scores.threshold(target)
    natural = scores.hidden_width(common)
    best, best_rank = (common, common), scores.rank(common, common, target)
    for steps in range(-NEARBY_WIDTHS, NEARBY_WIDTHS + 1):
        width = adjust_width(natural + steps * dim_multiple, shape.hidden_size, dim_multiple)
        rest = scores.threshold(target, width)
        hidden = scores.hidden_threshold(width, rest)
        rank = scores.rank(hidden, rest, target)
        if rank < best_rank:
            best, best_rank = (hidden, rest), rank
    return scores.shifted(*best)


class _Scores:
    """The sorted log_alpha of a model, to count quickly what a threshold keeps."""

    def __init__(self, masks: Masks, widths: Widths) -> None:
        self.masks = Masks(*(v.map(lambda t: t.detach().float().cpu()) for v in (masks.mu, masks.log_variance)))
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
        return Masks(
            mu=self.masks.mu,
            log_variance=PerUnit(
                hidden=(log_variance.hidden.double() - hidden).float(),
                attn=tuple((v.double() - rest).float() for v in log_variance.attn),
                inter=tuple((v.double() - rest).float() for v in log_variance.inter),
            ),
        )

    def hidden_width(self, cut: float) -> int:
        """Returns the hidden width that a cut leaves."""
        return self.widths.hidden(_count(self.sorted.hidden, cut))


def _count(sorted_scores: torch.Tensor, threshold: float) -> int:
    return int(torch.searchsorted(sorted_scores, threshold))


def _between(scores: torch.Tensor) -> torch.Tensor:
    """Returns the cuts that tell sorted scores apart: below all, midway between neighbours, above all."""
    return torch.cat([scores[:1] - 1, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1]).unique()


def describe_widths(plan: KeepPlan) -> dict[str, Any]:
    """Returns the plan's sizes as plain values, for reports."""
    return {
        "hidden_size": plan.hidden_size,
        "num_key_value_heads": list(plan.num_key_value_heads),
        "intermediate_size": list(plan.intermediate_size),
        "decoder_sparsity": plan.sparsity,
        "num_parameters": plan.num_parameters,
        "dim_multiple": plan.dim_multiple,
    }
