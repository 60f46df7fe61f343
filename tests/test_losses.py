import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tvaprune.losses import (
    CHUNK_TOKENS,
    Predictions,
    chunk_tokens,
    cross_entropy,
    distillation,
    distillation_loss,
    evaluated,
    hidden_loss,
    largest_difference,
    likelihood,
    spans,
    top_k,
    top_k_distillation,
)

# Vocabulary of two, three positions; the last one predicts nothing.
TEACHER = torch.tensor([[[0.0, 0.0], [math.log(3.0), 0.0], [5.0, -5.0]]])
STUDENT = torch.tensor([[[math.log(3.0), 0.0], [math.log(3.0), 0.0], [-5.0, 5.0]]])
# Position 0: teacher (1/2, 1/2), student (3/4, 1/4): 1/2 log(2/3) + 1/2 log 2 = 1/2 log(4/3)
FIRST = 0.5 * math.log(4 / 3)


def test_loss_by_hand():
    assert distillation_loss(STUDENT, TEACHER).item() == pytest.approx(FIRST / 2, abs=1e-6)  # position 1 agrees: 0


def test_it_is_the_teachers_expectation():
    # The other way round: 3/4 log(3/2) + 1/4 log(1/2) differs from 1/2 log(4/3)
    expected = (0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert distillation_loss(TEACHER, STUDENT).item() == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(FIRST / 2, abs=1e-3)


def test_temperature_divides_the_logits_and_its_square_multiplies_the_loss():
    # T = 2: the student at position 0 has sqrt(3) : 1, p = 0.633975; 1/2 log(1/2 / p) + 1/2 log(1/2 / (1 - p)), times 4
    p = math.sqrt(3) / (math.sqrt(3) + 1)
    expected = 4 * (0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))) / 2
    assert distillation_loss(STUDENT, TEACHER, temperature=2.0).item() == pytest.approx(expected, abs=1e-6)
    assert expected != pytest.approx(FIRST / 2, abs=1e-3)


def test_positions_of_ignored_labels_do_not_count():
    # labels[:, i + 1] is what position i predicts
    only_first = torch.tensor([[7, 1, -100]])
    only_second = torch.tensor([[7, -100, 1]])
    assert distillation_loss(STUDENT, TEACHER, labels=only_first).item() == pytest.approx(FIRST, abs=1e-6)
    assert distillation_loss(STUDENT, TEACHER, labels=only_second).item() == pytest.approx(0.0, abs=1e-6)
    all_counted = torch.tensor([[-100, 1, 1]])  # the first label is predicted by nothing
    assert distillation_loss(STUDENT, TEACHER, labels=all_counted).item() == pytest.approx(FIRST / 2, abs=1e-6)


def test_nothing_to_predict_is_a_loss_of_zero():
    assert distillation_loss(STUDENT, TEACHER, labels=torch.full((1, 3), -100)).item() == 0.0


def test_the_last_position_never_counts():
    changed = STUDENT.clone()
    changed[:, -1] += torch.tensor([9.0, 0.0])
    assert distillation_loss(changed, TEACHER) == distillation_loss(STUDENT, TEACHER)
    changed[:, 0] += torch.tensor([9.0, 0.0])  # control
    assert distillation_loss(changed, TEACHER) > distillation_loss(STUDENT, TEACHER) + 0.1


def test_the_gradient_is_the_difference_of_the_probabilities():
    student = STUDENT.clone().requires_grad_()
    distillation_loss(student, TEACHER).backward()
    # d KL / d logits = softmax(student) - softmax(teacher) = (3/4, 1/4) - (1/2, 1/2), over two positions
    expected = torch.tensor([[[0.125, -0.125], [0.0, 0.0], [0.0, 0.0]]])
    torch.testing.assert_close(student.grad, expected)


# Vocabulary of three: teacher (1/2, 1/4, 1/4), student (1/4, 1/4, 1/2); the second position predicts nothing.
TEACHER_OF_3 = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 1.0, 1.0]]]).log()
STUDENT_OF_3 = torch.tensor([[[0.25, 0.25, 0.5], [1.0, 1.0, 1.0]]]).log()


def of_top(k, temperature=1.0, labels=None):
    return evaluated(STUDENT_OF_3, top_k_distillation(*top_k(TEACHER_OF_3, k, temperature), temperature, labels))[
        0
    ].item()


def test_with_one_token_kept_the_others_count_as_one():
    # Token 0 and the rest: teacher (1/2, 1/2), student (1/4, 3/4)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert of_top(1) == pytest.approx(expected, abs=1e-6)
    # The full KL: 1/2 log 2 + 1/4 log 1 + 1/4 log(1/2) = 1/4 log 2
    assert expected != pytest.approx(0.25 * math.log(2), abs=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [3, 9])
