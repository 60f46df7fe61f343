"""What gate training minimises: the objective of the method's section 3, over a frozen model."""

from typing import Any

import torch
from torch import nn

from tvaprune.choose import gates
from tvaprune.choose.controller import Lagrangian, expected_sparsity, expected_spread
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.settings import GateSettings
from tvaprune.losses import distillation_loss
from tvaprune.models.units import PerUnit
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.log_alpha import log_variance_at
from tvaprune.plan.masks import Masks


class PruningObjective(nn.Module):
    """Gates and multipliers over a frozen model: the module whose parameters `Trainer` sees and saves.

    Gates first choose (noise, information loss, Lagrangian); once settled, the choice stands and the means adapt to it.
    """

    settled: torch.Tensor

    def __init__(self, gated: GatedModel, settings: GateSettings) -> None:
        super().__init__()
        self.gated = gated
        self.lagrangian = Lagrangian()
        self.settings = settings
        self.register_buffer("settled", torch.tensor(False))
        self.settled_log_alpha, self.settled_mu = (
            nn.ParameterList(nn.Parameter(torch.zeros_like(mu), False) for mu in gated.mu) for _ in range(2)
        )
        self._kept: PerUnit | None = None

    def settle(self) -> None:
        """Makes the present choice of units final: from now on only the kept gates' means train, without noise."""
        masks = calibrate(self.gated.masks(), self.gated.shape, self.settings.target_sparsity, self.settings.rules)
        for fixed, values in ((self.settled_log_alpha, masks.log_alpha), (self.settled_mu, masks.mu)):
            for parameter, value in zip(fixed, values, strict=True):
                parameter.data.copy_(value)
        self.settled.fill_(True)

    def masks(self) -> Masks:
        """Returns the gates as they stand; once settled, the choice and the means of what is cut are what they were."""
        masks = self.gated.masks()
        if not self.settled:
            return masks
        # A cut unit's mean gets no gradient, but momentum moves it on; a smaller target may keep the unit after all.
        kept, settled_mu = self._kept_units(), self.gated.per_unit(self.settled_mu)
        mu = kept.map(torch.where, masks.mu, settled_mu)
        return Masks(mu, mu.map(log_variance_at, self.gated.per_unit(self.settled_log_alpha)))

    def _kept_units(self) -> PerUnit:
        """Returns, for every unit, whether the settled choice keeps it."""
        if self._kept is None:  # also after a resume
            log_alpha = self.gated.per_unit(self.settled_log_alpha)
            ones = PerUnit.full(self.gated.shape, 1.0)  # of mean 1 a gate's log-variance is its log_alpha
            plan = plan_from_masks(Masks(ones, log_alpha), self.gated.shape, self.settings.rules)
            self._kept = plan.full_kept().map(lambda kept: kept.to(self.settled.device))
            self._sparsity = torch.tensor(plan.sparsity)
        return self._kept

    def forward(self, input_ids: torch.Tensor, beta: float, target: float) -> dict[str, torch.Tensor]:
        """Returns the loss of a batch and its parts, all scalars.

        Args:
            input_ids: Tokens, shape ``(batch, length)``.
            beta: Sharpness of the keep probability at this step.
            target: Target sparsity at this step.
        """
        if self.settled:
            return self._settled_loss(input_ids)
        task = self._task_loss(input_ids)
        masks = self.gated.masks()
        sparsity = expected_sparsity(masks.log_alpha, beta, self.gated.shape)
        spread = expected_spread(masks.log_alpha, beta, self.gated.shape) if self.settings.rules.uniform else 0.0
        penalty = self.lagrangian(sparsity, target, spread)
        information = self.settings.kl_factor * self._information(masks)
        return {"loss": task + information + penalty, "task_loss": task, "expected_sparsity": sparsity}

    def _settled_loss(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        # Held beyond this call: gradient checkpointing runs the forward again in the backward pass.
        kept = self._kept_units()
        self.gated.hold(self.gated.masks().mu.map(torch.mul, kept), kept.hidden)
        task = self._task_loss(input_ids)
        return {"loss": task, "task_loss": task, "expected_sparsity": self._sparsity}

    def _task_loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the KL to the ungated model's logits, or the cross-entropy, or both."""
        if not self.settings.distill:
            return self.gated(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        with torch.no_grad(), self.gated.off():
            teacher = self.gated(input_ids=input_ids, use_cache=False).logits
        weight = self.settings.gate_ce_weight
        student = self.gated(input_ids=input_ids, labels=input_ids if weight else None, use_cache=False)
        distance = distillation_loss(student.logits, teacher, self.settings.distill_temp)
        return distance + weight * student.loss if weight else distance

    def _information(self, masks: Masks) -> torch.Tensor:
        """Returns the weighted sum of the gates' KL terms; the hidden gate acts twice a layer and at the embedding."""
        terms = masks.mu.map(gates.information_loss, masks.log_variance)
        attn, inter = torch.stack(terms.attn).sum(), torch.stack(terms.inter).sum()
        hidden = (2 * len(terms.attn) + self.settings.emb_mult) * terms.hidden
        return self.settings.att_mul * attn + self.settings.inter_mul * inter + hidden

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Passes `Trainer`'s ``--gradient_checkpointing`` on to the stock model."""
        self.gated.activation_checkpointing_enable(**options)
