"""Which formats of other engines hold a model, decided by its config: the exporters refuse by it, the card tells."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from tvaprune.errors import InputError
from tvaprune.models.families import PREFIX, base_type
from tvaprune.models.pruned import config_of_widths
from tvaprune.models.shape import shape_of


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp knows a family.

    Attributes:
        name: The architecture of uniform models.
        interleaved: Whether its rotary embedding turns neighbouring features, so that q and k rows change places.
        per_layer: The architecture of models whose layers differ; None if there is none.
    """

    name: str
    interleaved: bool
    per_layer: str | None = None


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, per_layer="deci"),
    "mistral": Architecture("llama", interleaved=True, per_layer="deci"),
    "qwen2": Architecture("qwen2", interleaved=False),
    "qwen3": Architecture("qwen3", interleaved=False),
}


def gguf_architecture(config: PretrainedConfig) -> str:
    """Returns the architecture that a GGUF file of a model names.

    Raises:
        InputError: If llama.cpp has none, or would compute another function.
    """
    family, shape = base_type(config), shape_of(config)
    if family not in ARCHITECTURES:
        raise InputError(
            f"--format gguf: models of type '{family}' are not written, only {', '.join(ARCHITECTURES)}: export "
            "--format vanilla, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    known = ARCHITECTURES[family]
    scaling = config.rope_parameters["rope_type"]
    if scaling not in ("default", "llama3"):
        raise InputError(f"--format gguf: rotary scaling '{scaling}' is not supported, only 'llama3'; use another")
    if len(set(shape.num_key_value_heads)) == len(set(shape.intermediate_size)) == 1:
        return known.name
    if known.per_layer is None or shape.qkv_bias or shape.output_bias or shape.mlp_bias:
        raise InputError(
            "--format gguf: llama.cpp's per-layer architecture 'deci' has neither biases nor norms on q and k; export "
            "--format vanilla first and that folder to gguf, or learn the mask with --uniform"
        )
    return known.per_layer


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
    layers, heads, channels = shape.num_hidden_layers, shape.num_key_value_heads, shape.intermediate_size
    widest = [max(heads)] * layers, [max(channels)] * layers
    padded = config_of_widths(config, shape.hidden_size, shape.head_dim, *widest, shape.group_size)
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
