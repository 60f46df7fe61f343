"""The teacher-student loss: pure."""

import torch
from torch.nn import functional


def distillation_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Returns ``T^2 * KL(teacher || student)`` at temperature ``T``, the mean over the predicted tokens.

    The factor ``T^2`` keeps the gradient's size independent of ``T`` (Hinton et al., 2015, section 2).

    Args:
        student_logits: Shape ``(batch, length, vocabulary)``.
        teacher_logits: The same shape.
        labels: Shape ``(batch, length)``; the logits at position ``i`` predict ``labels[:, i + 1]``; labels equal to
            ``ignore_index`` do not count. ``None``: every position but the last counts.
    """
    student = functional.log_softmax(student_logits[:, :-1].float() / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_logits[:, :-1].float() / temperature, dim=-1)
    per_token = functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    if labels is None:
        return temperature**2 * per_token.mean()
    counted = (labels[:, 1:] != ignore_index).to(per_token.dtype)
    return temperature**2 * (per_token * counted).sum() / counted.sum().clamp(min=1)
