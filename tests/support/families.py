"""A row per family, cuts of it, and what the equalities compare."""

import copy
from dataclasses import replace

import torch

from support.folders import LLAMA3_ROPE
from tvaprune.cut.fold import fold
from tvaprune.cut.slice import apply_plan
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import Masks
from tvaprune.plan.widths import WidthRules

ROWS = {
    "llama MHA": ("llama", {"num_key_value_heads": 4}),
    "llama GQA": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "llama tied, with biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "mistral GQA, window shorter than the input": ("mistral", {"num_attention_heads": 6, "sliding_window": 4}),
    "qwen2 untied": ("qwen2", {"num_attention_heads": 6}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 untied": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "llama odd widths": (
        "llama",
        {"hidden_size": 45, "intermediate_size": 43, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "qwen3 odd widths, tied": ("qwen3", {"hidden_size": 29, "intermediate_size": 45, "tie_word_embeddings": True}),
}

WINDOWS = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "short_factor": [1.0, 1.5],
    "long_factor": [2.0, 4.0],
    "partial_rotary_factor": 0.7,  # 4 of 6 features
}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 3}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 40}  # of whose rows the kernels are made
MORE_ROWS = {  # the other families, each with what sets it apart
    "internlm3": ("internlm3", GQA | {"qkv_bias": True, "bias": True}),
    "ministral, windows in some layers": ("ministral", GQA | WINDOWS),
    "cwm": ("cwm", WINDOWS | {"mlp_bias": True, "bos_token_id": 1, "eos_token_id": 46}),
    "smollm3, layers without rope, tied": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "granite, tied": (
        "granite",
        {
            "tie_word_embeddings": True,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 0.6,
        },
    ),
    "seed_oss": ("seed_oss", GQA | {"attention_bias": True}),
    "seed_oss, all biases": ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"attention_bias": True}),
    "arcee": ("arcee", GQA | {"mlp_bias": True}),
    "gemma tied": ("gemma", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "gemma2 tied": ("gemma2", WINDOWS | {"tie_word_embeddings": True, "final_logit_softcapping": 2.0,
                                         "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 9}),
    "gemma3_text, one KV head": ("gemma3_text", WINDOWS | {"num_key_value_heads": 1, "query_pre_attn_scalar": 9}),
    "gemma3_text tied": ("gemma3_text", WINDOWS | {"tie_word_embeddings": True}),
    "phi3, long rope": ("phi3", {"hidden_size": 24, "rope_parameters": LONG_ROPE, "max_position_embeddings": 64,
                                 "original_max_position_embeddings": 2}),
    "phi3, partial rope": ("phi3", GQA | {"sliding_window": 5, "partial_rotary_factor": 0.7}),
    "olmo2": ("olmo2", GQA),
    "olmo3": ("olmo3", GQA | WINDOWS),
    "glm4": ("glm4", GQA | {"attention_bias": True}),
    "exaone4": ("exaone4", GQA | WINDOWS),
    "cohere2 tied": ("cohere2", WINDOWS | {"tie_word_embeddings": True, "logit_scale": 0.7}),
    "cohere2, with biases": ("cohere2", GQA | WINDOWS | {"attention_bias": True, "logit_scale": 1.3}),
    "mixtral": ("mixtral", GQA | EXPERTS | {"intermediate_size": 56, "sliding_window": 5}),
    "qwen3_moe, layer 1 without experts": ("qwen3_moe", EXPERTS | {"moe_intermediate_size": 16, "norm_topk_prob": True,
                                                                   "decoder_sparse_step": 1, "mlp_only_layers": [1]}),
    "qwen3_moe tied": ("qwen3_moe", GQA | EXPERTS | {"moe_intermediate_size": 24, "attention_bias": True,
                                                     "tie_word_embeddings": True}),
}  # fmt: skip
NAMED_ROWS = {  # what people have under another family's type, in its proportions
    "SmolLM2": ("llama", {"hidden_size": 54, "num_attention_heads": 9, "num_key_value_heads": 3,
                          "tie_word_embeddings": True}),
    "TinyLlama": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 48}),
    "Yi": ("llama", {"num_attention_heads": 8, "hidden_size": 48, "rope_theta": 5e6}),
    "Falcon3": ("llama", {"hidden_size": 36, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 12}),
    "CodeLlama": ("llama", {"num_key_value_heads": 4, "hidden_size": 24, "rope_theta": 1e6}),
    "DeepSeek-R1-Distill-Llama": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "DeepSeek-R1-Distill-Qwen": ("qwen2", {"num_attention_heads": 6, "rope_theta": 1e4}),
    "Mistral-Nemo": ("mistral", {"hidden_size": 40, "num_attention_heads": 4, "head_dim": 8, "sliding_window": None}),
    "Qwen2.5-Coder": ("qwen2", {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": True}),
}  # fmt: skip
REFUSED_VANILLA = {  # why zeros beside a layer's units are no stock model of the family
    "olmo2": "average over all heads of a layer, and zeros would count",
    "olmo3": "average over all heads of a layer, and zeros would count",
    "phi3": "with a long rope the dense width",
}


# dim_multiple, layer whose log_alpha of all KV heads is above 0, min_key_value_heads
CUTS = {
    "T=1": (1, None, 0),
    "T=8": (8, None, 0),
    "T=1, no attention in layer 0": (1, 0, 0),
    "T=8, no attention in the last layer": (8, 2, 0),
    "T=8, at least one KV head": (8, 0, 1),
}


CLOSE = {"atol": 1e-4, "rtol": 0.0}


def make_plan(model, make_masks, dim_multiple=1, empty_layer=None, min_heads=0):
    shape = shape_of(model.config)
    masks = make_masks(shape)
    attn = list(masks.log_variance.attn)
    for layer, values in enumerate(attn):  # one head stays everywhere, none where the cut says so
        values[:1] = -3.0
        attn[layer] = values.abs() + 5 if layer == empty_layer else values
    masks = Masks(mu=masks.mu, log_variance=replace(masks.log_variance, attn=tuple(attn)))
    return plan_from_masks(masks, shape, WidthRules(dim_multiple, min_heads))


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids, use_cache=False).logits


def sliced(model, plan):
    return fold(apply_plan(copy.deepcopy(model), plan), plan)


def generate(model, input_ids, attention_mask, use_cache):
    """Greedy tokens and the logits they were taken from, (batch, step, vocabulary)."""
    output = model.generate(
        input_ids,
        attention_mask=attention_mask,
        use_cache=use_cache,
        max_new_tokens=7,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[:, input_ids.shape[1] :], torch.stack(output.logits, dim=1)
