"""A GGUF file as a model: its own writer's file comes back as it was; what its reader would leave out is refused."""

import importlib.util
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch
from support import tiny
from support.families import CLOSE, logits
from support.folders import LLAMA3_ROPE
from support.in_process import half_written, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Gemma2Config, PreTrainedTokenizerFast

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.errors import InputError
from tvaprune.identity import weights_digest
from tvaprune.models.from_gguf import gguf_file, gguf_header, gguf_model
from tvaprune.models.load import load_config, load_model
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import save_masks
from tvaprune.stages.export import export

gguf = pytest.importorskip("gguf")
ARCHITECTURE = b"general.architecture" + struct.pack("<IQ", 8, 5)  # a string of five letters follows
CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 300}
DIGITS = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]


def byte_level(*steps):
    """Byte-level BPE with merges, that of GPT-2 unless other steps split the text first."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if steps else pre_tokenizers.ByteLevel(False)
    words.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    words.train_from_iterator([" ".join(tiny.WORDS), "a  b   c    d"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def make_gguf(make_model, tmp_path):
    """Returns a function: a family and a tokenizer -> the model, its GGUF file alone in a folder."""

    def make(family="llama", outtype="f32", words=None, **values):
        model, source = make_model(family, **(SIZES | values)), tmp_path / "source"
        model.save_pretrained(source)
        (words or byte_level()).save_pretrained(source)
        (tmp_path / "files").mkdir()
        export("gguf", source, tmp_path / "files" / "model.gguf", outtype, verify=False)
        return model, tmp_path / "files" / "model.gguf"

    return make


def ids(model):
    return torch.arange(0, model.config.vocab_size, 17).unsqueeze(0)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "num_attention_heads": 8}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_a_file_is_read_back_as_the_model_that_was_written(family, values, make_gguf, capsys):
    model, file = make_gguf(family, **values)
    read, words = load_model(str(file), "auto", CPU)
    assert f"note: {file}: F32 weights, dequantised to float32" in capsys.readouterr().out
    assert type(read).__name__.lower().startswith("llama" if family == "mistral" else family)  # llama.cpp has one name
    assert weights_digest(read) == weights_digest(model)
    torch.testing.assert_close(logits(read, ids(model)), logits(model, ids(model)), **CLOSE)
    assert bool(read.config.tie_word_embeddings) == model.config.tie_word_embeddings
    assert words.model_max_length == model.config.max_position_embeddings
    for text in ("the gate  keeps 12 units", "</s>a\n  b"):
        assert words(text).input_ids == byte_level()(text).input_ids
    again, _ = load_model(str(file.parent), "float32", CPU)  # its folder is the same model
    assert weights_digest(again) == weights_digest(read)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_s_gains_are_read_back_by_transformers(family, make_gguf):
    model, file = make_gguf(family, tie_word_embeddings=True, query_pre_attn_scalar=8)
    read, _ = load_model(str(file), "float32", CPU)
    torch.testing.assert_close(logits(read, ids(model)), logits(model, ids(model)), **CLOSE)


def test_what_is_read_is_plain_it_trains_and_saves(make_gguf, tmp_path):
    model, file = make_gguf()
    read, _ = load_model(str(file), "float32", CPU)
    naive = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert hasattr(naive.config, "quantization_config") and not hasattr(read.config, "quantization_config")  # control
    assert not getattr(read, "is_quantized", False) and all(p.requires_grad for p in read.parameters())
    read.save_pretrained(tmp_path / "saved")
    assert weights_digest(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == weights_digest(model)


def test_quantised_weights_come_near_and_are_stored_in_bfloat16(make_gguf, capsys):
    model, file = make_gguf(outtype="q8_0")
    read, _ = load_model(str(file), "auto", CPU)
    assert "Q8_0 weights, dequantised to float32" in capsys.readouterr().out
    assert load_config(str(file)).dtype == torch.bfloat16 and read.dtype == torch.float32
    for (name, found), expected in zip(read.state_dict().items(), model.state_dict().values(), strict=True):
        assert (found - expected).abs().max() <= expected.abs().max() / 127, name
    assert weights_digest(read) != weights_digest(model)
    half, _ = load_model(str(file), "bfloat16", CPU)
    assert half.dtype == torch.bfloat16


def test_digits_are_split_as_the_file_says(make_gguf):
    words = byte_level(*DIGITS)
    _, file = make_gguf(words=words)
    _, found = load_model(str(file), "auto", CPU)
    text = "a  5 gates\n    12"
    assert found.tokenize(text) == words.tokenize(text) and "ĠĠ" in found.tokenize(text)
    found.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert found.tokenize(text) != words.tokenize(text)  # control: as transformers alone splits


def flags(file, tmp_path):
    text = tiny.write_text(tmp_path / "text.txt", 3000)
    return ("--model_name_or_path", file, "--dataset_name", text, "--block_size", 16, "--ctx_length", 16,
            "--max_eval_samples", 4, "--speed_batches", 0, "--use_cpu")  # fmt: skip


def test_every_verb_takes_a_file(make_gguf, make_masks, tmp_path):
    model, file = make_gguf(outtype="bf16")
    save_masks(make_masks(shape_of(model.config)), tmp_path / "mask_info_1.0.pkl")
    shown = run("describe", tmp_path / "mask_info_1.0.pkl", "--model_name_or_path", file)
    assert shown.code == 0 and "KV heads" in shown.out, shown
    given = (*flags(file, tmp_path), "--mask_loc", tmp_path / "mask_info_1.0.pkl", "--save_pruned", tmp_path / "saved")
    ended = run("apply", *given, "--output_dir", tmp_path / "out", "--weight_update", "fold")
    assert ended.code == 0, ended
    results = tiny.read_json(tmp_path / "out" / "results.json")
    assert results["model"] == str(file)
    assert load_pruned(tmp_path / "saved").dtype == torch.bfloat16  # as the file has them
    within = run("apply", *given[:-1], file.parent, "--output_dir", tmp_path / "o", "--overwrite_output_dir")
    assert within.code == 2 and f"--save_pruned {file.parent}: holds --model_name_or_path" in within.err


def swap(file, old, new):
    content = file.read_bytes()
    assert len(old) == len(new) and content.count(old) == 1
    file.write_bytes(content.replace(old, new))


def set_type(file, name):
    """Says that the first tensor's numbers are of another type."""
    reader = gguf.GGUFReader(file, "r+")
    reader.tensors[0].field.parts[4][0] = gguf.GGMLQuantizationType[name]
    reader.data.flush()


