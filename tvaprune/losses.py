"""The losses over logits: pure, and in chunks of positions, so that no float32 copy of all logits is ever there."""

from collections.abc import Callable, Iterator

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_TOKENS = 2048  # whose logits are in float32 at a time


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns the mean negative log-likelihood of the counted labels; the logits at ``i`` predict label ``i + 1``.

    Args:
        logits: Shape ``(batch, length, vocabulary)``.
        labels: Shape ``(batch, length)``; those equal to `IGNORE_INDEX` do not count.
    """
    wanted = labels[:, 1:]
    total = torch.stack(_in_chunks(_summed, logits[:, :-1], wanted)).sum()
    return total / (wanted != IGNORE_INDEX).sum().clamp(min=1)


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Returns ``T^2 * KL(teacher || student)`` at temperature ``T``, the mean over the predicted tokens.

    The factor ``T^2`` keeps the gradient's size independent of ``T`` (Hinton et al., 2015, section 2).

    Args:
        student_logits: Shape ``(batch, length, vocabulary)``.
        teacher_logits: The same shape.
        labels: Shape ``(batch, length)``; the logits at position ``i`` predict ``labels[:, i + 1]``; labels equal to
            ``ignore_index`` do not count. ``None``: every position but the last counts.
    """

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        own, other = (functional.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
        return functional.kl_div(own, other, reduction="none", log_target=True).sum(-1)

    per_token = torch.cat(_in_chunks(divergence, student_logits[:, :-1], teacher_logits[:, :-1]), dim=1)
    return temperature**2 * _mean(per_token, labels, ignore_index)


def top_k(logits: torch.Tensor, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `top_k_distillation_loss` needs of a teacher: its likeliest tokens and their log-probabilities.

    Args:
        logits: Shape ``(batch, length, vocabulary)``.
        k: Tokens per position, at most the vocabulary.

    Returns:
        Token ids (int32) and log-probabilities at the temperature (float32), shape ``(batch, length, k)`` each.
    """
    log_probs = functional.log_softmax(logits.float() / temperature, dim=-1)
    values, tokens = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
    return tokens.int(), values


def top_k_distillation_loss(
    student_logits: torch.Tensor,
    tokens: torch.Tensor,
    log_probs: torch.Tensor,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> torch.Tensor:
    """Returns `distillation_loss` over the teacher's likeliest tokens, all others counted as one outcome.

    Nothing is renormalised: it is a lower bound of the full KL (merging outcomes never adds information), and the full
    KL where the tokens are the whole vocabulary.

    Args:
        student_logits: Shape ``(batch, length, vocabulary)``.
        tokens: What `top_k` returned for the same positions and temperature, shape ``(batch, length, k)``.
        log_probs: The same shape.
        labels: As in `distillation_loss`.
    """

    def divergence(logits: torch.Tensor, likeliest: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student = functional.log_softmax(logits.float() / temperature, dim=-1).gather(-1, likeliest.long())
        per_token = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        if likeliest.shape[-1] < logits.shape[-1]:
            rest_teacher, rest_student = _rest(teacher), _rest(student)
            per_token = per_token + torch.xlogy(rest_teacher, rest_teacher / rest_student)
        return per_token

    parts = _in_chunks(divergence, student_logits[:, :-1], tokens[:, :-1], log_probs[:, :-1])
    return temperature**2 * _mean(torch.cat(parts, dim=1), labels, ignore_index)


def hidden_loss(
    student: tuple[torch.Tensor, ...],
    teacher: tuple[torch.Tensor, ...],
    kept: torch.Tensor,
    factors: tuple[torch.Tensor, ...],
) -> torch.Tensor:
    """Returns 1 minus the cosine of student's and teacher's hidden states, the mean over layers and tokens.

    The size of a hidden state means nothing, as the next norm divides by it: only the direction is compared.

    Args:
        student: A hidden state per layer, shape ``(batch, length, len(kept))``; of the embedding none is wanted.
        teacher: The same of the teacher, shape ``(batch, length, hidden)``.
        kept: The teacher's dims that the student has, int64.
        factors: Of each state, what the student's dims are multiples of the teacher's by, shape ``(len(kept),)``.
    """
    terms = []
    for own, other, factor in zip(student, teacher, factors, strict=True):
        target = other.float().index_select(-1, kept) * factor
        terms.append(1 - functional.cosine_similarity(own.float(), target, dim=-1).mean())
    return torch.stack(terms).mean()


def _summed(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    flat = logits.flatten(0, 1).float()
    return functional.cross_entropy(flat, wanted.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def _in_chunks(function: Callable[..., torch.Tensor], *values: torch.Tensor) -> list[torch.Tensor]:
    """Calls a function of tensors of shape ``(batch, length, ...)`` on a chunk of positions at a time.

    What it computes of a chunk is not kept for the backward pass but computed again. One chunk is a plain call.
    """
    batch, length = values[0].shape[:2]
    size = max(1, CHUNK_TOKENS // batch)
    if length <= size:
        return [function(*values)]
    parts: Iterator[tuple[torch.Tensor, ...]] = zip(*(value.split(size, dim=1) for value in values), strict=True)
    return [checkpoint(function, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    smallest = torch.finfo(torch.float32).eps  # of a difference to 1: less is rounding
    return (1 - log_probs.exp().sum(-1)).clamp(min=smallest)


def _mean(per_token: torch.Tensor, labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """Returns the mean over the positions whose next label counts."""
    if labels is None:
        return per_token.mean()
    counted = (labels[:, 1:] != ignore_index).to(per_token.dtype)
    return (per_token * counted).sum() / counted.sum().clamp(min=1)
