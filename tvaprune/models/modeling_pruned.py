"""Models whose layers differ in width, one row of names for each family; a checkpoint carries a copy of this file.

It needs transformers (4.57 or later) and nothing else. The widths are ``per_layer_config`` of the config: transformers'
own key from 5.14 on, read here as plain JSON before that. All the arithmetic is the stock classes'. A family's classes
are made when one of them is asked for: ``PrunedLlamaConfig``, ``PrunedLlamaModel`` and so on.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.dataclasses import strict
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PretrainedConfig

NAMES = {  # by ``model_type`` of the stock config: what follows "Pruned" in the names of a family's classes
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "internlm3": "InternLM3",
    "ministral": "Ministral",
    "cwm": "Cwm",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "seed_oss": "SeedOss",
    "hunyuan_v1_dense": "HunYuanDenseV1",
    "arcee": "Arcee",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3Text",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "glm4": "Glm4",
    "exaone4": "Exaone4",
    "cohere2": "Cohere2",
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
}
WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
CARD, RESULTS = "README.md", ".eval_results/*.yaml"
_EMPTY_CARD = b"This model card has been automatically generated"  # transformers' words where there is none
ASKS_FOR_WIDTHS = ("phi3",)  # their attention asks its config for the number of heads in every forward pass
MIXTURES = ("mixtral", "qwen3_moe")  # whose experts are one tensor: transformers 4 has modules of each
CAPS_ATTENTION = ("gemma2",)  # their attention's logits, which sdpa does not: transformers 5 knows, 4 does not


def layer_config(config: Any, layer_idx: int) -> Any:
    """Returns the config of one layer: a copy that holds the layer's own widths."""
    if hasattr(config, "is_heterogeneous"):
        return config.per_layer_config[layer_idx]
    layer = copy.copy(config)
    for key, overrides in (getattr(config, "per_layer_config", None) or {}).items():
        if int(key) == layer_idx:
            layer.__dict__.update(overrides)
    return layer


@contextmanager
def _globals_readable(config: Any) -> Iterator[None]:
    """Lets stock code read the global widths, which transformers forbids: scaled rotary settings do before they ask."""
    if not hasattr(config, "is_heterogeneous"):
        yield
        return
    config.allow_global_per_layer_attribute_access = True
    try:
        yield
    finally:
        config.__dict__.pop("allow_global_per_layer_attribute_access", None)  # else it would be saved


@contextmanager
def _without_layers(config: Any) -> Iterator[None]:
    """Lets a stock constructor build everything but the layers, which it would build from the global widths."""
    depth = config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        with _globals_readable(config):
            yield
    finally:
        config.num_hidden_layers = depth


def _rebuilt(config_class: Any) -> Any:
    """Collects the validators of a config class anew where transformers has any (from 5 on)."""
    return strict(config_class) if hasattr(config_class, "__dataclass_fields__") else config_class


class _PrunedConfig:
    """Holds what a pruned model may be, and says it in the words of transformers 4 as well."""

    def validate_architecture(self) -> None:
        """Checks nothing: a pruned hidden width need not be a multiple of the number of heads."""

    def validate_rope(self) -> None:
        """Checks the rotary settings as for any model: a family's own check holds them against the dense widths."""
        with _globals_readable(self):
            PretrainedConfig.validate_rope(self)  # type: ignore[arg-type]

    def _rope_scaling_validation(self) -> None:
        """Checks nothing: transformers 4's own check in some families, against the dense widths too."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the config as plain values."""
        values: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return values | rope_of_transformers_4(values.get("rope_parameters") or {})


def rope_of_transformers_4(rope: dict[str, Any]) -> dict[str, Any]:
    """Returns rotary settings by the keys that transformers 4 reads: at the top, and one set for all full layers.

    Args:
        rope: ``rope_parameters`` of transformers 5: the settings, or those of each type of layer.
    """
    full = dict(rope.get("full_attention") or rope)
    if "rope_theta" not in full:
        return {}
    values = {"rope_theta": full.pop("rope_theta")}
    kind, at_top = full.get("rope_type", "default"), ["partial_rotary_factor"]
    if kind == "longrope":  # Phi-3's config wants the type and the two lists of factors in there, and nothing else
        full["type"] = full.pop("rope_type")
        at_top.append("original_max_position_embeddings")
    values |= {key: full.pop(key) for key in at_top if key in full}
    values["rope_scaling"] = None if kind == "default" else full
    if "sliding_attention" in rope:
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return values


class _OwnWidths:
    """The model's config, but the widths are a layer's own."""

    def __init__(self, config: Any, layer: Any) -> None:
        self.__dict__ |= {"config": config, "layer": layer}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by copy and pickle before there is anything to answer with
            raise AttributeError(name)
        return getattr(self.layer if name in WIDTHS else self.config, name)


