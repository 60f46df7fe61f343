"""One rotation of a model's residual stream: the same function in another basis, still a stock model.

RMSNorm commutes with an orthogonal ``Q`` once its gain is folded into the linears that read it (SliceGPT, arXiv
2401.15024, section 3): ``E Q``, ``W_in diag(g) Q`` and ``Q^T W_out`` compute what ``E``, ``W_in`` and ``W_out`` did,
with norm gains of 1. A head that takes the final norm's gain is no longer the embedding. A tie is kept where that gain
is taken from both sides: the stream is stretched by its root before it turns, dims of an unlike gain stay axes of
their own, and the final norm keeps a gain that commutes with ``Q``. Only what the norms divide by is then another:
see `tvaprune.choose.tie`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.errors import InputError
from tvaprune.models.families import ModelFamily, base_type, family_of
from tvaprune.models.layers import ROWS
from tvaprune.models.layout import Block, layout_of
from tvaprune.models.shape import ModelShape, shape_of

TOLERANCE = 1e-3  # of ``Q^T Q`` from the identity: float32's rounding at 8,192 dims is 1e-5


@dataclass(frozen=True, eq=False)
class Rotation:
    """What a residual stream is turned by: of ``x`` it makes ``(x * stretch) Q``.

    Attributes:
        matrix: ``Q``, orthogonal, shape ``(hidden_size, hidden_size)``.
        stretch: Above 0, shape ``(hidden_size,)``: the head stays tied to the embedding. None: 1, and it is untied.
    """

    matrix: torch.Tensor
    stretch: torch.Tensor | None = None

    @property
    def keeps_tie(self) -> bool:
        """Tells whether a tied head stays the embedding."""
        return self.stretch is not None

    def turned(self, shape: ModelShape) -> ModelShape:
        """Returns the sizes of a model that is turned so: what does not keep a tie unties."""
        return shape if self.keeps_tie else replace(shape, tie_word_embeddings=False)

    @cached_property
    def digest(self) -> str:
        """16 hex digits of its numbers."""
        parts = [self.matrix] if self.stretch is None else [self.matrix, self.stretch]
        values = torch.cat([part.detach().float().cpu().flatten() for part in parts])
        return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Turn:
    """What a rotation does to one parameter: ``Q^T (W diag(gain)) Q``, from the left, the right, or both.

    Attributes:
        reads: Whether its columns are what a norm hands on: ``Q`` from the right, the stretch taken back.
        writes: Whether its rows are dims of the stream: the stretch and ``Q^T`` from the left.
        holds: Whether its columns are dims of the stream, as the embedding's are: the stretch and ``Q`` from the right.
        norm: Dotted name of the norm whose gain its columns take; None: none.
    """

    reads: bool = False
    writes: bool = False
    holds: bool = False
    norm: str | None = None


def turns_of(family: ModelFamily, shape: ModelShape, tied: bool = False) -> dict[str, Turn]:
    """Returns what a rotation does to every parameter that it changes but the norms, the head's own included.

    Args:
        tied: Whether the head stays the embedding.
    """
    embedding = Turn(holds=True)
    turns = {
        f"{family.embedding}.weight": embedding,
        f"{family.head}.weight": embedding if tied else Turn(reads=True, norm=family.final_norm),
    }
    layout = layout_of(family, shape)
    for block in _blocks(family, shape):
        turns |= {f"{path}.weight": Turn(reads=True, norm=block.norm) for path in block.reading_linears}
        if (mixture := block.mixture) is not None:
            reads = Turn(reads=True, norm=block.norm)
            turns |= {mixture.router: reads, mixture.up: reads, mixture.down: Turn(writes=True)}
            continue
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
def rotate(model: PreTrainedModel, rotation: Rotation) -> PreTrainedModel:
    """Turns a model's residual stream, in place; a tied head gets weights of its own unless the rotation keeps the tie.

    Returns:
        The model: its logits are what they were, up to rounding (products in float64) and what a kept tie costs.

    Raises:
        InputError: If the family's stream cannot be rotated, or the rotation is none of this model.
    """
    basis = _basis(model, rotation, lambda name: model.get_parameter(name).detach())
    turned = set()  # a tied head is the embedding
    for name, turn in basis.turns.items():
        parameter = model.get_parameter(name)
        if id(parameter) not in turned:
            basis.turn(parameter, turn)
        turned.add(id(parameter))
    for name, weight in basis.norms.items():
        model.get_parameter(name).copy_(weight)
    return model


def rotated(
    model: PreTrainedModel, fetch: Callable[[str], torch.Tensor], rotation: Rotation, device: torch.device
) -> Callable[[str], torch.Tensor]:
    """Returns what fetches the same weights of a model that has none itself, one at a time; unties it as `rotate` does.

    Args:
        fetch: Returns a weight as it came, on the CPU.
        rotation: As for `rotate`, with its error.
        device: Where a weight is turned.
    """
    basis = _basis(model, rotation, fetch)

    @torch.no_grad()
    def turned(name: str) -> torch.Tensor:
        weight = fetch(name)
        if name in basis.norms:
            weight.copy_(basis.norms[name])
        if name in basis.turns:
            weight = weight.to(device)
            basis.turn(weight, basis.turns[name])
        return weight.cpu()

    return turned


@dataclass(frozen=True)
class _Basis:
    """What a rotation makes of one model.

    Attributes:
        gains: What each norm multiplied by, shape ``(hidden_size,)``, float64, by its name.
        norms: What the norms' weights become, by their names.
        turns: As `turns_of` says.
    """

    rotation: Rotation
    gains: dict[str, torch.Tensor]
    norms: dict[str, torch.Tensor]
    turns: dict[str, Turn]

    def turn(self, weight: torch.Tensor, turn: Turn) -> None:
        """Turns a weight in place, some rows at a time where they do not mix: an embedding has 128,000."""
        right, stretch = self.rotation.matrix.to(weight.device, torch.float64), self.rotation.stretch
        stretch = None if stretch is None else stretch.to(right)
        columns = None if turn.norm is None else self.gains[turn.norm].to(right)
        if stretch is not None and (turn.reads or turn.holds):
            columns = stretch if turn.holds else (1.0 if columns is None else columns) / stretch
        matrices = weight.unbind() if weight.dim() == 3 else [weight]  # of experts, each by itself
        for part in matrices if turn.writes else (rows for matrix in matrices for rows in matrix.split(ROWS)):
            values = part.double()
            if columns is not None:
                values = values * columns
            if turn.reads or turn.holds:
                values = values @ right
            if turn.writes and stretch is not None:
                values = values * (stretch.unsqueeze(1) if values.dim() == 2 else stretch)
            part.copy_(right.T @ values if turn.writes else values)


def _basis(model: PreTrainedModel, rotation: Rotation, fetch: Callable[[str], torch.Tensor]) -> _Basis:
    """Unties a model that a rotation may turn and that does not keep its tie, and refuses another."""
    family, shape = family_of(model.config), shape_of(model.config)
    reason = why_not(family, shape)
    if reason is not None:
        raise InputError(f"--rotate on: a model of type '{base_type(model.config)}' cannot be rotated, as {reason}")
    check_rotation(rotation, shape.hidden_size, "the rotation")
    names = norms_of(family, shape)
    gains = {name: fetch(f"{name}.weight").double().cpu() + family.norm_offset for name in names}
    norms = {f"{name}.weight": torch.ones(shape.hidden_size).double() - family.norm_offset for name in names}
    if rotation.keeps_tie:
        norms[f"{family.final_norm}.weight"] = _kept_gain(gains[family.final_norm], rotation) - family.norm_offset
    else:
        _untie(model)
    return _Basis(rotation, gains, norms, turns_of(family, shape, rotation.keeps_tie))


def _kept_gain(gain: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Returns the final norm's gain where a tie is kept, shape ``(hidden_size,)``: it must commute with the rotation.

    Raises:
        InputError: If it does not: the rotation was made for another model.
    """
    assert rotation.stretch is not None
    matrix, left = rotation.matrix.double().cpu(), gain / rotation.stretch.double().cpu().square()
    turned = matrix.T @ (left.unsqueeze(1) * matrix)
    kept = turned.diagonal()
    if not float((turned - kept.diag()).abs().max()) <= TOLERANCE * float(kept.abs().max()):
        raise InputError("the rotation keeps the tie of another model: give the rotation of this model")
    return kept


