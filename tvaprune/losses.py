"""The losses over logits, in chunks of positions: the head runs on a chunk, and all logits are never there at once.

The logits of 8 blocks of 512 tokens over 128,256 tokens are 2 GiB in float32, and a loss with its gradient holds some
six times that of student and teacher. Under a head that is not trained the gradient to its input is computed with the
chunk's loss, and nothing else is kept for the backward pass; else the chunk is computed again there.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
CHUNK_TOKENS = 1024  # whose logits are there at a time
LARGE_VOCABULARY = 2**16  # tokens, of more than which half as many positions are a chunk


def _same(states: torch.Tensor) -> torch.Tensor:
    return states


@dataclass(frozen=True)
class Predictions:
    """Logits that are yet to be computed.

    Attributes:
        states: What the head reads, shape ``(batch, length, width)``.
        head: From states to logits, position by position; the default: the states are the logits.
    """

    states: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor] = _same

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """Returns the logits of some positions, shape ``(batch, stop - start, vocabulary)``."""
        return self.head(positions(self.states, start, stop))

    @property
    def is_trained(self) -> bool:
        """Whether the head has parameters that want gradients: asked of no position."""
        return self.head(self.states[:, :0].detach()).requires_grad

    @property
    @torch.no_grad()
    def vocabulary(self) -> int:
        """The tokens that are predicted: asked of no position."""
        return self.logits(0, 0).shape[-1]


def positions(states: torch.Tensor, start: int, stop: int | None = None) -> torch.Tensor:
    """Returns some positions of states, contiguous: of a view a CPU multiplies by a copy of the head for each block."""
    return states[:, start:stop].contiguous()


Logits = torch.Tensor | Predictions  # shape (batch, length, vocabulary)


def in_full(values: torch.Tensor) -> AbstractContextManager[object]:
    """Returns a context in which a sum of products is made in its own precision, whatever a training's ``--bf16``."""
    device = values.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


@dataclass(frozen=True)
class Loss:
    """A mean over the positions that predict, which is yet to be computed.

    Attributes:
        function: ``function(logits, *others, *values)``, a number a position; it depends on no other position.
        others: Logits of others than the student, which are not trained.
        values: Of the positions, shape ``(batch, length - 1, ...)``.
        labels: Those equal to `IGNORE_INDEX` do not count, shape ``(batch, length)``; None: all positions count.
        factor: What the mean is multiplied by.
    """

    function: Callable[..., torch.Tensor]
    others: tuple[Logits, ...] = ()
    values: tuple[torch.Tensor, ...] = ()
    labels: torch.Tensor | None = None
    factor: float = 1.0


def evaluated(logits: Logits, *losses: Loss) -> list[torch.Tensor]:
    """Returns losses of the same predictions; what their head computes serves all of them.

    Args:
        logits: The student's, shape ``(batch, length, vocabulary)``.
    """
    found = _per_position(_lazy(logits), losses).unbind(-1)
    return [loss.factor * _mean(each, loss.labels) for loss, each in zip(losses, found, strict=True)]


