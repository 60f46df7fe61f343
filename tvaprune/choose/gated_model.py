"""Puts gates on a transformers model by hooks, and takes them off.

One object owns all hooks, and the forward methods of the norms meanwhile. Where each gate multiplies: the hidden
gate the embedding's output, once, and the output of every attention block and MLP before the residual add; the
attention gate the input of the output projection, a KV head with the query heads that share it; the MLP gate the input
of the down projection; experts have none. Under a hidden gate an RMSNorm reads the kept dims only, as the sliced model
will. A norm between an attention and the residual add divides out what all heads' gates have in common:
of a single head, all but the sign. There the output is multiplied by the gates' amplitude, which gives it back.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tvaprune.choose.gates import Gates, drawn, multiply
from tvaprune.choose.norms import KeptDims, centred_on_kept, kept_rms_norm
from tvaprune.flags.settings import PruneSettings
from tvaprune.models.families import family_of
from tvaprune.models.layout import Block, layout_of
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.edits import amplitude
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.log_alpha import log_alpha_of
from tvaprune.plan.masks import Masks

INITIAL_MU = 1.0
INITIAL_STD = 0.01  # of both means and log-variances, as in the released tool


@dataclass(frozen=True)
class _Pass:
    """What a pass under gates multiplies by and averages over, for all places at once.

    A place is the embedding, or a block in the order of `PerUnit`: the layers' attentions, then their MLPs.

    Attributes:
        inputs: What the input of each place's writer is multiplied by; that of the embedding is not used.
        outputs: What the output of each place is multiplied by: the hidden gates.
        kept: The hidden dims that norms read.
        attn: Per layer, the KV heads that count, bool: the kept ones; where gates are drawn, of a layer without, all.
        features: The features that norms over all heads average over, by the norm.
        recomputes: As of `multiply`; asked of the model once a pass, which looks through all its modules.
    """

    inputs: tuple[Gates | torch.Tensor, ...]
    outputs: tuple[Gates | torch.Tensor, ...]
    kept: KeptDims
    attn: tuple[torch.Tensor, ...]
    features: dict[str, KeptDims]
    recomputes: bool


class GatedModel(nn.Module):
    """A frozen stock model with a VIB gate on every prunable unit.

    Calls go to the stock model, with gates sampled per token unless `off` or `using` says otherwise. The state dict
    holds the gates alone. `detach_gates` gives the stock model back as it was.

    Args:
        model: A ``...ForCausalLM`` of a supported family; its parameters stop requiring gradients.
        initial_log_variance: Mean of the log-variances' start.
        noise: ``token``: a gate is drawn for every token (eq. 2); ``sequence``: one draw serves all tokens of a window.
        keeps_norm_width: Whether norms go on dividing the sum of the kept dims' squares by the dense width.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        initial_log_variance: float = PruneSettings.initial_log_variance,
        noise: str = "token",
        keeps_norm_width: bool = False,
    ) -> None:
        super().__init__()
        self.noise = noise
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model = model.requires_grad_(False)
        self.family = family_of(model.config)
        self.shape = shape_of(model.config)
        self.keeps_norm_width = keeps_norm_width

        def start(centre: float) -> nn.Parameter:
            units = PerUnit.full(self.shape, centre).map(lambda v: v + INITIAL_STD * torch.randn_like(v))
            return nn.Parameter(units.flat().to(model.device))

        self.mu, self.log_variance = start(INITIAL_MU), start(initial_log_variance)
        self.register_state_dict_post_hook(_drop_frozen)
        self._fixed: PerUnit | None = None
        self._fixed_kept: PerUnit | None = None
        self._fixed_keeps_norm_width = False
        self._off = False
        self._pass: _Pass | None = None
        self._amplitudes: dict[int, torch.Tensor] = {}
        self._stock_forwards: dict[nn.Module, Callable[..., torch.Tensor] | None] = {}
        self._handles = list(self._hook())

    def forward(self, **inputs: Any) -> Any:
        """Calls the stock model under the gates."""
        return self.model(**inputs)

    def train(self, mode: bool = True) -> "GatedModel":
        """Leaves the frozen model as it computes: of gates the only noise is theirs, dropout and the like stay off."""
        super().train(mode)
        self.model.eval()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # which computes again only where it is said to train
                module.training = mode
        return self

    def masks(self) -> Masks:
        """Returns the gates as they stand: the parameters themselves, with gradients."""
        mu, log_variance = PerUnit.of(self.mu, self.shape), PerUnit.of(self.log_variance, self.shape)
        return Masks(mu, log_variance, self.keeps_norm_width)

    def log_alpha(self) -> PerUnit:
        """Returns the scores of the gates as they stand, with gradients, in fewer steps than `masks` would."""
        return PerUnit.of(log_alpha_of(self.mu, self.log_variance), self.shape)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switches every gate off: the calls within are the stock model's."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def hold(self, values: PerUnit, kept: PerUnit | None = None, keeps_norm_width: bool = False) -> None:
        """Multiplies by fixed values from now on, full-sized, 0 where a unit is cut: the masked model.

        Args:
            kept: Whether a unit is kept, full-sized, bool; None: where its value is not 0.
            keeps_norm_width: As of `KeepPlan`.
        """
        device = self.mu.device
        self._fixed = values.map(lambda value: value.to(device))
        self._fixed_kept = (values.map(lambda value: value != 0) if kept is None else kept).map(lambda v: v.to(device))
        self._fixed_keeps_norm_width = keeps_norm_width
        self._begin()  # what is called may be layers alone, past the embedding

    @contextmanager
    def using(self, values: PerUnit, kept: PerUnit | None = None, keeps_norm_width: bool = False) -> Iterator[None]:
        """Multiplies by fixed values for a while, as `hold` does."""
        before = self._fixed, self._fixed_kept, self._fixed_keeps_norm_width
        self.hold(values, kept, keeps_norm_width)
        try:
            yield
        finally:
            self._fixed, self._fixed_kept, self._fixed_keeps_norm_width = before

    def applying(self, plan: KeepPlan) -> AbstractContextManager[None]:
        """Computes for a while what the model that is sliced and folded by a plan will."""
        return self.using(plan.full_scale(), plan.full_kept(), plan.keeps_norm_width)

    def detach_gates(self) -> PreTrainedModel:
        """Takes off every hook and returns the stock model, as trainable as it came."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for norm, forward in self._stock_forwards.items():
            del norm.forward
            if forward is not None:  # another tool's, which stood over the class's
                norm.forward = forward
        self._stock_forwards.clear()
        self._pass = None
        self._amplitudes.clear()  # of a recomputation that ended before the norm
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return self.model

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recomputes activations in the backward pass; the call that `Trainer` makes."""
        self.model.activation_checkpointing_enable(**options)

    def _hook(self) -> Iterator[Any]:
        """Registers all hooks, yields their handles, and replaces the forward methods of the norms."""
        embedding = self.model.get_submodule(self.family.embedding)
        yield embedding.register_forward_hook(self._begin)
        yield embedding.register_forward_hook(self._scale_output(0))
        self._replace_norm(self.family.final_norm)
        layout = layout_of(self.family, self.shape)
        for place, block in enumerate((*layout.attention, *layout.mlp), start=1):
            if block is not None:
                yield from self._hook_block(place, block)

    def _hook_block(self, place: int, block: Block) -> Iterator[Any]:
        writer = self.model.get_submodule(block.writer)
        is_normed = block.post_norm is not None and "query" in block.readers
        if block.mixture is None:
            yield writer.register_forward_pre_hook(self._scale_input(place, is_normed))
        for norm in (*block.norms, *block.head_norms.values()):
            self._replace_norm(norm)
        last = writer if block.post_norm is None else self.model.get_submodule(block.post_norm)
        yield last.register_forward_hook(self._scale_output(place, is_normed))

    def _begin(self, *unused: Any) -> None:
        """Computes what the whole pass needs; gradient checkpointing finds it again in the backward pass."""
        if self._off:
            return
        uses = 1 + 2 * self.shape.num_hidden_layers
        keeps_norm_width = self.keeps_norm_width if self._fixed is None else self._fixed_keeps_norm_width
        norm_width = self.shape.hidden_size if keeps_norm_width else None
        kept, attn = KeptDims.of(self._kept_hidden(), norm_width), tuple(self._counting_heads())
        features = dict(self._features_of(attn))
        recomputes = not self.model.is_activation_checkpointing
        if self._fixed is not None:
            factors = tuple(self._fixed)
            self._pass = _Pass(factors, _repeated(factors[0], uses), kept, attn, features, recomputes)
            return
        deviation = torch.exp(self.log_variance / 2)
        each = tuple(map(Gates, PerUnit.of(self.mu, self.shape), PerUnit.of(deviation, self.shape)))
        hidden = map(Gates, _repeated(each[0].mu, uses), _repeated(each[0].deviation, uses))
        self._pass = _Pass(each, tuple(hidden), kept, attn, features, recomputes)

    def _scale_output(self, place: int, is_normed: bool = False) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            if self._off:
                return output
            assert self._pass is not None
            if is_normed:
                output = output * self._amplitudes.pop(place).to(output.dtype)
            return self._multiply(output, self._pass.outputs[place])

        return hook

    def _scale_input(self, place: int, is_normed: bool) -> Callable[..., tuple[torch.Tensor] | None]:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
            if self._off:
                return None
            assert self._pass is not None
            by = self._pass.inputs[place]
            if is_normed:
                by = drawn(args[0], by, self.noise == "token") if isinstance(by, Gates) else by
                self._amplitudes[place] = amplitude(by, self._pass.attn[place - 1]).unsqueeze(-1)
            return (self._multiply(args[0], by),)

        return hook

    def _multiply(self, x: torch.Tensor, by: Gates | torch.Tensor) -> torch.Tensor:
        """Multiplies by gates that are sampled, or by fixed values.

        Args:
            x: Shape ``(batch, length, units * features)``, the features of a unit side by side.
        """
        assert self._pass is not None
        return multiply(x, by, self.noise == "token", self._pass.recomputes)

    def _replace_norm(self, path: str) -> None:
        """Lets a norm read the kept dims only."""
        norm: Any = self.model.get_submodule(path)
        if norm in self._stock_forwards:  # which both blocks of a layer read
            return
        family, stock = self.family, norm.forward
        epsilon = getattr(norm, family.norm_epsilon)

        def forward(x: torch.Tensor) -> torch.Tensor:
            if self._off:
                return stock(x)
            assert self._pass is not None
            kept = self._pass.features.get(path, self._pass.kept)
            read = centred_on_kept(x, kept) if family.norm_centres else x
            normed = kept_rms_norm(read, norm.weight, kept, epsilon, family.norm_offset, family.norm_rounds_once)
            return normed.to(x.dtype)

        self._stock_forwards[norm] = vars(norm).get("forward")
        norm.forward = forward

    def _kept_hidden(self) -> torch.Tensor:
        if self._fixed_kept is not None:
            return self._fixed_kept.hidden
        hidden = (self.mu[: self.shape.hidden_size], self.log_variance[: self.shape.hidden_size])
        log_alpha = log_alpha_of(*hidden).detach()
        least = 1 + self.family.norm_centres  # a plan keeps the surest dim, but one has no variance
        return (log_alpha < 0) | (log_alpha <= log_alpha.topk(least, largest=False).values[-1])

    def _counting_heads(self) -> Iterator[torch.Tensor]:
        """Yields, per layer, the KV heads that count, where norms ask for them."""
        if not (self.family.norms_all_heads or self.family.attention_post_norm is not None):
            return
        if self._fixed_kept is not None:
            yield from self._fixed_kept.attn
            return
        for score in self.log_alpha().attn:
            kept = score.detach() < 0
            yield kept | ~kept.any()

    def _features_of(self, attn: tuple[torch.Tensor, ...]) -> Iterator[tuple[str, KeptDims]]:
        """Yields, of each norm over all heads of a layer, the features of those that count, or of all."""
        if not self.family.norms_all_heads:
            return
        for block, heads in zip(layout_of(self.family, self.shape).attention, attn, strict=True):
            for role, norm in () if block is None else block.head_norms.items():
                features = self.shape.head_dim * (self.shape.group_size if role == "query" else 1)
                yield norm, KeptDims.of((heads | ~heads.any()).repeat_interleave(features))


def _repeated(values: torch.Tensor, times: int) -> tuple[torch.Tensor, ...]:
    """Returns values for several places, whose gradients add up in one step."""
    return values.expand(times, -1).unbind()


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the frozen model out of a state dict: a checkpoint of a 7B model's gates is 7 MB, not 14 GB."""
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        del state[key]
