"""A row of data per model family, keyed by ``config.model_type``: where stock transformers models keep their parts.

A new family is a new row, and a row in ``tests/models/test_family_contract.py``.
"""

from dataclasses import dataclass
from typing import Any

from tvaprune.errors import InputError


@dataclass(frozen=True)
class LayerPaths:
    """Dotted names of one layer's modules, as `torch.nn.Module.get_submodule` of the whole model takes them."""

    attention_norm: str
    query: str
    key: str
    value: str
    output: str
    query_norm: str
    key_norm: str
    mlp_norm: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class ModelFamily:
    """Names of the modules of one family's ``...ForCausalLM``.

    Attributes:
        beta: Sharpness of the keep probability at the end of gate training (method: 10 for Llama, 5 for Mistral).
        has_qkv_bias: Whether q/k/v carry biases that no flag of the config shows.
        has_head_norm: Whether q and k are normalised per head; those norms are ``head_dim`` wide and never cut.
    """

    beta: float
    has_qkv_bias: bool = False
    has_head_norm: bool = False
    decoder: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    final_norm: str = "norm"
    head: str = "lm_head"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    query_norm: str = "q_norm"  # where has_head_norm
    key_norm: str = "k_norm"
    mlp: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    @property
    def embedding_path(self) -> str:
        """Dotted name of the embedding; the head's is ``head``."""
        return f"{self.decoder}.{self.embedding}"

    @property
    def final_norm_path(self) -> str:
        """Dotted name of the norm before the head."""
        return f"{self.decoder}.{self.final_norm}"

    def layer_paths(self, index: int) -> LayerPaths:
        """Returns the dotted names of a layer's modules."""
        layer = f"{self.decoder}.{self.layers}.{index}"
        attention, mlp = f"{layer}.{self.attention}", f"{layer}.{self.mlp}"
        return LayerPaths(
            attention_norm=f"{layer}.{self.attention_norm}",
            query=f"{attention}.{self.query}",
            key=f"{attention}.{self.key}",
            value=f"{attention}.{self.value}",
            output=f"{attention}.{self.output}",
            query_norm=f"{attention}.{self.query_norm}",
            key_norm=f"{attention}.{self.key_norm}",
            mlp_norm=f"{layer}.{self.mlp_norm}",
            gate=f"{mlp}.{self.gate}",
            up=f"{mlp}.{self.up}",
            down=f"{mlp}.{self.down}",
        )


FAMILIES = {
    "llama": ModelFamily(beta=10.0),
    "mistral": ModelFamily(beta=5.0),
    "qwen2": ModelFamily(beta=10.0, has_qkv_bias=True),
    "qwen3": ModelFamily(beta=10.0, has_head_norm=True),
}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that pruning counts with, read from a model's config. Biases: 0 or 1 each."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_attention_heads // self.num_key_value_heads


def family_of(config: Any) -> ModelFamily:
    """Returns the row of a model's config.

    Raises:
        InputError: If the family has no row.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise InputError(
            f"the model's type is '{model_type}', supported are {', '.join(FAMILIES)}: choose such a model, or add a "
            "row to tvaprune/families.py"
        )
    return FAMILIES[model_type]


def shape_of(config: Any) -> ModelShape:
    """Reads the sizes from a transformers config.

    Raises:
        InputError: If the family is not supported or the sizes do not fit one another.
    """
    family = family_of(config)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % kv_heads:
        raise InputError(
            f"num_attention_heads is {heads}, not a multiple of num_key_value_heads {kv_heads}: mend config"
        )
    attention_bias = bool(getattr(config, "attention_bias", False))
    return ModelShape(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tie_word_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=family.has_qkv_bias or attention_bias,
        output_bias=attention_bias and not family.has_qkv_bias,
        mlp_bias=bool(getattr(config, "mlp_bias", False)),
        head_norm=family.has_head_norm,
    )