def test_with_the_whole_vocabulary_kept_it_is_the_full_loss(k, temperature):
    expected = distillation_loss(STUDENT_OF_3, TEACHER_OF_3, temperature).item()
    assert of_top(k, temperature) == pytest.approx(expected, abs=1e-6)
    assert of_top(1, temperature) < expected - 1e-3  # control: less is kept


def test_the_more_tokens_are_kept_the_more_of_the_loss_is_seen():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 5, 11, generator=generator) for _ in range(2))
    losses = [evaluated(student, top_k_distillation(*top_k(teacher, k)))[0].item() for k in range(1, 12)]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(distillation_loss(student, teacher).item(), abs=1e-6)


def test_kept_tokens_of_ignored_labels_do_not_count():
    assert of_top(1, labels=torch.tensor([[0, -100]])) == 0.0
    assert of_top(1, labels=torch.tensor([[-100, 0]])) == pytest.approx(of_top(1))


def test_a_token_that_the_teacher_is_sure_of_gives_a_finite_gradient():
    student = torch.zeros(1, 2, 3, requires_grad=True)
    teacher = torch.tensor([[[100.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    evaluated(student, top_k_distillation(*top_k(teacher, 1)))[0].backward()
    # softmax(student) - softmax(teacher) = (1/3, 1/3, 1/3) - (1, 0, 0)
    torch.testing.assert_close(student.grad[0, 0], torch.tensor([-2 / 3, 1 / 3, 1 / 3]))


def test_hidden_states_are_compared_by_direction_on_the_kept_dims():
    teacher = (torch.tensor([[[3.0, 9.0, 4.0]]]), torch.tensor([[[1.0, 7.0, 0.0]]]))
    kept = torch.tensor([0, 2])  # of the teacher: (3, 4) and (1, 0)
    student = (torch.tensor([[[6.0, 8.0]]]), torch.tensor([[[1.0, 1.0]]]))  # the first is twice the teacher's
    ones = (torch.ones(2), torch.ones(2))
    expected = (0 + (1 - math.sqrt(0.5))) / 2
    assert hidden_loss(student, teacher, kept, ones).item() == pytest.approx(expected, abs=1e-6)
    assert hidden_loss(student, teacher, torch.tensor([0, 1]), ones).item() != pytest.approx(expected, abs=1e-3)
    # With factors (4, 3) the first of the teacher is (12, 12): the cosine to (6, 8) is 14 / (10 sqrt 2)
    expected = (1 - 14 / math.sqrt(200) + 1 - math.sqrt(0.5)) / 2
    assert hidden_loss(student, teacher, kept, (torch.tensor([4.0, 3.0]), ones[1])).item() == pytest.approx(expected)


def losses_of(student, teacher, labels):
    tokens, log_probs = top_k(teacher, 3)
    return [
        distillation_loss(student, teacher, 2.0, labels),
        evaluated(student, top_k_distillation(tokens, log_probs, 1.0, labels))[0],
        cross_entropy(student, labels),
    ]


@pytest.mark.parametrize("chunk", [1, 3, 8, 16, 17])  # tokens, of 2 x 8 that predict
def test_chunks_of_positions_change_neither_losses_nor_gradients(chunk, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 9, 11, generator=generator) for _ in range(2))
    labels = torch.randint(0, 11, (2, 9), generator=generator)
    labels[0, 3:5] = -100

    def observed():
        logits = student.clone().requires_grad_()
        losses = losses_of(logits, teacher, labels)
        return losses, [torch.autograd.grad(loss, logits)[0] for loss in losses]

    whole, gradients = observed()
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", chunk)
    parts, same = observed()
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))
    torch.testing.assert_close(same, gradients, rtol=1e-6, atol=1e-8)  # scaled last in place of first


def largest_in_float32(student, teacher):
    """The elements of the largest tensor that a loss and its backward pass make, the gradient of the logits aside."""
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                sizes.append(result.numel())
            return result

    with Watch():
        distillation_loss(student, teacher).backward()
    return max(sizes)


def test_no_float32_copy_of_all_logits_is_made(monkeypatch):
    student = torch.randn(2, 65, 10).bfloat16().requires_grad_()
    teacher = torch.randn(2, 65, 10).bfloat16()
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 16)
    assert largest_in_float32(student, teacher) == 16 * 10
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 128)  # control
    assert largest_in_float32(student, teacher) == 128 * 10


