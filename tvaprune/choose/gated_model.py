"""Puts gates on a transformers model by hooks, and takes them off.

One object owns all hooks. Where each gate multiplies (method: section 1): the hidden gate the embedding's output,
once, and the output of every attention block and MLP before the residual add; the attention gate the input of the
output projection, a KV head with the query heads that share it; the MLP gate the input of the down projection. Under
a hidden gate an RMSNorm averages over the kept dims only, as the sliced model will.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.choose import gates
from tvaprune.models.families import family_of
from tvaprune.models.layout import Block, layout_of
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.log_alpha import log_alpha as log_alpha_of
from tvaprune.plan.masks import Masks

INITIAL_MU = 1.0
INITIAL_STD = 0.01  # of both means and log-variances (method: section 2)


class GatedModel(nn.Module):
    """A frozen stock model with a VIB gate on every prunable unit.

    Calls go to the stock model, with gates sampled per token unless `off` or `using` says otherwise. The state dict
    holds the gates alone. `detach_gates` gives the stock model back as it was.

    Args:
        model: A ``...ForCausalLM`` of a supported family; its parameters stop requiring gradients.
        initial_log_variance: Mean of the log-variances' start.
        noise: ``token``: a gate is drawn for every token (eq. 2); ``sequence``: one draw serves all tokens of a window.
    """

    def __init__(self, model: PreTrainedModel, initial_log_variance: float = -9.0, noise: str = "token") -> None:
        super().__init__()
        self.noise = noise
        self._trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.model = model.requires_grad_(False)
        self.family = family_of(model.config)
        self.shape = shape_of(model.config)
        device = model.device

        def start(centre: float) -> nn.ParameterList:
            units = PerUnit.full(self.shape, centre)
            return nn.ParameterList((v + INITIAL_STD * torch.randn_like(v)).to(device) for v in units)

        self.mu, self.log_variance = start(INITIAL_MU), start(initial_log_variance)
        self.register_state_dict_post_hook(_drop_frozen)
        self._fixed: PerUnit | None = None
        self._fixed_hidden: torch.Tensor | None = None
        self._off = False
        self._handles = list(self._hook())

    def forward(self, **inputs: Any) -> Any:
        """Calls the stock model under the gates."""
        return self.model(**inputs)

    def masks(self) -> Masks:
        """Returns the gates as they stand: the parameters themselves, with gradients."""
        return Masks(mu=self.per_unit(self.mu), log_variance=self.per_unit(self.log_variance))

    def per_unit(self, values: nn.ParameterList) -> PerUnit:
        """Sorts one tensor for each of the gates' tensors, in their order, by kind of unit."""
        layers = self.shape.num_hidden_layers
        tensors = tuple(values)
        return PerUnit(hidden=tensors[0], attn=tensors[1 : 1 + layers], inter=tensors[1 + layers :])

    @contextmanager
    def off(self) -> Iterator[None]:
        """Switches every gate off: the calls within are the stock model's."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def hold(self, values: PerUnit, hidden: torch.Tensor | None = None) -> None:
        """Multiplies by fixed values from now on, full-sized, 0 where a unit is cut: the masked model.

        Args:
            hidden: Whether a hidden dim is kept, shape ``(hidden_size,)``, bool; None: where its value is not 0.
        """
        device = self.mu[0].device
        self._fixed = values.map(lambda value: value.to(device))
        self._fixed_hidden = (values.hidden != 0 if hidden is None else hidden).to(device)

    @contextmanager
    def using(self, values: PerUnit, hidden: torch.Tensor | None = None) -> Iterator[None]:
        """Multiplies by fixed values for a while, as `hold` does."""
        before = self._fixed, self._fixed_hidden
        self.hold(values, hidden)
        try:
            yield
        finally:
            self._fixed, self._fixed_hidden = before

    def applying(self, plan: KeepPlan) -> AbstractContextManager[None]:
        """Computes for a while what the model that is sliced and folded by a plan will."""
        return self.using(plan.full_scale(), plan.full_kept().hidden)

    def detach_gates(self) -> PreTrainedModel:
        """Removes every hook and returns the stock model, as trainable as it came."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        return self.model

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recomputes activations in the backward pass; the call that `Trainer` makes."""
        self.model.activation_checkpointing_enable(**options)

    def _hook(self) -> Iterator[Any]:
        """Registers all hooks and yields their handles."""
        yield self.model.get_submodule(self.family.embedding).register_forward_hook(self._scale_output)
        yield self.model.get_submodule(self.family.final_norm).register_forward_hook(self._renormalise)
        layout = layout_of(self.family, self.shape)
        for place, block in enumerate((*layout.attention, *layout.mlp), start=1):  # the order of PerUnit
            if block is not None:
                yield from self._hook_block(place, block)

    def _hook_block(self, place: int, block: Block) -> Iterator[Any]:
        writer = self.model.get_submodule(block.writer)
        yield writer.register_forward_pre_hook(self._scale_input(place))
        for norm in block.norms:
            yield self.model.get_submodule(norm).register_forward_hook(self._renormalise)
        last = writer if block.post_norm is None else self.model.get_submodule(block.post_norm)
        yield last.register_forward_hook(self._scale_output)

    def _multiplier(self, place: int, like: torch.Tensor) -> torch.Tensor:
        """Returns the values of one tensor of units, to multiply ``like`` by: fixed, or sampled."""
        if self._fixed is not None:
            return list(self._fixed)[place].to(like.dtype)
        leading = like.shape[:-1] if self.noise == "token" else torch.Size((like.shape[0], 1))
        return gates.sample(self.mu[place], self.log_variance[place], leading).to(like.dtype)

    def _scale_output(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self._off else output * self._multiplier(0, output)

    def _scale_input(self, place: int) -> Any:
        units = len(self.mu[place])

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if self._off:
                return None
            (x,) = args  # a unit's features stand side by side: (batch, length, units * features)
            scale = self._multiplier(place, x)
            return ((x.unflatten(-1, (units, -1)) * scale.unsqueeze(-1)).flatten(-2),)

        return hook

    def _renormalise(self, norm: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Replaces an RMSNorm's output by one whose mean square is over the kept hidden dims."""
        if self._off:
            return output
        x = args[0].float()
        kept = self._kept_hidden().float()
        mean_square = (x.square() * kept).sum(-1, keepdim=True) / kept.sum()
        normed = x * torch.rsqrt(mean_square + getattr(norm, self.family.norm_epsilon))
        if self.family.norm_offset:  # such families round once, after the gain
            return (normed * (norm.weight.float() + self.family.norm_offset)).to(args[0].dtype)
        return norm.weight * normed.to(args[0].dtype)

    def _kept_hidden(self) -> torch.Tensor:
        if self._fixed_hidden is not None:
            return self._fixed_hidden
        log_alpha = log_alpha_of(self.mu[0], self.log_variance[0]).detach()
        return (log_alpha < 0) | (log_alpha == log_alpha.min())  # a plan keeps the surest dim at least


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the frozen model out of a state dict: a checkpoint of a 7B model's gates is 7 MB, not 14 GB."""
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        del state[key]
