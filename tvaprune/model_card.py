"""The README.md of a pruned checkpoint: what it is, how it was made, how each tool loads it."""

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from tvaprune.plan import KeepPlan

_LOADING = """## Load it

transformers (4.57 or later{remote_note}):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{remote_argument})
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

- PEFT, Trainer: as any model; name LoRA's `target_modules` or use `"all-linear"`.
- lm-evaluation-harness: `lm_eval --model hf --model_args pretrained={name}{remote_option}`
- vLLM{vllm_note}: `vllm serve {name}{remote_flag}` (not run on a GPU by the authors)
- llama.cpp: `python -m tvaprune.export --format gguf {name} {name}.gguf`, then `llama-cli -m {name}.gguf`
- ONNX Runtime: `python -m tvaprune.export --format onnx {name} {name}-onnx`
- any other engine: `python -m tvaprune.export --format vanilla {name} {name}-vanilla` pads every layer with zeros to
  the widest one: the same function, without the savings
"""


def model_card(config: PretrainedConfig, plan: KeepPlan, record: dict[str, Any], name: str) -> str:
    """Returns the card.

    Args:
        config: The checkpoint's config.
        plan: What was kept.
        record: The run's record and, where it was measured, its results; each entry may be missing.
        name: The folder's name.
    """
    base = record.get("model")
    return "\n".join(
        [
            _front_matter(base),
            f"# {name}",
            "",
            f"A narrower {_named(base)}, pruned by TVA-Prune: whole hidden dims, KV groups and MLP channels are gone, "
            "and what stays is a plain dense model.",
            "",
            "| | dense | pruned |",
            "|---|---|---|",
            *_size_rows(plan),
            *_perplexity_rows(record),
            "",
            _loading(config, name),
            "## How it was made",
            "",
            *(f"- {key}: {value}" for key, value in _origin(plan, record)),
            "",
        ]
    )


def _front_matter(base: str | None) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags: [pruned, tvaprune]"]
    if base and not Path(base).is_dir() and base.count("/") == 1:  # the hub takes a repository's name here, not a path
        lines += [f"base_model: {base}", "base_model_relation: finetune"]
    return "\n".join([*lines, "---", ""])


def _named(base: str | None) -> str:
    return f"`{base}`" if base else "model"


def _size_rows(plan: KeepPlan) -> list[str]:
    shape = plan.shape
    return [
        f"| hidden dims | {shape.hidden_size} | {plan.hidden_size} |",
        f"| KV heads per layer | {shape.num_key_value_heads} | {' '.join(map(str, plan.num_key_value_heads))} |",
        f"| MLP channels per layer | {shape.intermediate_size} | {' '.join(map(str, plan.intermediate_size))} |",
        f"| sparsity of the decoder layers | 0 | {plan.sparsity:.4f} |",
        f"| query heads per KV head, head dim | {shape.group_size}, {shape.head_dim} | the same |",
    ]


def _perplexity_rows(record: dict[str, Any]) -> list[str]:
    values = record.get("perplexity")
    if not values:
        return ["", "Its perplexity was not measured when it was saved."]
    where = f"{record['dataset_name']} {record['split']}, windows of {record['window']}"
    return [f"| perplexity ({where}) | {values['dense']:.2f} | {values['pruned']:.2f} |"]


def _loading(config: PretrainedConfig, name: str) -> str:
    stock = not getattr(config, "auto_map", None)
    return _LOADING.format(
        name=name,
        remote_note="" if stock else "; the modeling file comes with the weights",
        remote_argument="" if stock else ", trust_remote_code=True",
        remote_option="" if stock else ",trust_remote_code=True",
        remote_flag="" if stock else " --trust-remote-code",
        vllm_note="" if stock else " 0.28 or later",
    )


def _origin(plan: KeepPlan, record: dict[str, Any]) -> list[tuple[str, Any]]:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    rows = [
        ("mask", record.get("mask")),
        ("weights updated by", record.get("weight_update")),
        ("widths are multiples of", plan.dim_multiple),
        ("command", f"`{record['command']}`" if "command" in record else None),
        ("versions", versions or None),
    ]
    return [(key, value) for key, value in rows if value is not None]
