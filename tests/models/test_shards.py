"""The weights of a checkpoint where they lie, and a model that is opened without them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from tvaprune.models import shards
from tvaprune.models.load import open_model
from tvaprune.models.vetting import INDEX, WEIGHTS

HEAD = "lm_head.weight"


@pytest.mark.parametrize("name", [WEIGHTS, INDEX])
def test_what_the_hub_has_of_a_model_is_fetched_whole(name, tmp_path, monkeypatch):
    """An index names files that are fetched after it."""
    save_file({"a": torch.zeros(1)}, tmp_path / WEIGHTS)
    if name == INDEX:
        (tmp_path / WEIGHTS).rename(tmp_path / "one.safetensors")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    asked, fetched = [], []

    def cached(repo, wanted, **options):
        asked.append(wanted)
        return str(tmp_path / wanted) if wanted == name else None

    monkeypatch.setattr(shards, "cached_file", cached)
    monkeypatch.setattr(shards, "get_checkpoint_shard_files", lambda repo, index: fetched.append(index))
    (file,) = shards.files_of("somebody/model", "x")
    assert file.parent == tmp_path and asked == [WEIGHTS, INDEX][: 1 + (name == INDEX)]
    assert fetched == ([str(tmp_path / INDEX)] if name == INDEX else [])
    monkeypatch.setattr(shards, "cached_file", lambda *args, **options: None)
    with tiny.refused(f"x: has no {WEIGHTS} and no {INDEX}, and --stream True reads nothing else"):
        shards.files_of("somebody/other", "x")


def test_a_model_is_opened_with_its_own_generation_settings_and_a_head_as_it_is(make_model, tmp_path, capsys):
    folder = tiny.save_checkpoint(make_model(tie_word_embeddings=True), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"max_length": 77, "auto_map": {"a": "b"}}))
    tensors = load_file(folder / WEIGHTS)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}  # which is computed now
    for twice, tied in ((tensors["model.embed_tokens.weight"].clone(), True), (torch.ones(47, 36), False)):
        save_file(tensors | old | {HEAD: twice}, folder / WEIGHTS, {"format": "pt"})
        model, _, found = open_model(str(folder), "auto", torch.device("cpu"))
        assert (model.lm_head.weight is model.model.embed_tokens.weight) is model.config.tie_word_embeddings is tied
        assert torch.equal(found.weight(HEAD), twice)
        assert model.generation_config.max_length == 77 and not hasattr(model.generation_config, "auto_map")
        assert ("taken as untied" in capsys.readouterr().out) is not tied
