"""The README.md of a pruned checkpoint: what it is, how it was made, how each tool loads it."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PretrainedConfig

from tvaprune.checkpoint.card_metadata import adapter_metadata, made_of, model_metadata
from tvaprune.errors import InputError
from tvaprune.measure.figures import ERRORS, log_gap, with_error
from tvaprune.models.families import base_type
from tvaprune.models.formats import check_graph, gguf_architecture, vanilla_config
from tvaprune.models.published import PUBLISHED
from tvaprune.models.shape import in_words
from tvaprune.plan.keep_plan import KeepPlan

# The first version whose folders were opened: 4.57 lacks two families, fused experts, and a stock Gemma 2's cap.
_FIRST_OPENED = dict.fromkeys(("internlm3", "cwm", "gemma2", "mixtral", "qwen3_moe"), "5.23")
_ELSE_OPENED = "4.57"
_LOADING = """## Load it

transformers ({version} or later{remote_note}):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{remote_argument})
tokenizer = AutoTokenizer.from_pretrained("{name}"{remote_argument})
```

- PEFT, Trainer: as any model; name LoRA's `target_modules` or use `"all-linear"`.
- lm-evaluation-harness: `lm_eval --model hf --model_args pretrained={name}{remote_option}`
- vLLM{vllm_note}: `vllm serve {name}{remote_flag}` (not run on a GPU by the authors)
{formats}"""
_GGUF = """- llama.cpp: `python -m tvaprune.export --format gguf {source} {name}.gguf`{made}, then
  `llama-cli -m {name}.gguf`, where llama.cpp knows the tokenizer's way to split text
"""
_ONNX = "- ONNX Runtime: `python -m tvaprune.export --format onnx {name} {name}-onnx`\n"
_VANILLA = """- any other engine: `python -m tvaprune.export --format vanilla {name} {name}-vanilla` pads every layer
  with zeros to the widest one: the same function, without the savings
"""


_ADAPTER = """# {name}

A LoRA adapter that recovers the quality of a pruned model. It belongs to the pruned checkpoint `{base}`, and to no
other.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(model, "{name}")
```
"""


def adapter_card(plan: KeepPlan, record: dict[str, object], name: str, base: str) -> str:
    """Returns the card of a LoRA adapter.

    Args:
        record: As for `model_card`.
        base: The pruned checkpoint that it belongs to.
    """
    origin = [*_origin(plan, record), *_tuning(record)]
    lines = [adapter_metadata(record), _ADAPTER.format(name=name, base=base)]
    lines += ["## How it was made", "", *(f"- {k}: {v}" for k, v in origin), ""]
    return "\n".join(lines)


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
            model_metadata(record, name),
            f"# {name}",
            "",
            f"A narrower {_named(base)}, pruned by TVA-Prune{_and_tuned(record)}: whole hidden dims, KV groups and MLP "
            "channels are gone, and what stays is a plain dense model.",
            "",
            "| | dense | pruned |",
            "|---|---|---|",
            *_size_rows(plan),
            *_perplexity_rows(record),
            "",
            _loading(config, name),
            "## How it was made",
            "",
            *(f"- {key}: {value}" for key, value in [*_origin(plan, record), *_tuning(record)]),
            "",
            *_terms(base),
        ]
    )


def _terms(base: str | None) -> list[str]:
    """Returns what the licence of a fetched model asks of who passes on what is made of it, or of that again."""
    name = made_of(base)
    if name is None:
        return []
    fetched, where = PUBLISHED[name], f"What is named there is in the folder that `tvaprune fetch {name}` prints."
    return ["## Licence", "", f"It is made of {fetched.title}. {fetched.terms} {where}", ""]


def _named(base: str | None) -> str:
    return f"`{base}`" if base else "model"


def _size_rows(plan: KeepPlan) -> list[str]:
    shape = plan.shape
    heads, channels = (" ".join(map(str, kept)) for kept in (plan.num_key_value_heads, plan.intermediate_size))
    whole = [f"| experts per layer, with all their channels | {in_words(shape.experts)} | the same |"]
    return [
        f"| hidden dims | {shape.hidden_size} | {plan.hidden_size} |",
        f"| KV heads per layer | {in_words(shape.num_key_value_heads)} | {heads} |",
        f"| MLP channels per layer | {in_words(shape.intermediate_size)} | {channels} |",
        f"| sparsity of the decoder layers | 0 | {plan.sparsity:.4f} |",
        f"| query heads per KV head, head dim | {shape.group_size}, {shape.head_dim} | the same |",
        *(whole if any(shape.experts) else ()),
    ]


def _perplexity_rows(record: dict[str, Any]) -> list[str]:
    values = record.get("perplexity")
    if not values:
        return ["", "Its perplexity was not measured when it was saved."]
    text = record["protocol"]
    where = f"{text['dataset_name']} {text['split']}, windows of {text['window']}"
    dense, pruned, tuned = (_figure(values, name) for name in ("dense", "pruned", "finetuned"))
    last, gap = ("finetuned", "finetuned_gap") if tuned else ("pruned", "gap")
    reached = f"{tuned}, before fine-tuning {pruned}" if tuned else pruned
    rows = [f"| perplexity ({where}) | {dense} | {reached} |"]
    if values[last] is not None:
        apart = with_error(log_gap(values[last], values["dense"]), _error(values, gap))
        rows.append(f"| gap in log perplexity to the dense model | | {apart} |")
    return [*rows, "", ERRORS] if values.get("stderr") else rows


def _figure(values: Mapping[str, Any], name: str) -> str:
    """Returns a perplexity with its standard error, as JSON has both; nothing where it was not measured."""
    if name not in values:
        return ""
    return "not a number" if values[name] is None else with_error(values[name], _error(values, name), digits=2)


def _error(values: Mapping[str, Any], name: str) -> float | None:
    found: float | None = (values.get("stderr") or {}).get(name)
    return found


def _loading(config: PretrainedConfig, name: str) -> str:
    stock = not getattr(config, "auto_map", None)
    return _LOADING.format(
        name=name,
        version=_FIRST_OPENED.get(base_type(config), _ELSE_OPENED),
        formats=_formats(config, name),
        remote_note="" if stock else "; the modeling file comes with the weights",
        remote_argument="" if stock else ", trust_remote_code=True",
        remote_option="" if stock else ",trust_remote_code=True",
        remote_flag="" if stock else " --trust-remote-code",
        vllm_note="" if stock else " 0.28 or later",
    )


def _formats(config: PretrainedConfig, name: str) -> str:
    """Returns a line for each format that holds the model; a GGUF file may hold it padded only."""
    lines, is_padded = [], _is_held(vanilla_config, config)
    if _is_held(gguf_architecture, config):
        lines.append(_GGUF.format(name=name, source=name, made=""))
    elif is_padded and _is_held(gguf_architecture, vanilla_config(config)):
        lines.append(_GGUF.format(name=name, source=f"{name}-vanilla", made=", of the folder that the last line makes"))
    if _is_held(check_graph, config):
        lines.append(_ONNX.format(name=name))
    if is_padded:
        lines.append(_VANILLA.format(name=name))
    return "".join(lines)


def _is_held(decide: Callable[[PretrainedConfig], object], config: PretrainedConfig) -> bool:
    try:
        decide(config)
    except InputError:
        return False
    return True


def _origin(plan: KeepPlan, record: dict[str, Any]) -> list[tuple[str, object]]:
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    rows = [
        ("mask", record.get("mask")),
        ("weights updated by", record.get("weight_update")),
        ("widths are multiples of", plan.dim_multiple),
        ("command", f"`{record['command']}`" if "command" in record else None),
        ("versions", versions or None),
    ]
    return [(key, value) for key, value in rows if value is not None]


def _and_tuned(record: dict[str, Any]) -> str:
    told = record.get("finetune")
    if told is None:
        return ""
    how = "full fine-tuning" if told["method"] == "full" else "LoRA, merged"
    return f" and fine-tuned ({how})"


def _tuning(record: dict[str, Any]) -> list[tuple[str, Any]]:
    """Returns how the weights were trained, where they were."""
    told = dict(record.get("finetune") or {})
    settings = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
    return [("fine-tuned by", settings), ("trained on", record["dataset_name"])] if told else []
