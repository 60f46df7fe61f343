"""Pruned folders: plans for them, a tokenizer, edits of their config, and what the hub reads there."""

import json
from dataclasses import replace

import torch
import yaml
from huggingface_hub import parse_eval_result_entries
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def with_units(plan, kind, layer, count):
    """The plan with the first ``count`` units of one layer, or all that it has, at factors that are felt."""
    sizes = {"attn": plan.shape.num_key_value_heads, "inter": plan.shape.intermediate_size}
    count = min(count, sizes[kind][layer])

    def put(values, value):
        return replace(values, **{kind: tuple(value if i == layer else v for i, v in enumerate(getattr(values, kind)))})

    return replace(
        plan, kept=put(plan.kept, torch.arange(count)), scale=put(plan.scale, torch.linspace(0.5, 1.5, count))
    )


def with_hidden(plan, width):
    """The plan with the first hidden dims, at factors that are felt."""
    kept = replace(plan.kept, hidden=torch.arange(width))
    return replace(plan, kept=kept, scale=replace(plan.scale, hidden=torch.linspace(0.5, 1.5, width)))


def uneven(plan):
    """KV heads and channels differ between the layers."""
    return plan


def no_heads_in_layer_0(plan):
    return with_units(plan, "attn", 0, 0)


def uniform(plan):
    for layer in range(plan.shape.num_hidden_layers):
        plan = with_units(with_units(plan, "attn", layer, 1), "inter", layer, 16)
    return plan


def stock(plan):
    """Layers alike, and a hidden width that stock configs take."""
    queries = plan.shape.group_size
    return with_hidden(uniform(plan), (plan.shape.hidden_size - 1) // queries * queries)


def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(47)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1", pad_token="w2")


def with_more_tokens():
    """A tokenizer with a special token that has no role of its own."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["w3"]})
    return words


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **values):
    (folder / "config.json").write_text(json.dumps(read_config(folder) | values))


def hub_results(folder):
    """What the hub would read in a folder's ``.eval_results``: entries, by the files' names."""
    paths = sorted(folder.glob(".eval_results/*"))
    return [entry for path in paths for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))]
