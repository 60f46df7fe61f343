"""The exports: the tensors and fields that were written, read back independently, and the tool's own verification."""

import importlib.util
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from export.test_gguf_families import ROWS as FAMILY_ROWS
from export.test_gguf_tokenizer import TEXT, byte_level
from support.exports import fields_of, saved
from support.families import CLOSE, ROWS, logits
from support.folders import LLAMA3_ROPE, no_heads_in_layer_0, read_config, tokenizer, uneven, uniform
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.errors import InputError
from tvaprune.export.gguf_tokenizer import SPLITS
from tvaprune.export.verify import require
from tvaprune.files import _HOST
from tvaprune.stages.export import export

gguf = pytest.importorskip("gguf")
MISTRAL = "mistral GQA, window shorter than the input"


@pytest.fixture
def make_folder(make_model, make_masks, tmp_path):
    return partial(saved, make_model, make_masks, tmp_path / "pruned")


def tensors_of(path):
    """The tensors in the layout of torch, dequantised."""
    reader = gguf.GGUFReader(path)
    return {t.name: torch.tensor(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in reader.tensors}


def halves(rows, head_dim):
    """Undoes llama.cpp's order of q and k rows, head by head, from its definition: 2j and 2j + 1 were j and j + D/2."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    return torch.cat([heads[:, 0::2], heads[:, 1::2]], dim=1).reshape(rows.shape)


NAMES = {
    "blk.{}.attn_norm.weight": "input_layernorm.weight",
    "blk.{}.attn_v.weight": "self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "mlp.down_proj.weight",
}


@pytest.mark.parametrize("case", [uneven, no_heads_in_layer_0])
@pytest.mark.parametrize("row", ["llama MHA", "llama GQA", "llama odd widths", MISTRAL])
def test_a_gguf_file_holds_the_tensors_of_the_checkpoint(row, case, make_folder, tmp_path, capsys):
    _, folder = make_folder(row, case)
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    stored, tensors = load_pruned(folder), tensors_of(tmp_path / "model.gguf")
    weights = stored.state_dict()
    layers = range(3)
    for index in layers:
        prefix = f"model.layers.{index}."
        for name, source in NAMES.items():
            assert torch.equal(tensors.pop(name.format(index)), weights[prefix + source])
        for kind in "qk":
            written = tensors.pop(f"blk.{index}.attn_{kind}.weight")
            expected = weights[f"{prefix}self_attn.{kind}_proj.weight"]
            assert torch.equal(halves(written, stored.config.head_dim), expected)
            assert not expected.any() or not torch.equal(written, expected)  # control: there is an order to undo
    assert torch.equal(tensors.pop("token_embd.weight"), weights["model.embed_tokens.weight"])
    assert torch.equal(tensors.pop("output.weight"), weights["lm_head.weight"])
    assert torch.equal(tensors.pop("output_norm.weight"), weights["model.norm.weight"])
    assert not tensors
    fields = fields_of(tmp_path / "model.gguf")
    assert fields["general.architecture"] == "deci"
    config = [stored.config.per_layer_config[index] for index in layers]
    assert list(fields["deci.attention.head_count"]) == [layer.num_attention_heads for layer in config]
    assert list(fields["deci.attention.head_count_kv"]) == [layer.num_key_value_heads for layer in config]
    assert list(fields["deci.feed_forward_length"]) == [layer.intermediate_size for layer in config]
    assert 0 not in fields["deci.attention.head_count_kv"]
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == stored.config.head_dim
    assert fields["deci.context_length"] == (4 if row == MISTRAL else 64)  # the window
    assert ("no sliding window" in capsys.readouterr().out) == (row == MISTRAL)


@pytest.mark.parametrize(
    ("row", "architecture"),
    [(MISTRAL, "llama"), ("qwen2 untied", "llama"), ("qwen3 tied", "qwen3"), ("llama tied, with biases", "llama")],
)
def test_a_uniform_model_keeps_its_architecture(row, architecture, make_folder, tmp_path):
    _, folder = make_folder(row, uniform)
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    fields, tensors = fields_of(tmp_path / "model.gguf"), tensors_of(tmp_path / "model.gguf")
    assert fields["general.architecture"] == architecture
    assert fields[f"{architecture}.attention.head_count_kv"] == 1
    assert fields[f"{architecture}.feed_forward_length"] == 16
    weights = load_pruned(folder).state_dict()
    assert ("output.weight" in tensors) == (not ROWS[row][1].get("tie_word_embeddings", False))
    query = weights["model.layers.1.self_attn.q_proj.weight"]
    if architecture == "llama":
        query = query.unflatten(0, (-1, 2, 3)).transpose(1, 2).flatten(0, 2)
    assert torch.equal(tensors["blk.1.attn_q.weight"], query)
    if "model.layers.1.self_attn.k_proj.bias" in weights:
        bias = weights["model.layers.1.self_attn.k_proj.bias"]
        written = tensors["blk.1.attn_k.bias"]
        assert torch.equal(halves(written, 6) if architecture == "llama" else written, bias)
    if architecture == "qwen3":
        assert torch.equal(tensors["blk.1.attn_q_norm.weight"], weights["model.layers.1.self_attn.q_norm.weight"])


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("glm4", {"rope.dimension_count": 4, "attention.head_count": 4}),
        ("hunyuan_v1_dense", {"rope.freq_base": 5000.0 * 100.0 ** (8 / 6), "rope.dimension_count": 8}),
        ("llama, linear rope", {"rope.freq_base": 5000.0, "rope.scaling.factor": None}),  # it has factors
        ("cohere2", {"logit_scale": 0.7, "attention.layer_norm_epsilon": 1e-5, "attention.head_count": 4}),
    ],
)
def test_what_a_graph_computes_with_beside_the_weights(row, told, make_model, tmp_path):
    model_type, values, *_ = FAMILY_ROWS[row]
    make_model(model_type, **({"head_dim": 8} | values)).save_pretrained(tmp_path / "stock")
    export("gguf", tmp_path / "stock", tmp_path / "model.gguf", "f32", verify=False)
    fields = fields_of(tmp_path / "model.gguf")
    architecture = fields["general.architecture"]
    assert {name: fields.get(f"{architecture}.{name}") for name in told} == pytest.approx(told)
    assert fields[f"{architecture}.vocab_size"] == 47 and fields["general.file_type"] == gguf.LlamaFileType.ALL_F32


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_precisions(outtype, make_folder, tmp_path):
    _, folder = make_folder(hidden_size=96, intermediate_size=96)
    export("gguf", folder, tmp_path / "model.gguf", outtype, verify=False)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    file_type = gguf.LlamaFileType[f"MOSTLY_{outtype.upper()}"]
    assert types["output_norm.weight"] == "F32" and fields_of(tmp_path / "model.gguf")["general.file_type"] == file_type
    widths = {name: tensor.shape[-1] for name, tensor in tensors_of(tmp_path / "model.gguf").items()}
    matrices = {name: kind for name, kind in types.items() if "norm" not in name}
    for name, kind in matrices.items():
        assert kind == ("F16" if outtype == "q8_0" and widths[name] % 32 else outtype.upper())
    exact = load_pruned(folder).model.layers[0].mlp.up_proj.weight.detach()
    written = tensors_of(tmp_path / "model.gguf")["blk.0.ffn_up.weight"]
    assert 0 < (written - exact).abs().max() < 0.02 * exact.abs().max()


def test_scaled_rotary_frequencies_are_written_as_factors(make_folder, tmp_path):
    _, folder = make_folder(rope_parameters=LLAMA3_ROPE)
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    factors = tensors_of(tmp_path / "model.gguf")["rope_freqs.weight"]
    frequencies = 5000.0 ** (-torch.arange(0, 6, 2) / 6)
    torch.testing.assert_close(frequencies / factors, load_pruned(folder).model.rotary_emb.inv_freq)
    assert 1.0 <= factors.min() < 2.0 and factors.max() == pytest.approx(8.0)  # the slower, the nearer to the factor
    assert fields_of(tmp_path / "model.gguf")["deci.rope.freq_base"] == 5000.0


@pytest.mark.parametrize("row", ["llama GQA", "llama odd widths", MISTRAL, "qwen2 tied", "qwen3 untied"])
def test_vanilla_is_a_stock_model_of_the_same_function(row, make_folder, input_ids, tmp_path, capsys):
    narrow, folder = make_folder(row, no_heads_in_layer_0)
    export("vanilla", folder, tmp_path / "vanilla")
    assert "verified" in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "vanilla").eval()
    assert not type(loaded).__name__.startswith("Pruned")
    assert "per_layer_config" not in read_config(tmp_path / "vanilla")
    torch.testing.assert_close(logits(loaded, input_ids), logits(narrow, input_ids), **CLOSE)
    assert sum(p.numel() for p in loaded.parameters()) > sum(p.numel() for p in narrow.parameters())


def test_vanilla_refuses_what_no_stock_config_holds(make_folder, tmp_path):
    def odd_width(plan):
        hidden = {"hidden": plan.kept.hidden[:21]}, {"hidden": plan.scale.hidden[:21]}
        return replace(plan, kept=replace(plan.kept, **hidden[0]), scale=replace(plan.scale, **hidden[1]))

    _, folder = make_folder("llama tied, with biases", odd_width)
    with pytest.raises(InputError, match="a stock llama config does not take a hidden width"):
        export("vanilla", folder, tmp_path / "vanilla")


def test_a_wrong_export_is_never_left_as_a_result(make_folder, tmp_path, monkeypatch):
    from tvaprune.checkpoint import folder as checkpoint

    _, folder = make_folder()
    padded = checkpoint._padded
    monkeypatch.setattr(checkpoint, "_padded", lambda *given: padded(*given) * 0.9)
    with pytest.raises(InputError, match="the written model's logits are off by"):
        export("vanilla", folder, tmp_path / "vanilla")
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]
    export("vanilla", folder, tmp_path / "vanilla", verify=False)  # as asked


def test_onnx_runtime_gives_the_same_logits(make_folder, input_ids, tmp_path, capsys):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    narrow, folder = make_folder(MISTRAL, no_heads_in_layer_0, words=tokenizer(), num_hidden_layers=2)
    export("onnx", folder, tmp_path / "onnx")
    said = capsys.readouterr()
    assert said.out.count("verified") == 2 and "exporting: " in said.err and "Skipping" not in said.err
    files = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model_with_past.onnx", "config.json", "tokenizer.json"} <= files
    session = ort.InferenceSession(tmp_path / "onnx" / "model.onnx")
    found = torch.tensor(session.run(["logits"], {"input_ids": input_ids.numpy()})[0])
    torch.testing.assert_close(found, logits(narrow, input_ids), **CLOSE)
    step = ort.InferenceSession(tmp_path / "onnx" / "model_with_past.onnx")
    heads = [node.shape[1] for node in step.get_inputs() if node.name.endswith(".key")]
    assert heads == [layer.num_key_value_heads for layer in load_pruned(folder).config.per_layer_config]


def test_onnx_of_half_precision_is_float32_and_keeps_the_chat_template(make_folder, input_ids, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = tokenizer()
    words.chat_template = "{{ messages[0]['content'] }}"
    _, folder = make_folder("llama GQA", words=words, num_hidden_layers=1)
    half = load_pruned(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    export("onnx", folder, tmp_path / "onnx")
    session = ort.InferenceSession(tmp_path / "onnx" / "model.onnx")
    found = torch.tensor(session.run(["logits"], {"input_ids": input_ids.numpy()})[0])
    torch.testing.assert_close(found, logits(half.float(), input_ids), **CLOSE)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    assert loaded.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
@pytest.mark.parametrize("row", ["llama GQA", "llama MHA"])
def test_llama_cpp_gives_the_same_logits_and_tokens(row, make_folder, tmp_path, capsys):
    from llama_cpp import Llama

    words = byte_level(next(iter(SPLITS)))
    _, folder = make_folder(row, no_heads_in_layer_0, words=words, vocab_size=310, hidden_size=96, head_dim=16)
    export("gguf", folder, tmp_path / "model.gguf", "f32")
    assert capsys.readouterr().out.count("in llama.cpp: largest difference") == 2
    there = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    for text in TEXT:
        assert there.tokenize(text.encode(), add_bos=False) == words(text, add_special_tokens=False)["input_ids"]


def test_what_killed_commands_left_is_put_right(make_folder, tmp_path):
    """A checkpoint that was about to be replaced has its name back, and half a file is gone."""
    _, folder = make_folder()
    kinds = {kind: f".tvaprune-{kind}-{_HOST}-{os.getpid()}-" for kind in ("old", "part")}
    folder.rename(tmp_path / f"{kinds['old']}{folder.name}")
    (out := tmp_path / "out").mkdir()
    (out / f"{kinds['part']}other.gguf").write_bytes(b"GGUF")
    export("gguf", folder, out / "model.gguf", "f32", verify=False)
    assert [path.name for path in out.iterdir()] == ["model.gguf"] and {"out", folder.name} == set(os.listdir(tmp_path))


def test_what_is_in_use_or_missing_is_said_in_one_line(make_folder, tmp_path, monkeypatch):
    _, folder = make_folder()
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(InputError, match="is there, and no .gguf file; give a new file"):
        export("gguf", folder, tmp_path / "model.gguf", "f32", overwrite=True, verify=False)
    with pytest.raises(InputError, match="is there; give a new .gguf file, or replace it: --overwrite_output_dir"):
        export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    assert (tmp_path / "model.gguf").read_text() == "mine"
    (tmp_path / "model.gguf").write_bytes(b"GGUF, an earlier export")
    export("gguf", folder, tmp_path / "model.gguf", "f32", overwrite=True, verify=False)
    (full := tmp_path / "full").mkdir()
    (full / "mine").touch()
    with pytest.raises(InputError, match="is not empty; replace it with --overwrite_output_dir"):
        export("vanilla", folder, full)
    for name, place in (("vanilla", folder), ("vanilla", tmp_path), ("vanilla", folder / "vanilla"),
                        ("gguf", folder / "model.safetensors")):  # fmt: skip
        with pytest.raises(InputError, match="is the checkpoint, holds it or is within it; give a place apart"):
            export(name, folder, place, overwrite=True)
    assert (folder / "model.safetensors").is_file()
    with pytest.raises(InputError, match="--format GGUF: give gguf, onnx, vanilla"):
        export("GGUF", folder, tmp_path / "new.gguf")
    with pytest.raises(InputError, match="--outtype f8: give "):
        export("gguf", folder, tmp_path / "new.gguf", "f8")
    with pytest.raises(InputError, match="--outtype bf16: acts in --format gguf alone"):
        export("vanilla", folder, tmp_path / "new", "bf16")
    with pytest.raises(InputError, match="not a pruned checkpoint"):
        export("vanilla", full, tmp_path / "vanilla")
    with pytest.raises(InputError, match=r"--format onnx needs not_there: pip install 'tvaprune\[onnx\]'"):
        require("onnx", "torch", "not_there")
