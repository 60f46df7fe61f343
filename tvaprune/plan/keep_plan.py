"""Masks -> keep plan: which units stay and by what their weights are multiplied. Every way of choosing ends here.

The dimension adjustment (TVA-Prune, eq. 4-5), and the plan as JSON.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tvaprune.errors import InputError, reason
from tvaprune.files import read_json, write_text
from tvaprune.identity import digest_of
from tvaprune.models.parameters import decoder_sparsity, model_parameters
from tvaprune.models.shape import ModelShape, in_words
from tvaprune.models.units import PerUnit
from tvaprune.plan.masks import Masks
from tvaprune.plan.widths import NO_RULES, WidthRules, Widths

PADDING_HEADS = 1  # KV groups of a layer that lost all: vLLM and llama.cpp need attention in every layer
PADDING_CHANNELS = 32  # MLP channels of a layer that lost all: the smallest block of llama.cpp's formats


@dataclass(frozen=True)
class KeepPlan:
    """What is kept of a model.

    Attributes:
        kept: Ascending indices of the kept units (int64).
        scale: The factor of each kept unit, aligned with ``kept`` (float32).
        shape: The dense model's sizes.
        dim_multiple: What hidden and MLP widths were adjusted to; 1 is no adjustment.
        rotation: The digest of what the model was turned by before; None: it is as it came.
        keeps_norm_width: Whether norms go on dividing the sum of the kept dims' squares by the dense width.
        prune_method: How the units were chosen; None: it is not told.
        model_digest: Of the dense model's config and weights; None: it is not told.
    """

    kept: PerUnit
    scale: PerUnit
    shape: ModelShape
    dim_multiple: int
    rotation: str | None = None
    keeps_norm_width: bool = False
    prune_method: str | None = None
    model_digest: str | None = None

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
    def shape_after(self) -> ModelShape:
        """The narrower model's sizes."""
        sizes = {name: getattr(self, name) for name in ("hidden_size", "num_key_value_heads", "intermediate_size")}
        return replace(self.shape, **sizes)

    @property
    def sparsity(self) -> float:
        """Share of the decoder layers' parameters that goes."""
        return float(decoder_sparsity(self.hidden_size, self.num_key_value_heads, self.intermediate_size, self.shape))

    @property
    def padded(self) -> PerUnit:
        """What is kept, and the units whose places zeros take where a layer loses all of a kind."""

        def filled(kept: torch.Tensor, units: int, padding: int) -> torch.Tensor:
            return kept if len(kept) else torch.arange(min(padding, units))

        heads, channels = self.shape.num_key_value_heads, self.shape.intermediate_size
        return PerUnit(
            hidden=self.kept.hidden,
            attn=tuple(filled(kept, n, PADDING_HEADS) for kept, n in zip(self.kept.attn, heads, strict=True)),
            inter=tuple(filled(kept, n, PADDING_CHANNELS) for kept, n in zip(self.kept.inter, channels, strict=True)),
        )

    @property
    def shape_stored(self) -> ModelShape:
        """The narrower model's sizes as it is in memory and on disk: with what zeros take."""
        heads, channels = (tuple(map(len, kept)) for kept in (self.padded.attn, self.padded.inter))
        return replace(self.shape_after, num_key_value_heads=heads, intermediate_size=channels)

    @property
    def num_parameters(self) -> int:
        """All parameters of the narrower model: embeddings, lm_head and padding included."""
        return model_parameters(self.shape_stored)

    @property
    def digest(self) -> str:
        """16 hex digits that tell what is kept, and with which factors, from any other choice."""
        return digest_of([values.tolist() for values in (*self.kept, *self.scale)])

    def full_scale(self) -> PerUnit:
        """Returns the factors at the dense sizes, 0 where a unit goes: what the masked model multiplies by."""
        zeros = PerUnit.full(self.shape, 0.0)
        return zeros.map(lambda full, kept, scale: full.index_copy(0, kept, scale), self.kept, self.scale)

    def full_kept(self) -> PerUnit:
        """Returns, at the dense sizes, whether a unit stays (bool); a factor of 0 does not tell."""
        return PerUnit.full(self.shape, 0.0).map(lambda full, kept: full.index_fill(0, kept, 1.0).bool(), self.kept)

    def save(self, path: Path) -> None:
        """Writes the plan as JSON, whole or not at all."""
        layers = range(self.shape.num_hidden_layers)
        content = {
            "shape": asdict(self.shape),
            "dim_multiple": self.dim_multiple,
            "sparsity": self.sparsity,
            "rotation": self.rotation,
            "keeps_norm_width": self.keeps_norm_width,
            "prune_method": self.prune_method,
            "model_digest": self.model_digest,
            "hidden": {"kept": self.kept.hidden.tolist(), "scale": self.scale.hidden.tolist()},
            "attn": [{"kept": self.kept.attn[i].tolist(), "scale": self.scale.attn[i].tolist()} for i in layers],
            "inter": [{"kept": self.kept.inter[i].tolist(), "scale": self.scale.inter[i].tolist()} for i in layers],
        }
        write_text(json.dumps(content), path)

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
            if not bool(scale.isfinite().all()):
                raise ValueError("a factor is no number")
        if not len(self.kept.hidden):
            raise ValueError("no hidden dim is kept")
        if type(self.dim_multiple) is not int or self.dim_multiple < 1:
            raise ValueError("dim_multiple is no multiple")
        if not isinstance(self.keeps_norm_width, bool):
            raise ValueError("keeps_norm_width is neither true nor false")
        for name in ("prune_method", "model_digest"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"{name} is no name")

    def check_fits(self, shape: ModelShape, named: str) -> None:
        """Raises `InputError`, beginning with ``named``, unless the plan is of a model of this shape."""

        def told(size: object) -> str:
            return in_words(size) if isinstance(size, tuple) else str(size)

        if self.rotation is not None and not self.shape.tie_word_embeddings:  # which turning may have untied
            shape = replace(shape, tie_word_embeddings=False)
        other = [name for name, size in vars(shape).items() if getattr(self.shape, name) != size]
        if other:
            other = ["num_hidden_layers", *other]  # sizes by layer may be the same ones, of more layers or fewer
            pairs = [(name, told(getattr(self.shape, name)), told(getattr(shape, name))) for name in other]
            sizes = ", ".join(f"{name} {own} for {wanted}" for name, own, wanted in pairs if own != wanted)
            raise InputError(f"{named}: is of another model ({sizes}); give the plan of this model")

    @classmethod
    def load(cls, path: Path) -> "KeepPlan":
        """Reads a plan.

        Raises:
            InputError: If the file is no plan.
        """
        try:
            content = read_json(path)

            def units(name: str, dtype: torch.dtype) -> PerUnit:
                attn, inter = ([_numbers(row[name], dtype) for row in content[k]] for k in ("attn", "inter"))
                return PerUnit(_numbers(content["hidden"][name], dtype), tuple(attn), tuple(inter))

            sizes: dict[str, Any] = content["shape"]
            per_layer = {name: tuple(value) for name, value in sizes.items() if isinstance(value, list)}
            shape = ModelShape(**(sizes | per_layer))
            kept, scale = units("kept", torch.int64), units("scale", torch.float32)
            rotation, keeps_norm_width = content.get("rotation"), content.get("keeps_norm_width", False)
            told = content.get("prune_method"), content.get("model_digest")
            plan = cls(kept, scale, shape, content["dim_multiple"], rotation, keeps_norm_width, *told)
            plan._check()
            return plan
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            why = f"no {error} in it" if isinstance(error, KeyError) else reason(error)
            raise InputError(f"{path}: not a keep plan ({why}); give the plan.json of a run") from error


