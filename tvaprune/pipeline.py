"""The order of the stages. Page one for a reader.

flags -> stock model -> gates trained, or units scored -> mask file -> keep plan -> narrower model -> results and folder
"""

import copy
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from tvaprune import report, runtime
from tvaprune.apply import apply_plan
from tvaprune.attach import GatedModel
from tvaprune.baselines import score_masks
from tvaprune.checkpoint import check_output, save_pruned
from tvaprune.config import (
    RELEASED_MAX_WINDOW,
    DataArguments,
    DistillArguments,
    EvalArguments,
    ModelArguments,
    PruneArguments,
    gate_settings,
)
from tvaprune.data import token_blocks
from tvaprune.errors import InputError
from tvaprune.evaluation.perplexity import perplexity
from tvaprune.evaluation.speed import speed_up
from tvaprune.families import ModelShape, family_of, shape_of
from tvaprune.masks import Masks, best_mask, keep_best, load_masks
from tvaprune.param_count import SPARSITY_DEFINITION, dense_parameters
from tvaprune.plan import TOLERANCE, KeepPlan, calibrate, default_dim_multiple, describe_widths, plan_from_masks
from tvaprune.runtime import RunArguments
from tvaprune.trainer import GateTrainer
from tvaprune.update import fold

DEFAULT_TRAIN_SAMPLES = 4500  # blocks; the released runs take 4,000 to 5,000
DEFAULT_CALIBRATION_SAMPLES = 128  # blocks for the one-shot scores
CHOICE_SAMPLES = 128  # validation blocks: enough to tell masks apart


@dataclass
class Arguments:
    """One command's flags, by the stage they belong to."""

    source: ModelArguments
    data: DataArguments
    prune: PruneArguments
    distill: DistillArguments
    evaluation: EvalArguments
    training: RunArguments

    @classmethod
    def parse(cls) -> "Arguments":
        """Parses the command line."""
        classes = (ModelArguments, DataArguments, PruneArguments, DistillArguments, EvalArguments, RunArguments)
        return cls(*runtime.parse(classes))

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and masks go."""
        return Path(str(self.training.output_dir))

    @property
    def save_loc(self) -> Path:
        """Where results go."""
        return Path(self.evaluation.save_loc or str(self.training.output_dir))


@dataclass
class Run:
    """One command's flags, the loaded model and what follows from both."""

    args: Arguments
    model: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, args: Arguments) -> "Run":
        """Loads the model that the flags name."""
        set_seed(args.training.seed)
        device = args.training.device
        return cls(args, *runtime.load_model(args.source.model_name_or_path, args.source.dtype, device))

    @property
    def shape(self) -> ModelShape:
        """The unpruned model's sizes."""
        return shape_of(self.model.config)

    @property
    def dim_multiple(self) -> int:
        """The multiple of widths; 1 where the adjustment is off."""
        given = self.args.prune.dim_multiple
        return max(1, default_dim_multiple(self.shape.hidden_size) if given is None else given)

    @property
    def plan_options(self) -> tuple[int, int, bool, int]:
        """What the widths must satisfy: the arguments of `plan_from_masks` and `calibrate`."""
        prune = self.args.prune
        return self.dim_multiple, int(prune.keep_one_kv_head), prune.uniform, prune.tensor_parallel

    @property
    def window(self) -> int:
        """Tokens of an evaluation window."""
        return self.args.data.ctx_length or min(self.model.config.max_position_embeddings, RELEASED_MAX_WINDOW)

    def blocks(self, split: str, size: int, count: int | None) -> Dataset:
        """Returns token blocks of a split of the run's text; evaluation windows are the same whatever the seed."""
        data, seed = self.args.data, self.args.training.seed if split == "train" else 0
        return token_blocks(self.tokenizer, data.dataset_name, split, size, count, seed, data.data_dir)

    def train_blocks(self, default_count: int) -> Dataset:
        """Returns the blocks that gates are trained or units are scored on."""
        return self.blocks("train", self.args.data.block_size, self.args.data.max_train_samples or default_count)

    def choice_blocks(self) -> Dataset:
        """Returns the validation blocks that masks are compared on, whatever split is reported in the end."""
        count = min(self.args.data.max_eval_samples or CHOICE_SAMPLES, CHOICE_SAMPLES)
        return self.blocks("validation", self.args.data.block_size, count)

    def record(self) -> dict[str, Any]:
        """Returns what repeats the run."""
        return {
            "model": self.args.source.model_name_or_path,
            "prune_method": self.args.prune.prune_method,
            "dataset_name": self.args.data.dataset_name,
            "block_size": self.args.data.block_size,
            "target_sparsity": self.args.prune.target_sparsity,
            "seed": self.args.training.seed,
            "hardware": runtime.describe_device(self.args.training.device),
            "versions": runtime.versions(),
            "command": runtime.command_line(),
        }


