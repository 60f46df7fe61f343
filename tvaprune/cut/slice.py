"""Keep plan -> narrower model: the one knife that cuts.

One weight at a time: the peak of memory is the dense model and one weight. Source: docs/method.md, section 5.
"""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from tvaprune.models.families import family_of
from tvaprune.models.layers import Layers
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


class Cut:
    """Fetches the weights of a narrower model, as the cut leaves them, from the dense one's.

    Args:
        dense: The dense model; a weight is cut where it is.
        narrow: The narrower one, whose own weights need not be there.
        folds: Whether the means are folded in.
    """

    def __init__(self, dense: Layers, narrow: PreTrainedModel, plan: KeepPlan, folds: bool = True) -> None:
        self.dense, self.edits, self.folds = dense, edits_of(plan, dense.family), folds
        self.names = {name: names[0] for names in shared_names(dense.model) for name in names}
        self.shapes = {name: weight.shape for name, weight in narrow.named_parameters(remove_duplicate=False)}

    def __call__(self, name: str) -> torch.Tensor:
        """Returns a weight, cut and folded."""
        dense = self.dense.weight(name)
        edit = self.edits.get(self.names[name], Edit()).on(dense.device)
        weight = edit.kept(dense)
        check_size(name, weight, self.shapes[name])
        return edit.folded(weight) if self.folds else weight


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
