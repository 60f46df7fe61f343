"""Gate training on `transformers.Trainer`, and the best mask on disk.

Checkpoints hold gates, multipliers, optimizer, schedule, random states and the place in the data: `Trainer` resumes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import TrainingArguments, get_scheduler
from transformers.utils import SAFE_WEIGHTS_NAME

from tvaprune import ranks
from tvaprune.checkpoints import CheckpointedTrainer
from tvaprune.choose.controller import beta_at, expected_sparsity, target_at
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.settings import GateSettings
from tvaprune.errors import InputError
from tvaprune.measure.figures import with_error
from tvaprune.measure.perplexity import perplexity
from tvaprune.phases import GATE_TRAINING, Phases, TrainingBar
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import KeepPlan, describe_widths, plan_from_masks
from tvaprune.plan.masks import best_mask, keep_best

# A mask is scored once the expected sparsity is this near to the target. Wider than the released [-0.008, +0.001]: the
# threshold makes every scored mask exact, so the band only leaves out gates that have not parted yet.
BAND = 0.03


class GateTrainer(CheckpointedTrainer):
    """Trains the gates and keeps the best mask near the target under ``<output_dir>/best``.

    Args:
        gated: The model with its gates.
        settings: Resolved settings.
        record: What is written beside each mask: model, data, seed, versions; its ``identity`` says which run it is.
        eval_blocks: Windows on which masks are compared.
        phases: Of the command; its bar says where in them it is.
    """

    def __init__(
        self,
        gated: GatedModel,
        settings: GateSettings,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_blocks: Dataset,
        record: dict[str, Any],
        phases: Phases | None = None,
    ) -> None:
        objective = PruningObjective(gated, settings)
        identity = record.get("identity", {})
        bar = _GateProgress(phases or Phases(), GATE_TRAINING)
        super().__init__(
            objective, args, train_dataset=train_dataset, eval_dataset=eval_blocks, identity=identity, bar=bar
        )
        self.gated, self.settings, self.record = gated, settings, record
        self.best_folder = Path(str(args.output_dir)) / "best"
        self.best: Path | None = None  # what lies in the folder may be another run's
        with torch.no_grad():
            self.start = float(expected_sparsity(gated.log_alpha(), settings.beta_start, gated.shape))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Returns AdamW with two groups: the gates are minimised, the multipliers maximised."""
        objective = self._objective
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [objective.gated.mu, objective.gated.log_variance], "lr": self.settings.vib_learning_rate},
                {
                    "params": list(objective.lagrangian.parameters()),
                    "lr": self.settings.reg_learning_rate,
                    "maximize": True,
                },
            ],
            weight_decay=0.0,
        )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Returns ``--lr_scheduler_type`` (released: linear) for the gates, a constant rate for the multipliers."""
        optimizer = self.optimizer if optimizer is None else optimizer
        warmup = self.args.get_warmup_steps(num_training_steps)
        gates_only = get_scheduler(self.args.lr_scheduler_type, optimizer, warmup, num_training_steps).lr_lambdas[0]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [gates_only, lambda step: 1.0])
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *unused: Any, **options: Any) -> torch.Tensor:
        """Returns the objective of a batch at the schedule of this step."""
        if self.state.global_step >= self._num_choosing_steps and not self._objective.settled:
            self._settle()
        self._used = self._schedule()  # the log comes after the step counter has moved on
        parts = model(**inputs, **self._used)
        if not torch.isfinite(parts["loss"]):
            raise InputError(
                f"the loss is {parts['loss'].item()} at step {self.state.global_step}; use --dtype float32 or "
                "bfloat16, or lower --vib_learning_rate; what was saved is in --output_dir"
            )
        self._parts = {name: value.detach() for name, value in parts.items()}
        return self.of_step(parts["loss"], len(inputs["input_ids"]))

    def _settle(self) -> None:
        """Makes the choice final, and says so where the gates have not come to one by themselves."""
        with torch.no_grad():
            reached = float(expected_sparsity(self.gated.log_alpha(), self.settings.beta, self.gated.shape))
        if abs(reached - self.settings.target_sparsity) > BAND:
            ranks.on_main(
                tqdm.write,
                f"note: the choice is made at step {self.state.global_step} with the gates at an expected sparsity of "
                f"{reached:.3f}, the target is {self.settings.target_sparsity}: the least sure go with the others; "
                "more steps, or a higher --vib_learning_rate, choose better",
            )
        self._objective.settle()

    @property
    def _objective(self) -> PruningObjective:
        objective: PruningObjective = self.accelerator.unwrap_model(self.model)
        return objective

    @property
    def _num_choosing_steps(self) -> int:
        return self.state.max_steps - self.settings.num_settle_steps

    def _schedule(self) -> dict[str, float]:
        settings, step = self.settings, self.state.global_step
        beta = beta_at(step, self._num_choosing_steps, settings.beta_start, settings.beta)
        target = target_at(step, settings.num_warmup_steps, self.start, settings.target_sparsity)
        return {"beta": beta, "target": target}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the sparsity, its target and the multipliers to the training logs."""
        if "loss" in logs:
            lagrangian = self._objective.lagrangian
            logs |= {
                "task_loss": float(self._parts["task_loss"]),
                "expected_sparsity": float(self._parts["expected_sparsity"]),
                "target_sparsity": self._used["target"],
                "beta": self._used["beta"],
                "lambda_1": float(lagrangian.lambda_1.detach()),
                "lambda_2": float(lagrangian.lambda_2.detach()),
            }
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the mask of this step if it is near the target, and keeps it if it is the best."""
        schedule = self._schedule()
        with torch.no_grad():
            sparsity = expected_sparsity(self.gated.log_alpha(), schedule["beta"], self.gated.shape)
        rising = self.state.global_step < self.settings.num_warmup_steps
        is_near = abs(float(sparsity) - self.settings.target_sparsity) <= BAND  # NaN is not near
        metrics = self.score_mask() if self._objective.settled or (is_near and not rising) else {}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def score_last_mask(self) -> None:
        """Scores the mask that training ended with, unless its last step was one at which masks are scored."""
        rows = [row for row in self.state.log_history if row.get("step") == self.state.global_step]
        if not any("eval_perplexity" in row for row in rows):  # the log knows it, in a run that went on too
            self.score_mask()

    def score_mask(self) -> dict[str, float]:
        """Measures the mask of the gates as they stand, exactly at the target, and keeps it if it is the best."""
        settings = self.settings
        masks = self._objective.masks()
        if not self._objective.settled:
            masks = calibrate(masks, self.gated.shape, settings.target_sparsity, settings.rules)
        plan = plan_from_masks(masks, self.gated.shape, settings.rules)
        with self.gated.applying(plan):
            value = perplexity(self.gated, self.eval_dataset, self.args.per_device_eval_batch_size)
        metrics = {"eval_perplexity": value, "eval_sparsity": plan.sparsity} | _widths(plan)
        context = {"step": self.state.global_step, "settings": asdict(settings), "rules": asdict(settings.rules)}
        record = self.record | describe_widths(plan) | context
        self.best = ranks.on_main(keep_best, self.best_folder, masks, value, record, self.best)
        self.log(dict(metrics))
        return metrics

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Loads gates and multipliers; the frozen model is not in the checkpoint."""
        path = Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME
        if not path.is_file():
            raise InputError(f"--resume_from_checkpoint {resume_from_checkpoint}: holds no {SAFE_WEIGHTS_NAME}; give a "
                             "checkpoint-* folder of a gate training")  # fmt: skip
        objective = self._objective
        state = load_file(path)
        own = objective.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise InputError(f"--resume_from_checkpoint {resume_from_checkpoint}: holds the gates of another model; "
                             "give the model that the run began with")  # fmt: skip
        objective.load_state_dict(state, strict=False)
        self.best = ranks.on_main(best_mask, self.best_folder, self.identity)


def _widths(plan: KeepPlan) -> dict[str, float]:
    """Returns the kept widths for the logs, those of layers as their mean."""
    layered = {"num_key_value_heads": plan.num_key_value_heads, "intermediate_size": plan.intermediate_size}
    means = {f"eval_mean_{name}": sum(widths) / len(widths) for name, widths in layered.items()}
    return {"eval_hidden_size": float(plan.hidden_size)} | means


class _GateProgress(TrainingBar):
    """One bar with the figures that matter, in place of a printed dictionary per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or logs is None:  # only the first process has a bar
            return
        if "expected_sparsity" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['task_loss']:.3f}, sparsity {logs['expected_sparsity']:.3f}"
                f" -> {logs['target_sparsity']:.3f}, lambda {logs['lambda_1']:.2f} {logs['lambda_2']:.2f}"
            )
        if "eval_perplexity" in logs:
            self.training_bar.write(
                f"step {state.global_step}: mask at {logs['eval_sparsity']:.4f} sparsity, "
                f"perplexity {with_error(logs['eval_perplexity'], None)}"
            )