def check_rotation(rotation: Rotation, hidden_size: int, named: str) -> None:
    """Refuses what is no rotation of a stream of this width.

    Raises:
        InputError: Beginning with ``named``.
    """
    if rotation.matrix.shape != (hidden_size, hidden_size):
        sizes = " x ".join(map(str, rotation.matrix.shape))
        raise InputError(f"{named} is {sizes}, the model is {hidden_size} wide: give the rotation of this model")
    values, stretch = rotation.matrix.double(), rotation.stretch
    error = float((values.T @ values - torch.eye(hidden_size, dtype=values.dtype, device=values.device)).abs().max())
    if not error <= TOLERANCE:  # NaN is not orthogonal
        raise InputError(f"{named} is not orthogonal (off by {error:.2g}): its file is damaged; prune again")
    if stretch is not None and not (
        stretch.shape == (hidden_size,) and bool(((stretch > 0) & stretch.isfinite()).all())
    ):
        raise InputError(
            f"{named} has a stretch that is not {hidden_size} numbers above 0: its file is damaged; prune again"
        )


def _blocks(family: ModelFamily, shape: ModelShape) -> list[Block]:
    layout = layout_of(family, shape)
    return [block for block in (*layout.attention, *layout.mlp) if block is not None]


def norms_of(family: ModelFamily, shape: ModelShape) -> list[str]:
    """Returns the names of the norms that read the stream, the final one last."""
    return [block.norm for block in _blocks(family, shape) if block.norm is not None] + [family.final_norm]


def _untie(model: PreTrainedModel) -> None:
    """Gives the head a copy of the embedding, where the two share one."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        trained = head.weight.requires_grad
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=bool(trained))
    model.config.tie_word_embeddings = False
