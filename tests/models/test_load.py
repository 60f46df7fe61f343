"""A checkpoint is loaded whole, by us alone, or refused in one line."""

import copy
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.families import CLOSE, logits, sliced
from support.folders import edit_config, read_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.checkpoint.tokenizer import TOKENIZER_CONFIG, write_tokenizer
from tvaprune.errors import InputError
from tvaprune.models.load import load_config, load_model, precision
from tvaprune.models.shape import shape_of

CPU = torch.device("cpu")
UP = "model.layers.1.mlp.up_proj.weight"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def checkpoint(make_model, tmp_path):
    """Returns a function: what to do with the file's tensors, config entries -> the folder."""

    def make(edit=None, model_type="llama", config=None, **values):
        folder = tiny.save_checkpoint(make_model(model_type, **values), tmp_path / "model")
        if edit is not None:
            tensors = load_file(folder / "model.safetensors")
            edit(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if config is not None:
            edit_config(folder, **config)
        return folder

    return make


def load(folder):
    return load_model(str(folder), "auto", CPU)


def refused(folder, act=load):
    with pytest.raises(InputError) as caught:
        act(folder)
    line = str(caught.value)
    assert line.isprintable() and line.startswith(f"--model_name_or_path {folder}: ")
    return line


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in [*tensors] if any(part in name for part in names)]


def put(name, *sizes):
    return lambda tensors: tensors.update({name: torch.ones(*sizes)})


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_is_loaded_bit_for_bit_as_transformers_does(model_type, tied, checkpoint, input_ids, capsys):
    folder = checkpoint(model_type=model_type, tie_word_embeddings=tied)
    model, tokenizer = load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    assert stock.config._attn_implementation == model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, input_ids), logits(stock, input_ids))
    assert model.config.tie_word_embeddings is tied and not model.training
    assert tokenizer("the gate").input_ids == AutoTokenizer.from_pretrained(folder)("the gate").input_ids
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("edit", "config", "wanted"),
    [
        (drop("layers.1.mlp"), None, "3 of the model's tensors are missing, such as 'model.layers.1.mlp.down"),
        (drop("layers.2."), None, "9 of the model's tensors are missing, such as 'model.layers.2.input_layer"),
        (drop(HEAD), None, f"1 of the model's tensors are missing, such as '{HEAD}'"),
        (None, {"num_hidden_layers": 4}, "9 of the model's tensors are missing, such as 'model.layers.3.input_layer"),
        (None, {"num_hidden_layers": 2}, "9 of the file's are unknown to it, such as 'model.layers.2.input_layer"),
        (put("odd", 3), None, "1 of the file's are unknown to it, such as 'odd'"),
        (put(UP, 3, 36), None, f"'{UP}' is (3, 36) in the file and (52, 36) by config.json"),
        (None, {"intermediate_size": 10**8}, "is (36, 52) in the file and (36, 100000000) by config.json"),
    ],
    ids=["no MLP", "no layer", "no head", "deeper", "shallower", "more", "another size", "huge"],
)
def test_a_partial_load_is_refused(edit, config, wanted, checkpoint):
    assert wanted in refused(checkpoint(edit, config=config))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(value, checkpoint):
    def spoilt(tensors):
        tensors[UP][1, 2] = value

    assert f"{UP} holds NaN or infinity" in refused(checkpoint(spoilt))


@pytest.mark.parametrize(
    ("edit", "tied"),
    [
        (None, True),  # the file holds no head
        (lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}), True),
        (put("model.layers.0.self_attn.rotary_emb.inv_freq", 3), False),
    ],
    ids=["a tied head", "a tied head that is written twice", "old rotary tables"],
)
def test_what_a_model_computes_or_ties_may_be_missing_or_unknown(edit, tied, checkpoint, input_ids, make_model, capsys):
    model, _ = load(checkpoint(edit, tie_word_embeddings=tied))
    assert torch.equal(logits(model, input_ids), logits(make_model(tie_word_embeddings=tied), input_ids))
    assert model.config.tie_word_embeddings is tied
    assert capsys.readouterr().out == ""


