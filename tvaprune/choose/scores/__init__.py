"""One-shot scores of KV heads and MLP channels, in the form of masks: the same file, plan and knife as learned gates.

Hidden dims are kept, as these methods do. A score becomes a mask of mean 1 whose ``log_alpha`` is the negated score, so
`tvaprune.plan.exact_cut.calibrate` finds the threshold for the exact sparsity. Each function cites its source, says
what it ranks over, and gives the group form under GQA, where a KV head is one unit with all query heads that share it.
"""

from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune.choose.scores.activations import magnitude_scores, wanda_sp_scores
from tvaprune.choose.scores.bonsai import bonsai_scores
from tvaprune.choose.scores.calibration import Calibration
from tvaprune.choose.scores.flap import flap_scores
from tvaprune.choose.scores.kept import KeptRounds
from tvaprune.choose.scores.ranking import random_scores
from tvaprune.choose.scores.taylor import taylor_global_scores, taylor_scores
from tvaprune.errors import InputError
from tvaprune.models.shape import ModelShape, shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.masks import Masks

SCORES: dict[str, Callable[[Calibration], PerUnit]] = {
    "magnitude": magnitude_scores,
    "wanda_sp": wanda_sp_scores,
    "flap": flap_scores,
    "taylor": taylor_scores,
    "taylor_global": taylor_global_scores,
    "bonsai": bonsai_scores,
    "random": random_scores,
}
# What ranks within each layer: its number of heads is for one target alone. The others' choice serves every target.
PER_TARGET = frozenset({"magnitude", "wanda_sp", "taylor", "random"})
BACKWARD = frozenset({"taylor", "taylor_global"})  # what asks for gradients of all projections


def check_scored(method: str, shape: ModelShape) -> None:
    """Refuses a model that has next to nothing that a one-shot method cuts; gates pass.

    Raises:
        InputError: If it is a mixture of experts.
    """
    if method in SCORES and any(shape.experts):
        raise InputError(
            f"--prune_method {method}: scores KV heads and MLP channels, keeps all hidden dims, and experts lose "
            "nothing else: use --prune_method vib for a mixture of experts"
        )


@torch.no_grad()
def score_masks(
    model: PreTrainedModel,
    method: str,
    blocks: Dataset,
    target: float = 0.5,
    seed: int = 0,
    batch_size: int = 4,
    kept: KeptRounds | None = None,
) -> Masks:
    """Scores every KV head and MLP channel.

    Args:
        method: One of `SCORES`.
        blocks: Calibration windows.
        target: The sparsity that the masks are for, those of `PER_TARGET` for this alone; of several targets, Bonsai's
            order for the largest serves the smaller ones too.
        seed: Of the draws of ``random`` and ``bonsai``.
        batch_size: Windows per forward pass.
        kept: As `Calibration` says; of this model, text, seed and batch size alone.

    Returns:
        Masks of mean 1; the larger a unit's ``log_alpha``, the sooner it goes.

    Raises:
        InputError: As `check_scored`.
    """
    shape = shape_of(model.config)
    check_scored(method, shape)
    scores = SCORES[method](Calibration(model, blocks, target, seed, batch_size, kept))
    ones = PerUnit.full(shape, 1.0)
    return Masks(mu=ones, log_variance=scores.map(lambda score: -score.float().cpu()))
