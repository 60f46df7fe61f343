"""A row per family, cuts of it, and what the equalities compare."""

import copy
from dataclasses import replace

import torch

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