def run_prune(args: Arguments) -> None:
    """Learns a mask, writes it, applies it and measures the narrower model."""
    checkpoint = _checkpoint(args)
    _check_save(args)
    runtime.prepare_folder("output_dir", args.output_dir, args.training.overwrite_output_dir or checkpoint is not None)
    run = Run.load(args)
    blocks = run.blocks(args.evaluation.eval_split, run.window, args.data.max_eval_samples)
    path = _train_gates(run, checkpoint) if args.prune.prune_method == "vib" else _score_units(run)
    plan = _plan(run, load_masks(path))
    target = args.prune.target_sparsity
    results = _measure(run, plan, blocks) | {"mask": str(path), "target_sparsity": target}
    _report(results, args.save_loc)
    if abs(plan.sparsity - target) > TOLERANCE:
        print(
            f"note: with --dim_multiple {run.dim_multiple} the nearest to --target_sparsity {target} is "
            f"{plan.sparsity:.4f}; a smaller multiple comes nearer"
        )


def run_evaluate(args: Arguments) -> None:
    """Applies a mask file and measures the narrower model."""
    assert args.prune.mask_loc is not None
    masks = load_masks(args.prune.mask_loc)
    masks.check_fits(shape_of(runtime.load_config(args.source.model_name_or_path)), f"--mask_loc {args.prune.mask_loc}")
    results_path = args.save_loc / "results.json"
    if results_path.exists() and not args.training.overwrite_output_dir:
        raise InputError(f"--save_loc {args.save_loc}: holds results.json; --overwrite_output_dir replaces it")
    _check_save(args)
    runtime.prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    run = Run.load(args)
    plan = _plan(run, masks)
    blocks = run.blocks(args.evaluation.eval_split, run.window, args.data.max_eval_samples)
    _report(_measure(run, plan, blocks) | {"mask": args.prune.mask_loc, "target_sparsity": None}, args.save_loc)


def run_save(args: Arguments) -> None:
    """Applies a mask file and writes the narrower model, unmeasured."""
    assert args.prune.mask_loc is not None and args.prune.save_pruned is not None
    masks = load_masks(args.prune.mask_loc)
    _check_save(args)
    run = Run.load(args)
    masks.check_fits(run.shape, f"--mask_loc {args.prune.mask_loc}")
    plan = plan_from_masks(masks, run.shape, *run.plan_options)
    _save(run, _narrow(run, run.model, plan), plan, run.record())


def _check_save(args: Arguments) -> None:
    """Refuses a checkpoint folder that is in use, before the work begins."""
    if args.prune.save_pruned is not None:
        check_output("save_pruned", args.prune.save_pruned, args.training.overwrite_output_dir)


def _save(run: Run, pruned: PreTrainedModel, plan: KeepPlan, record: dict[str, Any]) -> None:
    """Writes the narrower model where ``--save_pruned`` says so."""
    folder = run.args.prune.save_pruned
    if folder is None:
        return
    mask = run.args.prune.mask_loc or best_mask(run.args.output_dir / "best")
    record = record | {"mask": str(mask), "weight_update": run.args.prune.weight_update}
    save_pruned(pruned, plan, run.tokenizer, folder, run.args.training.overwrite_output_dir, record)
    print(f"checkpoint: {folder}")


def _checkpoint(args: Arguments) -> str | None:
    """Returns the checkpoint to go on from; ``--resume_from_checkpoint True`` is the last of the output folder."""
    asked = args.training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    found: str | None = asked
    if asked.lower() == "true":
        found = get_last_checkpoint(str(args.output_dir)) if args.output_dir.is_dir() else None
    if found is None or not Path(found).is_dir():
        raise InputError(
            f"--resume_from_checkpoint {asked}: no checkpoint there; give a checkpoint-* folder, or leave the flag out"
        )
    return found