def test_tied_means_what_shares_storage(checkpoint, make_model, full_plan, input_ids, tmp_path, capsys):
    """A config that says tied beside another head: keeping everything is the dense model, in memory and on disk."""
    folder = checkpoint(config={"tie_word_embeddings": True})
    expected = logits(make_model(), input_ids)
    model, tokenizer = load(folder)
    assert capsys.readouterr().out == (
        f"note: {folder}: config.json says tie_word_embeddings true, but the file's lm_head is not the embedding: "
        "taken as untied\n"
    )
    assert not shape_of(model.config).tie_word_embeddings
    assert torch.equal(logits(model, input_ids), expected)
    plan = full_plan(model)
    cut = sliced(model, plan)
    torch.testing.assert_close(logits(cut, input_ids), expected, **CLOSE)
    saved = save_pruned(cut, plan, tokenizer, tmp_path / "pruned")
    assert read_config(saved)["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(load_pruned(saved), input_ids), expected, **CLOSE)
    believed = copy.deepcopy(model)  # control: what the config alone would have given
    believed.config.tie_word_embeddings = True
    plan = full_plan(believed)
    headless = save_pruned(sliced(believed, plan), plan, tokenizer, tmp_path / "believed")
    assert (logits(load_pruned(headless), input_ids) - expected).abs().max() > 0.1


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantised_weights_are_refused_by_the_file_that_says_so(name, checkpoint):
    folder = checkpoint(drop(UP))
    assert "are missing" in refused(folder)  # control: without it the tensors tell
    (folder / name).write_text("{}")
    assert f"holds a {name}, its weights are quantised" in refused(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_quantised_weights_are_refused_by_the_config(key, checkpoint):
    folder = checkpoint(config={key: {"quant_method": "gptq", "bits": 4}})
    assert f"its weights are quantised ({key} in config.json, 'gptq')" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_numbers_that_are_no_weights_are_refused(dtype, checkpoint):
    folder = checkpoint(lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    assert f"'{UP}' holds " in refused(folder)


def test_an_adapter_beside_the_weights_is_refused(checkpoint):
    folder = checkpoint()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere"}))
    assert "holds an adapter_config.json, which would change the weights" in refused(folder)


def test_git_lfs_pointers_are_named(checkpoint):
    folder = checkpoint()
    load(folder)  # control
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
        assert f"{name} is a git-lfs pointer, not the file; run `git lfs pull`" in refused(folder)
        (folder / name).write_bytes(whole)


def test_weights_that_are_not_read_may_be_pointers(checkpoint):
    folder = checkpoint()
    for name in ("pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 12\n")
    load(folder)
    (folder / "model.safetensors").unlink()  # control: now they would be
    assert "consolidated.safetensors is a git-lfs pointer" in refused(folder)


def test_tokens_beyond_the_embedding_are_refused(checkpoint):
    folder = checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more {i}" for i in range(47 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    load(folder)  # control: 47 tokens, as many as embeddings
    tokenizer.add_tokens(["one too\nmany"])
    tokenizer.save_pretrained(folder)
    assert r"which has 47 tokens ('one too\nmany' is token 47)" in refused(folder)


def test_a_place_for_images_behind_the_embedding_is_left_out_of_the_tokenizer(checkpoint, tmp_path, capsys):
    folder = checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"more {i}" for i in range(47 - len(tokenizer))])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    tokenizer.chat_template, tokenizer.model_max_length = "a template", 99
    tokenizer.save_pretrained(folder)
    settings = folder / TOKENIZER_CONFIG  # where every Gemma 3 names it by its use, and in no list
    told = tiny.read_json(settings) | {"image_token": "<image_soft_token>"}
    told.pop("extra_special_tokens")
    settings.write_text(json.dumps(told))
    _, loaded = load(folder)
    assert "'<image_soft_token>'" in capsys.readouterr().out
    write_tokenizer(loaded, tmp_path)
    for found in (loaded, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(found) == 47 and "<image_soft_token>" not in found.get_vocab()
        assert (found.eos_token, found.unk_token, found.chat_template) == ("</s>", "<unk>", "a template")
        assert found.model_max_length == 99
        assert found("the gate</s>")["input_ids"] == tokenizer("the gate</s>")["input_ids"]
    tokenizer.add_special_tokens({"pad_token": "<pad>"})  # which a batch is filled with
    tokenizer.save_pretrained(folder)
    assert "the tokenizer is not the model's" in refused(folder)


@pytest.mark.parametrize("path", ["./mistyped", "/no/such/folder", "a/b/c", "some/file.gguf"])
def test_a_path_that_leads_nowhere_is_told_as_one_and_not_asked_of_the_hub(path):
    line = refused(path, load_config)
    assert "is not there, nor a hub id; give a " in line and ("GGUF" in line) == path.endswith(".gguf")
    assert "is not there" not in refused("somebody/model", load_config)  # control: the hub may have it


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_checkpoint_is_told_from_its_folder(name, checkpoint):
    folder = checkpoint()
    assert "is a file; give the folder that it is in" in refused(str(folder / name), load_config)
    load_config(str(folder))  # control


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"model": {"type": "Unheard"}}', '{"version": "9.0"}',
                                     '{"model_max_length": "many"}'])  # fmt: skip
def test_a_tokenizer_that_cannot_be_read_or_used_is_one_line(content, checkpoint):
    folder = checkpoint()
    (folder / (TOKENIZER_CONFIG if "length" in content else "tokenizer.json")).write_text(content)
    assert "its tokenizer: cannot be loaded" in refused(folder)


def test_a_tokenizer_model_without_sentencepiece_says_what_reads_it(checkpoint, monkeypatch):
    folder = checkpoint()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert "pip install sentencepiece" in refused(folder)


