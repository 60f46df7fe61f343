"""One fine-tuning's teacher, its training and what is told of it."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import PreTrainedModel, set_seed

from tvaprune.budget import times_training
from tvaprune.errors import TRAINING, running_out_in
from tvaprune.measure.speed import SpeedUp, training_speed_up
from tvaprune.recover.job import Job
from tvaprune.recover.lora import Student, add_lora, drop_replaced_head, trainable
from tvaprune.recover.teacher import CachedTeacher, HiddenTarget, LiveTeacher, Teacher, cache_teacher
from tvaprune.recover.trainer import FinetuneTrainer, LossWeights

_NO_SPEED = "note: the dense model does not fit beside the pruned one in training: no speed-up of a training step"


@dataclass
class Tuning:
    """The settings of a fine-tuning, resolved, and how it went.

    Attributes:
        r: Of LoRA, as ``alpha_ratio`` and ``dropout``; None: all weights were trained.
        teacher: What was distilled from; None: nothing was.
        best_step: The step whose weights stay.
        adapter_merged_difference: The largest difference in logits of the two as they are read from disk.
    """

    method: str
    train_lm_head: bool
    trained_parameters: int
    teacher: str | None
    distill_ce_loss_alpha: float
    distill_temp: float
    distill_hidden_alpha: float
    learning_rate: float
    blocks_per_step: int
    train_blocks: int
    epochs: float | None
    steps: int
    best_step: int | None
    resumed_from: str | None
    seconds: float
    r: int | None = None
    alpha_ratio: float | None = None
    dropout: float | None = None
    adapter_merged_difference: float | None = None


def write_teacher_cache(job: Job) -> Path | None:
    """Writes the teacher's predictions if they are not there; returns their folder if ``--teacher_cache`` asks so."""
    args = job.run.args
    if args.finetune.teacher_cache is None or not args.distill.distill:
        return None
    k, temperature = args.finetune.teacher_top_k, args.distill.distill_temp
    folder, batch_size = args.finetune.teacher_cache, args.training.per_device_eval_batch_size
    return cache_teacher(folder, job.run.model, job.train_blocks, k, temperature, batch_size)


def prepare_student(job: Job, pruned: PreTrainedModel) -> Student:
    """Returns the model with what is trained of it: all, or LoRA, whose start is drawn."""
    set_seed(job.run.args.training.seed)
    if job.lora is None:
        return pruned.requires_grad_(True)
    student = add_lora(pruned, job.lora)
    drop_replaced_head(student)
    return student


def training_speed(job: Job, student: Student) -> SpeedUp | None:
    """Times a training step beside that of the dense model, trained in the same way; None: not asked, or no memory."""
    args = job.run.args
    if not times_training(args, job.plan):
        if args.evaluation.speed_batches:
            print(_NO_SPEED)
        return None
    try:
        with trainable(job.run.dense_model(), job.lora) as dense:
            return training_speed_up(dense, student, job.train_blocks, args.training, args.evaluation.speed_batches)
    except torch.cuda.OutOfMemoryError:
        print(_NO_SPEED)
        return None


def train(job: Job, student: Student) -> tuple[Tuning, list[dict[str, float]]]:
    """Trains the student in place; returns what is to be told of it, and its log."""
    args = job.run.args
    weights = LossWeights(args.finetune.distill_ce_loss_alpha, args.finetune.distill_hidden_alpha)
    trainer = FinetuneTrainer(
        student, args.training, job.train_blocks, job.selection_blocks, _teacher(job), weights, job.identity,
        args.finetune.early_stopping_patience, job.run.phases,
    )  # fmt: skip
    begin = time.perf_counter()
    with running_out_in(TRAINING):
        trainer.train(resume_from_checkpoint=None if job.checkpoint is None else str(job.checkpoint))
    told = _told(job, trainer, time.perf_counter() - begin)
    extract_model_from_parallel(student, keep_fp32_wrapper=False)  # what is measured next is without its autocast
    return told, trainer.state.log_history


def _teacher(job: Job) -> Teacher | None:
    args = job.run.args
    if job.teacher_cache is not None:
        return CachedTeacher(job.teacher_cache, args.distill.distill_temp)
    if not args.distill.distill:
        return None
    hidden = HiddenTarget.of(job.plan, args.prune.weight_update) if args.finetune.distill_hidden_alpha else None
    return LiveTeacher(job.run.dense_model(), args.distill.distill_temp, hidden)


def kept_step(trainer: FinetuneTrainer) -> int:
    """Returns the step whose weights stay: the best of those that were saved, where that is loaded at the end."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return trainer.state.global_step if best is None else int(Path(best).name.rpartition("-")[2])


def _told(job: Job, trainer: FinetuneTrainer, seconds: float) -> Tuning:
    args, training, state, lora = job.run.args, job.run.args.training, trainer.state, job.lora
    finetune, distill = args.finetune, args.distill.distill
    cached = f"cached, top {finetune.teacher_top_k}" if finetune.teacher_cache else "live"
    return Tuning(
        method="full" if lora is None else "lora",
        train_lm_head=job.train_lm_head,
        trained_parameters=trainer.get_num_trainable_parameters(),
        teacher=cached if distill else None,
        distill_ce_loss_alpha=finetune.distill_ce_loss_alpha if distill else 0.0,
        distill_temp=args.distill.distill_temp,
        distill_hidden_alpha=finetune.distill_hidden_alpha if distill else 0.0,
        learning_rate=training.learning_rate,
        blocks_per_step=training.train_batch_size * training.gradient_accumulation_steps * training.world_size,
        train_blocks=len(job.train_blocks),
        epochs=state.epoch,
        steps=state.global_step,
        best_step=kept_step(trainer),
        resumed_from=None if job.checkpoint is None else str(job.checkpoint),
        seconds=round(seconds, 1),
        r=None if lora is None else lora.r,
        alpha_ratio=None if lora is None else lora.alpha_ratio,
        dropout=None if lora is None else lora.dropout,
    )
