"""Which formats of other engines hold a model, decided by its config: the exporters refuse by it, the card tells."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import PretrainedConfig

from tvaprune.errors import InputError
from tvaprune.models.families import PREFIX, base_type
from tvaprune.models.pruned import config_of_widths
from tvaprune.models.shape import ModelShape, shape_of

SLIDING, FULL = "sliding_attention", "full_attention"
# Layers of the models of which llama.cpp takes the attention's scale from the hidden width, not from the head's.
LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}


@dataclass(frozen=True)
class Architecture:
    """What the loader and the graph of one of llama.cpp's architectures take.

    Source: ``src/llama-model.cpp`` and ``src/models/*.cpp`` of the llama.cpp in llama-cpp-python 0.3.36.

    Attributes:
        name: As the file tells it.
        per_layer: Whether every layer has a number of heads and of channels of its own.
        interleaved: Whether its rotary embedding turns neighbouring features where the family's turns halves, so that
            q and k rows change places.
        biases: Whether the output projection and the MLP may carry biases, as q, k and v may.
        ropes: The rotary scalings that it computes.
        windows: Whether it knows which layers look back over a window only.
        tied: Whether its head is always the embedding.
        square: Whether the query heads must be as wide together as the residual stream.
        fused: The projections that are one matrix in its files: ``qkv``, or gate and up.
        partial: Whether it may turn a part of each head only.
        activation: Of the MLP, as transformers calls it.
        lacks: A config -> what else of it the graph leaves out, as the end of a sentence; None: nothing.
    """

    name: str
    per_layer: bool = False
    interleaved: bool = False
    biases: bool = False
    ropes: tuple[str, ...] = ("default",)
    windows: bool = False
    tied: bool = False
    square: bool = False
    fused: str | None = None
    partial: bool = False
    activation: str = "silu"
    lacks: Callable[[PretrainedConfig], str | None] | None = None


def _uncapped(config: PretrainedConfig) -> str | None:
    return None if config.attn_logit_softcapping and config.final_logit_softcapping else "always caps the logits"


def _other_rope_layers(config: PretrainedConfig) -> str | None:
    known = [int((index + 1) % 4 != 0) for index in range(config.num_hidden_layers)]
    return None if list(config.no_rope_layers) == known else "leaves the rope out of every fourth layer and no other"


def _growing_rope(config: PretrainedConfig) -> str | None:
    rope = rope_of(config)
    growing = rope["rope_type"] == "dynamic" and not rope.get("alpha")
    return "has no rope that follows the length of the text" if growing else None


def _other_windows(config: PretrainedConfig) -> str | None:
    known = (config.sliding_window is not None) == (config.num_hidden_layers == 64)
    return None if known else "has sliding windows in models of 64 layers, and in no others"


_FACTORS = ("default", "linear", "llama3")  # of graphs that divide the rotary frequencies by a tensor
_GELU = "gelu_pytorch_tanh"
_LLAMA = Architecture("llama", interleaved=True, biases=True, ropes=_FACTORS)
_DECI = replace(_LLAMA, name="deci", per_layer=True)
_OPENELM = Architecture("openelm", per_layer=True, tied=True, fused="qkv")
_SAME_GRAPH = ("llama", "mistral", "internlm3", "ministral", "cwm", "granite", "seed_oss", "phi3")
# Of each family those that compute it, the first of which is best.
ARCHITECTURES: dict[str, tuple[Architecture, ...]] = {
    **dict.fromkeys(_SAME_GRAPH, (_LLAMA, _DECI)),
    "qwen2": (Architecture("qwen2", square=True), _LLAMA, _DECI),
    "qwen3": (Architecture("qwen3"), _OPENELM),
    "smollm3": (Architecture("smollm3", interleaved=True, lacks=_other_rope_layers),),
    "hunyuan_v1_dense": (Architecture("hunyuan-dense", ropes=("default", "dynamic"), lacks=_growing_rope),),
    "arcee": (Architecture("arcee", interleaved=True, ropes=_FACTORS, activation="relu2"),),
    "gemma": (Architecture("gemma", tied=True, activation=_GELU),),
    "gemma2": (Architecture("gemma2", tied=True, windows=True, activation=_GELU, lacks=_uncapped),),
    "gemma3_text": (Architecture("gemma3", ropes=("default", "linear"), windows=True, activation=_GELU),),
    "olmo2": (Architecture("olmo2", square=True),),
    "olmo3": (Architecture("olmo2", square=True, windows=True),),
    "glm4": (Architecture("glm4", fused="mlp", partial=True),),
    "exaone4": (Architecture("exaone4", ropes=_FACTORS, square=True, windows=True, lacks=_other_windows),),
    "cohere2": (Architecture("cohere2", square=True, tied=True, windows=True),),
}


def gguf_architecture(config: PretrainedConfig) -> Architecture:
    """Returns the architecture that a GGUF file of a model names.

    Raises:
        InputError: If llama.cpp has none that computes the model.
    """
    family, shape = base_type(config), shape_of(config)
    if family not in ARCHITECTURES:
        raise InputError(
            f"--format gguf: models of type '{family}' are not written, only {', '.join(ARCHITECTURES)}: export "
            "--format vanilla, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    uniform = len(set(shape.num_key_value_heads)) == len(set(shape.intermediate_size)) == 1
    lacking = {each.name: _lacking(each, config, shape) for each in ARCHITECTURES[family]}
    for architecture in ARCHITECTURES[family]:
        if lacking[architecture.name] is None and (uniform or architecture.per_layer):
            return architecture
    reasons = [f"'{name}' {reason or 'has one width for all layers'}" for name, reason in lacking.items()]
    advice = "export --format vanilla and that folder to gguf, or learn the mask with --uniform"
    advice = advice if None in lacking.values() else "use the checkpoint itself"
    raise InputError(f"--format gguf: llama.cpp's {', '.join(reasons)}; {advice}")


def _lacking(architecture: Architecture, config: PretrainedConfig, shape: ModelShape) -> str | None:
    """Returns what of a model an architecture leaves out, its widths apart, as the end of a sentence."""
    queries = max(shape.num_key_value_heads) * shape.group_size * shape.head_dim
    rope, activation = rope_of(config), getattr(config, "hidden_activation", None) or config.hidden_act
    if (shape.output_bias or shape.mlp_bias) and not architecture.biases:
        return "has no biases of the output projection and the MLP"
    if architecture.tied and not shape.tie_word_embeddings:
        return "has no head but the embedding"
    if architecture.square and queries != shape.hidden_size:
        return f"wants query heads as wide together as the hidden dims, here {queries} and {shape.hidden_size}"
    if rope["rope_type"] not in architecture.ropes:
        return f"has no rotary scaling '{rope['rope_type']}'"
    if config.rope_parameters.get(SLIDING, {}).get("rope_type", "default") != "default":
        return "scales no rope of sliding layers"
    if not architecture.partial and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "turns whole heads, not a part of them"
    if activation != architecture.activation:
        return f"has the activation {architecture.activation}, not {activation}"
    return None if architecture.lacks is None else architecture.lacks(config)


def rope_of(config: PretrainedConfig, kind: str = FULL) -> dict[str, Any]:
    """Returns the rope parameters of a kind of layer, where a family has several, or those of all layers."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get(kind, rope)


def sliding_window(config: PretrainedConfig) -> int | None:
    """Returns how many tokens those layers see that do not see all; None: all do."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds is not None and SLIDING not in kinds else getattr(config, "sliding_window", None)


def vanilla_config(config: PretrainedConfig) -> PretrainedConfig:
    """Returns the stock config of a model whose layers are padded with zeros to the widest one.

    Raises:
        InputError: If zeros would count, or no stock config can hold the sizes.
    """
    shape = shape_of(config)
    if shape.norms_all_heads and len(set(shape.num_key_value_heads)) > 1:
        raise InputError(
            "--format vanilla: this family's norms of q and k average over all heads of a layer, and zeros would "
            "count: learn the mask with --uniform True, which needs no padding"
        )
    heads, channels = ((max(sizes),) * len(sizes) for sizes in (shape.num_key_value_heads, shape.intermediate_size))
    padded = config_of_widths(config, replace(shape, num_key_value_heads=heads, intermediate_size=channels))
    if padded.model_type.startswith(PREFIX):
        raise InputError(
            f"--format vanilla: a stock {base_type(padded)} config does not take a hidden width "
            f"of {padded.hidden_size} with {padded.num_attention_heads} query heads of {shape.head_dim}: most want a "
            "multiple of the heads, with a long rope the dense width; prune with another --dim_multiple"
        )
    return padded


def check_graph(config: PretrainedConfig) -> None:
    """Refuses a model that no ONNX graph holds.

    Raises:
        InputError: If its rotary frequencies are not one set, or a router chooses what it computes.
    """
    if any(shape_of(config).experts):
        raise InputError(
            "--format onnx: which experts a token passes is chosen as it comes, and a graph holds no such choice: use "
            "the checkpoint itself, or --format vanilla"
        )
    rope = config.rope_parameters
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & {"longrope", "dynamic"}:
        raise InputError(
            "--format onnx: this model's rotary frequencies follow the length of the text (a long or dynamic rope), "
            "and a graph holds one set: use the checkpoint itself, or --format gguf where its family has one"
        )
