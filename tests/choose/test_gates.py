import math

import pytest
import torch

from tvaprune.choose import gates
from tvaprune.plan.log_alpha import log_alpha as log_alpha_of


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
    loss = gates.information_loss(torch.tensor([1.0, 2.0, 0.0]), torch.zeros(3))
    assert loss.item() == pytest.approx(1.151293, abs=1e-5)


def test_information_loss_is_finite_without_noise():
    # 1/2 log(1 + 1 / 1e-8) = 9.210340
    assert gates.information_loss(torch.ones(1), torch.tensor([-1000.0])).item() == pytest.approx(9.210340, abs=1e-4)


def test_samples_have_the_gates_mean_and_deviation_and_differ_between_tokens():
    torch.manual_seed(0)
    mu, log_variance = torch.tensor([1.0, -2.0]), torch.tensor([0.0, math.log(9.0)])
    drawn = gates.sample(mu, log_variance, torch.Size([100, 200]))
    assert drawn.shape == (100, 200, 2)
    flat = drawn.flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), mu, atol=0.1, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.tensor([1.0, 3.0]), atol=0.1, rtol=0)
    assert torch.corrcoef(flat.T)[0, 1].abs() < 0.05  # units are drawn apart
    assert len(flat[:, 0].unique()) > 19_000  # so are tokens


def test_a_sample_passes_gradients_to_mean_and_log_variance():
    mu, log_variance = torch.ones(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    z = gates.sample(mu, log_variance, torch.Size([1]))
    z.sum().backward()
    # z = mu + eps exp(logD / 2): dz/dmu = 1, dz/dlogD = eps exp(logD / 2) / 2 = (z - mu) / 2
    assert mu.grad.item() == 1.0
    assert log_variance.grad.item() == pytest.approx((z.item() - 1) / 2)
