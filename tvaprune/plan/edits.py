"""Keep plan -> what happens to every weight: the one truth that cutting, folding and refitting read.

Which rows and columns of a parameter stay, and by what they are multiplied. Sources: method, sections 5.1 and 5.3. Each
factor enters once: the hidden means where a block writes to the residual stream, the means of heads and channels where
the attention's output projection and the MLP's down projection read them. A norm between the attention and the stream
would divide out what the heads' means have in common; its gain takes that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch

from tvaprune.models.families import ModelFamily
from tvaprune.models.layers import ROWS
from tvaprune.models.layout import Block, Mixture, layout_of
from tvaprune.models.units import head_features
from tvaprune.plan.keep_plan import KeepPlan

NEARLY_ZERO = 2.0**-20  # a factor that can be divided out again, beside which a stream rounds


@dataclass(frozen=True)
class Edit:
    """What a plan does to one parameter: ``W[rows][:, columns] * row_factors[:, None] * column_factors``.

    A vector (a norm's weight, a bias) has rows only; of three dims (experts) every matrix is a ``W``.

    Attributes:
        rows: Ascending indices of the kept rows, shape ``(kept rows,)``, int64; None: all.
        columns: Likewise of the columns, shape ``(kept columns,)``.
        row_factors: Shape ``(kept rows,)``, float32; None: 1.
        column_factors: Shape ``(kept columns,)``, float32; None: 1.
        constant: A factor that the cut itself brings in, whether the means are folded or not; 0 makes a stand-in of
            what a layer lost.
        offset: What is multiplied is the parameter and this: a norm's gain may be ``1 + w``.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    row_factors: torch.Tensor | None = None
    column_factors: torch.Tensor | None = None
    constant: float = 1.0
    offset: float = 0.0

    def kept(self, values: torch.Tensor) -> torch.Tensor:
        """Returns a dense parameter's kept rows and columns: what the cut leaves of it."""
        values = values if self.rows is None else values.index_select(max(0, values.dim() - 2), self.rows)
        values = values if self.columns is None else values.index_select(-1, self.columns)
        if self.constant == 0:
            return torch.zeros_like(values)
        if self.constant == 1:
            return values
        return ((values.float() + self.offset) * self.constant - self.offset).to(values.dtype)

    def on(self, device: torch.device) -> "Edit":
        """Returns the edit with its tensors where the parameter is."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    @property
    def folds(self) -> bool:
        """Whether there are means to fold in."""
        return self.row_factors is not None or self.column_factors is not None

    def folded(self, cut: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a cut parameter times its factors: rows first, and one rounding, to its own precision.

        Args:
            into: What is written to, perhaps the parameter itself; None: new memory.
        """
        if not self.folds:
            return cut
        into, dim = torch.empty_like(cut) if into is None else into, max(0, cut.dim() - 2)
        by_rows = repeat(None) if self.row_factors is None else self.row_factors.split(ROWS)
        for part, rows, factors in zip(into.split(ROWS, dim), cut.split(ROWS, dim), by_rows, strict=False):
            values = rows.to(torch.float32, copy=True)  # of some rows: those of a head are gigabytes
            if self.offset:
                values += self.offset
            if factors is not None:
                values *= factors if values.dim() == 1 else factors.unsqueeze(1)
            if self.column_factors is not None:
                values *= self.column_factors
            part.copy_(values - self.offset if self.offset else values)
        return into


def edits_of(plan: KeepPlan, family: ModelFamily, device: torch.device | str = "cpu") -> dict[str, Edit]:
    """Returns the edit of every parameter that a plan changes, by its full name in the dense model.

    A tied head is the embedding and has no edit of its own. The embedding's factor must not reach it: the final norm is
    divided by the factor, which keeps the tie exactly, ``(n w / mu) @ (E mu).T = (n w) @ E.T``. Where norms go on
    dividing by the dense width, their gains take the root of its quotient by the kept one. A family that scales
    its embedding by the root of the hidden width goes on with the dense one's: the embedding takes the quotient. A
    layer that loses all its KV heads or channels keeps `KeepPlan.padded` ones as zeros: the same function, and no
    reader meets an empty layer. The bias of an output projection stays.

    Args:
        family: The row of the dense model.
        device: Where the edits' tensors are put.
    """
    kept, padded, scale = (
        units.map(lambda values: values.to(device)) for units in (plan.kept, plan.padded, plan.scale)
    )
    gain = (plan.shape.hidden_size / plan.hidden_size) ** 0.5 if plan.keeps_norm_width else 1.0
    stream = _Stream(kept.hidden, scale.hidden, family.norm_offset, gain)
    layout, shape = layout_of(family, plan.shape), plan.shape
    edits = _ends(plan, family, stream)
    for index in range(shape.num_hidden_layers):
        if (attention := layout.attention[index]) is not None:
            heads, width = padded.attn[index], shape.head_dim * shape.group_size  # query heads stand group by group
            keys, queries = head_features(heads, shape.head_dim), head_features(heads, width)
            rows, means = {"query": queries, "key": keys, "value": keys}, scale.attn[index].repeat_interleave(width)
            edits |= _block(attention, stream, rows, queries, means, shape.qkv_bias, shape.output_bias)
        mlp = layout.mlp[index]
        if mlp is not None and mlp.mixture is not None:
            edits |= _mixture(mlp.mixture, stream) | _norms(mlp, stream)
        elif mlp is not None:
            rows = dict.fromkeys(mlp.readers, padded.inter[index])
            edits |= _block(mlp, stream, rows, padded.inter[index], scale.inter[index], shape.mlp_bias, shape.mlp_bias)
    return edits


@dataclass(frozen=True)
class _Stream:
    """The residual stream: kept dims and their means, shapes ``(kept dims,)``.

    Attributes:
        offset: What its norms add to their weights.
        gain: What the cut multiplies its norms by.
    """

    kept: torch.Tensor
    means: torch.Tensor
    offset: float
    gain: float

    def norm(self, factors: torch.Tensor | None = None, constant: float = 1.0) -> Edit:
        """Returns the edit of a norm that reads it."""
        return Edit(self.kept, row_factors=factors, constant=self.gain * constant, offset=self.offset)


def _ends(plan: KeepPlan, family: ModelFamily, stream: _Stream) -> dict[str, Edit]:
    """Returns the edits of the embedding, the final norm and the head."""
    tied = plan.shape.tie_word_embeddings
    root = (plan.shape.hidden_size / plan.hidden_size) ** 0.5 if family.scales_embedding else 1.0
    means = stream.means
    if tied and family.norm_centres:  # what the norm makes of a dim of zeros is not 0, and the head reads it
        means = torch.where(means == 0, NEARLY_ZERO, means)
    inverse = torch.where(means == 0, 0.0, 1 / means)  # of a mean of 0 the norm's input is 0
    edits = {
        f"{family.embedding}.weight": Edit(columns=stream.kept, column_factors=means, constant=root),
        f"{family.final_norm}.weight": stream.norm(inverse, 1 / root) if tied else stream.norm(),
    }
    return edits if tied else edits | {f"{family.head}.weight": Edit(columns=stream.kept)}


def _block(
    block: Block,
    stream: _Stream,
    rows: Mapping[str, torch.Tensor],
    columns: torch.Tensor,
    means: torch.Tensor,
    reads_with_bias: bool,
    writes_with_bias: bool,
) -> dict[str, Edit]:
    """Returns the edits of an attention or an MLP, its norms included.

    Args:
        rows: The rows that each reading projection keeps, counted within it.
        columns: The input features that the writer keeps.
        means: Of these features; none: the block lost all its units, and zeros stand in.
    """
    constant = 1.0 if len(means) else 0.0
    edits: dict[str, Edit] = {}
    for path in block.reading_linears:
        parts = [rows[role] + reader.start for role, reader in block.readers.items() if reader.path == path]
        edits[f"{path}.weight"] = Edit(torch.cat(parts), stream.kept, constant=constant)
        if reads_with_bias:
            edits[f"{path}.bias"] = Edit(torch.cat(parts), constant=constant)
    written = stream.means if block.post_norm is None else None  # else the norm takes them
    edits[f"{block.writer}.weight"] = Edit(stream.kept, columns, written, means if len(means) else None, constant)
    if writes_with_bias:
        edits[f"{block.writer}.bias"] = Edit(stream.kept, row_factors=written)
    for role, norm in block.head_norms.items():
        edits[f"{norm}.weight"] = Edit(rows[role])
    return edits | _norms(block, stream, amplitude(means) if "query" in block.readers else None)


def _mixture(mixture: Mixture, stream: _Stream) -> dict[str, Edit]:
    """Returns the edits of experts, whose channels all stay, and of their router."""
    reads = Edit(columns=stream.kept)
    return {mixture.router: reads, mixture.up: reads, mixture.down: Edit(stream.kept, row_factors=stream.means)}


def _norms(block: Block, stream: _Stream, size: torch.Tensor | None = None) -> dict[str, Edit]:
    """Returns the edits of the norms around a block.

    Args:
        size: What the norm past the block divides out of its means; None: nothing that is given back.
    """
    edits: dict[str, Edit] = {}
    if block.norm is not None:
        edits[f"{block.norm}.weight"] = stream.norm()
    if block.post_norm is not None:
        factors = stream.means if size is None else stream.means * size
        edits[f"{block.post_norm}.weight"] = stream.norm(factors)
    return edits


def amplitude(gates: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the root mean square of gates, which a norm past their block divides out of its output.

    Where none is left there is nothing to give back: 1, and a norm that reads a bias alone stays what it is.

    Args:
        gates: Shape ``(..., units)``.
        kept: Which of them count, bool, shape ``(units,)``; None: all.

    Returns:
        Shape ``(...)``.
    """
    counting = torch.ones(gates.shape[-1], device=gates.device) if kept is None else kept.float()
    count = counting.sum()
    size = torch.linalg.vector_norm(gates * counting, dim=-1) / count.clamp(min=1).sqrt()
    return torch.where(count > 0, size, 1.0)