def heads(batch=2, length=9, width=6, vocabulary=11):
    """States and heads of a student and a teacher, and labels; two of these do not count."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(batch, length, width, generator=generator) for _ in range(2)]
    weights = [torch.randn(vocabulary, width, generator=generator) for _ in range(2)]
    labels = torch.randint(0, vocabulary, (batch, length), generator=generator)
    labels[0, 3:5] = -100
    return states, weights, labels


def observed(whole, states, weights, labels):
    """All losses, and their gradients to the student's states and to its head."""
    (own, other), (head, other_head) = states, weights
    own, head = own.clone().requires_grad_(), head.clone().requires_grad_()
    sides = Predictions(own, lambda x: x @ head.T), Predictions(other, lambda x: x @ other_head.T)
    student, teacher = (side.head(side.states) for side in sides) if whole else sides
    losses = losses_of(student, teacher, labels)
    return losses, [torch.autograd.grad(loss, (own, head), retain_graph=True) for loss in losses]


@pytest.mark.parametrize("chunk", [1, 3, 8, 16, 18])
def test_losses_from_states_are_those_of_all_logits_and_so_are_the_gradients(chunk, monkeypatch):
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", chunk)
    found, expected = (observed(whole, *heads()) for whole in (False, True))
    tight = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(found, expected, **tight)
    (own, other), (head, other_head), labels = heads()
    shifted = observed(True, [own, other], [head, other_head.roll(1, 0)], labels)
    with pytest.raises(AssertionError):  # control: another teacher's
        torch.testing.assert_close(found, shifted, **tight)


@pytest.mark.parametrize(("is_trained", "times"), [(False, 1), (True, 2)])
def test_the_head_never_sees_more_than_a_chunk_and_sees_it_once_where_it_is_not_trained(is_trained, times, monkeypatch):
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 6)
    (own, other), (head, other_head), labels = heads()
    head.requires_grad_(is_trained)
    asked = []

    def counted(states):
        asked.append(states.shape[0] * states.shape[1])
        return states @ head.T

    student = Predictions(own.requires_grad_(), counted)
    sum(evaluated(student, likelihood(labels), distillation(other @ other_head.T, 2.0, labels))).backward()
    assert max(asked) == 6
    assert sum(asked) == (1 + is_trained) * 16  # for both losses; what is trained is computed again, backward
    assert own.grad.abs().sum() > 0 and (head.grad is not None) is is_trained


def test_half_precision_rounds_the_gradient_once(monkeypatch):
    """It is scaled by 1 over the tokens in float32: in bfloat16 that number alone would be off by a thousandth."""
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 6)
    (own, other), (head, other_head), labels = heads()
    student = own.bfloat16().requires_grad_()
    loss = distillation_loss(Predictions(student, lambda x: x.float() @ head.T), other @ other_head.T, labels=labels)
    loss.backward()
    exact = own.bfloat16().float().requires_grad_()
    distillation_loss(exact @ head.T, other @ other_head.T, labels=labels).backward()
    torch.testing.assert_close(student.grad.float(), exact.grad, rtol=2**-7, atol=1e-8)
    assert abs((student.grad.float() * exact.grad).sum() / exact.grad.square().sum() - 1) < 1e-3


def test_a_trainings_autocast_does_not_round_the_sum(monkeypatch):
    student, teacher = (torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = distillation_loss(student, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distillation_loss(student, teacher), exact)
        monkeypatch.setattr("tvaprune.losses.in_full", lambda values: nullcontext())
        assert distillation_loss(student, teacher) != exact  # control


def test_the_largest_difference_of_two_models_by_hand(monkeypatch):
    monkeypatch.setattr("tvaprune.losses.CHUNK_TOKENS", 2)
    first, second = torch.zeros(1, 5, 3), torch.zeros(1, 5, 3)
    second[0, 1, 2], second[0, 4, 0] = 0.5, -2.0
    assert largest_difference(first, second).item() == 2.0
    assert largest_difference(first, first).item() == 0.0


def test_of_a_large_vocabulary_half_as_many_positions_are_a_chunk():
    head = torch.zeros(2**16 + 1, 2)
    for vocabulary, size in ((2**16, CHUNK_TOKENS), (2**16 + 1, CHUNK_TOKENS // 2)):
        side = Predictions(torch.zeros(2, CHUNK_TOKENS, 2), lambda x, rows=vocabulary: x @ head[:rows].T)
        assert side.vocabulary == vocabulary and chunk_tokens(vocabulary) == size
        assert spans(side, CHUNK_TOKENS)[0] == (0, size // 2)
