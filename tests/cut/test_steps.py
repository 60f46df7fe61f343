"""A pruned checkpoint is a model like any other: cutting it again is cutting once by the joined plan."""

from dataclasses import replace

import pytest
import torch
from support.families import CLOSE, MORE_ROWS, ROWS, logits, make_plan, sliced
from support.other_families import OTHER_ROWS
from support.tiny import read_json, save_checkpoint, write_text

from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.cli import run_verb
from tvaprune.errors import InputError
from tvaprune.models.families import family_of
from tvaprune.models.load import load_model
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import save_masks

pytestmark = pytest.mark.usefixtures("other_families")


def joined(first, second):
    """The plan that does at once what two do one after the other; what stands in for a lost layer stays lost."""

    def kept(before, after):
        return before[after] if len(before) else before

    def scale(before, factors, after, more):
        return factors[after] * more if len(before) else factors

    return KeepPlan(
        kept=first.kept.map(kept, second.kept),
        scale=first.kept.map(scale, first.scale, second.kept, second.scale),
        shape=first.shape,
        dim_multiple=1,
    )


@pytest.fixture(params=(ROWS | OTHER_ROWS).values(), ids=ROWS | OTHER_ROWS)
def model(request, make_model):
    return make_model(request.param[0], **request.param[1])


@pytest.mark.parametrize("empty_layer", [None, 2], ids=["", "no attention in layer 2"])
def test_cutting_twice_is_cutting_once_by_the_joined_plan(empty_layer, model, make_masks, input_ids):
    first = make_plan(model, make_masks, empty_layer=empty_layer)
    if family_of(model.config).attention_post_norm is not None:  # a root mean square of products is no product of them
        first = replace(first, scale=replace(first.scale, attn=tuple(map(torch.ones_like, first.scale.attn))))
    once = sliced(model, first)
    second = make_plan(once, make_masks, dim_multiple=8)
    twice, at_once = sliced(once, second), sliced(model, joined(first, second))
    assert shape_of(twice.config) == shape_of(at_once.config) != shape_of(once.config)
    torch.testing.assert_close(logits(twice, input_ids), logits(at_once, input_ids), **CLOSE)
    other = replace(first, scale=first.scale.map(lambda scale: scale.flip(0)))  # control: the first factors matter
    assert (logits(sliced(model, joined(other, second)), input_ids) - logits(at_once, input_ids)).abs().mean() > 0.01


@pytest.mark.parametrize("row", ROWS | MORE_ROWS)
def test_a_pruned_folder_is_the_dense_model_of_the_next_step(row, make_model, make_masks, input_ids, tmp_path):
    model_type, values = (ROWS | MORE_ROWS)[row]
    model = make_model(model_type, **values)
    plan = make_plan(model, make_masks, empty_layer=0)
    once = sliced(model, plan)
    save_checkpoint(once, tmp_path / "tokenizer")
    save_pruned(once, plan, None, tmp_path / "pruned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).rename(tmp_path / "pruned" / name)
    loaded, _ = load_model(str(tmp_path / "pruned"), "auto", torch.device("cpu"))
    assert shape_of(loaded.config) == shape_of(once.config)
    second = make_plan(once, make_masks, dim_multiple=8)
    assert torch.equal(logits(sliced(loaded, second), input_ids), logits(sliced(once, second), input_ids))


def test_every_verb_takes_a_pruned_folder(make_model, make_masks, tmp_path):
    """Prune by a mask, prune the outcome by magnitude, tune it, describe a mask of it, export it."""
    model = make_model("mistral")
    dense, pruned = save_checkpoint(model, tmp_path / "dense"), tmp_path / "pruned"
    mask, text = tmp_path / "mask_info_1.0.pkl", write_text(tmp_path / "text.txt")
    save_masks(make_masks(shape_of(model.config)), mask)
    common = ["--dataset_name", text, "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 4]
    common += ["--speed_batches", 0, "--weight_update", "fold"]

    def verb(words, *flags):
        name, *own = words.split()
        run_verb(name, [*own, *map(str, flags)])

    def applied(folder, by, *flags):
        verb("apply --do_eval True", "--model_name_or_path", folder, "--mask_loc", by, *flags, *common)

    applied(dense, mask, "--save_loc", tmp_path / "one", "--save_pruned", pruned)
    verb(
        "prune --prune_method magnitude --target_sparsity 0.3 --max_train_samples 4",
        "--model_name_or_path", pruned, "--output_dir", tmp_path / "two", *common,
    )  # fmt: skip
    before, results = (read_json(tmp_path / name / "results.json") for name in ("one", "two"))
    assert results["parameters"]["dense"] == before["parameters"]["pruned"]
    assert results["perplexity"]["dense"] == pytest.approx(before["perplexity"]["pruned"], rel=1e-6)
    (again,) = (tmp_path / "two" / "best").glob("mask_info_*.pkl")
    verb("describe --json", again, "--model_name_or_path", pruned)
    verb(
        "finetune --max_train_samples 8 --num_train_epochs 1", "--model_name_or_path", pruned, "--mask_loc", again,
        "--output_dir", tmp_path / "three", *common,
    )  # fmt: skip
    merged = load_pruned(tmp_path / "three" / "merged")
    assert sum(p.numel() for p in merged.parameters()) == results["parameters"]["pruned"]
    verb("export --format vanilla", pruned, tmp_path / "vanilla")
    with pytest.raises(InputError, match="give the mask of this model"):  # control: the dense model's
        applied(pruned, mask, "--save_loc", tmp_path / "four")
