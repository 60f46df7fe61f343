"""A turned model is the same function, a stock model of its class, for every family whose norms allow it."""

import copy
import json

import pytest
import torch
from support.families import CLOSE, MORE_ROWS, ROWS, logits
from support.other_families import OTHER_ROWS
from transformers import AutoModelForCausalLM

from tvaprune.choose.tie import _stretched_norms, stretched
from tvaprune.errors import InputError
from tvaprune.models.families import family_of
from tvaprune.models.rotate import Rotation, norms_of, rotate, turns_of, why_not
from tvaprune.models.shape import shape_of
from tvaprune.plan.rotation import drop_rotations, read_rotation, save_rotation

pytestmark = pytest.mark.usefixtures("other_families")


ALL = ROWS | MORE_ROWS | OTHER_ROWS
TIED = {name: row for name, row in ALL.items() if row[1].get("tie_word_embeddings")}


def random_rotation(size, seed=0):
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(values).Q.float()


@pytest.fixture(params=ALL.values(), ids=ALL)
def model(request, make_model):
    model_type, values = request.param
    return make_model(model_type, **values)


def test_a_turned_model_computes_what_it_did_or_is_refused(model, input_ids, tmp_path):
    before, rotation = logits(model, input_ids), random_rotation(model.config.hidden_size)
    if why_not(family_of(model.config), shape_of(model.config)) is not None:
        weights = copy.deepcopy(model.state_dict())
        with pytest.raises(InputError, match="--rotate on: .* cannot be rotated, as (a norm stands|its norms sub)"):
            rotate(model, Rotation(rotation))
        assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())
        return
    rotate(model, Rotation(rotation))
    torch.testing.assert_close(logits(model, input_ids), before, **CLOSE)
    norms = [
        model.get_parameter(f"{name}.weight") for name in norms_of(family_of(model.config), shape_of(model.config))
    ]
    offset = family_of(model.config).norm_offset
    assert all(torch.equal(norm + offset, torch.ones_like(norm)) for norm in norms)
    model.save_pretrained(tmp_path / "turned")  # a model like any other
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "turned").eval()
    assert type(again) is type(model) and not again.config.tie_word_embeddings
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))


@pytest.mark.parametrize("missed", ["model.embed_tokens", "lm_head", "layers.1.self_attn.v_proj", "layers.2.mlp.down"])
def test_every_parameter_of_the_stream_must_turn(missed, make_model, input_ids):
    """Control of the above: one that does not is felt."""
    model = make_model("llama")
    before, kept = logits(model, input_ids), None
    (name,) = (name for name in turns_of(family_of(model.config), shape_of(model.config)) if missed in name)
    kept = model.get_parameter(name).detach().clone()
    rotate(model, Rotation(random_rotation(model.config.hidden_size)))
    with torch.no_grad():
        model.get_parameter(name).copy_(kept)
    assert (logits(model, input_ids) - before).abs().max() > 0.1


def test_what_is_no_rotation_is_refused_before_anything_turns(make_model, input_ids):
    model = make_model("llama")
    before, size = logits(model, input_ids), model.config.hidden_size
    skewed, lost = random_rotation(size), random_rotation(size)
    skewed[0] *= 1.1
    lost[0, 0] = float("nan")
    for wrong, words in ((skewed, "is not orthogonal"), (lost, "is not orthogonal"), (torch.eye(4), "is 4 x 4")):
        with pytest.raises(InputError, match=words):
            rotate(model, Rotation(wrong))
    ones = torch.ones(size)
    for wrong in (ones[1:], -ones, ones * float("nan"), ones * float("inf")):
        with pytest.raises(InputError, match=f"has a stretch that is not {size} numbers above 0"):
            rotate(model, Rotation(random_rotation(size), wrong))
    assert torch.equal(logits(model, input_ids), before)


@pytest.mark.parametrize("trains", [False, True])
def test_a_head_of_its_own_trains_if_the_embedding_does(trains, make_model):
    model = make_model("llama", tie_word_embeddings=True).requires_grad_(trains)
    rotate(model, Rotation(random_rotation(model.config.hidden_size)))
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert {weight.requires_grad for weight in model.parameters()} == {trains}


