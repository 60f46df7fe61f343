"""Equal widths in every layer, and widths that devices can share: in the plan, at the target, and in the training."""

from dataclasses import replace

import pytest
import torch

from tvaprune.choose.controller import Lagrangian, expected_sparsity, expected_spread
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.settings import PruneSettings
from tvaprune.models.parameters import decoder_sparsity
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.exact_cut import TOLERANCE, calibrate
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.widths import WidthRules, Widths
from tvaprune.run import Run

SHAPE = ModelShape.uniform(
    hidden_size=96,
    num_hidden_layers=5,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=6,
    intermediate_size=160,
    vocab_size=50,
)


@pytest.fixture
def masks(make_masks):
    return make_masks(SHAPE)


def equal(widths):
    return len(set(widths)) == 1


@pytest.mark.parametrize("dim_multiple", [1, 8])
def test_uniform_widths_are_the_means_of_the_free_ones(masks, dim_multiple):
    free, plan = plan_from_masks(masks, SHAPE), plan_from_masks(masks, SHAPE, WidthRules(dim_multiple, uniform=True))
    assert not equal(free.num_key_value_heads) and not equal(free.intermediate_size)  # control
    assert set(plan.num_key_value_heads) == {round(sum(free.num_key_value_heads) / 5)}
    (channels,) = set(plan.intermediate_size)
    assert channels % dim_multiple == 0 and abs(channels - sum(free.intermediate_size) / 5) <= max(
        0.5, dim_multiple / 2
    )
    scores = masks.log_alpha
    for kept, score in zip((*plan.kept.attn, *plan.kept.inter), (*scores.attn, *scores.inter), strict=True):
        gone = torch.ones(len(score), dtype=torch.bool).index_fill(0, kept, False)
        assert score[kept].max() < score[gone].min()  # each layer keeps its own best


def test_layers_of_a_model_that_differ_become_equally_wide_as_far_as_the_narrowest_goes():
    shape = replace(SHAPE, num_key_value_heads=(8, 2, 8, 8, 8), intermediate_size=(160, 40, 160, 160, 160))
    widths = Widths(shape, WidthRules(uniform=True))
    assert widths.heads([8, 2, 8, 7, 8]) == [2] * 5 and widths.channels([99, 40, 99, 99, 99]) == [40] * 5
    assert widths.heads([1, 2, 1, 1, 1]) == [1] * 5  # control


