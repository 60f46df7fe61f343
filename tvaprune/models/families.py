"""A row of data per model family, keyed by ``config.model_type``: where stock transformers models keep their parts.

A new family is a new row, and a row in ``tests/models/test_family_contract.py``.
"""

from dataclasses import dataclass
from typing import Any

from tvaprune.errors import InputError

PREFIX = "pruned_"  # of the type of a family's models whose layers differ in width


@dataclass(frozen=True)
class ModelFamily:
    """Dotted names of the modules of one family's ``...ForCausalLM``; a layer's are relative to the layer.

    Two projections that name the same module are fused: their rows lie in it side by side, in the order of the fields.

    Attributes:
        beta: Sharpness of the keep probability at the end of gate training (method: 10 for Llama, 5 for Mistral).
        has_qkv_bias: Whether q/k/v carry biases that no flag of the config shows.
        has_head_norm: Whether q and k are normalised per head; those norms are ``head_dim`` wide and never cut.
        scales_embedding: Whether the embedding's output is multiplied by the root of ``config.hidden_size``.
        norm_offset: What a norm adds to its weight: its gain is ``w`` or ``1 + w``.
        norm_epsilon: The attribute of a norm that holds its epsilon.
        attention_norm: The norm that the attention reads; None: it reads the residual stream.
        attention_post_norm: The norm between the attention and the residual stream; None: there is none.
        logit_factor: The entry of the config that the head's output is multiplied by; None: it is the logits.
        logit_divisor: The entry that it is divided by.
        logit_cap: The entry ``c`` that bounds it: ``c * tanh(logits / c)``.
        gate: The projection that the activation function follows; None: the MLP has ``up`` and ``down`` alone.
    """

    beta: float
    has_qkv_bias: bool = False
    has_head_norm: bool = False
    scales_embedding: bool = False
    norm_offset: float = 0.0
    norm_epsilon: str = "variance_epsilon"
    logit_factor: str | None = None
    logit_divisor: str | None = None
    logit_cap: str | None = None
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn"
    attention_norm: str | None = "input_layernorm"
    attention_post_norm: str | None = None
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"  # where has_head_norm
    key_norm: str = "self_attn.k_norm"
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"


FAMILIES = {
    "llama": ModelFamily(beta=10.0),
    "mistral": ModelFamily(beta=5.0),
    "qwen2": ModelFamily(beta=10.0, has_qkv_bias=True),
    "qwen3": ModelFamily(beta=10.0, has_head_norm=True),
}


def base_type(config: Any) -> str:
    """Returns the family's name, of a stock config and of a pruned one."""
    return str(getattr(config, "model_type", None)).removeprefix(PREFIX)


def family_of(config: Any) -> ModelFamily:
    """Returns the row of a model's config, stock or pruned.

    Raises:
        InputError: If the family has no row.
    """
    model_type = base_type(config)
    if model_type not in FAMILIES:
        raise InputError(
            f"the model's type is '{model_type}', supported are {', '.join(FAMILIES)}: choose such a model, or add a "
            "row to tvaprune/models/families.py"
        )
    return FAMILIES[model_type]
