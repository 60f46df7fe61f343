"""The pruned checkpoint: in memory = saved and reloaded, in every tool that opens it."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.families import CLOSE, MORE_ROWS, ROWS, logits, sliced
from support.folders import (
    LLAMA3_ROPE,
    edit_config,
    no_heads_in_layer_0,
    read_config,
    tokenizer,
    uneven,
    uniform,
    with_more_tokens,
    with_units,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, Qwen3MoeConfig

from tvaprune.checkpoint import folder as checkpoint
from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.checkpoint.tokenizer import write_tokenizer
from tvaprune.errors import InputError
from tvaprune.files import read_json
from tvaprune.models.auto_classes import auto_map
from tvaprune.models.families import FAMILIES
from tvaprune.models.modeling_pruned import WIDTHS, layer_config
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.widths import WidthRules

DOWN = ("down_proj", "down_proj.weight")
GQA = {"num_attention_heads": 6, "num_key_value_heads": 3}


def nothing_in_layer_1(plan):
    return with_units(with_units(plan, "attn", 1, 0), "inter", 1, 0)


CASES = (uneven, no_heads_in_layer_0, nothing_in_layer_1, uniform)


@pytest.mark.parametrize(
    ("row", "case"),
    [(row, case) for rows, cases in ((ROWS, CASES), (MORE_ROWS, (nothing_in_layer_1, uniform)))
     for row in rows for case in cases],
)  # fmt: skip
def test_a_saved_and_reloaded_model_is_the_sliced_one(row, case, make_pruned, input_ids, tmp_path):
    narrow, plan = make_pruned(row, case)
    expected, before = logits(narrow, input_ids), copy.deepcopy(narrow.state_dict())
    save_pruned(narrow, plan, None, tmp_path / "pruned")
    loaded = load_pruned(tmp_path / "pruned")
    # One matrix of an expert begins anywhere in memory, and a CPU's kernels round by where it does.
    rounding = {"atol": 1e-6 * any(plan.shape.experts), "rtol": 0.0}
    torch.testing.assert_close(logits(loaded, input_ids), expected, **rounding)
    for state in (narrow.state_dict(), loaded.state_dict()):  # saving changes nothing, loading gives the same
        assert state.keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in state.items())
    shape = shape_of(loaded.config)
    assert shape.num_key_value_heads == tuple(count or 1 for count in plan.num_key_value_heads)
    assert shape.intermediate_size == tuple(
        0 if experts else count or 32 for count, experts in zip(plan.intermediate_size, plan.shape.experts, strict=True)
    )
    if plan.shape.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    (down,) = (value for name, value in loaded.model.layers[0].mlp.named_parameters() if name.endswith(DOWN))
    down.data[..., 0, 0] += 1.0  # control: the comparison sees one weight
    assert not torch.equal(logits(loaded, input_ids), expected)


def test_every_family_has_classes_of_its_own():
    assert set(auto_map("llama")) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for model_type in FAMILIES:
        config = AutoConfig.for_model(f"pruned_{model_type}")
        assert type(config).__name__ == auto_map(model_type)["AutoConfig"].split(".")[1]


def test_the_folder_is_a_hugging_face_folder(uneven_folder):
    files = {path.name for path in uneven_folder.iterdir()}
    assert files == {
        ".tvaprune.json",
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_pruned.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in uneven_folder.parent.iterdir()] == ["pruned"]  # nothing temporary stays
    config = read_config(uneven_folder)
    assert config["auto_map"] == {
        "AutoConfig": "modeling_pruned.PrunedMistralConfig",
        "AutoModel": "modeling_pruned.PrunedMistralModel",
        "AutoModelForCausalLM": "modeling_pruned.PrunedMistralForCausalLM",
    }
    assert config["model_type"] == "pruned_mistral"
    assert config["architectures"] == ["PrunedMistralForCausalLM"]
    assert {key for row in config["per_layer_config"].values() for key in row} <= set(WIDTHS)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["rope_scaling"] is None
    assert (config["head_dim"], config["sliding_window"], config["tie_word_embeddings"]) == (6, 4, False)


def test_the_widths_are_read_without_transformers_5(uneven_folder):
    """transformers 4 hands ``per_layer_config`` over as the plain dictionary of the file."""
    loaded = load_pruned(uneven_folder)

    class Plain:
        def __init__(self, values):
            self.__dict__ |= values

    plain = Plain(read_config(uneven_folder))
    for index, layer in enumerate(loaded.model.layers):
        assert layer_config(plain, index).intermediate_size == layer.mlp.up_proj.out_features
        assert layer_config(plain, index).num_key_value_heads * 6 == layer.self_attn.k_proj.out_features
    assert plain.intermediate_size == max(layer.mlp.up_proj.out_features for layer in loaded.model.layers)


@pytest.mark.parametrize(
    ("row", "values", "stock"),
    [
        ("llama GQA", {}, "MistralForCausalLM"),  # whatever hidden width is left, no multiple of 2 heads for sure
        ("llama GQA", {"hidden_size": 12}, "LlamaForCausalLM"),
        ("llama tied, with biases", {}, "PrunedLlamaForCausalLM"),
        ("mistral GQA, window shorter than the input", {}, "MistralForCausalLM"),
        ("qwen2 tied", {}, "Qwen2ForCausalLM"),
        ("qwen3 untied", {}, "Qwen3ForCausalLM"),
    ],
)
def test_equal_widths_give_a_stock_checkpoint(row, values, stock, make_pruned, input_ids, tmp_path):
    narrow, plan = make_pruned(row, uniform)
    width = plan.hidden_size // 2 * 2 - (not values)  # odd, but where the row asks for even
    narrow_plan = replace(
        plan,
        kept=replace(plan.kept, hidden=plan.kept.hidden[:width]),
        scale=replace(plan.scale, hidden=plan.scale.hidden[:width]),
    )
    narrow, _ = make_pruned(row, lambda _: narrow_plan)
    save_pruned(narrow, narrow_plan, None, tmp_path / "pruned")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    assert type(loaded).__name__ == stock
    assert (tmp_path / "pruned" / "modeling_pruned.py").exists() == stock.startswith("Pruned")
    config = read_config(tmp_path / "pruned")
    assert "per_layer_config" not in config and config["rope_theta"] == narrow.config.rope_parameters["rope_theta"]
    assert torch.equal(logits(loaded, input_ids), logits(narrow, input_ids))
    if row == "llama GQA":
        assert read_config(tmp_path / "pruned").get("sliding_window") is None


def test_saving_leaves_the_model_and_its_precision_as_they_are(make_pruned, tmp_path):
    """A CPU computes in float32 what is saved in bfloat16: the second time too."""
    narrow, plan = make_pruned("qwen2 tied", no_heads_in_layer_0)

    def saved(name):
        save_pruned(narrow, plan, None, tmp_path / name)
        return {tensor.dtype for tensor in load_file(tmp_path / name / "model.safetensors").values()}

    narrow.config.dtype = torch.bfloat16
    assert saved("first") == saved("second") == {torch.bfloat16}
    assert narrow.dtype == torch.float32 and narrow.config.dtype == torch.bfloat16
    narrow.config.dtype = torch.float32  # control
    assert saved("third") == {torch.float32}
    narrow.to(torch.bfloat16)
    assert saved("fourth") == {torch.bfloat16}


def test_what_readers_have_other_defaults_for_is_written_out(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    checkpoint._complete_config(tmp_path / "config.json", Qwen3MoeConfig(head_dim=8))
    assert {"head_dim", "tie_word_embeddings", "sliding_window", "num_experts"} <= read_config(tmp_path).keys()


def test_scaled_rotary_settings_survive(make_pruned, input_ids, tmp_path):
    narrow, plan = make_pruned("llama GQA", uneven, rope_parameters=LLAMA3_ROPE)
    save_pruned(narrow, plan, None, tmp_path / "pruned")
    config = read_config(tmp_path / "pruned")
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    expected = logits(narrow, input_ids)
    assert torch.equal(logits(load_pruned(tmp_path / "pruned"), input_ids), expected)
    edit_config(tmp_path / "pruned", rope_scaling=None, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert not torch.allclose(logits(load_pruned(tmp_path / "pruned"), input_ids), expected, atol=1e-3)


@pytest.mark.parametrize("row", ["llama MHA", "mistral GQA, window shorter than the input", "qwen2 tied", "qwen3 tied"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 3.0],
         "original_max_position_embeddings": 8},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_every_scaled_rotary_embedding_is_saved_loaded_and_cut_again(row, rope, make_pruned, input_ids, tmp_path):
    """Texts shorter and longer than the model's longest, where frequencies that follow the length are computed anew."""
    narrow, plan = make_pruned(row, uneven, rope_parameters=rope | {"rope_theta": 5000.0}, max_position_embeddings=16)
    loaded = load_pruned(save_pruned(narrow, plan, None, tmp_path / "pruned"))
    assert "allow_global_per_layer_attribute_access" not in read_config(tmp_path / "pruned")
    for ids in (input_ids, input_ids.repeat(1, 3)):
        assert torch.equal(logits(loaded, ids), logits(narrow, ids))
    shape = shape_of(loaded.config)
    ones = PerUnit.full(shape, 1.0)
    same = KeepPlan(ones.map(lambda units: torch.arange(len(units))), ones, shape, 1)
    other = copy.deepcopy(loaded.config)
    other.rope_parameters = {"rope_type": "default", "rope_theta": 5000.0}
    with torch.no_grad():  # control: without the scaling the model is another
        plain = AutoModelForCausalLM.from_config(other)
        plain.load_state_dict(loaded.state_dict())
    assert (logits(plain.eval(), input_ids.repeat(1, 3)) - logits(loaded, input_ids.repeat(1, 3))).abs().max() > 1e-3
    again = sliced(loaded, same)
    torch.testing.assert_close(logits(again, input_ids.repeat(1, 3)), logits(narrow, input_ids.repeat(1, 3)), **CLOSE)