def lie(kind):
    """Returns a function that changes a file, and the words that it is refused with."""
    return {
        "cut short": (lambda file: file.write_bytes(file.read_bytes()[:-2000]), "cannot be loaded"),
        "no GGUF": (lambda file: file.write_bytes(b"x" * 999), "is not a GGUF file"),
        "another family": (lambda file: swap(file, ARCHITECTURE + b"llama", ARCHITECTURE + b"bloom"),
                           "the model's type is 'bloom', which has no row in"),
        "another architecture": (lambda file: swap(file, ARCHITECTURE + b"llama", ARCHITECTURE + b"other"),
                                 "GGUF model with architecture other is not supported"),
        "an unknown split": (lambda file: swap(file, b"gpt-2", b"gpt-9"),
                             "splits text in a way that is not known here ('gpt-9'"),
        "numbers that nothing unpacks": (lambda file: set_type(file, "Q8_1"), "(Dequantization for Q8_1"),
        "two files": (lambda file: shutil.copy(file, file.with_name("other.gguf")), "holds 2 GGUF files"),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "cut short",
        "no GGUF",
        "another family",
        "another architecture",
        "an unknown split",
        "numbers that nothing unpacks",
        "two files",
    ],
)
def test_a_file_that_cannot_be_a_model_is_one_line(kind, make_gguf, tmp_path):
    _, file = make_gguf(outtype="q8_0")
    given = (*flags(file.parent, tmp_path), "--prune_method", "magnitude", "--output_dir", tmp_path / "out")
    change, words = lie(kind)
    change(file)
    ended = run("prune", *given)
    assert ended.code == 2 and words in ended.err, ended
    assert ended.fault == "" and half_written(tmp_path) == []


def test_a_rotary_embedding_that_transformers_would_forget_is_refused(make_gguf):
    _, file = make_gguf(rope_parameters=LLAMA3_ROPE)
    naive = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    assert naive.config.rope_parameters["rope_type"] == "default"  # control: forgotten in silence
    with pytest.raises(InputError, match=r"is scaled or of a part of the head \(rope_freqs.weight\)"):
        load_model(str(file), "auto", CPU)


