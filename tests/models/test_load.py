import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny

from tvaprune.errors import InputError
from tvaprune.models.load import load_model

CPU = torch.device("cpu")


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request, make_model, tmp_path):
    return tiny.save_checkpoint(make_model("llama", tie_word_embeddings=request.param), tmp_path / "model")


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def drop(tensors, part):
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def test_a_whole_checkpoint_loads_and_old_rotary_buffers_are_fine(folder):
    edit(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    model, _ = load_model(str(folder), "auto", CPU)
    assert torch.equal(
        model.model.embed_tokens.weight, load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: drop(t, "layers.1.mlp"),
            "3 of the model's tensors are missing, such as 'model.layers.1.mlp.down",
        ),
        (lambda t: drop(t, "layers.2."), "9 of the model's tensors are missing, such as 'model.layers.2.input_layer"),
        (lambda t: t.update({"odd": torch.ones(1)}), "1 of the file's are unknown to it, such as 'odd'"),
    ],
    ids=["no MLP", "no layer", "an unknown tensor"],
)
def test_a_partial_load_is_refused_by_name(change, words, folder):
    edit(folder, change)
    with pytest.raises(InputError) as error:
        load_model(str(folder), "auto", CPU)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_head_that_is_not_tied_is_refused(make_model, tmp_path):
    folder = tiny.save_checkpoint(make_model("llama", tie_word_embeddings=False), tmp_path / "model")
    edit(folder, lambda tensors: drop(tensors, "lm_head"))
    with pytest.raises(InputError, match="1 of the model's tensors are missing, such as 'lm_head.weight'"):
        load_model(str(folder), "auto", CPU)


def test_quantised_weights_are_refused_by_name(folder):
    path = folder / "config.json"
    quantised = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(tiny.read_json(path) | quantised), encoding="utf-8")
    with pytest.raises(InputError, match="its weights are quantised"):
        load_model(str(folder), "auto", CPU)