LOCAL = {"rope_type": "default", "rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("row", "rope"),
    [
        ("gemma3_text tied", {"full_attention": LOCAL | {"rope_type": "linear", "factor": 8.0},
                              "sliding_attention": LOCAL}),
        ("olmo3", {"full_attention": YARN, "sliding_attention": LOCAL}),
        ("hunyuan_v1_dense", {"rope_type": "dynamic", "rope_theta": 5000.0, "alpha": 50.0, "factor": 1.0}),
        ("glm4", {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.7}),
        ("granite, tied", YARN),
        ("smollm3, layers without rope, tied", {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}),
        ("cwm", LLAMA3_ROPE),
        ("exaone4", LLAMA3_ROPE),
    ],
)  # fmt: skip
def test_a_familys_own_rotary_settings_are_saved_and_reloaded(row, rope, make_pruned, input_ids, tmp_path):
    narrow, plan = make_pruned(row, uneven, rope_parameters=copy.deepcopy(rope), max_position_embeddings=16)
    loaded = load_pruned(save_pruned(narrow, plan, None, tmp_path / "pruned"))
    long = input_ids.repeat(1, 3)
    for ids in (input_ids, long):
        assert torch.equal(logits(loaded, ids), logits(narrow, ids))
    plain, _ = make_pruned(row, uneven, rope_parameters=_without_scaling(rope), max_position_embeddings=16)
    assert (logits(plain, long) - logits(narrow, long)).abs().max() > 1e-3  # control


