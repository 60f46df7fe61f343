import json

import pytest

from tvaprune.errors import InputError
from tvaprune.flags.settings import PruneSettings
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import save_masks
from tvaprune.plan.widths import WidthRules
from tvaprune.stages.describe import describe, main


@pytest.fixture
def mask_and_config(make_model, make_masks, tmp_path):
    config = make_model("llama").config
    config.save_pretrained(tmp_path / "model")  # config.json alone, no weights
    masks = make_masks(shape_of(config))
    save_masks(masks, tmp_path / "mask_info_1.5.pkl")
    return tmp_path / "mask_info_1.5.pkl", tmp_path / "model", plan_from_masks(masks, shape_of(config), WidthRules(8))


def test_the_description_is_the_plan(mask_and_config):
    mask, model, plan = mask_and_config
    content = describe(mask, str(model), PruneSettings(dim_multiple=8))
    assert content.adjusted.hidden_size == plan.hidden_size
    assert content.adjusted.num_key_value_heads == list(plan.num_key_value_heads)
    assert content.adjusted.num_parameters == plan.num_parameters
    assert content.learned.dim_multiple == 1


def test_a_multiple_that_no_width_reaches_is_refused(mask_and_config):
    mask, model, _ = mask_and_config
    with pytest.raises(InputError, match="--dim_multiple 53: no width of the model is as large, the widest is 52"):
        describe(mask, str(model), PruneSettings(dim_multiple=53))
    assert describe(mask, str(model), PruneSettings(dim_multiple=52)).adjusted.intermediate_size == [52] * 3


def test_zero_switches_the_adjustment_off(mask_and_config):
    mask, model, _ = mask_and_config
    content = describe(mask, str(model), PruneSettings(dim_multiple=0))
    assert content.adjusted == content.learned


def test_json_and_table_say_the_same(mask_and_config, monkeypatch, capsys):
    mask, model, plan = mask_and_config
    flags = ["describe", str(mask), "--model_name_or_path", str(model), "--dim_multiple", "8"]
    monkeypatch.setattr("sys.argv", [*flags, "--json"])
    main()
    assert json.loads(capsys.readouterr().out)["adjusted"]["decoder_sparsity"] == plan.sparsity
    monkeypatch.setattr("sys.argv", flags)
    main()
    table = capsys.readouterr().out
    assert f"{plan.num_parameters:,}" in table and f"{plan.sparsity:.4f}" in table
    assert len(table.splitlines()) == 5 + 2 + 3  # totals, a blank line with a heading, three layers


def test_a_folder_without_config_is_refused(mask_and_config, tmp_path):
    with pytest.raises(InputError, match="nowhere: is not there, nor a hub id"):
        describe(mask_and_config[0], str(tmp_path / "nowhere"), PruneSettings())


def test_a_plan_is_described_as_it_is(mask_and_config, tmp_path):
    mask, model, plan = mask_and_config
    plan.save(tmp_path / "plan.json")
    content = describe(tmp_path / "plan.json", str(model), PruneSettings())
    assert content.adjusted == content.learned == describe(mask, str(model), PruneSettings(dim_multiple=8)).adjusted
    with pytest.raises(InputError, match="--dim_multiple: acts on a mask"):
        describe(tmp_path / "plan.json", str(model), PruneSettings(dim_multiple=4))


def test_a_plan_of_another_model_is_refused(mask_and_config, make_model, tmp_path):
    mask_and_config[2].save(tmp_path / "plan.json")
    make_model("llama", num_hidden_layers=2).config.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="is of another model"):
        describe(tmp_path / "plan.json", str(tmp_path / "other"), PruneSettings())
