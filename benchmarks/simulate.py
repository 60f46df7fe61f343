"""What a phase takes at any model's sizes, without a card and without weights: the real code on a simulated card."""

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from benchmarks.card import CARD, Counter, Taken, simulated
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.rotation import _Moments
from tvaprune.choose.scores.calibration import Calibration
from tvaprune.choose.scores.taylor import group_importance
from tvaprune.choose.settings import gate_settings
from tvaprune.cut import narrow, reconstruct
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.measure import cost, update_cost
from tvaprune.measure.perplexity import perplexity
from tvaprune.measure.work import Work, forward_flops, weights
from tvaprune.models.families import family_of
from tvaprune.models.pruned import config_of_widths
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.phases import Phases
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.widths import NO_RULES
from tvaprune.recover.lora import LoraSettings, add_lora, drop_replaced_head
from tvaprune.recover.teacher import LiveTeacher
from tvaprune.recover.trainer import FinetuneTrainer


class Blocks:
    """Windows of a text, without a text."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int | slice) -> dict[str, torch.Tensor]:
        rows = [self.length] if isinstance(place, int) else [len(range(*place.indices(self.count))), self.length]
        return {"input_ids": torch.zeros(rows, dtype=torch.int64)}


def plan_to(shape: ModelShape, pruned: ModelShape) -> KeepPlan:
    """Returns a plan that keeps as many units as a narrower model has, the first of each kind, with factors of 1."""
    kept = PerUnit(
        torch.arange(pruned.hidden_size),
        tuple(map(torch.arange, pruned.num_key_value_heads)),
        tuple(map(torch.arange, pruned.intermediate_size)),
    )
    return KeepPlan(kept, kept.map(lambda units: torch.ones(len(units))), shape, 1)


@dataclass
class Scene:
    """A model of random weights on the simulated card, or on a real one, and what its phases do."""

    card: Counter
    work: Work
    config: PretrainedConfig
    plan: KeepPlan
    device: torch.device = CARD
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.dense = self.model(self.config)
        self.windows = Blocks(self.work.pass_tokens(self.work.window) // self.work.window, self.work.window)

    def model(self, config: PretrainedConfig) -> PreTrainedModel:
        """Returns a frozen model on the card."""
        kernel = family_of(config).attention_kernel
        with self.device:
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation=kernel, trust_remote_code=False
            )
        return built.requires_grad_(False).eval()

    def pruned(self) -> PreTrainedModel:
        """Returns the narrower model on the card, beside the dense one."""
        return self.model(config_of_widths(self.config, self.plan.shape_stored))

    def perplexity(self, model: Any) -> Taken:
        """One pass of an evaluation."""
        self.card.restart()
        perplexity(model, self.windows, self.work.eval_batch)
        return self.card.taken

    def dense_perplexity(self) -> Taken:
        """The dense model's."""
        return self.perplexity(self.dense)

    def pruned_perplexity(self) -> Taken:
        """The narrower model's, the dense one beside it."""
        return self.perplexity(self.pruned())

    def timing(self) -> Taken:
        """A plain forward pass of the dense model, the narrower one beside it."""
        pruned, ids = self.pruned(), self.windows[:]["input_ids"].to(self.device)
        self.card.restart()
        with torch.inference_mode():
            self.dense(input_ids=ids, use_cache=False)
        del pruned
        return self.card.taken

    def gradient_pass(self) -> Taken:
        """A pass of what learns a rotation."""
        moments = _Moments(SimpleNamespace(model=self.dense, shape=self.work.dense))  # type: ignore[arg-type]
        ids = torch.zeros(self.work.rotation_batch, self.work.block, dtype=torch.int64, device=self.device)
        draws = torch.zeros(ids.shape, device=self.device)
        self.card.restart()
        moments.add(ids, draws)
        return self.card.taken

    def scoring_pass(self) -> Taken:
        """A pass of Taylor's scores, and one before it, whose gradients are there."""
        blocks: Any = Blocks(2 * self.work.scored_batch, self.work.block)
        self.card.restart()
        group_importance(Calibration(self.dense, blocks, 0.5, 0, self.work.scored_batch))
        return replace(self.card.taken, flops=self.card.taken.flops / 2)

    def gate_step(self) -> Taken:
        """The second step of gate training: the optimiser's state is there."""
        work = self.work
        settings = gate_settings(PruneSettings(), DistillSettings(), 4500, 4500, 10.0, NO_RULES)
        objective = PruningObjective(GatedModel(self.dense), settings).train()
        del objective._buffers["settled"]  # whose value is asked
        objective.settled = False  # type: ignore[assignment]
        if work.checkpointing:
            objective.activation_checkpointing_enable()
        return self._steps(objective, lambda ids: objective(ids, 10.0, 0.3)["loss"])

    def _steps(self, model: Any, loss: Callable[[torch.Tensor], torch.Tensor]) -> Taken:
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], fused=True)
        ids = torch.zeros(self.work.batch, self.work.block, dtype=torch.int64, device=self.device)
        for passes in (1, 1 + self.work.accumulates):
            for _ in range(passes):
                self.card.restart()  # the gradients of an earlier pass are there
                loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.card.taken

    def refit(self) -> Taken:
        """The cut, the fold and the refit, as `tvaprune.cut.narrow` does them."""
        return self._update("refit")

    def reconstruct(self) -> Taken:
        """The same with the reconstruction after it."""
        return self._update("reconstruct")

    def _update(self, update: Literal["refit", "reconstruct"]) -> Taken:
        self.card.restart()
        run: Any = SimpleNamespace(
            model=self.dense, refit_blocks=lambda: Blocks(self.work.refit_blocks, self.work.block),
            held_out_blocks=lambda: Blocks(self.work.held_blocks, self.work.block), phases=Phases(),
            args=SimpleNamespace(
                training=SimpleNamespace(per_device_eval_batch_size=self.work.eval_batch, device=self.device, seed=0),
                prune=PruneSettings(refit_offload=self.work.refit_offload, weight_update=update),
            ),
        )  # fmt: skip
        with mock.patch.object(reconstruct, "RATES", reconstruct.RATES[:1]):  # the first helps: here no error falls
            narrow._refitted(run, self.plan, True)
        return self.card.taken

    def finetuning_step(self) -> Taken:
        """The second step of fine-tuning, of several passes its second."""
        work = self.work
        lora = LoraSettings(work.lora_r, 4.0, 0.05, work.train_lm_head)
        student: Any = self.pruned()
        student = add_lora(student, lora) if work.lora_r else student.requires_grad_(True)
        student.to(self.device).train()
        if work.lora_r and work.train_lm_head:
            drop_replaced_head(student)
        if work.checkpointing:
            student.activation_checkpointing_enable()
        teacher = LiveTeacher(self.dense, 1.0) if work.distill else None
        if not work.compare_dense:
            del self.dense  # without a teacher it leaves the memory
        trainer = FinetuneTrainer.__new__(FinetuneTrainer)  # its loss alone: no accelerator, no files
        trainer.teacher, trainer.weights, trainer._sums, trainer._count = teacher, {"ce": 1.0, "kl": 0.01}, {}, 0
        trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
        return self._steps(student, lambda ids: trainer.compute_loss(student, {"input_ids": ids}))


