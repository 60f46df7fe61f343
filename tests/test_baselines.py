import pytest
import torch
from datasets import Dataset

from tvaprune.baselines import SCORES, score_masks
from tvaprune.families import shape_of
from tvaprune.plan import calibrate, plan_from_masks

BLOCKS = Dataset.from_dict({"input_ids": torch.arange(8 * 12).remainder(47).view(8, 12).tolist()}).with_format("torch")


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("target", [0.2, 0.5])
def test_every_score_reaches_the_exact_target_and_keeps_all_hidden_dims(make_model, method, target):
    model = make_model("mistral", num_attention_heads=8, num_key_value_heads=8, intermediate_size=96)
    shape = shape_of(model.config)
    plan = plan_from_masks(calibrate(score_masks(model, method, BLOCKS), shape, target), shape)
    assert plan.sparsity == pytest.approx(target, abs=0.05)  # ranks tie over the layers: steps of a head in every layer
    assert plan.hidden_size == shape.hidden_size
    assert all(float(scale.min()) == 1.0 for scale in plan.scale)


@pytest.mark.parametrize("method", SCORES)
def test_a_unit_that_writes_nothing_is_the_first_to_go(make_model, method):
    model = make_model("mistral")
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, 5] = 0.0
        layer.self_attn.o_proj.weight[:, 12:24] = 0.0  # KV head 1: query heads 2 and 3 of 6 features each
    scores = score_masks(model, method, BLOCKS).log_alpha
    assert int(scores.inter[1].argmax()) == 5
    assert int(scores.attn[1].argmax()) == 1


def test_the_three_scores_order_units_differently(make_model):
    model = make_model("llama")
    orders = {tuple(score_masks(model, method, BLOCKS).log_alpha.inter[0].argsort().tolist()) for method in SCORES}
    assert len(orders) == len(SCORES)


def test_flap_ignores_a_constant_input_that_wanda_keeps(make_model):
    """The fluctuation of a constant is nil, however large its norm."""
    model = make_model("llama", mlp_bias=True)
    mlp = model.model.layers[0].mlp
    with torch.no_grad():  # channel 3: silu(20) * 5 = 100 whatever comes in
        mlp.gate_proj.weight[3], mlp.up_proj.weight[3] = 0.0, 0.0
        mlp.gate_proj.bias[3], mlp.up_proj.bias[3] = 20.0, 5.0
    assert int(score_masks(model, "flap", BLOCKS).log_alpha.inter[0].argmax()) == 3
    assert int(score_masks(model, "wanda_sp", BLOCKS).log_alpha.inter[0].argmin()) == 3
