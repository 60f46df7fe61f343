"""The model under the gates stays what it is while they train: without its dropout, with its checkpointing."""

import pytest
import torch

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.settings import gate_settings
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.plan.widths import WidthRules

NOISY = {  # what a family's config may leave to chance in training
    "llama": {"attention_dropout": 0.5},
    "granite": {"attention_dropout": 0.5},
    "seed_oss": {"attention_dropout": 0.0, "residual_dropout": 0.5},
    "phi3": {"resid_pdrop": 0.5},
    "mixtral": {"router_jitter_noise": 0.5},
}


def objective_of(model, log_variance):
    settings = gate_settings(PruneSettings(target_sparsity=[0.3]), DistillSettings(), 8, 8, 5.0, WidthRules(4))
    return PruningObjective(GatedModel(model, log_variance), settings)


@pytest.mark.parametrize("family", NOISY)
def test_dropout_of_the_frozen_model_stays_off_in_training(family, make_model, input_ids):
    objective = objective_of(make_model(family, **NOISY[family]), -60.0)
    with torch.no_grad():
        objective.gated.mu.fill_(1.0)
    objective.train()  # as Trainer does
    assert float(objective(input_ids, beta=5.0, target=0.0)["task_loss"].detach()) < 1e-6
    objective.gated.model.train()  # control
    assert float(objective(input_ids, beta=5.0, target=0.0)["task_loss"].detach()) > 1e-4


def test_activations_are_computed_again_all_the_same(make_model, input_ids):
    calls = {}
    for checkpointing in (False, True):
        objective = objective_of(make_model("llama"), -3.0)
        if checkpointing:
            objective.activation_checkpointing_enable()
        objective.train()
        seen = calls[checkpointing] = []
        objective.gated.model.model.layers[0].mlp.act_fn.register_forward_hook(lambda *args, seen=seen: seen.append(1))
        objective(input_ids, beta=5.0, target=0.2)["loss"].backward()
    assert len(calls[True]) == len(calls[False]) + 1