def likelihood(labels: torch.Tensor) -> Loss:
    """Returns the mean negative log-likelihood of the counted labels; the logits at ``i`` predict label ``i + 1``.

    Args:
        labels: Shape ``(batch, length)``; those equal to `IGNORE_INDEX` do not count.
    """

    def missed(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        flat = logits.flatten(0, 1).float()
        found = functional.cross_entropy(flat, wanted.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
        return found.view_as(wanted)

    return Loss(missed, values=(labels[:, 1:],), labels=labels)


def distillation(teacher_logits: Logits, temperature: float = 1.0, labels: torch.Tensor | None = None) -> Loss:
    """Returns ``T^2 * KL(teacher || student)`` at temperature ``T``, the mean over the predicted tokens.

    The factor ``T^2`` keeps the gradient's size independent of ``T`` (Hinton et al., 2015, section 2).

    Args:
        teacher_logits: Shape ``(batch, length, vocabulary)``.
        labels: Shape ``(batch, length)``; the logits at position ``i`` predict ``labels[:, i + 1]``; labels equal to
            `IGNORE_INDEX` do not count. ``None``: every position but the last counts.
    """

    def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        own, other = (functional.log_softmax(logits.float() / temperature, dim=-1) for logits in (student, teacher))
        with in_full(own):
            return torch.linalg.vecdot(other.exp(), other - own)

    return Loss(divergence, (teacher_logits,), (), labels, temperature**2)


def top_k_distillation(
    tokens: torch.Tensor, log_probs: torch.Tensor, temperature: float = 1.0, labels: torch.Tensor | None = None
) -> Loss:
    """Returns `distillation` over the teacher's likeliest tokens, all others counted as one outcome.

    Nothing is renormalised: it is a lower bound of the full KL (merging outcomes never adds information), and the full
    KL where the tokens are the whole vocabulary.

    Args:
        tokens: What `top_k` returned for the same positions and temperature, shape ``(batch, length, k)``.
        log_probs: The same shape.
        labels: As in `distillation`.
    """

    def divergence(logits: torch.Tensor, likeliest: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        student = functional.log_softmax(logits.float() / temperature, dim=-1).gather(-1, likeliest.long())
        per_token = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        if likeliest.shape[-1] < logits.shape[-1]:
            rest_teacher, rest_student = _rest(teacher), _rest(student)
            per_token = per_token + torch.xlogy(rest_teacher, rest_teacher / rest_student)
        return per_token

    return Loss(divergence, (), (tokens[:, :-1], log_probs[:, :-1]), labels, temperature**2)


def cross_entropy(logits: Logits, labels: torch.Tensor) -> torch.Tensor:
    """Returns the `likelihood` loss of one model's logits."""
    return evaluated(logits, likelihood(labels))[0]


def distillation_loss(
    student_logits: Logits, teacher_logits: Logits, temperature: float = 1.0, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the `distillation` loss of a student's logits."""
    return evaluated(student_logits, distillation(teacher_logits, temperature, labels))[0]


@torch.no_grad()
def top_k(logits: Logits, k: int, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns what `top_k_distillation` needs of a teacher: its likeliest tokens and their log-probabilities.

    Args:
        logits: Shape ``(batch, length, vocabulary)``.
        k: Tokens per position, at most the vocabulary.

    Returns:
        Token ids (int32) and log-probabilities at the temperature (float32), shape ``(batch, length, k)`` each.
    """

    def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_probs = functional.log_softmax(logits.float() / temperature, dim=-1)
        values, tokens = log_probs.topk(min(k, logits.shape[-1]), dim=-1)
        return tokens.int(), values

    side = _lazy(logits)
    parts = [likeliest(side.logits(*span)) for span in spans(side, side.states.shape[1])]
    tokens, log_probs = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return tokens, log_probs


def largest_difference(first: Logits, second: Logits) -> torch.Tensor:
    """Returns the largest difference between two models' logits, over all positions."""
    own, other = _lazy(first), _lazy(second)
    parts = [
        (own.logits(*span).float() - other.logits(*span).float()).abs().max()
        for span in spans(own, own.states.shape[1])
    ]
    return torch.stack(parts).max()


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


def chunk_tokens(vocabulary: int) -> int:
    """Returns the tokens whose logits are there at a time."""
    return CHUNK_TOKENS if vocabulary <= LARGE_VOCABULARY else CHUNK_TOKENS // 2


def spans(side: Predictions, length: int) -> list[tuple[int, int]]:
    """Returns the first ``length`` positions in chunks of `chunk_tokens` tokens: first, past the last."""
    size = max(1, chunk_tokens(side.vocabulary) // side.states.shape[0])
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _lazy(logits: Logits) -> Predictions:
    return logits if isinstance(logits, Predictions) else Predictions(logits)


def _per_position(student: Predictions, losses: Sequence[Loss]) -> torch.Tensor:
    """Returns what losses are the means of, a chunk of the positions that predict at a time: all but the last.

    Returns:
        Shape ``(batch, length - 1, losses)``.
    """
    count = student.states.shape[1] - 1
    chunks = spans(student, count)

    def part(states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        own = student.head(states)[:, : stop - start]
        found = []
        for loss in losses:
            others = [_lazy(one).logits(start, start + states.shape[1])[:, : stop - start] for one in loss.others]
            found.append(loss.function(own, *others, *(value[:, start:stop] for value in loss.values)))
        return torch.stack(found, dim=-1)

    if len(chunks) == 1:
        return part(student.states, 0, count)  # the head runs on whole windows
    if student.is_trained:
        part = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    elif student.states.requires_grad and torch.is_grad_enabled():
        found: torch.Tensor = _AtOnce.apply(student.states, part, chunks)
        return found
    return torch.cat([part(positions(student.states, *span), *span) for span in chunks], dim=1)


class _AtOnce(torch.autograd.Function):
    """What `_per_position` returns, each chunk's together with its gradients to the states."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, part: Callable[..., torch.Tensor], chunks: list[tuple[int, int]]
    ) -> torch.Tensor:
        found: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []  # of each loss
        for start, stop in chunks:
            with torch.enable_grad():
                own = positions(states, start, stop).detach().requires_grad_()
                values = part(own, start, stop)
                sums = values.sum((0, 1)).unbind()
                gradients = gradients or [torch.zeros_like(states) for _ in sums]
                for gradient, each in zip(gradients, sums, strict=True):
                    (gradient[:, start:stop],) = torch.autograd.grad(each, own, retain_graph=each is not sums[-1])
            found.append(values.detach())
        ctx.save_for_backward(*gradients)
        return torch.cat(found, dim=1)

    @staticmethod
    def backward(ctx: Any, of_values: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weights = functional.pad(of_values, (0, 0, 0, 1)).unbind(-1)
        result, *others = (  # no float32 copy in between
            torch.mul(gradient, by.unsqueeze(-1), out=torch.empty_like(gradient))
            for gradient, by in zip(ctx.saved_tensors, weights, strict=True)
        )
        for other in others:
            result += other
        return result, None, None


def _rest(log_probs: torch.Tensor) -> torch.Tensor:
    smallest = torch.finfo(torch.float32).eps  # of a difference to 1: less is rounding
    return (1 - log_probs.exp().sum(-1)).clamp(min=smallest)


def _mean(per_token: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Returns the mean over the positions whose next label counts."""
    if labels is None:
        return per_token.mean()
    counted = (labels[:, 1:] != IGNORE_INDEX).to(per_token.dtype)
    return (per_token * counted).sum() / counted.sum().clamp(min=1)
