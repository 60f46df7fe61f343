"""Puts gates on a stock transformers model by hooks, and takes them off.

One object owns all hooks. Where each gate multiplies (method: section 1): the hidden gate the embedding's output,
once, and the output of every attention block and MLP before the residual add; the attention gate the input of
``o_proj``, a KV head with the query heads that share it; the MLP gate the input of ``down_proj``. Under a hidden gate
an RMSNorm averages over the kept dims only, as the sliced model will.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.choose import gates
from tvaprune.models.families import ModelFamily, family_of, shape_of
from tvaprune.models.units import PerUnit
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
        device = next(model.parameters()).device

        def start(centre: float) -> nn.ParameterList:
            units = PerUnit.full(self.shape, centre)
            return nn.ParameterList((v + INITIAL_STD * torch.randn_like(v)).to(device) for v in units)

        self.mu, self.log_variance = start(INITIAL_MU), start(initial_log_variance)
        self.register_state_dict_post_hook(_drop_frozen)
        self._fixed: PerUnit | None = None
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

    def hold(self, values: PerUnit) -> None:
        """Multiplies by fixed values from now on, full-sized, 0 where a unit is cut: the masked model."""
        device = self.mu[0].device
        self._fixed = values.map(lambda value: value.to(device))

    @contextmanager
    def using(self, values: PerUnit) -> Iterator[None]:
        """Multiplies by fixed values for a while, as `hold` does."""
        before = self._fixed
        self.hold(values)
        try:
            yield
        finally:
            self._fixed = before

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
        family = self.family
        decoder = getattr(self.model, family.decoder)
        yield getattr(decoder, family.embedding).register_forward_hook(self._scale_output)
        yield getattr(decoder, family.final_norm).register_forward_hook(self._renormalise)
        for index, layer in enumerate(getattr(decoder, family.layers)):
            yield from self._hook_layer(index, layer, family)

    def _hook_layer(self, index: int, layer: nn.Module, family: ModelFamily) -> Iterator[Any]:
        layers = self.shape.num_hidden_layers
        output = getattr(getattr(layer, family.attention), family.output)
        down = getattr(getattr(layer, family.mlp), family.down)
        # The place of a unit's tensor in the order of PerUnit.
        yield output.register_forward_pre_hook(self._scale_input(1 + index))
        yield down.register_forward_pre_hook(self._scale_input(1 + layers + index))
        for module in (output, down):
            yield module.register_forward_hook(self._scale_output)
        for norm in (family.attention_norm, family.mlp_norm):
            yield getattr(layer, norm).register_forward_hook(self._renormalise)

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
        normed = x * torch.rsqrt(mean_square + norm.variance_epsilon)
        return norm.weight * normed.to(args[0].dtype)

    def _kept_hidden(self) -> torch.Tensor:
        if self._fixed is not None:
            return self._fixed.hidden != 0
        return log_alpha_of(self.mu[0], self.log_variance[0]).detach() < 0


def _drop_frozen(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Leaves the frozen model out of a state dict: a checkpoint of a 7B model's gates is 7 MB, not 14 GB."""
    for key in [key for key in state if key.startswith(f"{prefix}model.")]:
        del state[key]
