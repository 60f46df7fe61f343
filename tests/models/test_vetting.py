"""What is refused of a folder before anything is loaded, and what a saved file loses."""

import json
import math
import re

import pytest
import torch
from support import tiny

from tvaprune.errors import InputError
from tvaprune.models.load import load_config, load_whole
from tvaprune.models.vetting import INDEX, WEIGHTS, check_config, check_folder, drop_code, shards

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "max_position_embeddings", "sliding_window")  # fmt: skip
OF_EXPERTS = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step")


@pytest.mark.parametrize(
    ("model_type", "key"),
    [*(("llama", key) for key in SIZES), *(("mixtral", key) for key in OF_EXPERTS)],
)
def test_what_is_no_size_is_refused_by_its_name(model_type, key):
    for value in (0, -1, True, 2.0, "12", [3], 10**9):
        with tiny.refused(re.escape(f"x: {key} in config.json is {json.dumps(value)}: a whole number from 1 to ")):
            check_config({"model_type": model_type, key: value}, "x")
    check_config({"model_type": model_type, key: 1}, "x")  # control


def test_masks_number_layers_by_four_digits():
    check_config({"model_type": "llama", "num_hidden_layers": 9999}, "x")
    with tiny.refused("x: num_hidden_layers in config.json is 10000: a whole number from 1 to 9999 is needed"):
        check_config({"model_type": "llama", "num_hidden_layers": 10000}, "x")


def test_each_file_that_quantisers_leave_is_known(tmp_path):
    for name in ("quantize_config.json", "quant_config.json", "quant_strategy.json", "hf_quant_config.json"):
        (tmp_path / name).write_text("{}")
        with tiny.refused(f"x: holds a {name}, its weights are quantised"):
            check_folder(tmp_path, "x")
        (tmp_path / name).unlink()


def test_every_file_that_is_passed_on_is_one_of_the_folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text("of mine")
    for name in ("tokenizer.model", "merges.txt", "vocab.json", "chat_template.jinja"):
        (folder / name).write_text("{}")
        check_folder(folder, "x")  # control
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "secret")
        with tiny.refused(f"x: {name} is a link out of the folder: put a copy of the file there"):
            check_folder(folder, "x")
        (folder / name).unlink()


def test_a_file_loses_code_and_what_is_no_json(tmp_path):
    file = tmp_path / "generation_config.json"
    drop_code(file)  # it need not be there
    for lost, left in (({"auto_map": {}}, {}), ({"custom_pipelines": {}}, {}), ({"top_p": math.nan}, {"top_p": None})):
        file.write_text(json.dumps({"max_length": 20} | lost))
        drop_code(file)
        assert tiny.read_json(file) == {"max_length": 20} | left
    file.write_text('{"max_length":20}')
    drop_code(file)
    assert file.read_text() == '{"max_length":20}'  # as it was


def test_an_index_without_a_file_is_told(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {}}))
    with tiny.refused(f"DIR: {INDEX} names no file; give the checkpoint as it was published"):
        shards(tmp_path, "DIR")
    (tmp_path / WEIGHTS).touch()  # control: one file goes before an index
    assert shards(tmp_path, "DIR") == [tmp_path / WEIGHTS]


def test_parts_without_their_index_are_told(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    with tiny.refused(f"DIR: holds model-00001-of-00002.safetensors, but no {INDEX}, which says what lies in which"):
        shards(tmp_path, "DIR")
    (tmp_path / "pytorch_model.bin").touch()  # controls
    assert shards(tmp_path, "DIR") == []
    (tmp_path / WEIGHTS).touch()
    assert shards(tmp_path, "DIR") == [tmp_path / WEIGHTS]


def test_a_generation_config_that_transformers_refuses_is_named(make_model, tmp_path):
    folder = tiny.save_checkpoint(make_model(), tmp_path / "model")
    told = folder / "generation_config.json"
    for text in ("{", '{"temperature": 0.6, "do_sample": false}'):  # controls: not read, and read with a warning
        told.write_text(text)
        load_whole(folder, load_config(str(folder)), "DIR", dtype=torch.float32)
    told.write_text('{"max_new_tokens": -3}')
    with pytest.raises(InputError, match="DIR: generation_config.json cannot be used .*is -3.*; mend it, or move it"):
        load_whole(folder, load_config(str(folder)), "DIR", dtype=torch.float32)
