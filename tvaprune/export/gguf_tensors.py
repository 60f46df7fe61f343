"""A model's tensors as llama.cpp's graph of an architecture takes them: its names, its order of rows, its factors.

What a graph does not multiply by is multiplied into weights, exactly: a norm does not see the scale of what it reads,
so a factor of the embedding becomes its inverse in all that the blocks write, and the tie with the head stays.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tvaprune.models.families import base_type, embedding_factor, family_of, residual_factor
from tvaprune.models.formats import LARGEST_GEMMA, Architecture, rope_of
from tvaprune.models.layout import layout_of
from tvaprune.models.shape import shape_of

_APART = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "gate": "gate_proj", "up": "up_proj"}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of the file, whose values are made when they are asked for: all in float32 are twice the model.

    Attributes:
        name: llama.cpp's.
        values: Returns them, of this shape, in float32.
    """

    name: str
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]


def gguf_tensors(model: PreTrainedModel, architecture: Architecture) -> list[GgufTensor]:
    """Returns what the file holds of a model, in its order."""
    import gguf

    known = {name: each for each, name in gguf.MODEL_ARCH_NAMES.items()}[architecture.name]
    names = gguf.get_tensor_name_map(known, model.config.num_hidden_layers)
    parts: dict[str, list[tuple[str, str, torch.Tensor]]] = {}
    for module, kind, values in _parts(model, architecture):
        block, _, last = module.rpartition(".")
        is_part = architecture.fused == "qkv" and last in ("q_proj", "k_proj", "v_proj")
        name = f"{names.get_name(f'{block}.qkv_proj' if is_part else module)}.{kind}"
        parts.setdefault(name, []).append((module, kind, values))

    def values_of(name: str) -> torch.Tensor:
        found = [_changed(module, kind, values.float(), model, architecture) for module, kind, values in parts[name]]
        return found[0] if len(found) == 1 else torch.cat(found)

    shapes = {name: (sum(len(values) for *_, values in rows), *rows[0][-1].shape[1:]) for name, rows in parts.items()}
    tensors = [GgufTensor(name, shape, partial(values_of, name)) for name, shape in shapes.items()]
    if "llama3" in architecture.ropes and (factors := rope_factors(model)) is not None:
        tensors.append(GgufTensor("rope_freqs.weight", tuple(factors.shape), lambda: factors))
    return tensors


def _parts(model: PreTrainedModel, architecture: Architecture) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yields module, ``weight`` or ``bias``, and values; of a fused projection each part, unless the graph fuses it."""
    layout = layout_of(family_of(model.config), shape_of(model.config))
    parts: dict[str, list[tuple[str, slice]]] = {}
    for block in (*layout.attention, *([] if architecture.fused == "mlp" else layout.mlp)):
        for role, reader in block.readers.items() if block is not None else ():
            name = f"{reader.path.rpartition('.')[0]}.{_APART[role]}"
            parts.setdefault(reader.path, []).append((name, slice(reader.start, reader.stop)))
    for path, values in model.state_dict().items():
        module, _, kind = path.rpartition(".")
        if module == "lm_head" and model.config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output
        for name, rows in parts.get(module, [(module, slice(None))]):
            yield name, kind, values[rows]


def _changed(
    module: str, kind: str, values: torch.Tensor, model: PreTrainedModel, architecture: Architecture
) -> torch.Tensor:
    """Returns a tensor's values with what the graph lacks."""
    config, family, last = model.config, family_of(model.config), module.rpartition(".")[-1]
    if kind == "weight" and values.dim() == 1:
        values = values + family.norm_offset
    if last in (family.down.rpartition(".")[-1], family.output.rpartition(".")[-1]):
        values = values * (residual_factor(config) / embedding_factor(config))
    if module == family.final_norm and family.logit_divisor is not None:
        values = values / getattr(config, family.logit_divisor)
    if last == ("q_proj" if family.query_norm is None else family.query_norm.rpartition(".")[-1]):
        values = values * _attention_factor(model)
    if architecture.interleaved and last in ("q_proj", "k_proj"):
        values = interleave(values, shape_of(config).head_dim)
    return values


def _attention_factor(model: PreTrainedModel) -> float:
    """Returns what the attention's logits are multiplied by, over what llama.cpp's graph does it by."""
    config = model.config
    is_largest = config.num_hidden_layers == LARGEST_GEMMA.get(base_type(config))
    width = config.hidden_size // config.num_attention_heads if is_largest else shape_of(config).head_dim
    factor: float = model.model.layers[0].self_attn.scaling * math.sqrt(width)
    return 1.0 if math.isclose(factor, 1.0) else factor


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders the rows of a q or k projection, or of its bias, from halves to neighbouring pairs, head by head.

    transformers turns feature ``j`` with ``j + head_dim / 2``, llama.cpp's ``llama`` feature ``2j`` with ``2j + 1``.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(model: PreTrainedModel) -> torch.Tensor | None:
    """Returns what llama.cpp divides the rotary frequencies by, shape ``(head_dim / 2,)``; None: nothing scales."""
    rope, head_dim = rope_of(model.config), shape_of(model.config).head_dim
    if rope["rope_type"] not in ("llama3", "linear") or not hasattr(model.model.rotary_emb, "inv_freq"):
        return None
    base = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    return base / model.model.rotary_emb.inv_freq.float().cpu()


def norm_epsilon(config: PretrainedConfig) -> float:
    """Returns the norms' epsilon; a stream whose embedding is left unscaled has that of its own scale."""
    epsilon: float = getattr(config, "layer_norm_eps" if family_of(config).norm_centres else "rms_norm_eps")
    return epsilon / embedding_factor(config) ** 2
