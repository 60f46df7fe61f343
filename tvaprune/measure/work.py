"""What a run is asked to do, and the sizes and operations of a model that every cost of it is made of.

Letters: h hidden size, q features of all query heads, k features of all KV heads, f MLP channels, v vocabulary; b bytes
of a number in the weights' precision. What trains, and moments, are float32 or float64, of 4 and 8 bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from tvaprune.measure.perplexity import windows_of_pass
from tvaprune.models.families import family_of
from tvaprune.models.parameters import layer_parameters, model_parameters
from tvaprune.models.shape import ModelShape

GIB = 2**30


@dataclass(frozen=True)
class Work:
    """What a run is asked to do, as far as it costs memory or time.

    Attributes:
        dense: The model's sizes; ``pruned`` are the narrower model's.
        weight_bytes: Of a number of the weights, and of what is computed with them.
        sliding_window: Tokens that attention looks back; None: all.
        eager: Whether attention is computed step by step, all pairs of tokens there, as of families without a kernel.
        post_norms: Whether what attention and MLP write is normalised.
        block: Tokens of a training block.
        batch: Blocks of a forward pass in training; ``steps`` passes are made.
        accumulates: Whether a step is of several passes, so that gradients of earlier ones are there.
        checkpointing: Whether the backward pass computes a layer's activations again.
        redraws: Whether the noise of the gates is drawn again backward, as on a GPU, or kept.
        distill: Whether the dense model teaches.
        window: Tokens of an evaluation window; ``windows`` are measured.
        eval_batch: Windows of a pass; 0: as `tvaprune.measure.perplexity.windows_of_pass` says.
        scorings: How often masks, or checkpoints, are compared in training, on ``selection_blocks`` blocks.
        refit_blocks: Blocks that the refit fits.
        held_blocks: Blocks on which it compares what it chooses among.
        refit_offload: Whether the dense model and the streams are on the host meanwhile.
        refits: Whether the kept weights are refitted, or only cut; ``reconstructs``: trained after that.
        keep_dense: Whether the dense model is on the card while the narrower one is measured; ``compare_dense``: while
            that is tuned, too.
        rotation_batch: Blocks of a pass of what learns a rotation; 0: nothing is turned.
        scored_batch: Blocks of a pass of scores that go backward, of ``scored_blocks``; 0: there are none.
        lora_r: Rank of LoRA; 0: all weights are trained.
        measures: Whether perplexities are measured; ``targets``: how often it is cut, and what is left measured.
    """

    dense: ModelShape
    pruned: ModelShape
    weight_bytes: int = 2
    sliding_window: int | None = None
    eager: bool = False
    post_norms: bool = False
    block: int = 512
    batch: int = 1
    steps: int = 4500
    accumulates: bool = False
    checkpointing: bool = False
    redraws: bool = False
    distill: bool = True
    window: int = 4096
    windows: int = 256
    eval_batch: int = 0
    scorings: int = 60
    selection_blocks: int = 128
    held_blocks: int = 64
    refits: bool = True
    reconstructs: bool = False
    refit_blocks: int = 128
    refit_offload: bool = False
    keep_dense: bool = True
    compare_dense: bool = False
    rotation_batch: int = 0
    scored_batch: int = 0
    scored_blocks: int = 128
    lora_r: int = 128
    train_lm_head: bool = True
    measures: bool = True
    targets: int = 1

    @property
    def tokens(self) -> int:
        """Tokens of a training pass."""
        return self.batch * self.block

    def pass_tokens(self, window: int) -> int:
        """Returns the tokens of an evaluation's pass."""
        return window * windows_of_pass(window, self.eval_batch)


def of_family(config: Any) -> dict[str, Any]:
    """Returns what a work takes from a model's config beside its sizes."""
    family = family_of(config)
    return {
        "sliding_window": getattr(config, "sliding_window", None),
        "eager": family.attention_kernel == "eager",
        "post_norms": family.attention_post_norm is not None,
    }


def layer_widths(shape: ModelShape) -> Iterator[tuple[int, int, int]]:
    """Yields q, k and f of every layer; of experts f counts those that a token passes."""
    for heads, channels in zip(shape.num_key_value_heads, shape.channels_per_token, strict=True):
        yield heads * shape.group_size * shape.head_dim, heads * shape.head_dim, channels


def layer_sizes(shape: ModelShape) -> list[int]:
    """Returns the numbers of every layer's linears and of all its experts."""
    sizes = zip(shape.num_key_value_heads, shape.intermediate_size, shape.per_dim, shape.layer_norms, strict=True)
    return [layer_parameters(shape.hidden_size, k, f, shape, per_dim - norms) for k, f, per_dim, norms in sizes]


def pairs_kept(shape: ModelShape, work: Work) -> list[int]:
    """Returns the bytes a token that each layer's attention keeps where no kernel spares it the pairs.

    Of a pair the capped score, the softmax in float32 and in the weights' precision; and keys and values as often as
    query heads read them.
    """
    b, wide = work.weight_bytes, shape.head_dim
    return [work.eager * (2 * b * q + (2 * b + 4) * work.block * q // wide) for q, _, _ in layer_widths(shape)]


def copies(shape: ModelShape) -> int:
    """Returns the numbers of a token's copies, of which each expert that it passes reads one and writes one."""
    return 2 * shape.experts_per_token * shape.hidden_size


def narrower(shape: ModelShape, sparsity: float) -> ModelShape:
    """Returns a shape of as many hidden dims whose layers all lost the same share of heads and channels.

    Of a mixture of experts the hidden dims go: nothing else is cut of experts.
    """
    if any(shape.experts):
        return replace(shape, hidden_size=round(shape.hidden_size * (1 - sparsity)))
    heads, channels = (
        tuple(round(size * (1 - sparsity)) for size in sizes)
        for sizes in (shape.num_key_value_heads, shape.intermediate_size)
    )
    return replace(shape, num_key_value_heads=heads, intermediate_size=channels)


def weights(shape: ModelShape, work: Work) -> int:
    """Returns the bytes of a model's weights."""
    return model_parameters(shape) * work.weight_bytes


def forward_flops(shape: ModelShape, tokens: int, window: int, head: bool = True) -> float:
    """Returns the operations of a forward pass; of attention all pairs of a window count, as for fused kernels."""
    h, projections = shape.hidden_size, 2 + shape.gated_mlp
    linear = sum(h * (2 * q + 2 * k + projections * f) for q, k, f in layer_widths(shape)) + head * h * shape.vocab_size
    linear += h * sum(shape.experts)  # routers
    return tokens * (2 * linear + sum(4 * q * window for q, _, _ in layer_widths(shape)))


def head_flops(shape: ModelShape, tokens: int) -> int:
    """Returns the operations of the lm_head."""
    return 2 * tokens * shape.hidden_size * shape.vocab_size