def _train_gates(run: Run, checkpoint: str | None) -> Path:
    """Trains the gates and returns the best mask's file."""
    args, training = run.args, run.args.training
    train_blocks = run.train_blocks(DEFAULT_TRAIN_SAMPLES)
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps_per_epoch = math.ceil(len(train_blocks) / batch)
    num_steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    beta = family_of(run.model.config).beta
    settings = gate_settings(args.prune, args.distill, num_steps, steps_per_epoch, beta, run.dim_multiple)
    if checkpoint is None:
        _clear(args.output_dir)
    gated = GatedModel(run.model, settings.initial_log_variance)
    record = run.record() | {"train_blocks": len(train_blocks)}
    trainer = GateTrainer(gated, settings, training, train_blocks, run.choice_blocks(), record)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.score_mask()
    gated.detach_gates()
    report.plot_training(trainer.state.log_history, args.save_loc / "training.png")
    report.write_json({"log": trainer.state.log_history}, args.save_loc / "training_log.json")
    best = best_mask(trainer.best_folder)
    if best is None:
        raise InputError("no mask has a finite perplexity; lower --vib_learning_rate or use --dtype float32")
    return best


def _score_units(run: Run) -> Path:
    """Scores the units in one shot and returns the mask's file."""
    blocks = run.train_blocks(DEFAULT_CALIBRATION_SAMPLES)
    scores = score_masks(run.model, run.args.prune.prune_method, blocks)
    masks = calibrate(scores, run.shape, run.args.prune.target_sparsity, *run.plan_options)
    plan = plan_from_masks(masks, run.shape, *run.plan_options)
    gated = GatedModel(run.model)
    with gated.using(plan.full_scale()):
        value = perplexity(gated, run.choice_blocks(), run.args.training.per_device_eval_batch_size)
    gated.detach_gates()
    _clear(run.args.output_dir)
    record = run.record() | {"train_blocks": len(blocks)} | describe_widths(plan)
    return keep_best(run.args.output_dir / "best", masks, value, record)


def _clear(folder: Path) -> None:
    """Removes what an earlier run of this tool left: masks and checkpoints, nothing else."""
    for old in [folder / "best", *folder.glob("checkpoint-*")]:
        shutil.rmtree(old, ignore_errors=True)


def _plan(run: Run, masks: Masks) -> KeepPlan:
    """Turns a mask into the plan for the run's model, and writes it down."""
    plan = plan_from_masks(masks, run.shape, *run.plan_options)
    folder = run.args.save_loc
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    report.plot_widths(plan, folder / "widths.png")
    return plan


def _measure(run: Run, plan: KeepPlan, blocks: Dataset) -> dict[str, Any]:
    """Measures the dense and the pruned model side by side."""
    dense, evaluation = run.model, run.args.evaluation
    batch_size = run.args.training.per_device_eval_batch_size
    results: dict[str, Any] = {
        **run.record(),
        "split": evaluation.eval_split,
        "window": run.window,
        "num_windows": len(blocks),
        "weight_update": run.args.prune.weight_update,
        "shape": asdict(plan.shape),
        "widths": describe_widths(plan),
        "sparsity_definition": SPARSITY_DEFINITION,
        "parameters": {"dense": dense_parameters(plan.shape), "pruned": plan.num_parameters},
    }
    dense_perplexity = perplexity(dense, blocks, batch_size, "dense perplexity")
    # In place where nothing is timed: then the peak of memory is the dense model's.
    pruned = _narrow(run, copy.deepcopy(dense) if evaluation.speed_batches else dense, plan)
    pruned_perplexity = perplexity(pruned, blocks, batch_size, "pruned perplexity")
    results["perplexity"] = {"dense": dense_perplexity, "pruned": pruned_perplexity}
    if evaluation.speed_batches:
        results["speed_up"] = asdict(speed_up(dense, pruned, blocks, batch_size, evaluation.speed_batches))
    _save(run, pruned, plan, results)
    return results


def _narrow(run: Run, model: PreTrainedModel, plan: KeepPlan) -> PreTrainedModel:
    """Slices a model in place and updates its weights."""
    apply_plan(model, plan)
    return fold(model, plan) if run.args.prune.weight_update == "fold" else model


def _report(results: dict[str, Any], folder: Path) -> None:
    """Writes results.json and prints the closing table."""
    report.write_json(results, folder / "results.json")
    print("\n" + report.table([*report.summary_rows(results), ("mask", results["mask"]), ("results", f"{folder}/")]))