PHASES = (
    "dense_perplexity", "pruned_perplexity", "gradient_pass", "scoring_pass", "gate_step", "refit", "reconstruct",
    "finetuning_step",
)  # fmt: skip


def simulate(config: PretrainedConfig, work: Work, phase: str, plan: KeepPlan | None = None) -> Taken:
    """Returns what one of `PHASES` takes.

    Args:
        plan: What is kept; None: the first units of each kind.
    """
    plan = plan or plan_to(work.dense, work.pruned)
    with simulated() as card:
        found: Taken = getattr(Scene(card, work, config, plan), phase)()
    gc.collect()
    return found


def by_formula(phase: str, work: Work) -> tuple[float, float]:
    """Returns the bytes on the device and the operations that the formulas give for what `simulate` counts."""
    if phase == "gradient_pass":
        return cost.gradient_pass(work), cost.gradient_flops(work)
    if phase == "scoring_pass":
        return cost.scoring_pass(work), cost.scoring_flops(work)
    if phase == "gate_step":
        return cost.gate_step(work), cost.gate_flops(work)
    if phase == "finetuning_step":
        return cost.finetuning_step(work), cost.finetuning_flops(work)
    if phase == "refit":
        return update_cost.refit(work), update_cost.refit_flops(work)
    if phase == "reconstruct":  # the refit comes before it
        return max(update_cost.refit(work), update_cost.reconstruct(work)), update_cost.refit_flops(
            work
        ) + update_cost.reconstruct_flops(work)
    shape, beside = (work.dense, 0) if phase == "dense_perplexity" else (work.pruned, weights(work.dense, work))
    flops = forward_flops(shape, work.pass_tokens(work.window), work.window)
    return weights(shape, work) + beside + cost.evaluation(shape, work, work.window), flops


CONFIGS = {
    "Llama-2-7B": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096),
    "Mistral-7B": MistralConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                                max_position_embeddings=32768, sliding_window=4096),
    "Llama-3-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192),
}  # fmt: skip
