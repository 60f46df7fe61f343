"""Parameters of a model as a function of its widths: the same formula for tensors (expected) and ints (exact).

Sparsity counts the decoder layers' projections without bias and their two norms (method: section 3); embeddings,
lm_head and the final norm are not counted.
"""

from collections.abc import Sequence
from typing import Any

from tvaprune.models.families import ModelShape

SPARSITY_DEFINITION = "decoder layers' projections and norms; embeddings, lm_head and final norm are not counted"


def layer_parameters(hidden: Any, kv_heads: Any, channels: Any, shape: ModelShape) -> Any:
    """Returns the counted parameters of one layer, for ints or for scalar tensors alike."""
    attention = 2 * shape.head_dim * (1 + shape.group_size) * kv_heads * hidden
    return attention + 3 * channels * hidden + 2 * hidden


def decoder_sparsity(hidden: Any, kv_heads: Sequence[Any], channels: Sequence[Any], shape: ModelShape) -> Any:
    """Returns the share of the decoder layers' parameters that is gone.

    Args:
        hidden: Kept hidden dims.
        kv_heads: Kept KV heads per layer.
        channels: Kept MLP channels per layer.
        shape: The unpruned model's sizes.
    """
    kept = sum(layer_parameters(hidden, k, c, shape) for k, c in zip(kv_heads, channels, strict=True))
    full = layer_parameters(shape.hidden_size, shape.num_key_value_heads, shape.intermediate_size, shape)
    return 1 - kept / (full * shape.num_hidden_layers)


def total_parameters(hidden: int, kv_heads: Sequence[int], channels: Sequence[int], shape: ModelShape) -> int:
    """Returns every parameter of the model at these widths: embeddings, lm_head, norms and biases too."""
    total = shape.vocab_size * hidden * (1 if shape.tie_word_embeddings else 2) + hidden
    for k, c in zip(kv_heads, channels, strict=True):
        total += layer_parameters(hidden, k, c, shape)
        total += shape.qkv_bias * k * shape.head_dim * (2 + shape.group_size) + shape.output_bias * hidden
        total += shape.mlp_bias * (2 * c + hidden)
        total += shape.head_norm * 2 * shape.head_dim * (k > 0)
    return total


def dense_parameters(shape: ModelShape) -> int:
    """Returns every parameter of the unpruned model."""
    layers = range(shape.num_hidden_layers)
    heads, channels = [shape.num_key_value_heads for _ in layers], [shape.intermediate_size for _ in layers]
    return total_parameters(shape.hidden_size, heads, channels, shape)
