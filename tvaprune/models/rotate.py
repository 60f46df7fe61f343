"""One rotation of a model's residual stream: the same function in another basis, still a stock model.

RMSNorm commutes with an orthogonal ``Q`` once its gain is folded into the linears that read it (SliceGPT, arXiv
2401.15024, section 3): ``E Q``, ``W_in diag(g) Q`` and ``Q^T W_out`` compute what ``E``, ``W_in`` and ``W_out`` did,
with norm gains of 1. A tied head is no longer the embedding, as it takes the final norm's gain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.errors import InputError
from tvaprune.models.families import ModelFamily, base_type, family_of
from tvaprune.models.layout import Block, layout_of
from tvaprune.models.shape import ModelShape, shape_of

ROWS = 8192  # turned at a time
TOLERANCE = 1e-3  # of ``Q^T Q`` from the identity: float32's rounding at 8,192 dims is 1e-5


@dataclass(frozen=True)
class Turn:
    """What a rotation does to one parameter: ``Q^T (W diag(gain)) Q``, from the left, the right, or both.

    Attributes:
        reads: Whether its columns (of the embedding: a token's entries) are dims of the stream: ``Q`` from the right.
        writes: Whether its rows are: ``Q^T`` from the left.
        norm: Dotted name of the norm whose gain its columns take; None: none.
    """

    reads: bool = False
    writes: bool = False
    norm: str | None = None


def turns_of(family: ModelFamily, shape: ModelShape) -> dict[str, Turn]:
    """Returns what a rotation does to every parameter that it changes, the head's own included; norms become 1."""
    turns = {
        f"{family.embedding}.weight": Turn(reads=True),
        f"{family.head}.weight": Turn(reads=True, norm=family.final_norm),
    }
    layout = layout_of(family, shape)
    for block in _blocks(family, shape):
        turns |= {f"{path}.weight": Turn(reads=True, norm=block.norm) for path in block.reading_linears}
        turns[f"{block.writer}.weight"] = Turn(writes=True)
        if shape.output_bias if block in layout.attention else shape.mlp_bias:
            turns[f"{block.writer}.bias"] = Turn(writes=True)
    return turns


def why_not(family: ModelFamily, shape: ModelShape) -> str | None:
    """Returns what keeps a family's stream from being rotated, in words; None: nothing does."""
    if family.norm_centres:
        return "its norms subtract the mean of the dims, which does not commute with a rotation"
    if any(block.post_norm is not None for block in _blocks(family, shape)):
        return "a norm stands between its blocks and the residual stream, and does not commute with a rotation"
    return None


@torch.no_grad()
def rotate(model: PreTrainedModel, rotation: torch.Tensor) -> PreTrainedModel:
    """Turns a model's residual stream, in place; the head gets weights of its own.

    Args:
        rotation: ``Q``, shape ``(hidden_size, hidden_size)``, orthogonal.

    Returns:
        The model: its logits are what they were, up to rounding (products in float64).

    Raises:
        InputError: If the family's stream cannot be rotated, or the rotation is none of this model.
    """
    family, shape = _may_turn(model, rotation)
    gains = _gains(model, family, shape)
    for name, turn in turns_of(family, shape).items():
        parameter = model.get_parameter(name)
        _turn(parameter, turn, None if turn.norm is None else gains[turn.norm], rotation)
    for norm in gains:
        model.get_parameter(f"{norm}.weight").fill_(1.0 - family.norm_offset)
    return model


def rotated(
    model: PreTrainedModel, fetch: Callable[[str], torch.Tensor], rotation: torch.Tensor, device: torch.device
) -> Callable[[str], torch.Tensor]:
    """Returns what fetches the same weights of a model that has none itself, one at a time; unties it.

    Args:
        fetch: Returns a weight as it came, on the CPU.
        rotation: As for `rotate`, with its error.
        device: Where a weight is turned.
    """
    family, shape = _may_turn(model, rotation)
    turns, norms = turns_of(family, shape), {f"{name}.weight" for name in norms_of(family, shape)}
    right = rotation.to(device)

    @torch.no_grad()
    def turned(name: str) -> torch.Tensor:
        weight, turn = fetch(name), turns.get(name)
        if name in norms:
            weight.fill_(1.0 - family.norm_offset)
        if turn is None:
            return weight
        gain = None if turn.norm is None else fetch(f"{turn.norm}.weight").double() + family.norm_offset
        weight = weight.to(device)
        _turn(weight, turn, None if gain is None else gain.to(device), right)
        return weight.cpu()

    return turned


def _may_turn(model: PreTrainedModel, rotation: torch.Tensor) -> tuple[ModelFamily, ModelShape]:
    """Unties a model that a rotation may turn, and refuses another."""
    family, shape = family_of(model.config), shape_of(model.config)
    reason = why_not(family, shape)
    if reason is not None:
        raise InputError(f"--rotate on: a model of type '{base_type(model.config)}' cannot be rotated, as {reason}")
    check_rotation(rotation, shape.hidden_size, "the rotation")
    _untie(model)
    return family, shape


def _turn(weight: torch.Tensor, turn: Turn, gain: torch.Tensor | None, rotation: torch.Tensor) -> None:
    """Turns a weight in place, some rows at a time where they do not mix: an embedding has 128,000."""
    right = rotation.to(weight.device, torch.float64)
    for part in [weight] if turn.writes else weight.split(ROWS):
        values = part.double()
        if gain is not None:
            values = values * gain
        values = values @ right if turn.reads else values
        part.copy_(right.T @ values if turn.writes else values)


def check_rotation(rotation: torch.Tensor, hidden_size: int, named: str) -> None:
    """Refuses what is no rotation of a stream of this width.

    Raises:
        InputError: Beginning with ``named``.
    """
    if rotation.shape != (hidden_size, hidden_size):
        sizes = " x ".join(map(str, rotation.shape))
        raise InputError(f"{named} is {sizes}, the model is {hidden_size} wide: give the rotation of this model")
    values = rotation.double()
    error = float((values.T @ values - torch.eye(hidden_size, dtype=values.dtype, device=values.device)).abs().max())
    if not error <= TOLERANCE:  # NaN is not orthogonal
        raise InputError(f"{named} is not orthogonal (off by {error:.2g}): its file is damaged; prune again")


def _blocks(family: ModelFamily, shape: ModelShape) -> list[Block]:
    layout = layout_of(family, shape)
    return [block for block in (*layout.attention, *layout.mlp) if block is not None]


def norms_of(family: ModelFamily, shape: ModelShape) -> list[str]:
    """Returns the names of the norms that read the stream, the final one last."""
    return [block.norm for block in _blocks(family, shape) if block.norm is not None] + [family.final_norm]


def _gains(model: PreTrainedModel, family: ModelFamily, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Returns what each norm multiplies by, shape ``(hidden_size,)``, float64."""
    return {
        norm: model.get_parameter(f"{norm}.weight").double() + family.norm_offset for norm in norms_of(family, shape)
    }


def _untie(model: PreTrainedModel) -> None:
    """Gives the head a copy of the embedding, where the two share one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        trained = head.weight.requires_grad
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=bool(trained))
    model.config.tie_word_embeddings = False
