"""A GGUF file for llama.cpp: of an architecture that computes the model, with the sizes and the tensors that it reads.

llama.cpp's ``llama`` takes layer 0's sizes for all layers; ``deci`` is the same graph and reads every size per layer.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from tvaprune.errors import InputError
from tvaprune.export.gguf_tensors import gguf_tensors, norm_epsilon
from tvaprune.export.gguf_tokenizer import tokenizer_fields
from tvaprune.export.in_llama_cpp import logits_in_llama_cpp
from tvaprune.export.verify import fixed_prompt, reference_logits, report_difference, tell_odd_widths
from tvaprune.files import clear_leftovers, replacing
from tvaprune.models.families import family_of
from tvaprune.models.formats import SLIDING, Architecture, gguf_architecture, rope_of, sliding_window
from tvaprune.models.shape import shape_of

QUANTIZATIONS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
# llama.cpp's K-quants, and what llama-quantize takes in their place for a matrix whose rows are no multiple of it.
BLOCK = 256
FALLBACK = "where llama-quantize packs Q4_K as Q5_0, Q6_K as Q8_0, and what 32 does not divide as F16"
# Largest difference of logits, relative to the largest logit, that a precision explains; f16 KV cache switched off.
# Where the activation is GELU, float32 has that of f16: llama.cpp reads it from a table of half precision.
TOLERANCES = {"f32": 1e-4, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}


def export_gguf(model: PreTrainedModel, source: Path, out: Path, outtype: str, overwrite: bool, verify: bool) -> None:
    """Writes the file.

    Raises:
        InputError: If llama.cpp has no architecture for the model, or the file is there or cannot be written.
    """
    architecture = gguf_architecture(model.config)
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"--format gguf {out}: is there; give a new .gguf file, or replace it: --overwrite_output_dir")
    if out.exists() and not _is_gguf(out):
        raise InputError(f"--format gguf {out}: is there, and no .gguf file; give a new file")
    context = _context_length(model.config, architecture)
    if context < model.config.max_position_embeddings:
        print(f"note: llama.cpp knows no sliding window here; the file's context length is the window, {context}")
    clear_leftovers(out.parent)
    try:
        with replacing(out) as temporary:
            _write(model, source, temporary, architecture, outtype)
            if verify:
                _verify(model, temporary, architecture, outtype)
    except OSError as error:
        raise InputError(f"--format gguf {out}: cannot be written ({error}); nothing was left there") from error
    tell_odd_widths(model.config, BLOCK, FALLBACK)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _write(model: PreTrainedModel, source: Path, path: Path, architecture: Architecture, outtype: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    _add_sizes(writer, model.config, architecture)
    _add_rest(writer, model.config, architecture)
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(outtype)))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in tokenizer_fields(source, model.config).items():
        (writer.add_array if isinstance(value, list) else _adder(writer, value))(key, value)
    tensors = gguf_tensors(model, architecture)
    wanted = [gguf.GGMLQuantizationType[_precision(tensor.shape, outtype)] for tensor in tensors]
    for tensor, kind in zip(tensors, wanted, strict=True):
        size = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor, kind in zip(tensors, wanted, strict=True):
        writer.write_tensor_data(gguf.quantize(tensor.values().contiguous().cpu().numpy(), kind))
    writer.close()


def _add_sizes(writer: Any, config: PretrainedConfig, architecture: Architecture) -> None:
    shape = shape_of(config)
    heads, channels = list(shape.num_key_value_heads), list(shape.intermediate_size)
    queries = [count * shape.group_size for count in heads]
    if not architecture.per_layer:  # one number for all layers
        heads, channels, queries = heads[0], channels[0], queries[0]  # type: ignore[assignment]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config, architecture))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(queries)
    writer.add_head_count_kv(heads)
    writer.add_feed_forward_length(channels)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)


def _add_rest(writer: Any, config: PretrainedConfig, architecture: Architecture) -> None:
    """Adds what the graph computes with beside the weights: epsilon, rotary embedding, windows, factors."""
    import gguf

    family, rope, head_dim = family_of(config), rope_of(config), shape_of(config).head_dim
    (writer.add_layer_norm_eps if family.norm_centres else writer.add_layer_norm_rms_eps)(norm_epsilon(config))
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    base = rope["rope_theta"]
    if rope["rope_type"] == "dynamic":  # with a fixed alpha, as Hunyuan has it
        base *= rope["alpha"] ** (head_dim / (head_dim - 2))
    writer.add_rope_freq_base(base)
    if rope["rope_type"] == "linear" and "llama3" not in architecture.ropes:  # else by factors
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if architecture.windows and sliding_window(config) is not None:
        writer.add_sliding_window(sliding_window(config))
        writer.add_sliding_window_pattern([kind == SLIDING for kind in config.layer_types])
        writer.add_rope_freq_base_swa(rope_of(config, SLIDING)["rope_theta"])
    adders = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        family.logit_cap: writer.add_final_logit_softcapping,
        family.logit_multiplier: writer.add_logit_scale,
    }
    for entry, add in adders.items():
        if entry is not None and getattr(config, entry, None) is not None:
            add(getattr(config, entry))


def _context_length(config: PretrainedConfig, architecture: Architecture) -> int:
    """Returns the longest text on which llama.cpp computes the same: few of its graphs know a sliding window."""
    window = sliding_window(config)
    if architecture.windows or window is None or window >= config.max_position_embeddings:
        return int(config.max_position_embeddings)
    return int(window)


def _adder(writer: Any, value: Any) -> Any:
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    return adders[type(value)]


def _file_type(outtype: str) -> str:
    return "ALL_F32" if outtype == "f32" else f"MOSTLY_{QUANTIZATIONS[outtype]}"


def _precision(shape: tuple[int, ...], outtype: str) -> str:
    """Returns a tensor's type: norms, biases and factors in F32; F16 where Q8_0's blocks of 32 do not fit."""
    if len(shape) == 1:
        return "F32"
    return "F16" if outtype == "q8_0" and shape[-1] % 32 else QUANTIZATIONS[outtype]


def _verify(model: PreTrainedModel, path: Path, architecture: Architecture, outtype: str) -> None:
    """Compares prefill and token-by-token decoding in llama.cpp with the checkpoint, if its bindings are installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        print("not verified: llama-cpp-python is not installed")
        return
    input_ids = fixed_prompt(model.config.vocab_size)[:, : _context_length(model.config, architecture)]
    expected = reference_logits(model.float(), input_ids)[0]  # half precision's own error would hide the file's
    tolerance = TOLERANCES["f16" if outtype == "f32" and "gelu" in architecture.activation else outtype]
    try:
        found = logits_in_llama_cpp(path, input_ids[0].tolist(), torch.get_num_threads())
    except RuntimeError as error:
        raise InputError(
            f"--format gguf: llama.cpp, as it is installed here, fails on the file ({error}), which was not kept; try "
            "--outtype f16 or another build of llama-cpp-python, or write it unchecked: --no_verify"
        ) from error
    for what, logits in found.items():
        report_difference(f"{what} in llama.cpp", logits, expected, tolerance)