def test_a_slow_tokenizer_is_read(checkpoint):
    """One without ``backend_tokenizer``: ByT5 is bytes and needs no file."""
    folder = checkpoint(vocab_size=400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    _, tokenizer = load(folder)
    assert not hasattr(tokenizer, "backend_tokenizer") and tokenizer("a", add_special_tokens=False).input_ids == [100]


@pytest.mark.parametrize("value", [0, -1, "12", 4.5, None, [3], math.nan, True, 10**12], ids=str)
@pytest.mark.parametrize(
    "key",
    ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
     "vocab_size", "head_dim", "max_position_embeddings", "layer_types", "rope_parameters", "hidden_act", "dtype"],
)  # fmt: skip
def test_a_broken_config_is_one_line_or_harmless(key, value, checkpoint, make_model, input_ids):
    folder = checkpoint(config={key: value})
    try:
        model, _ = load(folder)
    except InputError as error:
        assert str(error).isprintable()
    else:  # what a null or an unused entry leaves at its default is the model
        assert torch.equal(logits(model, input_ids), logits(make_model(), input_ids))


def test_a_size_that_is_none_is_named(checkpoint):
    line = refused(checkpoint(config={"num_attention_heads": 0}), lambda folder: load_config(str(folder)))
    assert "num_attention_heads in config.json is 0: a whole number from 1 to" in line


@pytest.mark.parametrize("text", ["", "[]", "{", "null", '{"model_type": 3}', '{"model_type": ["llama"]}', "[" * 99999])
def test_a_config_that_is_no_config_is_one_line(text, checkpoint):
    folder = checkpoint()
    (folder / "config.json").write_text(text)
    refused(folder, lambda folder: load_config(str(folder)))


def shard(folder, names=("one.safetensors", "two.safetensors")):
    """Cuts the weights into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: names[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in names:
        (folder / file).parent.mkdir(exist_ok=True)
        save_file({name: tensors[name] for name in where if where[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards_are_read_and_only_from_their_folder(checkpoint, make_model, input_ids):
    folder = checkpoint()
    shard(folder)
    model, _ = load(folder)
    assert torch.equal(logits(model, input_ids), logits(make_model(), input_ids))
    (folder / "two.safetensors").unlink()
    assert "'two.safetensors' of model.safetensors.index.json is missing" in refused(folder)


@pytest.mark.parametrize("outside", ["../two.safetensors", "inner/../../two.safetensors", "/ABSOLUTE/two.safetensors"])
def test_an_index_that_leads_out_of_the_folder_is_refused(outside, checkpoint, tmp_path):
    folder = checkpoint()
    outside = outside.replace("/ABSOLUTE", str(tmp_path))
    (folder / "inner").mkdir()
    shard(folder, ("one.safetensors", outside))
    assert "which is no file of this folder" in refused(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # control: transformers would have read it


def test_a_link_out_of_the_folder_is_refused(checkpoint, tmp_path):
    folder = checkpoint()
    (tmp_path / "secret").write_text("of mine")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert "chat_template.jinja is a link out of the folder" in refused(folder)
    assert AutoTokenizer.from_pretrained(folder).chat_template == "of mine"  # control: it would have been passed on
    (folder / "chat_template.jinja").unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").symlink_to(tmp_path / "secret")
    assert "tool.jinja is a link out of the folder" in refused(folder)


def test_links_of_the_hubs_cache_and_to_weights_are_followed(checkpoint, tmp_path, make_model, input_ids):
    folder, snapshot = checkpoint(), tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert torch.equal(logits(load(snapshot)[0], input_ids), logits(make_model(), input_ids))
    weights = tmp_path / "weights.safetensors"
    (snapshot / "model.safetensors").resolve().rename(weights)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(weights)
    assert torch.equal(logits(load(snapshot)[0], input_ids), logits(make_model(), input_ids))


CUDA, HALF = torch.device("cuda"), torch.float16


def test_what_is_trained_is_not_in_float16_unless_asked(monkeypatch):
    """Without scaling the loss, float16 loses a third of a 7B model's gradients of the gates; bfloat16 loses none."""
    cases = ((True, True, torch.bfloat16), (True, False, torch.float32), (False, False, torch.bfloat16))
    for is_there, has, expected in cases:  # without a GPU the card of an estimate is taken to have it
        monkeypatch.setattr("torch.cuda.is_available", lambda is_there=is_there: is_there)
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, has=has: has)
        assert precision("auto", CUDA, HALF, trains=True) == expected
        assert precision("auto", CUDA, torch.bfloat16, trains=True) == torch.bfloat16
        assert precision("auto", CUDA, HALF) == HALF  # applying
        assert precision("float16", CUDA, HALF, trains=True) == HALF  # the user's
    assert precision("auto", CPU, HALF, trains=True) == precision("auto", CUDA, None) == torch.float32
    assert precision("bfloat16", CPU, HALF) == torch.bfloat16
