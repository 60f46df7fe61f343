"""``docs/models.md`` says what is so: its table, its commands, its code."""

import re
import shlex

import pytest
import torch
from support.model_table import CHECKPOINTS, table
from support.tiny import ROOT, save_checkpoint
from transformers import AutoConfig, AutoModelForImageTextToText, Gemma3Config

from tvaprune.flags.arguments import Arguments
from tvaprune.flags.verbs import MODES, check_flags
from tvaprune.models.families import FAMILIES
from tvaprune.models.load import load_model

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^tvaprune .*$", PAGE, flags=re.MULTILINE)


def test_the_table_is_that_of_the_rows():
    written = [line for line in PAGE.split("\nThe table is made")[0].splitlines() if line.startswith("|")]
    # Sorted: a test that takes a family away and puts it back leaves it last.
    assert sorted(written) == sorted(table()), "run: PYTHONPATH=tests python tests/support/model_table.py"
    assert set(CHECKPOINTS) == set(FAMILIES)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_names_flags_that_there_are(line):
    _, verb, *flags = shlex.split(line)
    check_flags(verb, flags, MODES)
    assert Arguments.parse(flags, verb).source.model_name_or_path in CHECKPOINTS.values()


def test_there_is_a_command_for_each_family():
    assert len(COMMANDS) == len(FAMILIES)


PATHS = sorted(set(re.findall(r"\b(?:(?:tests|script|tvaprune)/[\w/.]*\w|test_\w+\.py)", PAGE)))


@pytest.mark.parametrize("path", PATHS)
def test_the_files_that_the_page_names_are_there(path):
    assert (ROOT / path).exists() or (ROOT / "tests" / "models" / path).is_file()


def test_every_way_to_name_a_file_is_found():
    assert {"tests/checkpoint", "tests/models/test_each_family.py", "test_rotate.py", "script/tva_prune.sh"} <= {*PATHS}


def test_the_text_part_of_a_multimodal_model_is_saved_by_the_page_s_code(make_model, tmp_path, input_ids):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    text = make_model("gemma3_text", tie_word_embeddings=True).config
    vision = AutoConfig.for_model(
        "siglip_vision_model", hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=46,
                          boi_token_index=44, eoi_token_index=45)  # fmt: skip
    full = AutoModelForImageTextToText.from_config(config).eval()
    save_checkpoint(full, tmp_path / "full")
    exec(code, {"SOURCE": tmp_path / "full", "TARGET": tmp_path / "text"})
    model, _ = load_model(str(tmp_path / "text"), "auto", torch.device("cpu"))
    with torch.no_grad():
        expected = full(input_ids=input_ids % 40).logits
        torch.testing.assert_close(model(input_ids=input_ids % 40).logits, expected)
    assert model.config.model_type == "gemma3_text"
