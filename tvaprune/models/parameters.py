"""Parameters of a model as a function of its widths: the same formula for tensors (expected) and ints (exact).

Sparsity counts the decoder layers' projections without bias and their norms of the hidden width (docs/method.md), all
experts and their routers among them; embeddings, lm_head and the final norm are not counted.
"""

from collections.abc import Sequence
from typing import Any

from tvaprune.models.shape import ModelShape

SPARSITY_DEFINITION = "decoder layers' projections and norms; embeddings, lm_head and final norm are not counted"


def layer_parameters(hidden: Any, kv_heads: Any, channels: Any, shape: ModelShape, per_dim: int = 2) -> Any:
    """Returns the counted parameters of one layer, for ints or for scalar tensors alike.

    Args:
        per_dim: As of `ModelShape`.
    """
    attention = 2 * shape.head_dim * (1 + shape.group_size) * kv_heads * hidden
    return attention + (2 + shape.gated_mlp) * channels * hidden + per_dim * hidden


def head_parameters(shape: ModelShape) -> int:
    """Returns what goes with a KV head and its query heads, at the dense hidden width."""
    parameters: int = layer_parameters(shape.hidden_size, 1, 0, shape, per_dim=0)
    return parameters


def channel_parameters(shape: ModelShape) -> int:
    """Returns what goes with an MLP channel, at the dense hidden width."""
    parameters: int = layer_parameters(shape.hidden_size, 0, 1, shape, per_dim=0)
    return parameters


def _layers(hidden: Any, kv_heads: Sequence[Any], channels: Sequence[Any], shape: ModelShape) -> Any:
    widths = zip(kv_heads, channels, shape.per_dim, strict=True)
    return sum(layer_parameters(hidden, heads, width, shape, per_dim) for heads, width, per_dim in widths)


def all_layers(hidden: Any, kv_heads: Any, channels: Any, shape: ModelShape) -> Any:
    """Returns the counted parameters of all layers, whose KV heads and MLP channels are given added up."""
    return layer_parameters(hidden, kv_heads, channels, shape, per_dim=sum(shape.per_dim))


def counted_parameters(shape: ModelShape) -> int:
    """Returns the counted parameters of all layers of a model of these sizes."""
    parameters: int = _layers(shape.hidden_size, shape.num_key_value_heads, shape.intermediate_size, shape)
    return parameters


def decoder_sparsity(hidden: Any, kv_heads: Sequence[Any], channels: Sequence[Any], shape: ModelShape) -> Any:
    """Returns the share of the decoder layers' parameters that is gone.

    Args:
        hidden: Kept hidden dims.
        kv_heads: Kept KV heads per layer.
        channels: Kept MLP channels per layer.
        shape: The dense model's sizes.
    """
    return 1 - _layers(hidden, kv_heads, channels, shape) / counted_parameters(shape)


def model_parameters(shape: ModelShape) -> int:
    """Returns every parameter of a model of these sizes: embeddings, lm_head, norms and biases too."""
    hidden = shape.hidden_size
    total = shape.vocab_size * hidden * (1 if shape.tie_word_embeddings else 2) + hidden
    total += counted_parameters(shape)
    for k, c in zip(shape.num_key_value_heads, shape.intermediate_size, strict=True):
        total += shape.qkv_bias * k * shape.head_dim * (2 + shape.group_size) + shape.output_bias * hidden
        total += shape.mlp_bias * ((1 + shape.gated_mlp) * c + hidden)
        normed = k * (1 + shape.group_size) if shape.norms_all_heads else 2 * (k > 0)  # heads
        total += shape.head_norm * shape.head_dim * normed
    return total
