"""Keep plan -> narrower model: the one knife that cuts.

One weight at a time: the peak of memory is the dense model and one weight. Source: docs/method.md, section 5.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.models.families import family_of
from tvaprune.models.pruned import config_of_widths, empty_model, set_parameter, shared_names
from tvaprune.plan.edits import Edit, edits_of
from tvaprune.plan.keep_plan import KeepPlan


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: KeepPlan, device: torch.device | None = None) -> PreTrainedModel:
    """Returns the narrower model: its class, config and weights are those of the checkpoint that it is saved as.

    The factors of the plan are left to `tvaprune.cut.fold`.

    Args:
        model: The dense model. It is used up: its weights go, one by one, as those of the narrower model come.
        device: Of the narrower model, to which the weights go one by one; None: each stays where it is.
    """
    narrow, edits = narrow_shell(model, plan, device), edits_of(plan, family_of(model.config), device or model.device)
    for names in shared_names(model):
        weight = _cut(model, names, edits.get(names[0], Edit()), device)
        for name in names:
            check_size(name, weight, narrow.get_parameter(name).shape)
            set_parameter(narrow, name, weight)
    return narrow


def narrow_shell(model: PreTrainedModel, plan: KeepPlan, device: torch.device | None = None) -> PreTrainedModel:
    """Returns the narrower model without its weights.

    Args:
        device: Where it will compute, if the dense model has no weights either.
    """
    return empty_model(config_of_widths(model.config, plan.shape_stored), model, device)


def check_size(name: str, weight: torch.Tensor, wanted: torch.Size) -> None:
    """Raises `ValueError` if a cut weight is not of the size that the narrower model has."""
    if weight.shape != wanted:
        raise ValueError(f"no edit makes {name} of shape {tuple(wanted)}: the family's row lacks it")


def lent(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a model of the same weights that may be used up: the weights themselves stay where they are."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _cut(model: nn.Module, names: list[str], edit: Edit, device: torch.device | None) -> nn.Parameter:
    """Takes a parameter out of the model and returns a copy of what is kept; nothing holds the dense one here."""
    dense = model.get_parameter(names[0])
    for name in names:
        set_parameter(model, name, None)
    moved = dense if device is None else dense.to(device)
    kept = edit.on(moved.device).kept(moved)
    return nn.Parameter(kept.clone() if kept is dense else kept, requires_grad=dense.requires_grad)