def test_a_rotation_is_read_only_where_it_is_the_one_that_is_named(tmp_path):
    first, second = Rotation(random_rotation(8)), Rotation(random_rotation(8, seed=1))
    path, mask = save_rotation(first, tmp_path), tmp_path / "mask_info_1.0.pkl"
    stretches = (None, torch.ones(8), torch.arange(1.0, 9.0))
    assert len({Rotation(first.matrix, stretch).digest for stretch in stretches}) == 3
    found = read_rotation(mask, first.digest, 8)
    assert torch.equal(found.matrix, first.matrix) and read_rotation(mask, None, 8) is None
    with pytest.raises(InputError, match="is not beside it: keep both together"):
        read_rotation(mask, second.digest, 8)
    with pytest.raises(InputError, match="is 8 x 8, the model is 12 wide"):
        read_rotation(mask, first.digest, 12)
    for digest in ("../../etc/passwd", 7, {"a": 1}):
        with pytest.raises(InputError, match="which is no digest"):
            read_rotation(mask, digest, 8)
    path.write_bytes(save_rotation(second, tmp_path).read_bytes())
    with pytest.raises(InputError, match="is not the rotation that mask_info_1.0.pkl names"):
        read_rotation(mask, first.digest, 8)
    path.write_bytes(b"\x08\x00")
    with pytest.raises(InputError, match="is no rotation"):
        read_rotation(mask, first.digest, 8)


def test_only_rotations_that_nothing_names_are_removed(tmp_path):
    """Several masks may lie in a folder, each with its rotation; one may be written over."""
    first, second, third = (Rotation(random_rotation(8, seed=seed)) for seed in range(3))
    paths = [save_rotation(rotation, tmp_path) for rotation in (first, second, third)]
    (tmp_path / "mask_info_1.0.json").write_text(json.dumps({"rotation": first.digest}))
    (tmp_path / "plan.json").write_text(json.dumps({"rotation": second.digest}))
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "broken.json").write_text("{")
    drop_rotations(tmp_path)
    assert all(path.is_file() for path in paths)  # the broken one may name any
    (tmp_path / "broken.json").unlink()
    drop_rotations(tmp_path)
    assert [path.is_file() for path in paths] == [True, True, False]


def a_tied_basis(model, axes=4, seed=0):
    """A rotation that keeps a tie: some dims stay axes, the stretch takes the final gain of the others."""
    family, size = family_of(model.config), model.config.hidden_size
    gain = model.get_parameter(f"{family.final_norm}.weight").detach().double() + family.norm_offset
    stretch, is_axis = stretched(gain, torch.ones(size, dtype=torch.float64), axes)
    matrix, kept = torch.zeros(size, size, dtype=torch.float64), is_axis.nonzero().squeeze(1)
    matrix[kept, torch.arange(len(kept))] = 1.0
    matrix[(~is_axis).nonzero().squeeze(1), len(kept) :] = random_rotation(size - len(kept), seed).double()
    return Rotation(matrix.float(), stretch.float())


@pytest.mark.parametrize("row", TIED)
def test_a_turned_tied_model_stays_tied_and_computes_what_the_stretch_says(row, make_model, input_ids, tmp_path):
    """Every norm's output changes by one factor per token, and nothing else does."""
    model_type, values = TIED[row]
    model = make_model(model_type, **values)
    family, shape = family_of(model.config), shape_of(model.config)
    if why_not(family, shape) is not None:
        with pytest.raises(InputError, match="cannot be rotated"):
            rotate(model, a_tied_basis(model))
        return
    with torch.no_grad():  # gains unlike each other
        model.get_parameter(f"{family.final_norm}.weight").add_(torch.rand(shape.hidden_size).mul(0.5))
    rotation = a_tied_basis(model)
    with _stretched_norms(model, rotation.stretch):
        told = logits(model, input_ids)
    assert (told - logits(model, input_ids)).abs().max() > 1e-3  # control: the stretch is felt
    rotate(model, rotation)
    torch.testing.assert_close(logits(model, input_ids), told, **CLOSE)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "turned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "turned").eval()
    assert again.config.tie_word_embeddings and torch.equal(logits(again, input_ids), logits(model, input_ids))


def test_a_basis_that_keeps_another_models_tie_is_refused(make_model, input_ids):
    model = make_model("llama", tie_word_embeddings=True)
    before, rotation = logits(model, input_ids), a_tied_basis(model)
    with torch.no_grad():
        model.model.norm.weight[20:].mul_(1.5)
    with pytest.raises(InputError, match="keeps the tie of another model"):
        rotate(model, rotation)
    with torch.no_grad():
        model.model.norm.weight[20:].div_(1.5)
    torch.testing.assert_close(logits(model, input_ids), before)
    rotate(model, rotation)  # control
