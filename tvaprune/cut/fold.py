"""The instant weight update: the learned means of the kept gates go into the weights of the sliced model.

Source: method, section 5.1. Which factor enters where is `tvaprune.plan.edits`.
"""

import torch
from transformers import PreTrainedModel

from tvaprune.cut.slice import narrow_parameter
from tvaprune.models.families import family_of
from tvaprune.plan.edits import Edit, edits_of
from tvaprune.plan.keep_plan import KeepPlan


@torch.no_grad()
def fold(model: PreTrainedModel, plan: KeepPlan) -> PreTrainedModel:
    """Multiplies a model that was sliced by ``plan`` by the plan's factors, in place, and returns it."""
    for name, edit in edits_of(plan, family_of(model.config), next(model.parameters()).device).items():
        weight = narrow_parameter(model, name)
        if weight is not None and (edit.row_factors is not None or edit.column_factors is not None):
            weight.copy_(_scaled(weight.float(), edit))  # one rounding, in the weights' own dtype
    return model


def _scaled(values: torch.Tensor, edit: Edit) -> torch.Tensor:
    """Returns a weight ``(rows, columns)`` or a vector ``(rows,)`` times its factors: rows first."""
    if edit.row_factors is not None:
        values = values * (edit.row_factors.unsqueeze(1) if values.dim() == 2 else edit.row_factors)
    return values if edit.column_factors is None else values * edit.column_factors