def _numbers(values: object, dtype: torch.dtype) -> torch.Tensor:
    """Returns a list of a plan's file as a tensor; `ValueError` where it holds anything but numbers of this kind."""
    kinds = (int, float) if dtype.is_floating_point else (int,)
    if not isinstance(values, list) or any(type(value) not in kinds for value in values):
        raise ValueError("a list holds something else than numbers")
    return torch.tensor(values, dtype=dtype)


def plan_from_masks(
    masks: Masks,
    shape: ModelShape,
    rules: WidthRules = NO_RULES,
) -> KeepPlan:
    """Cuts at ``log_alpha = 0``, then adjusts the widths: the units of smallest ``log_alpha`` fill or leave (eq. 5).

    Args:
        shape: The dense model's sizes.
        rules: What the widths must satisfy; where they are equal, every layer keeps its own best units.

    Raises:
        InputError: If ``rules.tensor_parallel`` does not divide the dense widths.
    """

    def counts(scores: Sequence[torch.Tensor]) -> list[int]:
        return [int((log_alpha < 0).sum()) for log_alpha in scores]

    def indices(log_alpha: torch.Tensor, width: int) -> torch.Tensor:
        return torch.argsort(log_alpha, stable=True)[:width].sort().values

    masks = masks.plain()
    scores = masks.log_alpha
    widths = Widths(shape, rules)
    kept = PerUnit(
        hidden=indices(scores.hidden, widths.hidden(*counts([scores.hidden]))),
        attn=tuple(map(indices, scores.attn, widths.heads(counts(scores.attn)))),
        inter=tuple(map(indices, scores.inter, widths.channels(counts(scores.inter)))),
    )
    scale = masks.mu.map(torch.Tensor.__getitem__, kept)
    return KeepPlan(kept, scale, shape, rules.dim_multiple, keeps_norm_width=masks.keeps_norm_width)


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
