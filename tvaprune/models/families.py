"""A row of data per model family, keyed by ``config.model_type``: where stock transformers models keep their parts.

A new family is a new row, a name in `modeling_pruned`, and a row in ``tests/support/families.py`` and
``model_table.py``.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from tvaprune.errors import InputError

PREFIX = "pruned_"  # of the type of a family's models whose layers differ in width


@dataclass(frozen=True)
class ModelFamily:
    """Dotted names of the modules of one family's ``...ForCausalLM``; a layer's are relative to the layer.

    Two projections that name the same module are fused: their rows lie in it side by side, in the order of the fields.

    Attributes:
        beta: Sharpness of the keep probability at the end of gate training (method: 10 for Llama, 5 for Mistral).
        attention_kernel: The implementation of attention; ``sdpa`` knows no cap on the attention's logits.
        begins_with_bos: Whether every window of text begins with BOS, without which such a model predicts nothing.
        qkv_bias: Whether q, k and v carry biases, or the entry of the config that says so; so the other two.
        query_norm: The norm of q, with ``key_norm`` of k, as wide as a head; None: there is none.
        norms_all_heads: Whether these norms are as wide as all heads together and average over all of them.
        scales_embedding: Whether the embedding's output is multiplied by the root of ``config.hidden_size``.
        embedding_multiplier: The entry of the config that multiplies the embedding's output, after the module.
        residual_multiplier: That which multiplies a block's output before it joins the residual stream.
        logit_divisor: The entry of the config that the head's output is divided by; None: it is the logits.
        logit_multiplier: That which it is multiplied by.
        logit_cap: The entry ``c`` that bounds it: ``c * tanh(logits / c)``.
        norm_centres: Whether a norm subtracts the mean first.
        norm_offset: What a norm adds to its weight: its gain is ``w`` or ``1 + w``.
        norm_epsilon: The attribute of a norm that holds its epsilon.
        norm_rounds_once: Whether a norm rounds to half precision after its gain, not before it.
        attention_norm: The norm that the attention reads; None: it reads the residual stream.
        attention_post_norm: The norm between the attention and the residual stream; None: there is none.
        gate: The projection that the activation function follows; None: the MLP has ``up`` and ``down`` alone.
        experts: The module of a layer's experts, fused: tensors of three dims; None: every layer has an MLP.
        router: The module that chooses among them.
        expert_size: The entry of the config that is the MLP channels of an expert.
    """

    beta: float = 10.0
    attention_kernel: str = "sdpa"
    begins_with_bos: bool = False
    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    query_norm: str | None = None
    key_norm: str | None = None
    norms_all_heads: bool = False
    scales_embedding: bool = False
    embedding_multiplier: str | None = None
    residual_multiplier: str | None = None
    logit_divisor: str | None = None
    logit_multiplier: str | None = None
    logit_cap: str | None = None
    norm_centres: bool = False
    norm_offset: float = 0.0
    norm_epsilon: str = "variance_epsilon"
    norm_rounds_once: bool = False
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
    mlp: str = "mlp"
    mlp_norm: str | None = "post_attention_layernorm"
    mlp_post_norm: str | None = None
    gate: str | None = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    experts: str | None = None
    router: str = "mlp.gate"
    expert_size: str = "moe_intermediate_size"

    @property
    def is_parallel(self) -> bool:
        """Whether attention and MLP read the stream together, by one norm, and not the MLP what the attention made."""
        return self.attention_norm is not None and self.attention_norm == self.mlp_norm


_HEAD_NORMS: dict[str, Any] = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
_NO_BIAS: dict[str, Any] = {"qkv_bias": False, "output_bias": False, "mlp_bias": False}
_GEMMA: dict[str, Any] = {
    "begins_with_bos": True,
    "scales_embedding": True,
    "norm_offset": 1.0,
    "norm_epsilon": "eps",
    "norm_rounds_once": True,
    "mlp_bias": False,
}
_AROUND: dict[str, Any] = {  # norms before and after both blocks
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_AFTER: dict[str, Any] = _AROUND | {"attention_norm": None, "mlp_norm": None}
_FUSED_MLP: dict[str, Any] = {"gate": "mlp.gate_up_proj", "up": "mlp.gate_up_proj"}

FAMILIES = {
    "llama": ModelFamily(),
    "mistral": ModelFamily(beta=5.0),
    "qwen2": ModelFamily(qkv_bias=True, output_bias=False),
    "qwen3": ModelFamily(**_HEAD_NORMS),
    "internlm3": ModelFamily(),
    "ministral": ModelFamily(beta=5.0, **_NO_BIAS),
    "cwm": ModelFamily(qkv_bias=False, output_bias=False),
    "smollm3": ModelFamily(),
    "granite": ModelFamily(
        embedding_multiplier="embedding_multiplier",
        residual_multiplier="residual_multiplier",
        logit_divisor="logits_scaling",
    ),
    "seed_oss": ModelFamily(output_bias="attention_out_bias"),
    "hunyuan_v1_dense": ModelFamily(
        mlp_bias=False, query_norm="self_attn.query_layernorm", key_norm="self_attn.key_layernorm"
    ),
    "arcee": ModelFamily(gate=None),
    "gemma": ModelFamily(**_GEMMA),
    "gemma2": ModelFamily(attention_kernel="eager", logit_cap="final_logit_softcapping", **_GEMMA, **_AROUND),
    "gemma3_text": ModelFamily(logit_cap="final_logit_softcapping", **_GEMMA, **_AROUND, **_HEAD_NORMS),
    "phi3": ModelFamily(
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        **_FUSED_MLP,
        **_NO_BIAS,
    ),
    "olmo2": ModelFamily(mlp_bias=False, norms_all_heads=True, norm_rounds_once=True, **_AFTER, **_HEAD_NORMS),
    "olmo3": ModelFamily(mlp_bias=False, norms_all_heads=True, norm_rounds_once=True, **_AFTER, **_HEAD_NORMS),
    "glm4": ModelFamily(
        output_bias=False,
        mlp_bias=False,
        attention_post_norm="post_self_attn_layernorm",
        mlp_post_norm="post_mlp_layernorm",
        **_FUSED_MLP,
    ),
    "exaone4": ModelFamily(**_NO_BIAS, **_AFTER, **_HEAD_NORMS),
    "cohere2": ModelFamily(
        mlp_bias=False,
        mlp_norm="input_layernorm",
        norm_centres=True,
        norm_rounds_once=True,
        logit_multiplier="logit_scale",
    ),
    "mixtral": ModelFamily(beta=5.0, experts="mlp.experts", expert_size="intermediate_size", **_NO_BIAS),
    "qwen3_moe": ModelFamily(mlp_bias=False, experts="mlp.experts", **_HEAD_NORMS),
}


def base_type(config: Any) -> str:
    """Returns the family's name, of a stock config and of a pruned one."""
    return str(getattr(config, "model_type", None)).removeprefix(PREFIX)


