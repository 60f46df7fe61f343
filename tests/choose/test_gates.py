import math

import pytest
import torch

from tvaprune.choose import gates
from tvaprune.plan.log_alpha import log_alpha_of


@pytest.mark.parametrize(
    ("mu", "log_variance", "expected"),
    [
        (1.0, -9.0, -9.0),  # -9 - log 1
        (math.e, 1.0, -1.0),  # 1 - log e^2
        (-math.e, 1.0, -1.0),  # the sign of the mean does not matter
        (1.0, 0.0, 0.0),  # variance = mean squared: on the edge
        (0.0, 0.0, 18.420681),  # -log 1e-8: finite for a mean of zero
    ],
)
def test_log_alpha_is_log_variance_minus_log_mean_squared(mu, log_variance, expected):
    score = log_alpha_of(torch.tensor([mu]), torch.tensor([log_variance]))
    assert score.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("log_alpha", "beta", "expected"),
    [
        (0.0, 10.0, 0.5),
        (-0.1, 10.0, 0.731059),  # 1 / (1 + e^-1)
        (0.2, 5.0, 0.268941),  # 1 / (1 + e)
        (-9.0, 10.0, 1.0),
    ],
)
def test_keep_probability_is_a_sigmoid_that_falls_with_log_alpha(log_alpha, beta, expected):
    assert gates.keep_probability(torch.tensor(log_alpha), beta).item() == pytest.approx(expected, abs=1e-6)


def test_information_loss_adds_up_over_units():
    # 1/2 [log(1 + 1/1) + log(1 + 4/1) + log(1 + 0)] = 1/2 [0.693147 + 1.609438 + 0] = 1.151293
    terms = gates.information(torch.tensor([1.0, 2.0, 0.0]), torch.zeros(3))
    assert terms.sum().item() == pytest.approx(1.151293, abs=1e-5)


def test_information_loss_is_finite_without_noise():
    # 1/2 log(1 + 1 / 1e-8) = 9.210340
    assert gates.information(torch.ones(1), torch.tensor([-1000.0])).item() == pytest.approx(9.210340, abs=1e-4)


def test_samples_have_the_gates_mean_and_deviation_and_differ_between_tokens():
    torch.manual_seed(0)
    mu, deviation = torch.tensor([1.0, -2.0]), torch.tensor([1.0, 3.0])
    drawn = gates.multiply(torch.ones(100, 200, 2), gates.Gates(mu, deviation))
    assert drawn.shape == (100, 200, 2)
    flat = drawn.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), mu, atol=0.1, rtol=0)
    torch.testing.assert_close(flat.std(0), deviation, atol=0.1, rtol=0)
    assert torch.corrcoef(flat.T)[0, 1].abs() < 0.05  # units are drawn apart
    assert len(flat[:, 0].unique()) > 19_000  # so are tokens


@pytest.mark.parametrize("redrawing", [frozenset(), frozenset({"cpu"})], ids=["kept", "drawn again"])
@pytest.mark.parametrize("per_token", [True, False], ids=["token", "window"])
@pytest.mark.parametrize("features", [1, 3])
def test_the_product_has_the_gradients_of_a_plain_one(features, per_token, redrawing, monkeypatch):
    monkeypatch.setattr(gates, "REDRAWING", redrawing)
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
              for size in ((2, 5, 4 * features), (4,), (4,))]  # fmt: skip
    weights = torch.randn(2, 5, 4 * features, generator=generator, dtype=torch.float64)

    def plain(x, mu, deviation):
        noise = torch.randn((2, 5 if per_token else 1, 4), dtype=torch.float64)
        return x * (mu + noise * deviation).repeat_interleave(features, -1)

    def gradients(product):
        torch.manual_seed(7)
        found = product(*values)
        torch.rand(3)  # what others draw in between
        return found, *torch.autograd.grad((found * weights).sum(), values)

    expected = gradients(plain)
    for found, wanted in zip(
        gradients(lambda x, mu, d: gates.multiply(x, gates.Gates(mu, d), per_token)), expected, strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    before = torch.get_rng_state()
    gates.multiply(values[0], gates.Gates(*values[1:])).sum().backward()
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    torch.randn(2, 5, 4, dtype=torch.float64)
    assert torch.equal(torch.get_rng_state(), after)  # drawing again moves nobody's generator on


@pytest.mark.parametrize("size", [(4,), (2, 5, 4), (2, 1, 4)], ids=["all", "token", "window"])
@pytest.mark.parametrize("features", [1, 3])
def test_the_product_with_given_gates_has_the_gradients_of_a_plain_one(features, size):
    torch.manual_seed(0)
    x, by = (torch.randn(size, dtype=torch.float64).requires_grad_() for size in ((2, 5, 4 * features), size))
    weights = torch.randn(2, 5, 4 * features, dtype=torch.float64)
    found, expected = gates.multiply(x, by), x * by.repeat_interleave(features, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for one, wanted in zip(
        *(torch.autograd.grad((product * weights).sum(), (x, by)) for product in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("recomputes", [True, False])
def test_what_is_a_product_is_computed_again_of_its_factors_to_the_bit(recomputes, given):
    torch.manual_seed(0)
    one, other = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(2))
    leaves = [torch.rand(4).requires_grad_() for _ in range(1 if given else 2)]
    by = leaves[0] if given else gates.Gates(*leaves)

    def gradients(recomputes):
        torch.manual_seed(7)
        product = one * other
        found = gates.multiply(product, by, recomputes=recomputes)
        kept = {tensor.data_ptr() for tensor in found.grad_fn.saved_tensors if tensor is not None}
        return product.data_ptr() in kept, torch.autograd.grad(found.sum(), (one, other, *leaves))

    (keeps, found), (_, expected) = gradients(recomputes), gradients(False)
    assert keeps is not recomputes
    assert all(map(torch.equal, found, expected))
