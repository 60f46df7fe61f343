"""What is refused of a folder before anything is loaded, and what a saved file loses."""

import json
import math
import re

import pytest
from support import tiny

from tvaprune.models.vetting import check_config, check_folder, drop_code

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