def row_of(model_type: object) -> ModelFamily:
    """Returns the row of a type that a config names, stock or pruned; of one without a row what most families are."""
    return FAMILIES.get(str(model_type).removeprefix(PREFIX), ModelFamily())


def family_of(config: Any) -> ModelFamily:
    """Returns the row of a model's config, stock or pruned.

    Raises:
        InputError: If the family has no row.
    """
    model_type = base_type(config)
    if model_type not in FAMILIES:
        raise InputError(f"the model's type is '{model_type}', {_reason(config)}")
    return FAMILIES[model_type]


def _reason(config: Any) -> str:
    """Returns why a family is not supported, and what to do, as the end of a sentence."""
    text = getattr(config, "text_config", None)
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    recurrent = [key for key in _RECURRENT if hasattr(config, key)]
    if text is not None:
        supported = base_type(text) in FAMILIES
        return f"which reads more than text; its text part, '{base_type(text)}', is " + (
            "supported: save that as a model of its own, as docs/models.md shows" if supported else "not supported"
        )
    if recurrent or kinds - _ATTENTION_LAYERS:
        found = sorted(kinds - _ATTENTION_LAYERS) or recurrent
        return f"which mixes attention with layers that have no KV heads to prune ({found[0]}): {_nearest(config)}"
    if any(getattr(config, key, None) for key in _EXPERTS):
        return f"a mixture of experts of another kind than mixtral's and qwen3_moe's: {_nearest(config)}"
    return f"which has no row in tvaprune/models/families.py: {_nearest(config)}"


def _nearest(config: Any) -> str:
    close = get_close_matches(base_type(config), FAMILIES, n=1)
    return f"{f'nearest is {close[0]}, ' if close else ''}supported are {', '.join(FAMILIES)}"


_ATTENTION_LAYERS = {"attention", "full_attention", "sliding_attention", "chunked_attention"}
_RECURRENT = ("mamba_d_state", "mamba_state_dim", "ssm_state_size", "state_size", "conv_L_cache", "lru_width")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def embedding_factor(config: Any) -> float:
    """Returns what a model multiplies its embedding's output by, outside the module."""
    return _factor(config, family_of(config).embedding_multiplier)


def residual_factor(config: Any) -> float:
    """Returns what a model multiplies a block's output by before it joins the residual stream."""
    return _factor(config, family_of(config).residual_multiplier)


def _factor(config: Any, name: str | None) -> float:
    return 1.0 if name is None else float(getattr(config, name))
