"""The way from hidden states to logits: a model runs up to its head, which the losses then call chunk by chunk."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from tvaprune.losses import Predictions, positions
from tvaprune.models.families import FAMILIES, base_type

Context = Callable[[], AbstractContextManager[Any]]
Product = Callable[[torch.Tensor], torch.Tensor]
_proved: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # whether `_way` is a model's own


def predictions(model: Any, **inputs: Any) -> tuple[Predictions, Any]:
    """Runs a causal LM up to its head.

    The first call of a model compares the logits of the last position with the model's own; where they differ, or the
    family has no row, all logits are computed by the model itself, and these are the predictions. A head that is
    trained adds up its gradients of all chunks in one place.

    Args:
        model: A transformers causal LM, or a module around one that calls it: gates, LoRA, a parallel wrapper.
        inputs: Of its forward pass.

    Returns:
        The predictions, and the model's output, whose logits are those of the last position alone, or all.
    """
    causal = _causal(model)
    head, way = causal.get_output_embeddings(), _way(causal)
    if way is not None and _proved.get(causal, True):
        states, output = _up_to(head, model, inputs)
        if states is not None and causal not in _proved:
            _proved[causal] = bool((way(positions(states, -1)) == output.logits).all())
        if states is not None and _proved[causal]:
            return Predictions(states, _way(causal, _summing(head)) or way), output
    output = model(**inputs)
    return Predictions(output.logits), output


def predictions_within(context: Context, model: Any, **inputs: Any) -> tuple[Predictions, Any]:
    """Returns `predictions` within a context, a training's autocast; the head's too, which a loss calls later."""
    with context():
        found, output = predictions(model, **inputs)

    def head(states: torch.Tensor) -> torch.Tensor:
        with context():
            return found.head(states)

    return Predictions(found.states, head), output


def head_of(model: Any) -> Product:
    """Returns what makes logits of the states that a supported model's head reads."""
    way = _way(_causal(model))
    assert way is not None, "the family has no row"
    return way


def _causal(model: Any) -> Any:
    return next(module for module in model.modules() if hasattr(module, "get_output_embeddings"))


def _up_to(head: nn.Module, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor | None, Any]:
    """Calls a model, its head on the last position alone; returns what the head was to read, and the output."""
    seen: list[torch.Tensor] = []

    def last(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        seen.append(args[0])
        return (positions(args[0], -1),)

    with head.register_forward_pre_hook(last):
        output = model(**inputs)
    return (seen[0] if len(seen) == 1 else None), output


def _way(causal: Any, head: Product | None = None) -> Product | None:
    """Returns what makes logits of the states that a model's head reads; None: the family has no row.

    Args:
        head: What multiplies in place of the model's head.
    """
    row, config = FAMILIES.get(base_type(causal.config)), causal.config
    if row is None:
        return None
    head = head or causal.get_output_embeddings()
    divisor, multiplier = (
        1.0 if name is None else getattr(config, name) for name in (row.logit_divisor, row.logit_multiplier)
    )
    cap = None if row.logit_cap is None else getattr(config, row.logit_cap)
    if divisor == multiplier == 1 and cap is None:
        return head

    def way(states: torch.Tensor) -> torch.Tensor:
        logits = head(states) / divisor * multiplier
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return way


def _summing(head: Any) -> Product:
    """Returns a head that is called once a chunk and a loss, and adds up the gradients of its weight as they come.

    Autograd holds three of them at the first sum, and of 128,256 tokens in float32 each is 2 GiB. A head that is
    frozen, in shares or under autocast is returned as it is. No family's head has a bias.
    """
    plain: Product = head
    linear: Any = head.modules_to_save[head.active_adapters[0]] if hasattr(head, "modules_to_save") else head
    weight: Any = getattr(linear, "weight", None)
    is_plain = type(linear) is nn.Linear and weight.requires_grad and not isinstance(weight, DTensor)
    if not (is_plain and torch.is_grad_enabled()) or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return plain
    sums: list[torch.Tensor] = []
    shared = _Shared.apply(weight, sums)

    def product(states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = _Summed.apply(states.to(weight.dtype), shared, sums)
        return logits

    return product


class _Shared(torch.autograd.Function):
    """A weight, whose gradient is what its products have left in ``sums``."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, sums: list[torch.Tensor]) -> torch.Tensor:
        ctx.sums = sums
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> tuple[torch.Tensor | None, None]:
        return (ctx.sums.pop() if ctx.sums else None), None


class _Summed(torch.autograd.Function):
    """``states @ weight.T``, whose gradient to the weight is added to ``sums``."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, sums: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.sums = sums
        return nn.functional.linear(states, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        states, weight = ctx.saved_tensors
        left, right = gradient.flatten(0, -2).t(), states.flatten(0, -2)
        if ctx.sums:
            ctx.sums[0].addmm_(left, right)
        else:
            ctx.sums.append(left @ right)
        return gradient @ weight, None, None