PHI3 = {"self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "embed_tokens": "token_embd", "lm_head": "output", "norm": "output_norm"}  # fmt: skip


def write_gguf(file, config, architecture, tensors, parts=1, **entries):
    """Writes what llama.cpp's converter does for families that we do not export."""
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_uint16("split.count", parts)
    for name, value in entries.items():
        writer.add_uint32(f"{architecture}.{name.replace('__', '.')}", value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_part_of_a_file_is_told_from_a_whole_one(make_model, tmp_path):
    config = make_model("llama").config
    for name, parts in (("part", 2), ("whole", 1)):
        file = tmp_path / f"{name}.gguf"
        write_gguf(file, config, "llama", {"x": torch.ones(1)}, parts, attention__key_length=6)
    with pytest.raises(InputError, match="part.gguf: is one of 2 files of a model; join them with `llama-gguf-split"):
        load_config(str(tmp_path / "part.gguf"))
    assert load_config(str(tmp_path / "whole.gguf")).model_type == "llama"  # control


@pytest.mark.parametrize(("heads", "channels"), [([2, 0, 1], 52), (2, [52, 8, 16])])
def test_layers_that_differ_in_width_are_refused_by_what_they_are(heads, channels, make_model, tmp_path):
    values = vars(make_model("llama").config) | {"num_key_value_heads": heads, "intermediate_size": channels}
    write_gguf(tmp_path / "model.gguf", SimpleNamespace(**values), "deci", {"x": torch.ones(1)})
    with pytest.raises(InputError, match="model.gguf: its layers have widths of their own, which llama.cpp reads"):
        load_config(str(tmp_path / "model.gguf"))


def test_a_phi_3_has_its_window_and_a_rotary_embedding_of_a_part_is_refused(make_model, tmp_path):
    model = make_model("phi3", hidden_size=24, sliding_window=5, rope_theta=1e4, pad_token_id=0)
    tensors = {}
    for name, tensor in model.state_dict().items():
        *path, kind = name.removeprefix("model.").split(".")
        layer = f"blk.{path[1]}." if path[0] == "layers" else ""
        tensors[f"{layer}{PHI3['.'.join(path[2:] if layer else path)]}.{kind}"] = tensor
    file, entries = (
        tmp_path / "model.gguf",
        {"rope__scaling__original_context_length": 64, "attention__sliding_window": 5},
    )
    write_gguf(file, model.config, "phi3", tensors, rope__dimension_count=6, **entries)
    config = load_config(str(file))
    config.pad_token_id = 0
    read, _ = gguf_model(file, config, "")
    long = ids(model)[:, :1] + torch.arange(20).unsqueeze(0)
    torch.testing.assert_close(logits(read, long), logits(model, long), **CLOSE)
    read.config.sliding_window = None  # control: what transformers' reader makes of it
    assert (logits(read, long) - logits(model, long)).abs().max() > 0.01
    write_gguf(file, model.config, "phi3", tensors, rope__dimension_count=4, **entries)
    with pytest.raises(InputError, match=r"of a part of the head \(phi3.rope.dimension_count\)"):
        gguf_model(file, config, "")


@pytest.mark.parametrize(
    ("entries", "factor", "told"),
    [
        ({"rope__scaling__factor": 4}, 1.0, "llama.rope.scaling.factor"),
        ({}, 2.0, "rope_freqs.weight"),
        ({"rope__scaling__factor": 1, "rope__scaling__original_context_length": 64}, 1.0, None),
    ],
)
def test_a_rotary_embedding_is_scaled_by_an_entry_or_by_factors(entries, factor, told, tmp_path):
    tensors = {"x": torch.ones(5), "rope_freqs.weight": torch.full((3,), factor)}
    write_gguf(tmp_path / "model.gguf", Gemma2Config(), "llama", tensors, **entries)
    header = gguf_header(tmp_path / "model.gguf")
    assert (header.rotary, header.elements) == (told, 5)


def test_other_weights_of_a_folder_go_before_a_file(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert gguf_file(str(tmp_path), "") == file == gguf_file(str(file), "")
    for name in ("model-00001-of-00002.safetensors", "pytorch_model.bin"):
        (tmp_path / name).touch()
        assert gguf_file(str(tmp_path), "") is None and gguf_file(str(file), "") == file
        (tmp_path / name).unlink()


@pytest.mark.parametrize(("layers", "scalar"), [(42, 8), (46, 6)])  # the head's width; 24 hidden dims of 4 heads
def test_the_largest_gemma_2_scales_its_attention_by_its_hidden_width(layers, scalar, tmp_path):
    config = Gemma2Config(hidden_size=24, num_attention_heads=4, head_dim=8, num_hidden_layers=layers)
    write_gguf(tmp_path / "model.gguf", config, "gemma2", {"x": torch.ones(1)}, attention__key_length=8)
    assert load_config(str(tmp_path / "model.gguf")).query_pre_attn_scalar == scalar


@pytest.mark.parametrize(
    ("kinds", "dtype", "told"),
    [
        ((torch.float64,), torch.float64, "F64"),
        ((torch.float64, torch.float32), torch.float32, "F64"),
        ((torch.float32, torch.float16), torch.float16, "F16"),
        ((torch.float32, torch.int8), torch.bfloat16, "I8"),  # control: no float, as a quantised one
    ],
)
def test_numbers_of_double_precision_are_not_quantised(kinds, dtype, told, tmp_path):
    tensors = {str(kind): torch.ones(4, 4, dtype=kind) for kind in kinds}
    write_gguf(tmp_path / "model.gguf", Gemma2Config(), "gemma2", tensors)
    header = gguf_header(tmp_path / "model.gguf")
    assert (header.dtype, header.precision) == (dtype, told)


def test_tensors_that_transformers_would_leave_out_are_refused(make_gguf):
    _, file = make_gguf(attention_bias=True)
    AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)  # control: leaves the biases out in silence
    with pytest.raises(InputError, match="numbers, and a llama of its sizes has .* leaves out"):
        load_model(str(file), "auto", CPU)


def test_without_the_package_one_line_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else SimpleNamespace())
    with pytest.raises(InputError, match=r"needs gguf: pip install 'tvaprune\[gguf\]'"):
        load_config(str(tmp_path / "model.gguf"))
