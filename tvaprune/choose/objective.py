"""What gate training minimises: the objective of docs/method.md, section 2, over a frozen model."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tvaprune.choose import gates
from tvaprune.choose.controller import Lagrangian, expected_sparsity, expected_spread
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.settings import GateSettings
from tvaprune.errors import InputError
from tvaprune.losses import cross_entropy, distillation, evaluated, in_full, likelihood
from tvaprune.models.logits import predictions
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
    _weights: torch.Tensor

    def __init__(self, gated: GatedModel, settings: GateSettings) -> None:
        super().__init__()
        self.gated = gated
        self.lagrangian = Lagrangian()
        self.settings = settings
        self.register_buffer("settled", torch.tensor(False))
        self.settled_log_alpha, self.settled_mu = (nn.Parameter(torch.zeros_like(gated.mu), False) for _ in range(2))
        self.register_buffer("_weights", self._information_weights().to(gated.mu.device), persistent=False)
        self._kept: PerUnit | None = None

    def settle(self) -> None:
        """Makes the present choice of units final: from now on only the kept gates' means train, without noise."""
        masks = calibrate(self.gated.masks(), self.gated.shape, self.settings.target_sparsity, self.settings.rules)
        self.settled_log_alpha.data.copy_(masks.log_alpha.flat())
        self.settled_mu.data.copy_(masks.mu.flat())
        self.settled.fill_(True)

    def masks(self) -> Masks:
        """Returns the gates as they stand; once settled, the choice and the means of what is cut are what they were."""
        masks = self.gated.masks()
        if not self.settled:
            return masks
        # A cut unit's mean gets no gradient, but momentum moves it on; a smaller target may keep the unit after all.
        kept, shape = self._kept_units(), self.gated.shape
        mu = kept.map(torch.where, masks.mu, PerUnit.of(self.settled_mu, shape))
        settled = PerUnit.of(self.settled_log_alpha, shape)
        return replace(masks, mu=mu, log_variance=mu.map(log_variance_at, settled))

    def _kept_units(self) -> PerUnit:
        """Returns, for every unit, whether the settled choice keeps it."""
        if self._kept is None:  # also after a resume
            log_alpha = PerUnit.of(self.settled_log_alpha, self.gated.shape)
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
        with in_full(task):
            log_alpha = self.gated.log_alpha()
            sparsity = expected_sparsity(log_alpha, beta, self.gated.shape)
            spread = expected_spread(log_alpha, beta, self.gated.shape) if self.settings.rules.uniform else 0.0
            penalty = self.lagrangian(sparsity, target, spread)
            terms = gates.information(self.gated.mu, self.gated.log_variance)
            information = self.settings.kl_factor * (terms @ self._weights)
        return {"loss": task + information + penalty, "task_loss": task, "expected_sparsity": sparsity}

    def _settled_loss(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        # Held beyond this call: gradient checkpointing runs the forward again in the backward pass.
        kept = self._kept_units()
        self.gated.hold(PerUnit.of(self.gated.mu * kept.flat(), self.gated.shape), kept, self.gated.keeps_norm_width)
        task = self._task_loss(input_ids)
        return {"loss": task, "task_loss": task, "expected_sparsity": self._sparsity}

    def _task_loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Returns the KL to the ungated model's logits, or the cross-entropy, or both."""
        if not self.settings.distill:
            return cross_entropy(predictions(self.gated, input_ids=input_ids, use_cache=False)[0], input_ids)
        with torch.no_grad(), self.gated.off():
            teacher, _ = predictions(self.gated, input_ids=input_ids, use_cache=False)
        student, _ = predictions(self.gated, input_ids=input_ids, use_cache=False)
        distance, weight = distillation(teacher, self.settings.distill_temp), self.settings.gate_ce_weight
        if not weight:
            return evaluated(student, distance)[0]
        kl, ce = evaluated(student, distance, likelihood(input_ids))
        return kl + weight * ce

    def _information_weights(self) -> torch.Tensor:
        """Returns what each unit's KL term counts; the hidden gate acts twice a layer and at the embedding."""
        settings, ones = self.settings, PerUnit.full(self.gated.shape, 1.0)
        layers = self.gated.shape.num_hidden_layers
        return PerUnit(
            hidden=ones.hidden * (2 * layers + settings.emb_mult),
            attn=tuple(v * settings.att_mul for v in ones.attn),
            inter=tuple(v * settings.inter_mul for v in ones.inter),
        ).flat()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Passes `Trainer`'s ``--gradient_checkpointing`` on to the stock model.

        Raises:
            InputError: If it is asked to be reentrant: that goes backward once a layer, through gates all layers share.
        """
        if any(isinstance(given, dict) and given.get("use_reentrant") for given in options.values()):
            raise InputError(
                "--gradient_checkpointing_kwargs: use_reentrant is true, gates need false, the default: leave it out"
            )
        self.gated.activation_checkpointing_enable(**options)
