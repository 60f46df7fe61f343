"""One fine-tuning: what it needs, loaded before anything is touched, and the folders it writes."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.choose.choose import DEFAULT_TRAIN_SAMPLES
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.identity import check_identity
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks
from tvaprune.recover.lora import LoraSettings
from tvaprune.recover.teacher import weights_digest
from tvaprune.run import Run


@dataclass
class Job:
    """One fine-tuning: the run, its plan, its text, what its checkpoints belong to, and the folders it writes.

    Attributes:
        windows: Those that are reported on.
        train_blocks: Those that are trained on.
        choice_blocks: Those that checkpoints are compared on.
        dtype: The run's precision; ``run.model`` is given up in the end.
    """

    run: Run
    plan: KeepPlan
    checkpoint: Path | None
    windows: Dataset
    train_blocks: Dataset
    choice_blocks: Dataset
    dtype: torch.dtype
    identity: dict[str, Any] = field(default_factory=dict)
    teacher_cache: Path | None = None

    @classmethod
    def load(cls, args: Arguments, units: Masks | KeepPlan, checkpoint: Path | None) -> "Job":
        """Loads all that the flags name: whatever is wrong with it ends the job before an earlier one's files go."""
        run = Run.load(args)
        if args.finetune.full_ft and run.model.dtype == torch.float16:
            raise InputError("--full_ft: float16 weights cannot be trained; give --dtype float32 or bfloat16")
        windows = run.windows()
        blocks = run.train_blocks(DEFAULT_TRAIN_SAMPLES), run.choice_blocks()
        job = cls(run, run.plan(units), checkpoint, windows, *blocks, run.model.dtype)
        job.identity = _identity(job)
        if checkpoint is not None:
            check_identity("checkpoint", checkpoint, job.identity)
        return job

    @property
    def output(self) -> Path:
        """The folder of checkpoints, adapter and merged model."""
        return self.run.args.output_dir

    @property
    def pruned_folder(self) -> Path:
        """Where the model that is trained stands: ``--save_pruned``, or beside the adapter."""
        return Path(self.run.args.prune.save_pruned or self.output / "pruned")

    @property
    def train_lm_head(self) -> bool:
        """Whether the lm_head is trained: as asked, else where it is not tied."""
        asked = self.run.args.finetune.train_lm_head
        return not self.plan.shape.tie_word_embeddings if asked is None else asked

    @property
    def unties(self) -> bool:
        """Whether the merged model's lm_head is no longer the embeddings."""
        return self.plan.shape.tie_word_embeddings and self.train_lm_head and self.lora is not None

    @property
    def lora(self) -> LoraSettings | None:
        """What is trained; None: all weights."""
        flags = self.run.args.finetune
        if flags.full_ft:
            return None
        return LoraSettings(flags.lora_r, flags.lora_alpha_ratio, flags.lora_dropout, self.train_lm_head)

    @property
    def needs_dense(self) -> bool:
        """Whether the unpruned model is wanted once the narrower one is there."""
        args = self.run.args
        live = args.distill.distill and args.finetune.teacher_cache is None
        return live or args.evaluation.speed_batches > 0 or args.evaluation.compare_dense

    def load_pruned(self) -> PreTrainedModel:
        """Loads the pruned checkpoint in the run's precision and on its device."""
        return _on_device(self.run, load_pruned(self.pruned_folder, dtype=self.dtype))

    def load_merged(self) -> PreTrainedModel:
        """Loads the fine-tuned model as it stands on disk."""
        return _on_device(self.run, load_pruned(self.output / "merged", dtype=self.dtype))


def _identity(job: Job) -> dict[str, Any]:
    """Returns what tells this fine-tuning's checkpoints and adapter from another's."""
    digest = hashlib.sha256()
    for values in (*job.plan.kept, *job.plan.scale):
        digest.update(values.numpy().tobytes())
    lora = {} if job.lora is None else {"lora_r": job.lora.r, "lora_alpha_ratio": job.lora.alpha_ratio}
    return {
        "model": weights_digest(job.run.model),
        "mask": digest.hexdigest()[:16],
        "weight_update": job.run.args.prune.weight_update,
        "full_ft": job.lora is None,
        "train_lm_head": job.train_lm_head,
        **lora,
    }


def _on_device(run: Run, model: PreTrainedModel) -> PreTrainedModel:
    module: torch.nn.Module = model
    module.to(run.args.training.device)
    return model