class _PrunedLayer(nn.Module):
    """A stock decoder layer at the widths of its place."""

    self_attn: Any
    mlp: Any

    def __init__(self, config: Any, layer_idx: int) -> None:
        own = layer_config(config, layer_idx)
        super().__init__(own, layer_idx)
        asks = config.model_type.removeprefix("pruned_") in ASKS_FOR_WIDTHS
        self.self_attn.config = _OwnWidths(config, own) if asks else config  # a copy misses set_attn_implementation
        if hasattr(self.mlp, "experts"):
            self.mlp.experts.config = config  # likewise


class _PrunedModel(nn.Module):
    """A stock decoder whose layers are of ``layer_class``."""

    layer_class: Any
    post_init: Any

    def __init__(self, config: Any) -> None:
        with _without_layers(config):
            super().__init__(config)
        for name, rotary in self.named_children():  # read again where the frequencies follow the text's length
            if name.startswith("rotary_emb"):
                rotary.config = layer_config(config, 0)
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(config.num_hidden_layers))
        self.post_init()


class _PrunedForCausalLM(nn.Module):
    """A stock language model whose decoder is of ``model_class``."""

    model_class: Any
    post_init: Any
    config: Any
    own_files: dict[str, bytes] | None = None

    def __init__(self, config: Any) -> None:
        with _without_layers(config):
            super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model as any; read before, since with ``push_to_hub`` the folder's own card may be written over."""
        self.own_files = _told_of(self)
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Uploads with card and results of the folder that it came from, where transformers made an empty card."""
        card = Path(working_dir) / CARD
        if self.own_files and card.is_file() and _EMPTY_CARD in card.read_bytes():
            for name, content in self.own_files.items():
                path = Path(working_dir) / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
                path.parent.touch()  # what did not change since the call began is not uploaded
        return super()._upload_modified_files(working_dir, *args, **kwargs)  # type: ignore[misc]


def _told_of(model: Any) -> dict[str, bytes]:
    """Returns card and evaluation results of the folder that a model was read from.

    None without a card, or where the weights are others by now, of which the card's figures are not.
    """
    folder = Path(model.config._name_or_path or "/")
    if not (folder / CARD).is_file() or not _holds(folder, model.state_dict()):
        return {}
    return {str(path.relative_to(folder)): path.read_bytes() for path in (folder / CARD, *folder.glob(RESULTS))}


def _holds(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    """Tells whether a folder's files hold these weights, whatever precision they were loaded in."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                stored, own = opened.get_tensor(name), weights.get(name)
                if own is None or own.is_meta or not torch.equal(stored, own.to("cpu", stored.dtype)):
                    return False
    return True


def classes_of(model_type: str) -> tuple[Any, Any, Any]:
    """Returns the config, the decoder and the language model of a family, each a subclass of the stock one.

    Args:
        model_type: That of the stock config.
    """
    name = f"Pruned{NAMES[model_type]}"
    if f"{name}Config" not in globals():
        _make(model_type, name)
    config, model, causal = (globals()[name + kind] for kind in ("Config", "Model", "ForCausalLM"))
    return config, model, causal


def _make(model_type: str, name: str) -> None:
    """Derives a family's classes and puts them into this module."""
    if model_type not in CONFIG_MAPPING:
        raise ImportError(f"transformers {transformers.__version__} has no '{model_type}' models: take a later one")
    if model_type in MIXTURES and int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers {transformers.__version__} does not read fused experts: take 5 or later")
    config = CONFIG_MAPPING[model_type]
    model: Any = MODEL_MAPPING[config]
    causal: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    module, stem = sys.modules[causal.__module__], causal.__name__.removesuffix("ForCausalLM")
    layer = getattr(module, stem + "DecoderLayer")

    def derive(kind: str, *bases: Any, **attributes: Any) -> Any:
        doc = f"{bases[-1].__name__} with per-layer widths."
        made = type(name + kind, bases, {"__module__": __name__, "__doc__": doc} | attributes)
        globals()[made.__name__] = made if kind != "Config" else _rebuilt(made)
        return globals()[made.__name__]

    own_config = derive("Config", _PrunedConfig, config, model_type=f"pruned_{model_type}")
    own_layer = derive("DecoderLayer", _PrunedLayer, layer)
    common = {"config_class": own_config, "_no_split_modules": [own_layer.__name__]}
    common |= {"_supports_sdpa": False} if model_type in CAPS_ATTENTION else {}
    own_model = derive("Model", _PrunedModel, model, layer_class=own_layer, **common)
    derive("ForCausalLM", _PrunedForCausalLM, causal, model_class=own_model, **common)


def __getattr__(name: str) -> Any:
    """Makes the classes of a family when one of them is asked for by its name."""
    for model_type, stem in NAMES.items():
        if name in {f"Pruned{stem}{kind}" for kind in ("Config", "DecoderLayer", "Model", "ForCausalLM")}:
            classes_of(model_type)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