def _without_scaling(rope):
    kinds = [key for key in rope if key.endswith("attention")]
    return {key: LOCAL for key in kinds} if kinds else LOCAL


def test_an_existing_folder_is_replaced_only_if_all_in_it_is_ours_and_the_flag_says_so(uneven_folder, make_pruned):
    narrow, plan = make_pruned("llama MHA")
    with pytest.raises(InputError, match="--save_pruned .*: is not empty; replace it with --overwrite_output_dir"):
        save_pruned(narrow, plan, None, uneven_folder)
    assert read_config(uneven_folder)["model_type"] == "pruned_mistral"
    save_pruned(narrow, plan, None, uneven_folder, overwrite=True)
    assert read_config(uneven_folder)["model_type"] == "pruned_llama"
    assert not (uneven_folder / "tokenizer.json").exists()
    (uneven_folder / "checkpoint-500").mkdir()
    (uneven_folder / "checkpoint-500" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds checkpoint-500/notes.txt, which this tool did not write .*; move it"):
        save_pruned(narrow, plan, None, uneven_folder, overwrite=True)
    (uneven_folder / "checkpoint-500" / "notes.txt").unlink()
    (uneven_folder / ".tvaprune.json").unlink()
    with pytest.raises(InputError, match="holds README.md, which this tool did not write"):
        save_pruned(narrow, plan, None, uneven_folder, overwrite=True)
    with pytest.raises(InputError, match="is a file; give a folder"):
        save_pruned(narrow, plan, None, uneven_folder / "README.md")


def test_a_full_disk_leaves_nothing_behind_and_the_older_checkpoint_in_place(uneven_folder, make_pruned, monkeypatch):
    narrow, plan = make_pruned("llama MHA")

    def full(path, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_complete_config", full)  # the weights are written by then
    for name, overwrite in (("pruned", True), ("other", False)):
        with pytest.raises(InputError, match="cannot be written .*No space left on device.*; nothing was left there"):
            save_pruned(narrow, plan, None, uneven_folder.with_name(name), overwrite)
    assert [path.name for path in uneven_folder.parent.iterdir()] == ["pruned"]
    assert read_config(uneven_folder)["model_type"] == "pruned_mistral"


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def widen(folder):
    edit_config(folder, hidden_size=read_config(folder)["hidden_size"] + 1)


def change_layer(folder):
    layers = read_config(folder)["per_layer_config"]
    edit_config(folder, per_layer_config=layers | {"0": layers.get("0", {}) | {"intermediate_size": 3}})


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"not a pruned checkpoint \(no config.json\)"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: edit_config(folder, model_type="gpt2"), r"not a pruned checkpoint \(its type is 'gpt2'\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"pruned: cannot be loaded \(.*model.safetensors"),
        (cut, "model.safetensors is no whole safetensors file"),
        (drop_tensor, "1 of the model's tensors are missing, such as 'model.layers.1.mlp.up_proj.weight'"),
        (widen, r"is \(\d+, \d+\) in the file and \(\d+, \d+\) by config.json"),
        (change_layer, r"'model.layers.0.mlp.* in the file and"),
        (lambda folder: edit_config(folder, num_hidden_layers=-1), "config.json"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(breaks, message, uneven_folder):
    load_pruned(uneven_folder)
    breaks(uneven_folder)
    with tiny.refused(message):
        load_pruned(uneven_folder)


def test_lora_ft_vib_saves_the_pruned_model(make_model, make_masks, input_ids, tmp_path, monkeypatch, capsys):
    from tvaprune.flags.arguments import Arguments
    from tvaprune.plan.keep_plan import plan_from_masks
    from tvaprune.plan.masks import save_masks
    from tvaprune.stages import apply as stages

    model = make_model("mistral", **GQA)
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    masks = make_masks(shape_of(model.config))
    save_masks(masks, tmp_path / "mask_info_1.pkl")
    flags = ["--model_name_or_path", "dense", "--mask_loc", "mask_info_1.pkl", "--save_pruned", "pruned", "--use_cpu"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="cannot load allenai/c4 .*; --weight_update fold needs no text"):
        stages.run_apply(Arguments.parse(flags, "apply"))
    flags += ["--weight_update", "fold"]
    stages.run_apply(Arguments.parse(flags, "apply"))
    assert "checkpoint: pruned" in capsys.readouterr().out
    expected = sliced(model, plan_from_masks(masks, shape_of(model.config), WidthRules(8)))
    assert torch.equal(logits(load_pruned("pruned"), input_ids), logits(expected, input_ids))
    assert "- mask: mask_info_1.pkl" in (tmp_path / "pruned" / "README.md").read_text()
    with pytest.raises(InputError, match="--save_pruned pruned: is not empty"):
        stages.run_apply(Arguments.parse(flags, "apply"))


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llamas_tokenizer_goes_on_splitting_as_it_did_behind_a_special_token(legacy, tmp_path):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    source = LlamaTokenizer(vocab=vocab, merges=[("▁", "a")], legacy=legacy)
    write_tokenizer(source, tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    ids = [tokens("</s>a", add_special_tokens=False)["input_ids"] for tokens in (source, found)]
    assert ids == [[2, 5] if legacy else [2, 4]] * 2


def test_a_tokenizer_is_written_in_words_that_transformers_4_knows(tmp_path):
    words = with_more_tokens()
    words.save_pretrained(tmp_path / "as_it_is")
    write_tokenizer(words, tmp_path)
    plain, ours = (read_json(folder / "tokenizer_config.json") for folder in (tmp_path / "as_it_is", tmp_path))
    assert plain["tokenizer_class"] == "TokenizersBackend" and plain["extra_special_tokens"] == ["w3"]  # control
    assert ours["tokenizer_class"] == "PreTrainedTokenizerFast" and ours["additional_special_tokens"] == ["w3"]
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("w5 w3 w46")["input_ids"] == words("w5 w3 w46")["input_ids"]
    assert again.special_tokens_map == words.special_tokens_map and again.all_special_ids == words.all_special_ids
