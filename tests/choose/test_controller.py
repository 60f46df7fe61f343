import pytest
import torch

from tvaprune.choose.controller import Lagrangian, beta_at, expected_sparsity, target_at
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import Masks

SHAPE = ModelShape.uniform(
    hidden_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    intermediate_size=20,
    vocab_size=7,
)


@pytest.mark.parametrize(
    ("step", "target"),
    [(0, 0.1), (1, 0.2), (2, 0.3), (4, 0.5), (5, 0.5), (1000, 0.5)],  # 0.1 + 0.4 * step / 4
)
def test_target_rises_linearly_then_stays(step, target):
    assert target_at(step, num_warmup_steps=4, start=0.1, target=0.5) == pytest.approx(target)


def test_without_warm_up_the_target_stands_from_the_first_step():
    assert target_at(0, num_warmup_steps=0, start=0.0, target=0.5) == 0.5


@pytest.mark.parametrize(
    ("step", "beta"),
    [(0, 0.5), (35, 5**0.5), (70, 10.0), (100, 10.0)],  # half way: the geometric mean, sqrt(0.5 * 10)
)
def test_beta_rises_geometrically_over_the_choosing_steps(step, beta):
    assert beta_at(step, num_steps=70, start=0.5, end=10.0) == pytest.approx(beta)


def test_without_choosing_steps_beta_is_at_its_end_from_the_first_on():
    assert beta_at(1, num_steps=0, start=0.5, end=10.0) == pytest.approx(10.0)


def test_penalty_by_hand():
    controller = Lagrangian()
    sparsity = torch.tensor(0.3, requires_grad=True)
    assert controller(sparsity, 0.5).item() == 0.0  # multipliers start at zero
    with torch.no_grad():
        controller.lambda_1.fill_(2.0)
        controller.lambda_2.fill_(3.0)
    penalty = controller(sparsity, 0.5)
    assert penalty.item() == pytest.approx(2 * -0.2 + 3 * 0.04)
    penalty.backward()
    assert sparsity.grad.item() == pytest.approx(2 + 2 * 3 * -0.2)  # lambda_1 + 2 lambda_2 (s - t)
    # Ascent on these makes a penalty that pulls the sparsity up: lambda_1 falls, lambda_2 grows.
    assert controller.lambda_1.grad.item() == pytest.approx(-0.2)
    assert controller.lambda_2.grad.item() == pytest.approx(0.04)


def test_expected_sparsity_by_hand():
    # Every unit kept with probability 1/2: 5 hidden, 1 KV head, 10 channels; a layer
    # 2 * 4 * 3 * 1 * 5 + 3 * 10 * 5 + 2 * 5 = 280 of 1100
    half = expected_sparsity(PerUnit.full(SHAPE, 0.0), 10.0, SHAPE)
    assert half.item() == pytest.approx(1 - 280 / 1100, abs=1e-6)
    assert expected_sparsity(PerUnit.full(SHAPE, -9.0), 10.0, SHAPE).item() == pytest.approx(0.0, abs=1e-6)
    assert expected_sparsity(PerUnit.full(SHAPE, 9.0), 10.0, SHAPE).item() == pytest.approx(1.0, abs=1e-6)


def test_expected_sparsity_is_the_exact_one_where_all_probabilities_are_zero_or_one():
    generator = torch.Generator().manual_seed(0)
    log_alpha = PerUnit.full(SHAPE, 0.0).map(lambda v: 20 * torch.randn(v.shape, generator=generator).sign())
    exact = plan_from_masks(Masks(mu=PerUnit.full(SHAPE, 1.0), log_variance=log_alpha), SHAPE).sparsity
    assert 0.2 < exact < 0.95
    assert expected_sparsity(log_alpha, 10.0, SHAPE).item() == pytest.approx(exact, abs=1e-5)


def test_a_small_beta_gives_gates_a_gradient_where_the_final_one_gives_none():
    def gradient(beta):
        log_alpha = PerUnit.full(SHAPE, -9.0).map(lambda v: v.requires_grad_())
        expected_sparsity(log_alpha, beta, SHAPE).backward()
        return min(v.grad.abs().min() for v in log_alpha)

    assert gradient(10.0) < 1e-20
    assert gradient(0.5) > 1e-5
