"""Keep plan -> what happens to every weight: the one truth that cutting, folding and refitting read.

Which rows and columns of a parameter stay, and by what they are multiplied. Sources: method, sections 5.1 and 5.3. Each
factor enters once: the hidden means where a block writes to the residual stream, the means of heads and channels where
the attention's output projection and the MLP's down projection read them.
"""

from dataclasses import dataclass

import torch

from tvaprune.models.families import LayerPaths, ModelFamily
from tvaprune.models.units import head_features
from tvaprune.plan.keep_plan import KeepPlan


@dataclass(frozen=True)
class Edit:
    """What a plan does to one parameter: ``W[rows][:, columns] * row_factors[:, None] * column_factors``.

    A vector (a norm's weight, a bias) has rows only.

    Attributes:
        rows: Ascending indices of the kept rows, shape ``(kept rows,)``, int64; None: all.
        columns: Likewise of the columns, shape ``(kept columns,)``.
        row_factors: Shape ``(kept rows,)``, float32; None: 1.
        column_factors: Shape ``(kept columns,)``, float32; None: 1.
    """

    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    row_factors: torch.Tensor | None = None
    column_factors: torch.Tensor | None = None


def edits_of(plan: KeepPlan, family: ModelFamily, device: torch.device | str = "cpu") -> dict[str, Edit]:
    """Returns the edit of every parameter that a plan changes, by its full name in the stock model.

    A tied head is the embedding and has no edit of its own. The embedding's factor must not reach it: the final norm is
    divided by the factor, which keeps the tie exactly, ``(n w / mu) @ (E mu).T = (n w) @ E.T``. A layer that loses all
    its KV heads loses its attention: no row of q, k, v and their norms stays, no column of o; the bias of o stays.

    Args:
        family: The row of the stock model.
        device: Where the edits' tensors are put.
    """
    kept, scale = (units.map(lambda values: values.to(device)) for units in (plan.kept, plan.scale))
    tied = plan.shape.tie_word_embeddings
    edits = {
        f"{family.embedding_path}.weight": Edit(columns=kept.hidden, column_factors=scale.hidden),
        f"{family.final_norm_path}.weight": Edit(rows=kept.hidden, row_factors=1 / scale.hidden if tied else None),
    }
    if not tied:
        edits[f"{family.head}.weight"] = Edit(columns=kept.hidden)
    for index in range(plan.shape.num_hidden_layers):
        paths = family.layer_paths(index)
        for norm in (paths.attention_norm, paths.mlp_norm):
            edits[f"{norm}.weight"] = Edit(rows=kept.hidden)
        edits |= _attention(plan, paths, kept.hidden, scale.hidden, kept.attn[index], scale.attn[index])
        edits |= _mlp(plan, paths, kept.hidden, scale.hidden, kept.inter[index], scale.inter[index])
    return edits


def _attention(
    plan: KeepPlan,
    paths: LayerPaths,
    hidden: torch.Tensor,
    hidden_scale: torch.Tensor,
    kv_heads: torch.Tensor,
    scale: torch.Tensor,
) -> dict[str, Edit]:
    """Returns the edits of a layer's attention: whole KV groups stay, ``group_size`` query heads side by side."""
    shape = plan.shape
    keys = head_features(kv_heads, shape.head_dim)
    queries = head_features(kv_heads, shape.head_dim * shape.group_size)
    factors = scale.repeat_interleave(shape.head_dim * shape.group_size)
    edits: dict[str, Edit] = {}
    for path, rows in ((paths.query, queries), (paths.key, keys), (paths.value, keys)):
        edits |= _linear(path, Edit(rows=rows, columns=hidden), shape.qkv_bias)
    edits |= _linear(paths.output, Edit(hidden, queries, hidden_scale, factors), shape.output_bias)
    if shape.head_norm and not len(kv_heads):  # else they stay as they are: one serves all heads
        edits |= {f"{norm}.weight": Edit(rows=keys) for norm in (paths.query_norm, paths.key_norm)}
    return edits


def _mlp(
    plan: KeepPlan,
    paths: LayerPaths,
    hidden: torch.Tensor,
    hidden_scale: torch.Tensor,
    channels: torch.Tensor,
    scale: torch.Tensor,
) -> dict[str, Edit]:
    """Returns the edits of a layer's MLP."""
    bias, reader = plan.shape.mlp_bias, Edit(rows=channels, columns=hidden)
    writer = Edit(hidden, channels, hidden_scale, scale)
    return _linear(paths.gate, reader, bias) | _linear(paths.up, reader, bias) | _linear(paths.down, writer, bias)


def _linear(path: str, weight: Edit, bias: bool) -> dict[str, Edit]:
    """Returns the edits of a linear: its bias, if it has one, follows the rows of its weight."""
    edits = {f"{path}.weight": weight}
    return edits | {f"{path}.bias": Edit(rows=weight.rows, row_factors=weight.row_factors)} if bias else edits
