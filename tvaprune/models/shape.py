"""The sizes that pruning counts with, read from a model's config, layer by layer: a pruned model has them too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvaprune.errors import InputError
from tvaprune.models.families import family_of
from tvaprune.models.modeling_pruned import layer_config


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model, stock or pruned.

    Attributes:
        num_key_value_heads: Per layer; 0: the layer has no attention.
        group_size: Query heads per KV head.
        intermediate_size: MLP channels per layer that may go; 0: the layer has no MLP, or experts.
        qkv_bias: Whether q, k and v carry biases; so the other biases.
        head_norm: Whether q and k are normalised.
        norms_all_heads: Whether they are so over all heads, not each head by itself.
        gated_mlp: Whether the MLP has a gate beside its up projection.
        is_parallel: Whether attention and MLP of a layer read the stream together.
        layer_norms: Norms of each layer that are ``hidden_size`` wide; none told: two.
        experts: Experts of each layer, whose channels all stay; 0: it has an MLP; none told: no layer has any.
        expert_size: MLP channels of an expert.
        experts_per_token: How many a token passes.
    """

    hidden_size: int
    num_key_value_heads: tuple[int, ...]
    group_size: int
    head_dim: int
    intermediate_size: tuple[int, ...]
    vocab_size: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    norms_all_heads: bool = False
    gated_mlp: bool = True
    is_parallel: bool = False
    layer_norms: tuple[int, ...] = ()
    experts: tuple[int, ...] = ()
    expert_size: int = 0
    experts_per_token: int = 0

    def __post_init__(self) -> None:
        if not self.layer_norms:
            object.__setattr__(self, "layer_norms", (2,) * self.num_hidden_layers)
        if not self.experts:
            object.__setattr__(self, "experts", (0,) * self.num_hidden_layers)

    @classmethod
    def uniform(
        cls,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        intermediate_size: int,
        vocab_size: int,
        **rest: Any,
    ) -> "ModelShape":
        """Returns the sizes of a model whose layers are all alike, in the words of a stock config."""
        heads, channels = (num_key_value_heads,) * num_hidden_layers, (intermediate_size,) * num_hidden_layers
        group_size = num_attention_heads // num_key_value_heads
        return cls(hidden_size, heads, group_size, head_dim, channels, vocab_size, **rest)

    @property
    def num_hidden_layers(self) -> int:
        """The number of layers."""
        return len(self.num_key_value_heads)

    @property
    def per_dim(self) -> tuple[int, ...]:
        """Numbers of each layer that go with a hidden dim and with no other unit: norms, experts and their router."""
        each = (2 + self.gated_mlp) * self.expert_size + 1
        return tuple(norms + count * each for norms, count in zip(self.layer_norms, self.experts, strict=True))

    @property
    def channels_per_token(self) -> tuple[int, ...]:
        """MLP channels of each layer that a token passes, those of its experts among them."""
        chosen = self.experts_per_token * self.expert_size
        return tuple(
            size + chosen * (count > 0) for size, count in zip(self.intermediate_size, self.experts, strict=True)
        )


def in_words(per_layer: Sequence[int]) -> str:
    """Returns sizes of layers for a table: one number where they are all alike."""
    return " ".join(map(str, per_layer if len(set(per_layer)) > 1 else per_layer[:1]))


def shape_of(config: Any) -> ModelShape:
    """Reads the sizes from a transformers config.

    Raises:
        InputError: If the family is not supported or the sizes do not fit one another.
    """
    family = family_of(config)
    layers = [layer_config(config, index) for index in range(config.num_hidden_layers)]
    heads = [_kv_heads(layer) for layer in layers]
    groups = {layer.num_attention_heads // count for layer, count in zip(layers, heads, strict=True) if count}
    if len(groups) != 1:
        raise InputError(f"the layers have {sorted(groups)} query heads per KV head, one number is needed: mend config")
    experts = tuple(_experts(config, index) if family.experts else 0 for index in range(len(layers)))
    channels = tuple(0 if count else layer.intermediate_size for layer, count in zip(layers, experts, strict=True))
    attention_norms, mlp_norms = (
        2 - norms.count(None)
        for norms in ((family.attention_norm, family.attention_post_norm), (family.mlp_norm, family.mlp_post_norm))
    )
    return ModelShape(
        hidden_size=config.hidden_size,
        num_key_value_heads=tuple(heads),
        group_size=groups.pop(),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // layers[0].num_attention_heads,
        intermediate_size=channels,
        vocab_size=config.vocab_size,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=_told(config, family.qkv_bias),
        output_bias=_told(config, family.output_bias),
        mlp_bias=_told(config, family.mlp_bias),
        head_norm=family.query_norm is not None,
        norms_all_heads=family.norms_all_heads,
        gated_mlp=family.gate is not None,
        is_parallel=family.is_parallel,
        layer_norms=tuple(
            attention_norms * (k > 0) + mlp_norms * (c > 0) - family.is_parallel * (k > 0) * (c > 0)
            for k, c in zip(heads, map(sum, zip(channels, experts, strict=True)), strict=True)
        ),
        experts=experts,
        expert_size=getattr(layers[0], family.expert_size) if any(experts) else 0,
        experts_per_token=config.num_experts_per_tok if any(experts) else 0,
    )


def _experts(config: Any, index: int) -> int:
    """Returns the experts of a layer of a mixture's config; 0: it has an MLP."""
    is_dense = index in (getattr(config, "mlp_only_layers", None) or ())
    if is_dense or (index + 1) % getattr(config, "decoder_sparse_step", 1):
        return 0
    count: int = config.num_local_experts
    if config.num_experts_per_tok > count:
        raise InputError(f"num_experts_per_tok is {config.num_experts_per_tok}, of {count} experts: mend config")
    return count


def _told(config: Any, value: bool | str) -> bool:
    """Returns what a family's row says, or the entry of the config that it names."""
    return bool(getattr(config, value, False)) if isinstance(value, str) else value


def _kv_heads(layer: Any) -> int:
    """Returns the KV heads of a layer's config: as many as query heads where it tells none."""
    heads: int = layer.num_attention_heads
    count: int | None = getattr(layer, "num_key_value_heads", None)
    kv_heads = heads if count is None else count
    if kv_heads and heads % kv_heads:
        raise InputError(
            f"config.json: num_attention_heads is {heads}, no multiple of num_key_value_heads, {kv_heads}; mend it, or "
            "give another model"
        )
    return kv_heads
