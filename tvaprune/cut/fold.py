"""The instant weight update: the learned means of the kept gates go into the weights of the sliced model.

Source: docs/method.md, section 5. Which factor enters where is `tvaprune.plan.edits`.
"""

import torch
from transformers import PreTrainedModel

from tvaprune.models.families import family_of
from tvaprune.plan.edits import edits_of
from tvaprune.plan.keep_plan import KeepPlan


@torch.no_grad()
def fold(model: PreTrainedModel, plan: KeepPlan) -> PreTrainedModel:
    """Multiplies a model that was sliced by ``plan`` by the plan's factors, in place, and returns it."""
    for name, edit in edits_of(plan, family_of(model.config), model.device).items():
        if edit.folds:
            weight = model.get_parameter(name)
            edit.on(weight.device).folded(weight, into=weight)
    return model