@pytest.mark.parametrize("target", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("dim_multiple", [1, 8])
def test_a_uniform_plan_meets_the_target(masks, target, dim_multiple):
    plan = plan_from_masks(
        calibrate(masks, SHAPE, target, WidthRules(dim_multiple, uniform=True)),
        SHAPE,
        WidthRules(dim_multiple, uniform=True),
    )
    assert equal(plan.num_key_value_heads) and equal(plan.intermediate_size)
    # The smallest steps: one hidden multiple, or one KV head or one multiple of channels in all five layers.
    assert abs(plan.sparsity - target) < (TOLERANCE if dim_multiple == 1 else 0.02)
    free = plan_from_masks(calibrate(masks, SHAPE, target, WidthRules(dim_multiple)), SHAPE, WidthRules(dim_multiple))
    assert not equal(free.num_key_value_heads)


def test_a_uniform_plan_keeps_attention_in_every_layer(masks):
    assert Widths(SHAPE, WidthRules(uniform=True)).heads([0, 0, 1, 0, 0]) == [1] * 5
    assert Widths(SHAPE).heads([0, 0, 1, 0, 0]) == [0, 0, 1, 0, 0]


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("devices", [2, 4])
def test_devices_can_share_every_layer(masks, devices, uniform):
    options = {"dim_multiple": 5, "uniform": uniform, "tensor_parallel": devices}
    plan = plan_from_masks(calibrate(masks, SHAPE, 0.5, WidthRules(**options)), SHAPE, WidthRules(**options))
    assert all(width % devices == 0 for width in (*plan.num_key_value_heads, *plan.intermediate_size))
    assert all(width % 5 == 0 for width in plan.intermediate_size) and min(plan.num_key_value_heads) >= devices
    assert not uniform or equal(plan.num_key_value_heads)
    free = plan_from_masks(calibrate(masks, SHAPE, 0.5), SHAPE)
    assert any(width % devices for width in free.num_key_value_heads)


def test_devices_that_do_not_divide_the_model_are_refused(masks):
    with pytest.raises(InputError, match="--tensor_parallel is 3: the model's num_key_value_heads, 8, is no multiple"):
        plan_from_masks(masks, SHAPE, WidthRules(tensor_parallel=3))
    with pytest.raises(InputError, match="--tensor_parallel is 0: give a number above 0"):
        PruneSettings(tensor_parallel=0)


def at_counts(heads, channels):
    """log_alpha with so many surely kept KV heads and channels per layer, the others surely gone."""

    def scores(count, full):
        return torch.where(torch.arange(full) < count, -9.0, 9.0)

    return PerUnit(
        hidden=torch.full((96,), -9.0),
        attn=tuple(scores(count, 8) for count in heads),
        inter=tuple(scores(count, 160) for count in channels),
    )


def test_the_spread_is_zero_for_equal_layers_and_the_variance_of_their_shares_otherwise():
    even, uneven = at_counts([4] * 5, [80] * 5), at_counts([2, 6, 4, 4, 4], [80] * 5)
    assert float(expected_spread(even, 10.0, SHAPE)) == pytest.approx(0.0, abs=1e-12)
    # A layer has 8 * 3,456 + 160 * 288 + 2 * 96 = 73,920 parameters; the heads' deviations are -2, 2, 0, 0, 0.
    expected = (4 + 4) / 5 * (3456 / 73920) ** 2
    assert float(expected_spread(uneven, 10.0, SHAPE)) == pytest.approx(expected, rel=1e-4)
    traded = at_counts([2, 6, 4, 4, 4], [80 + 24, 80 - 24, 80, 80, 80])  # equal layers in sum, 2 heads for 24 channels
    assert float(expected_spread(traded, 10.0, SHAPE)) == pytest.approx(2 * expected, rel=1e-4)
    assert float(expected_sparsity(traded, 10.0, SHAPE)) == pytest.approx(
        float(decoder_sparsity(96, [4] * 5, [80] * 5, SHAPE)), abs=1e-6
    )


def test_the_penalty_draws_layers_to_one_width():
    generator = torch.Generator().manual_seed(0)
    scores = PerUnit(
        hidden=torch.full((96,), -9.0),
        attn=tuple(torch.randn(8, generator=generator) + i - 2 for i in range(5)),
        inter=tuple(torch.randn(160, generator=generator) + i - 2 for i in range(5)),
    ).map(lambda v: v.requires_grad_())
    start = float(expected_spread(scores, 1.0, SHAPE).detach())
    lagrangian = Lagrangian()
    lagrangian.lambda_2.data += 100.0
    optimizer = torch.optim.Adam([*scores.attn, *scores.inter], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        sparsity, spread = expected_sparsity(scores, 1.0, SHAPE), expected_spread(scores, 1.0, SHAPE)
        lagrangian(sparsity, 0.4, spread).backward()
        optimizer.step()
    assert float(expected_spread(scores, 1.0, SHAPE).detach()) < start / 100
    assert float(expected_sparsity(scores, 1.0, SHAPE).detach()) == pytest.approx(0.4, abs=0.01)


def test_the_penalty_without_a_spread_is_the_one_it_was():
    lagrangian = Lagrangian()
    lagrangian.lambda_1.data += 2.0
    lagrangian.lambda_2.data += 3.0
    with torch.no_grad():
        assert float(lagrangian(torch.tensor(0.3), 0.5)) == pytest.approx(2 * -0.2 + 3 * 0.04)
        assert float(lagrangian(torch.tensor(0.3), 0.5, 0.01)) == pytest.approx(2 * -0.2 + 3 * 0.05)


@pytest.mark.parametrize(
    ("flags", "rules"),
    [
        ([], WidthRules(8)),
        (["--uniform", "True", "--tensor_parallel", "2"], WidthRules(8, 0, True, 2)),
        (["--dim_multiple", "0", "--keep_one_kv_head", "True"], WidthRules(1, 1)),
    ],
)
def test_the_flags_become_one_object_of_rules(flags, rules, make_model):
    assert Run(Arguments.parse(flags, "prune"), make_model(), None).rules == rules
