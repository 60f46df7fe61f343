"""One fine-tuning: what it needs, loaded before anything is touched, and the folders it writes."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune.budget import fit, times
from tvaprune.checkpoint.folder import load_pruned
from tvaprune.choose.choose import DEFAULT_TRAIN_SAMPLES
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.identity import Identity, check_identity, content, weights_digest
from tvaprune.phases import Phases
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks
from tvaprune.recover.lora import LoraSettings
from tvaprune.refusals import check_training
from tvaprune.run import Run


@dataclass
class Job:
    """One fine-tuning: the run, its plan, its text, what its checkpoints belong to, and the folders it writes.

    Attributes:
        windows: Those that are reported on.
        train_blocks: Those that are trained on.
        selection_blocks: Those that checkpoints are compared on.
        dtype: The run's precision; ``run.model`` is given up in the end.
        stored: The precision that the narrower model is saved in, tuned or not.
        use_cache: What the config says of it, which training switches off.
    """

    run: Run
    plan: KeepPlan
    checkpoint: Path | None
    windows: Dataset
    train_blocks: Dataset
    selection_blocks: Dataset
    dtype: torch.dtype
    stored: torch.dtype
    use_cache: bool
    identity: Identity = field(default_factory=dict)
    teacher_cache: Path | None = None

    @classmethod
    def load(cls, args: Arguments, units: Masks | KeepPlan, checkpoint: Path | None, phases: Phases) -> "Job":
        """Loads all that the flags name: whatever is wrong with it ends the job before an earlier one's files go."""
        check_training(args)
        run = Run.load(args, trains=True, phases=phases)
        if args.finetune.full_ft and run.model.dtype == torch.float16:
            raise InputError("--full_ft: float16 weights cannot be trained; give --dtype float32")
        if args.finetune.full_ft and run.model.dtype == torch.bfloat16:
            print(
                "note: --full_ft trains the weights in bfloat16, which loses small steps; --dtype float32 --bf16 True "
                "keeps them, in twice the memory"
            )
        windows = run.windows()
        blocks = run.train_blocks(DEFAULT_TRAIN_SAMPLES, tells=True), run.selection_blocks()
        use_cache, precisions = run.model.config.use_cache, (run.model.dtype, run.stored_dtype)
        job = cls(run, run.plan(units), checkpoint, windows, *blocks, *precisions, use_cache)
        fit(run.args, job.plan)
        job.identity = _identity(job)
        if job.unties:
            print(
                "note: --train_lm_head unties the lm_head from the embeddings: "
                f"{job.plan.shape.vocab_size * len(job.plan.kept.hidden):,} parameters more in the merged model"
            )
        if checkpoint is not None:
            check_identity("checkpoint", checkpoint, job.identity)
        return job

    def began_with(self, pruned: PreTrainedModel) -> None:
        """Adds the model that is trained to what the checkpoints and the adapter belong to.

        Raises:
            InputError: If the checkpoint that the run goes on from began with another.
        """
        self.identity["contents"]["save_pruned"] = content(str(self.pruned_folder), weights_digest(pruned))
        if self.checkpoint is not None:
            check_identity("checkpoint", self.checkpoint, self.identity)

    @property
    def output(self) -> Path:
        """The folder of checkpoints, adapter and merged model."""
        return self.run.args.output_dir

    @property
    def pruned_folder(self) -> Path:
        """Where the model that is trained stands: ``--save_pruned``, or beside the adapter."""
        return Path(self.run.args.prune.save_pruned or self.output / "pruned")

    @property
    def merged_folder(self) -> Path:
        """Where the fine-tuned model stands."""
        return self.output / "merged"

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
    def sharded(self) -> bool:
        """Whether the models' layers are spread over the processes while they train."""
        return self.run.args.source.shard

    @property
    def tunes_beside_dense(self) -> bool:
        """Whether the unpruned model is wanted in fine-tuning or after it: it teaches, or is compared."""
        args = self.run.args
        return (args.distill.distill and args.finetune.teacher_cache is None) or args.evaluation.compare_dense

    @property
    def needs_dense(self) -> bool:
        """Whether it is wanted once the narrower one is there: it is timed, too."""
        return self.tunes_beside_dense or times(self.run.args, self.plan)

    def load_pruned(self) -> PreTrainedModel:
        """Loads the pruned checkpoint in the run's precision and on its device; one to be sharded, on the CPU."""
        folder = self.pruned_folder.resolve()  # an adapter records it, and is loaded from elsewhere
        return _on_device(self.run, load_pruned(folder, dtype=self.dtype))

    def load_merged(self) -> PreTrainedModel:
        """Loads the fine-tuned model as it stands on disk."""
        return _on_device(self.run, load_pruned(self.merged_folder, dtype=self.dtype))


# transformers' own flags that act in fine-tuning alone and change what it ends with.
_TUNING_FLAGS = (
    "learning_rate", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "neftune_noise_alpha",
    "label_smoothing_factor",
)  # fmt: skip


def _identity(job: Job) -> Identity:
    """Returns what tells this fine-tuning's checkpoints and adapter from another's."""
    args, finetune = job.run.args, job.run.args.finetune
    flags = {name: getattr(args.training, name) for name in _TUNING_FLAGS}
    flags |= {
        "weight_update": args.prune.weight_update,
        "max_train_samples": len(job.train_blocks),
        "full_ft": finetune.full_ft,
        "train_lm_head": job.train_lm_head,
        "distill": args.distill.distill,
        "early_stopping_patience": finetune.early_stopping_patience,
    }
    if args.prune.refits:
        flags["refit_samples"] = args.prune.refit_samples
    if not finetune.full_ft:
        flags |= {name: getattr(finetune, name) for name in ("lora_r", "lora_alpha_ratio", "lora_dropout")}
    if args.distill.distill:
        flags |= {name: getattr(finetune, name) for name in ("distill_ce_loss_alpha", "distill_hidden_alpha")}
        flags |= {
            "distill_temp": args.distill.distill_temp,
            "teacher_top_k": None if finetune.teacher_cache is None else finetune.teacher_top_k,
        }
    identity = job.run.identity(flags, (job.train_blocks, job.selection_blocks), {})
    identity["contents"]["mask_loc"] = content(args.prune.mask_loc, job.plan.digest)
    return identity


def _on_device(run: Run, model: PreTrainedModel) -> PreTrainedModel:
    module: torch.nn.Module = model
    if not run.args.source.shard:
        module.to(run.args.training.device)
    return model
