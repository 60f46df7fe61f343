"""A GGUF file for llama.cpp: architecture ``deci`` where layers differ in width, the family's own where they do not.

llama.cpp's ``llama`` takes layer 0's sizes for all layers; ``deci`` is the same graph and reads every size per layer.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tvaprune.errors import InputError
from tvaprune.export.gguf_tokenizer import tokenizer_fields
from tvaprune.export.verify import fixed_prompt, reference_logits, report_difference, require, tell_odd_widths
from tvaprune.files import clear_leftovers, replacing
from tvaprune.models.families import base_type
from tvaprune.models.formats import ARCHITECTURES, gguf_architecture
from tvaprune.models.shape import shape_of

QUANTIZATIONS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
# llama.cpp's K-quants, and what llama-quantize takes in their place for a matrix whose rows are no multiple of it.
BLOCK = 256
FALLBACK = "where llama-quantize packs Q4_K as Q5_0, Q6_K as Q8_0, and what 32 does not divide as F16"
# Largest difference of logits, relative to the largest logit, that a precision explains; f16 KV cache switched off.
TOLERANCES = {"f32": 1e-4, "f16": 2e-2, "bf16": 1e-1, "q8_0": 1e-1}
_GLOBAL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export_gguf(model: PreTrainedModel, source: Path, out: Path, outtype: str, overwrite: bool, verify: bool) -> None:
    """Writes the file.

    Raises:
        InputError: If llama.cpp has no architecture for the model, or the file is there or cannot be written.
    """
    architecture = gguf_architecture(model.config)
    if out.is_dir() or (out.exists() and not overwrite):
        raise InputError(f"--format gguf {out}: is there; give a new .gguf file, or replace it: --overwrite_output_dir")
    clear_leftovers(out.parent)
    try:
        with replacing(out) as temporary:
            _write(model, source, temporary, architecture, outtype)
            if verify:
                _verify(model, temporary, outtype)
    except OSError as error:
        raise InputError(f"--format gguf {out}: cannot be written ({error}); nothing was left there") from error
    tell_odd_widths(model.config, BLOCK, FALLBACK)


def gguf_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Returns the tensors under llama.cpp's names, in float32, q and k in its order of rows."""
    config, interleaved = model.config, ARCHITECTURES[base_type(model.config)].interleaved
    tensors = {}
    for name, tensor in model.state_dict().items():
        module, kind = name.rsplit(".", 1)
        if module == "lm_head" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no output
        values = tensor.detach().float()
        if interleaved and module.endswith(("q_proj", "k_proj")):
            values = interleave(values, config.head_dim)
        tensors[f"{_gguf_name(module)}.{kind}"] = values
    factors = rope_factors(model)
    return tensors if factors is None else tensors | {"rope_freqs.weight": factors}


def interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorders the rows of a q or k projection, or of its bias, from halves to neighbouring pairs, head by head.

    transformers turns feature ``j`` with ``j + head_dim / 2``, llama.cpp's ``llama`` feature ``2j`` with ``2j + 1``.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def rope_factors(model: PreTrainedModel) -> torch.Tensor | None:
    """Returns what llama.cpp divides the rotary frequencies by, shape ``(head_dim / 2,)``; None: nothing scales."""
    rope = model.config.rope_parameters
    if rope["rope_type"] == "default":
        return None
    base = rope["rope_theta"] ** (-torch.arange(0, model.config.head_dim, 2).float() / model.config.head_dim)
    return base / model.model.rotary_emb.inv_freq.float().cpu()


def _gguf_name(module: str) -> str:
    if module in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[module]
    layer, _, name = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[name]}"


def _write(model: PreTrainedModel, source: Path, path: Path, architecture: str, outtype: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, model.config, architecture)
    writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(outtype)))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in tokenizer_fields(source, model.config).items():
        (writer.add_array if isinstance(value, list) else _adder(writer, value))(key, value)
    for name, tensor in gguf_tensors(model).items():
        wanted = getattr(gguf.GGMLQuantizationType, _precision(tensor, outtype))
        writer.add_tensor(name, gguf.quantize(tensor.contiguous().cpu().numpy(), wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: PretrainedConfig, architecture: str) -> None:
    shape = shape_of(config)
    heads, channels = list(shape.num_key_value_heads), list(shape.intermediate_size)
    queries = [count * shape.group_size for count in heads]
    if architecture != "deci":  # one number for all layers
        heads, channels, queries = heads[0], channels[0], queries[0]  # type: ignore[assignment]
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(queries)
    writer.add_head_count_kv(heads)
    writer.add_feed_forward_length(channels)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _context_length(config: PretrainedConfig) -> int:
    """Returns the longest text on which llama.cpp computes the same: it knows no sliding window here."""
    window = getattr(config, "sliding_window", None)
    if window is None or window >= config.max_position_embeddings:
        return int(config.max_position_embeddings)
    print(f"note: llama.cpp knows no sliding window here; the file's context length is the window, {window}")
    return int(window)


def _adder(writer: Any, value: Any) -> Any:
    adders = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
    return adders[type(value)]


def _file_type(outtype: str) -> str:
    return "ALL_F32" if outtype == "f32" else f"MOSTLY_{QUANTIZATIONS[outtype]}"


def _precision(tensor: torch.Tensor, outtype: str) -> str:
    """Returns a tensor's type: norms, biases and factors in F32; F16 where Q8_0's blocks of 32 do not fit."""
    if tensor.dim() == 1:
        return "F32"
    return "F16" if outtype == "q8_0" and tensor.shape[-1] % 32 else QUANTIZATIONS[outtype]


def _verify(model: PreTrainedModel, path: Path, outtype: str) -> None:
    """Compares prefill and token-by-token decoding in llama.cpp with the checkpoint, if its bindings are installed."""
    try:
        require("gguf", "llama_cpp")
    except InputError:
        print("not verified: llama-cpp-python is not installed")
        return
    from llama_cpp import Llama

    input_ids = fixed_prompt(model.config.vocab_size)
    expected = reference_logits(model, input_ids)[0]
    llama = Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, verbose=False)
    tokens = input_ids[0].tolist()
    for what, chunks in (("prefill", [tokens]), ("decode", [[token] for token in tokens])):
        llama.reset()
        for chunk in chunks:
            llama.eval(chunk)
        found = torch.tensor(llama.scores[: len(tokens)])
        report_difference(f"{what} in llama.cpp", found, expected, TOLERANCES[outtype])
