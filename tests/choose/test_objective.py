"""What gates are trained on: three terms, the teacher, the choice once it stands."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.gating import settings

from tvaprune.choose import gates
from tvaprune.choose.controller import expected_spread
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.widths import WidthRules


def test_a_trainings_autocast_rounds_neither_sparsity_nor_information(make_model, input_ids, monkeypatch):
    objective = PruningObjective(GatedModel(make_model("mistral"), -3.0), settings())
    with torch.no_grad():
        objective.lagrangian.lambda_1.fill_(2.0)

    def beside_the_task():
        parts = objective(input_ids, beta=5.0, target=0.25)
        return parts["expected_sparsity"], (parts["loss"] - parts["task_loss"]).float()

    monkeypatch.setattr(objective, "_task_loss", lambda ids: torch.zeros(()))
    exact = beside_the_task()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, beside_the_task(), exact))
        monkeypatch.setattr("tvaprune.choose.objective.in_full", lambda values: nullcontext())
        assert not torch.equal(beside_the_task()[1], exact[1])  # control


def test_the_objective_draws_layers_to_one_width_where_they_must_have_it(make_model, input_ids, monkeypatch):
    gated, free = GatedModel(make_model("llama")), settings()
    with torch.no_grad():
        gated.log_variance.normal_(generator=torch.Generator().manual_seed(0))
    penalties = []
    for chosen in (free, replace(free, rules=WidthRules(4, uniform=True))):
        objective = PruningObjective(gated, chosen)
        monkeypatch.setattr(objective, "_task_loss", lambda ids: torch.zeros(()))
        with torch.no_grad():
            objective.lagrangian.lambda_2.fill_(2.0)
            penalties.append(float(objective(input_ids, beta=2.0, target=0.25)["loss"]))
    spread = float(expected_spread(gated.log_alpha(), 2.0, gated.shape).detach())
    assert spread > 1e-4 and penalties[1] - penalties[0] == pytest.approx(2 * spread, rel=1e-2)


@pytest.mark.parametrize("distill", [True, False])
def test_the_objective_is_the_sum_of_its_three_terms(make_model, input_ids, distill):
    model = make_model("mistral")
    chosen = settings(distill=distill)
    objective = PruningObjective(GatedModel(model, -3.0), chosen)
    with torch.no_grad():
        objective.lagrangian.lambda_1.fill_(2.0)
        objective.lagrangian.lambda_2.fill_(3.0)
    parts = objective(input_ids, beta=5.0, target=0.25)
    masks = objective.gated.masks()
    # att_mul 256, inter_mul 1, emb_mult 30, and the hidden gate twice in each of 3 layers
    kl = masks.mu.map(lambda *gate: gates.information(*gate).sum(), masks.log_variance)
    information = sum(256 * a + 1 * i + 2 * kl.hidden for a, i in zip(kl.attn, kl.inter, strict=True)) + 30 * kl.hidden
    gap = parts["expected_sparsity"] - 0.25
    expected = parts["task_loss"] + 1e-6 * information + 2.0 * gap + 3.0 * gap**2
    torch.testing.assert_close(parts["loss"], expected)
    objective.gated.detach_gates()


def test_the_teacher_is_the_ungated_model_and_gates_of_one_lose_nothing(make_model, input_ids):
    objective = PruningObjective(GatedModel(make_model("llama"), -60.0), settings(distill=True))
    with torch.no_grad():
        objective.gated.mu.fill_(1.0)
    assert float(objective(input_ids, beta=5.0, target=0.0)["task_loss"].detach()) < 1e-6
    with torch.no_grad():
        objective.gated.mu[:9] = 0.5  # all of them would cancel in the norms
    assert float(objective(input_ids, beta=5.0, target=0.0)["task_loss"].detach()) > 1e-3
    objective.gated.detach_gates()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gates_are_drawn_to_the_ungated_model_by_the_forward_kl(temperature, make_model, input_ids):
    """KL(teacher || student); the reverse would forgive what the student leaves out."""
    chosen = replace(settings(distill=True), distill_temp=temperature)
    objective = PruningObjective(GatedModel(make_model("llama"), -60.0), chosen)
    uneven = objective.gated.masks().mu.map(lambda v: torch.linspace(0.2, 1.8, len(v)))
    with torch.no_grad(), objective.gated.using(uneven):
        loss = float(objective._task_loss(input_ids))
        student = (objective.gated(input_ids=input_ids).logits[:, :-1] / temperature).log_softmax(-1)
        with objective.gated.off():
            teacher = (objective.gated(input_ids=input_ids).logits[:, :-1] / temperature).log_softmax(-1)
    forward = temperature**2 * float((teacher.exp() * (teacher - student)).sum(-1).mean())
    reverse = temperature**2 * float((student.exp() * (student - teacher)).sum(-1).mean())
    assert abs(forward - reverse) > 0.02 * forward  # control: they can be told apart
    assert loss == pytest.approx(forward, rel=1e-4)


def test_settled_gates_keep_their_choice_and_train_the_kept_means_without_noise(make_model, input_ids):
    torch.manual_seed(0)
    objective = PruningObjective(GatedModel(make_model("llama"), -3.0), settings())
    with torch.no_grad():
        objective.gated.log_variance.add_(3 * torch.randn_like(objective.gated.log_variance))
    before = objective.masks().log_alpha
    noisy = [float(objective(input_ids, 5.0, 0.3)["loss"].detach()) for _ in range(2)]
    assert noisy[0] != noisy[1]  # control
    settled_mu = objective.gated.mu.detach().clone()
    objective.settle()
    parts = [objective(input_ids, 5.0, 0.3) for _ in range(2)]
    assert parts[0]["loss"].detach() == parts[1]["loss"].detach()
    parts[0]["loss"].backward()
    chosen = [values < 0 for values in objective.masks().log_alpha]
    sizes = objective.settings.rules
    plan = plan_from_masks(objective.masks(), objective.gated.shape, sizes)
    assert float(parts[0]["expected_sparsity"]) == pytest.approx(plan.sparsity) == pytest.approx(0.3, abs=0.05)
    kept = plan.full_scale()
    assert 0 < sum(int((scale == 0).sum()) for scale in kept)
    scale = kept.flat()
    assert torch.equal(objective.gated.mu.grad != 0, scale != 0)
    assert objective.gated.log_variance.grad is None
    with torch.no_grad():
        objective.gated.mu.mul_(
            0.01
        )  # would have moved log_alpha by 9; as momentum does, it moves the means of cut units too
    assert all(torch.equal(a, b < 0) for a, b in zip(chosen, objective.masks().log_alpha, strict=True))
    torch.testing.assert_close(objective.masks().mu.flat(), torch.where(scale != 0, 0.01 * settled_mu, settled_mu))
    assert not all(torch.equal(a, b < 0) for a, b in zip(chosen, before, strict=True))  # the exact cut is not 0
    objective.gated.detach_gates()


def test_settled_gates_compute_what_their_mask_will(make_model, input_ids):
    """Their norms divide by what they did before, which the cut knows."""
    torch.manual_seed(0)
    gated = GatedModel(make_model("llama"), -3.0, keeps_norm_width=True)
    objective = PruningObjective(gated, settings())
    with torch.no_grad():
        gated.log_variance.add_(3 * torch.randn_like(gated.log_variance))
        objective.settle()
        loss = objective(input_ids, 5.0, 0.3)["loss"]
        plan = plan_from_masks(objective.masks(), gated.shape, objective.settings.rules)
        assert plan.keeps_norm_width and plan.hidden_size < gated.shape.hidden_size
        for of_mask, is_same in ((plan, True), (replace(plan, keeps_norm_width=False), False)):  # and the control
            gated.hold(of_mask.full_scale(), of_mask.full_kept(), of_mask.keeps_norm_width)
            assert torch.isclose(objective._task_loss(input_ids), loss, rtol=1e-5) == is_same


def test_cross_entropy_joins_the_distillation_by_its_weight(make_model, input_ids):
    model = make_model("llama")
    losses = {}
    for weight in (0.0, 0.5):
        objective = PruningObjective(GatedModel(model, -60.0), settings(gate_ce_weight=weight))
        with torch.no_grad():
            objective.gated.mu.fill_(1.0)
        losses[weight] = float(objective(input_ids, 5.0, 0.0)["task_loss"].detach())
        objective.gated.detach_gates()
    with torch.no_grad():
        cross_entropy = float(model(input_ids=input_ids, labels=input_ids).loss)
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * cross_entropy, rel=1e-4)
