"""The settings of one gate training, resolved: what depends on the target, the family or the number of steps."""

import math
from dataclasses import dataclass

from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.plan.widths import WidthRules

SCORING_SHARE = 0.25  # of the training's work, that scoring masks may take

_WARMUP_EPOCHS = 0.3
_AS_GIVEN = (
    "vib_learning_rate", "reg_learning_rate", "kl_factor", "inter_mul", "emb_mult", "initial_log_variance",
    "gate_noise", "gate_ce_weight", "norm_width",
)  # fmt: skip


@dataclass(frozen=True)
class GateSettings:
    """The settings of one gate training, every default resolved. Same names as the flags."""

    target_sparsity: float
    vib_learning_rate: float
    reg_learning_rate: float
    kl_factor: float
    att_mul: float
    inter_mul: float
    emb_mult: float
    num_warmup_steps: int
    num_settle_steps: int
    beta: float
    beta_start: float
    initial_log_variance: float
    rules: WidthRules
    gate_noise: str
    gate_ce_weight: float
    norm_width: str
    distill: bool
    distill_temp: float


def gate_settings(
    prune: PruneSettings,
    distill: DistillSettings,
    num_steps: int,
    steps_per_epoch: float,
    family_beta: float,
    rules: WidthRules,
) -> GateSettings:
    """Resolves the defaults that depend on the target, the family and the number of steps.

    Raises:
        InputError: If the target would still rise where the choice must stand.
    """
    sparsity, beta = max(prune.target_sparsity), _given(prune.beta, family_beta)
    warmup_epochs = _given(prune.lagrangian_warmup_epochs, _WARMUP_EPOCHS)
    num_warmup_steps, num_settle_steps = round(warmup_epochs * steps_per_epoch), round(prune.settle_share * num_steps)
    if num_warmup_steps > num_steps - num_settle_steps:
        if prune.lagrangian_warmup_epochs is not None:
            raise InputError(
                f"--lagrangian_warmup_epochs is {warmup_epochs}: the target rises for {num_warmup_steps} steps, but "
                f"the choice stands after {num_steps - num_settle_steps} of {num_steps}; give less, or a smaller "
                "--settle_share"
            )
        num_warmup_steps = (num_steps - num_settle_steps) // 2  # a run of few steps, as --max_steps makes it
    return GateSettings(
        target_sparsity=sparsity,
        att_mul=_given(prune.att_mul, 512 if sparsity > 0.6 else 256),
        num_warmup_steps=num_warmup_steps,
        num_settle_steps=num_settle_steps,
        beta=beta,
        beta_start=min(prune.beta_start, beta),
        rules=rules,
        **{name: getattr(prune, name) for name in _AS_GIVEN},
        **vars(distill),
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def describe(settings: GateSettings, num_steps: int) -> str:
    """Returns the line that says how the steps are spent; and what the rate cannot reach."""
    choosing = num_steps - settings.num_settle_steps
    line = (
        f"gates: the target rises over {settings.num_warmup_steps:,} of {num_steps:,} steps, the choice stands after "
        f"{choosing:,}; --vib_learning_rate {settings.vib_learning_rate:g}"
    )
    reach = settings.vib_learning_rate * choosing * (1 - choosing / num_steps / 2)  # AdamW's steps, linear decay
    if reach < -settings.initial_log_variance:
        line += (
            f"\nnote: until then this rate moves a log-variance by {reach:.1f} at most, and the cut is "
            f"{-settings.initial_log_variance:g} away: raise --vib_learning_rate or --initial_log_variance, or take "
            "smaller batches"
        )
    return line


@dataclass(frozen=True)
class Cadence:
    """How often masks are scored, and what it costs; work is counted in tokens that pass the layers once.

    A step passes a token forward and, to the gates alone, backward, which costs as much again where the weights are
    frozen; with a teacher it passes it forward once more.

    Attributes:
        num_steps: Of the training.
        step_tokens: Tokens of a step.
        scored_tokens: Tokens of a scoring.
        distill: Whether there is a teacher.
    """

    num_steps: int
    step_tokens: int
    scored_tokens: int
    distill: bool

    @classmethod
    def of(cls, args: Arguments, epochs: float, train_blocks: int, scored_blocks: int) -> "Cadence":
        """Returns that of a run's training."""
        training, block = args.training, args.data.block_size
        batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
        num_steps = math.ceil(epochs * math.ceil(train_blocks / batch))
        num_steps = training.max_steps if training.max_steps > 0 else num_steps
        return cls(num_steps, batch * block, scored_blocks * block, args.distill.distill)

    @property
    def num_tokens(self) -> int:
        """Of the training."""
        return self.num_steps * self.step_tokens

    def steps(self, given: float | None, least: int) -> float:
        """Returns the steps between two scorings.

        Args:
            given: The user's own, in steps or below 1 as a share of all; None: there is none.
        """
        if given is None:
            return self.interval(least)
        return math.ceil(given * self.num_steps) if given < 1 else given

    def share(self, interval: float) -> float:
        """Returns the most that scoring every so many steps, and at the last, takes of the training's work."""
        scorings = math.ceil(self.num_steps / interval)
        return scorings * self.scored_tokens / (self.num_tokens * (2 + self.distill))

    def interval(self, least: int) -> int:
        """Returns the smallest interval of at least ``least`` steps that keeps to `SCORING_SHARE`, or all steps."""
        affordable = int(SCORING_SHARE / self.share(self.num_steps))
        return max(least, math.ceil(self.num_steps / affordable)) if affordable else max(least, self.num_steps)

    def describe(self, given: float | None, least: int) -> str:
        """Returns the line that says which interval `steps` takes, and why."""
        steps, why = self.steps(given, least), "the default" if given is None else "as given"
        if given is None and steps > least:
            why = f"every {least} would cost {self.share(least):.0%}, the limit is {SCORING_SHARE:.0%}"
        return (
            f"scoring: --eval_steps {steps:g}, {why}; it costs {self.share(steps):.0%} of the training's work at most"
        )
