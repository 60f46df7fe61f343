import copy
from dataclasses import replace

import pytest
import torch
from support.families import CLOSE, CUTS, MORE_ROWS, ROWS, logits, make_plan, sliced

from tvaprune.choose.gated_model import GatedModel
from tvaprune.cut import fold, slice
from tvaprune.models.families import FAMILIES, family_of
from tvaprune.models.layout import layout_of
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit, head_features
from tvaprune.plan.edits import Edit, edits_of
from tvaprune.plan.keep_plan import KeepPlan

GROUPED = [row for row, (_, values) in ROWS.items() if "MHA" not in row]


@pytest.fixture(params=(ROWS | MORE_ROWS).values(), ids=ROWS | MORE_ROWS)
def model(request, make_model):
    model_type, values = request.param
    return make_model(model_type, **values)


@pytest.fixture(params=CUTS.values(), ids=CUTS)
def plan(request, model, make_masks):
    dim_multiple, empty_layer, min_heads = request.param
    return make_plan(model, make_masks, dim_multiple, empty_layer, min_heads)


def as_lists(edit):
    values = (edit.rows, edit.columns, edit.row_factors, edit.column_factors)
    lists = tuple(None if value is None else value.tolist() for value in values)
    return (*lists, edit.constant, edit.offset) if edit.constant != 1 or edit.offset else lists


def by_hand(tied):
    """Hidden 4, layers 2, query heads 4, KV heads 2 (groups of 2), head_dim 2, channels 3."""
    shape = ModelShape.uniform(
        4, 2, 4, 2, 2, 3, 7, tie_word_embeddings=tied, qkv_bias=True, mlp_bias=True, head_norm=True
    )
    empty = torch.tensor([], dtype=torch.int64)
    kept = PerUnit(torch.tensor([0, 3]), (torch.tensor([1]), empty), (torch.tensor([0, 2]), torch.tensor([1])))
    scale = PerUnit(
        torch.tensor([0.5, 2.0]),
        (torch.tensor([1.5]), torch.tensor([])),
        (torch.tensor([2.5, 3.0]), torch.tensor([4.0])),
    )
    return edits_of(KeepPlan(kept, scale, shape, 1), FAMILIES["qwen3"])


def test_edits_are_those_worked_out_by_hand():
    """KV head 1 of head_dim 2 owns features 2, 3 of k and v; in q its group is heads 2 and 3: features 4 ... 7.

    Layer 1 loses its KV heads: zeros stand in KV head 0's places, and the norms of q and k stay.
    """
    hidden, scale = [0, 3], [0.5, 2.0]
    attn, mlp = "model.layers.{}.self_attn.".format, "model.layers.{}.mlp.".format
    expected = {
        "model.embed_tokens.weight": (None, hidden, None, scale),
        "model.norm.weight": (hidden, None, None, None),
        "lm_head.weight": (None, hidden, None, None),
        attn(0) + "q_proj.weight": ([4, 5, 6, 7], hidden, None, None),
        attn(0) + "q_proj.bias": ([4, 5, 6, 7], None, None, None),
        attn(0) + "k_proj.weight": ([2, 3], hidden, None, None),
        attn(0) + "k_proj.bias": ([2, 3], None, None, None),
        attn(0) + "v_proj.weight": ([2, 3], hidden, None, None),
        attn(0) + "v_proj.bias": ([2, 3], None, None, None),
        attn(0) + "o_proj.weight": (hidden, [4, 5, 6, 7], scale, [1.5, 1.5, 1.5, 1.5]),
        attn(1) + "q_proj.weight": ([0, 1, 2, 3], hidden, None, None, 0.0, 0.0),
        attn(1) + "q_proj.bias": ([0, 1, 2, 3], None, None, None, 0.0, 0.0),
        attn(1) + "k_proj.weight": ([0, 1], hidden, None, None, 0.0, 0.0),
        attn(1) + "k_proj.bias": ([0, 1], None, None, None, 0.0, 0.0),
        attn(1) + "v_proj.weight": ([0, 1], hidden, None, None, 0.0, 0.0),
        attn(1) + "v_proj.bias": ([0, 1], None, None, None, 0.0, 0.0),
        attn(1) + "o_proj.weight": (hidden, [0, 1, 2, 3], scale, None, 0.0, 0.0),
    }
    for layer, channels, factors in ((0, [0, 2], [2.5, 3.0]), (1, [1], [4.0])):
        for reader in ("gate_proj", "up_proj"):
            expected[f"{mlp(layer)}{reader}.weight"] = (channels, hidden, None, None)
            expected[f"{mlp(layer)}{reader}.bias"] = (channels, None, None, None)
        expected[mlp(layer) + "down_proj.weight"] = (hidden, channels, scale, factors)
        expected[mlp(layer) + "down_proj.bias"] = (hidden, None, scale, None)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            expected[f"model.layers.{layer}.{norm}.weight"] = (hidden, None, None, None)
    assert {name: as_lists(edit) for name, edit in by_hand(tied=False).items()} == expected


def test_a_tied_embedding_takes_the_factor_and_the_final_norm_gives_it_back():
    tied, untied = by_hand(tied=True), by_hand(tied=False)
    assert as_lists(tied["model.embed_tokens.weight"]) == (None, [0, 3], None, [0.5, 2.0])
    assert as_lists(tied["model.norm.weight"]) == ([0, 3], None, [2.0, 0.5], None)  # 1 / 0.5, 1 / 2
    assert untied.keys() - tied.keys() == {"lm_head.weight"}


def edited(weight, edit):
    """What an edit says, on one tensor: independent of the code that cuts."""
    if weight.dim() == 3:
        return torch.stack([edited(matrix, edit) for matrix in weight])
    weight = weight if edit.rows is None else weight[edit.rows]
    weight = weight if edit.columns is None else weight[:, edit.columns]
    weight = weight if edit.constant == 1 else (weight + edit.offset) * edit.constant - edit.offset
    if edit.row_factors is not None:
        weight = (weight + edit.offset) * edit.row_factors.view(-1, *[1] * (weight.dim() - 1)) - edit.offset
    return weight if edit.column_factors is None else weight * edit.column_factors


@pytest.mark.parametrize("size", [(7,), (7, 4), (2, 7, 4)])
def test_a_parameter_is_folded_some_rows_at_a_time(size, monkeypatch):
    weight, rows, columns = torch.randn(size), torch.rand(7), torch.rand(4) if len(size) > 1 else None
    edit = Edit(row_factors=rows, column_factors=columns, offset=1.0)
    expected = edit.folded(weight)
    monkeypatch.setattr("tvaprune.plan.edits.ROWS", 3)
    before = weight.clone()
    assert torch.equal(edit.folded(weight), expected) and torch.equal(weight, before)
    assert edit.folded(weight, into=weight) is weight and torch.equal(weight, expected)
    assert not torch.equal(weight, before)  # control


def test_edits_name_parameters_and_cover_all_that_a_cut_changes(model, plan):
    stock, edits = dict(model.named_parameters()), edits_of(plan, family_of(model.config))
    assert edits.keys() <= stock.keys()
    narrow = sliced(model, plan)
    after = narrow.state_dict()
    assert after.keys() == model.state_dict().keys()
    for name, weight in stock.items():
        expected = edited(weight, edits.get(name, Edit()))
        assert torch.equal(after[name], expected), name
    if plan.shape.tie_word_embeddings:
        assert narrow.lm_head.weight is narrow.model.embed_tokens.weight
    changed = {name for name, weight in stock.items() if not torch.equal(after[name], weight)}
    assert changed and changed <= edits.keys()  # an edit that keeps all of a layer's heads changes nothing


def grouped_otherwise(plan, family):
    """The edits, but of KV head k the query heads k, k + n_kv, k + 2 n_kv ... stay."""
    edits, shape = edits_of(plan, family), plan.shape
    for block, kv_heads, all_heads in zip(
        layout_of(family, shape).attention, plan.kept.attn, shape.num_key_value_heads, strict=True
    ):
        heads = (kv_heads.unsqueeze(1) + torch.arange(shape.group_size) * all_heads).flatten()
        queries = head_features(heads, shape.head_dim)
        for kind in ("weight", "bias"):
            if (name := f"{block.readers['query'].path}.{kind}") in edits:
                edits[name] = replace(edits[name], rows=queries)
        edits[f"{block.writer}.weight"] = replace(edits[f"{block.writer}.weight"], columns=queries)
    return edits


@pytest.mark.parametrize("row", GROUPED)
def test_another_grouping_of_query_heads_cuts_another_model(row, make_model, full_plan, input_ids, monkeypatch):
    model = make_model(ROWS[row][0], **ROWS[row][1])
    plan = full_plan(model)
    attn = tuple(v[1:] for v in plan.kept.attn)  # KV head 0 goes everywhere
    scale = tuple(torch.linspace(0.5, 1.5, len(v)) for v in attn)
    plan = replace(plan, kept=replace(plan.kept, attn=attn), scale=replace(plan.scale, attn=scale))
    gated = GatedModel(copy.deepcopy(model))
    with gated.using(plan.full_scale()):
        masked = logits(gated, input_ids)
    torch.testing.assert_close(logits(sliced(model, plan), input_ids), masked, **CLOSE)
    for module in (slice, fold):
        monkeypatch.setattr(module, "edits_of", lambda plan, family, device: grouped_otherwise(plan, family))
    assert (logits(sliced(model, plan), input_ids) - masked).abs().mean() > 0.02


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_a_norm_that_reads_the_bias_of_a_lost_attention_stays_what_it_is(model_type, make_model, make_masks, input_ids):
    model = make_model(model_type, attention_bias=True, attn_implementation="eager")
    plan = make_plan(model, make_masks, empty_layer=1)
    assert plan.shape.output_bias and not plan.num_key_value_heads[1]
    cut = logits(sliced(model, plan), input_ids)
    gated = GatedModel(model)
    with torch.no_grad(), gated.applying(plan):
        torch.testing.assert_close(gated(input_ids=input_ids).logits, cut, **CLOSE)
        model.model.layers[1].self_attn.o_proj.bias.data.neg_()  # control: the norm reads it
        assert (gated(input_ids=input_ids).logits - cut).abs().max() > 0.01


def test_a_gain_of_1_and_w_is_rounded_once_by_a_constant():
    w = torch.linspace(-0.6, 0.6, 200).bfloat16()
    found = Edit(constant=0.9, offset=1.0).kept(w)
    once = ((w.double() + 1) * 0.9 - 1).bfloat16()
    assert found.dtype == torch.bfloat16 and torch.equal(found, once)
    assert not torch.equal((w + 1) * 0.9 - 1, once)  # control: in its own precision
