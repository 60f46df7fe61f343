"""The order of the stages. Page one for a reader.

flags -> stock model -> gates trained, or units scored -> mask file -> keep plan -> narrower model -> results
"""

import copy
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed
from transformers.trainer_utils import get_last_checkpoint

from tvaprune import report, runtime, zero_report
from tvaprune.apply import apply_plan
from tvaprune.attach import GatedModel
from tvaprune.baselines import score_masks
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
from tvaprune.evaluation.zeroshot import RELEASED_TASKS, ZeroShot
from tvaprune.families import family_of, shape_of
from tvaprune.masks import MASK_NAME, Masks, load_masks, save_masks
from tvaprune.param_count import total_parameters
from tvaprune.plan import TOLERANCE, KeepPlan, calibrate, default_dim_multiple, describe_widths, plan_from_masks
from tvaprune.runtime import RunArguments
from tvaprune.trainer import GateTrainer, best_mask
from tvaprune.update import fold
from tvaprune.zero_report import DENSE, PRUNED

ARGUMENT_CLASSES = (ModelArguments, DataArguments, PruneArguments, DistillArguments, EvalArguments, RunArguments)
DEFAULT_TRAIN_SAMPLES = 4500  # blocks; the released runs take 4,000 to 5,000


@dataclass
class Run:
    """One command's arguments, the loaded model and what follows from them."""

    model_args: ModelArguments
    data: DataArguments
    prune: PruneArguments
    distill: DistillArguments
    evaluation: EvalArguments
    training: RunArguments
    model: PreTrainedModel
    tokenizer: Any

    @classmethod
    def load(cls, arguments: tuple[Any, ...]) -> "Run":
        """Loads the model that the arguments name."""
        model_args, training = arguments[0], arguments[-1]
        set_seed(training.seed)
        model, tokenizer = runtime.load_model(model_args.model_name_or_path, model_args.dtype, training.device)
        return cls(*arguments, model=model, tokenizer=tokenizer)

    @property
    def output_dir(self) -> Path:
        """Where checkpoints and masks go."""
        return Path(self.training.output_dir)

    @property
    def save_loc(self) -> Path:
        """Where results go."""
        return Path(self.evaluation.save_loc or self.training.output_dir)

    @property
    def dim_multiple(self) -> int:
        """The multiple of widths; 1 where the adjustment is off."""
        given = self.prune.dim_multiple
        return max(1, default_dim_multiple(self.model.config.hidden_size) if given is None else given)

    @property
    def window(self) -> int:
        """Tokens of an evaluation window."""
        return self.data.ctx_length or min(self.model.config.max_position_embeddings, RELEASED_MAX_WINDOW)

    def blocks(self, split: str, size: int, count: int | None) -> Dataset:
        """Returns token blocks of a split of the run's text."""
        name, folder = self.data.dataset_name, self.data.data_dir
        return token_blocks(self.tokenizer, name, split, size, count, self.training.data_seed or 0, folder)


def run_prune(arguments: tuple[Any, ...]) -> None:
    """Learns a mask, writes it, applies it and measures the narrower model."""
    training = arguments[-1]
    tasks = _zero_shot_tasks(arguments)
    checkpoint = _checkpoint(training)
    runtime.prepare_output(training, resume=checkpoint is not None)
    run = Run.load(arguments)
    evaluation_blocks = run.blocks(run.evaluation.eval_split, run.window, run.data.max_eval_samples)
    if run.prune.prune_method == "vib":
        path = _train_gates(run, checkpoint)
    else:
        path = _score(run)
    print(f"\nmask: {path}")
    plan = _save_plan(run, _plan(run, load_masks(path), str(path)))
    if abs(plan.sparsity - run.prune.target_sparsity) > TOLERANCE:
        print(
            f"note: with --dim_multiple {run.dim_multiple} the nearest to --target_sparsity "
            f"{run.prune.target_sparsity} is {plan.sparsity:.4f}; a smaller multiple comes nearer"
        )
    origin = {"mask": str(path), "target_sparsity": run.prune.target_sparsity}
    models = _measure(run, plan, evaluation_blocks, origin)
    _zero_shot(run, tasks, models, _identity(run, plan, str(path)))


def run_evaluate(arguments: tuple[Any, ...]) -> None:
    """Applies a mask file and measures the narrower model; zero-shot results join those that are there."""
    evaluation, training = arguments[-2], arguments[-1]
    results = Path(evaluation.save_loc or training.output_dir) / "results.json"
    if results.exists() and not (training.overwrite_output_dir or evaluation.do_zero_eval):
        raise InputError(f"--save_loc {results.parent}: holds results.json; --overwrite_output_dir replaces it")
    tasks = _zero_shot_tasks(arguments)
    run = Run.load(arguments)
    plan = None
    if run.prune.mask_loc is not None:
        plan = _plan(run, load_masks(run.prune.mask_loc), f"--mask_loc {run.prune.mask_loc}")
    identity = _identity(run, plan, run.prune.mask_loc)
    if not training.overwrite_output_dir:
        zero_report.check_same(results, identity)
    if plan is None:
        models = {"model": run.model}
    elif training.do_eval:
        blocks = run.blocks(evaluation.eval_split, run.window, run.data.max_eval_samples)
        models = _measure(run, _save_plan(run, plan), blocks, {"mask": run.prune.mask_loc})
    else:
        models = _dense_and_pruned(run, _save_plan(run, plan), evaluation.compare_dense)
    _zero_shot(run, tasks, models, identity)


def _identity(run: Run, plan: KeepPlan | None, mask: str | None) -> dict[str, Any]:
    """Returns what the results of a model are recorded with, so that no other model's are mixed with them."""
    pruning = {} if plan is None else {"weight_update": run.prune.weight_update, "widths": describe_widths(plan)}
    return _record(run) | {"mask": mask} | pruning


def _zero_shot_tasks(arguments: tuple[Any, ...]) -> ZeroShot | None:
    """Finds the tasks that the flags name, before any work: a wrong name fails at once."""
    data, evaluation = arguments[1], arguments[-2]
    if not evaluation.do_zero_eval:
        return None
    names = evaluation.zero_eval_tasks or RELEASED_TASKS
    return ZeroShot(names, data.data_dir, evaluation.num_fewshot, evaluation.zero_eval_limit)


def _zero_shot(run: Run, tasks: ZeroShot | None, models: dict[str, PreTrainedModel], identity: dict[str, Any]) -> None:
    """Scores the models at hand on the tasks, each result written as it comes, and prints the table."""
    if tasks is None:
        return
    wanted = {name: model for name, model in models.items() if name != DENSE or run.evaluation.compare_dense}
    record = zero_report.ZeroShotRecord(run.save_loc, identity, run.evaluation.write_out)
    missing = tasks.run(wanted, run.tokenizer, record.add, run.data.ctx_length)
    print(record.finish(missing))
    print(f"results: {run.save_loc}")


def _dense_and_pruned(run: Run, plan: KeepPlan, keep_dense: bool) -> dict[str, PreTrainedModel]:
    """Prunes the run's model: a copy of it where the dense one is asked for too, else in place."""
    pruned = apply_plan(copy.deepcopy(run.model) if keep_dense else run.model, plan)
    if run.prune.weight_update == "fold":
        fold(pruned, plan)
    return {DENSE: run.model, PRUNED: pruned} if keep_dense else {PRUNED: pruned}


def _checkpoint(training: RunArguments) -> str | None:
    """Returns the checkpoint to go on from; ``--resume_from_checkpoint True`` is the last of the output folder."""
    asked = training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    folder = Path(training.output_dir)
    path = (get_last_checkpoint(str(folder)) if folder.is_dir() else None) if asked.lower() == "true" else asked
    if path is None or not Path(path).is_dir():
        raise InputError(f"--resume_from_checkpoint {asked}: no checkpoint there; give a checkpoint-* folder, or leave "
                         "the flag out")  # fmt: skip
    return path


def _train_gates(run: Run, checkpoint: str | None) -> Path:
    """Trains the gates and returns the best mask's file."""
    count = run.data.max_train_samples or DEFAULT_TRAIN_SAMPLES
    train_blocks = run.blocks("train", run.data.block_size, count)
    # The mask is chosen on validation text whatever split is reported; a subset of it is enough to compare masks.
    choice_blocks = run.blocks("validation", run.data.block_size, min(run.data.max_eval_samples or 128, 128))
    training = run.training
    batch = training.train_batch_size * training.gradient_accumulation_steps * max(1, training.world_size)
    steps_per_epoch = max(1, math.ceil(len(train_blocks) / batch))
    num_steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    beta = family_of(run.model.config).beta
    settings = gate_settings(run.prune, run.distill, num_steps, steps_per_epoch, beta, run.dim_multiple)
    if checkpoint is None:
        _clear(run.output_dir)
    gated = GatedModel(run.model, settings.initial_log_variance)
    record = _record(run) | {"block_size": run.data.block_size, "train_blocks": len(train_blocks)}
    trainer = GateTrainer(gated, settings, training, train_blocks, choice_blocks, record)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.score_mask()
    gated.detach_gates()
    report.plot_training(trainer.state.log_history, run.save_loc / "training.png")
    report.write_json({"log": trainer.state.log_history}, run.save_loc / "training_log.json")
    best = best_mask(trainer.best_folder)
    if best is None:
        raise InputError("no mask has a finite perplexity; lower --vib_learning_rate or use --dtype float32")
    return best


def _score(run: Run) -> Path:
    """Scores the units in one shot and returns the mask's file."""
    count = run.data.max_train_samples or 128
    blocks = run.blocks("train", run.data.block_size, count)
    masks = score_masks(run.model, run.prune.prune_method, blocks)
    shape = shape_of(run.model.config)
    sizes = (run.dim_multiple, int(run.prune.keep_one_kv_head))
    masks = calibrate(masks, shape, run.prune.target_sparsity, *sizes)
    plan = plan_from_masks(masks, shape, *sizes)
    gated = GatedModel(run.model)
    choice_blocks = run.blocks("validation", run.data.block_size, min(run.data.max_eval_samples or 128, 128))
    with gated.using(plan.full_scale()):
        value = perplexity(gated, choice_blocks)
    gated.detach_gates()
    _clear(run.output_dir)
    path = run.output_dir / "best" / MASK_NAME.format(perplexity=value)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_masks(masks, path)
    record = _record(run) | {"block_size": run.data.block_size, "train_blocks": len(blocks)}
    report.write_json(record | describe_widths(plan) | {"perplexity": value}, path.with_suffix(".json"))
    return path


def _clear(folder: Path) -> None:
    """Removes what an earlier run of this tool left: masks and checkpoints, nothing else."""
    for old in [folder / "best", *folder.glob("checkpoint-*")]:
        shutil.rmtree(old, ignore_errors=True)


def _record(run: Run) -> dict[str, Any]:
    """Returns what repeats a run."""
    return {
        "model": run.model_args.model_name_or_path,
        "prune_method": run.prune.prune_method,
        "dataset_name": run.data.dataset_name,
        "target_sparsity": run.prune.target_sparsity,
        "seed": run.training.seed,
        "hardware": runtime.describe_device(run.training.device),
        "versions": runtime.versions(),
        "command": runtime.command_line(),
    }


def _plan(run: Run, masks: Masks, origin: str) -> KeepPlan:
    """Turns a mask into the plan for the run's model."""
    shape = shape_of(run.model.config)
    masks.check_fits(shape, origin)
    return plan_from_masks(masks, shape, run.dim_multiple, int(run.prune.keep_one_kv_head))


def _save_plan(run: Run, plan: KeepPlan) -> KeepPlan:
    """Writes the plan down and returns it."""
    run.save_loc.mkdir(parents=True, exist_ok=True)
    plan.save(run.save_loc / "plan.json")
    report.plot_widths(plan, run.save_loc / "widths.png")
    return plan


def _measure(run: Run, plan: KeepPlan, blocks: Dataset, origin: dict[str, Any]) -> dict[str, PreTrainedModel]:
    """Measures the dense and the pruned model, writes and prints the results, and returns the models that are left."""
    dense, batch_size, shape = run.model, run.training.per_device_eval_batch_size, plan.shape
    layers = shape.num_hidden_layers
    full = shape.hidden_size, [shape.num_key_value_heads] * layers, [shape.intermediate_size] * layers
    results: dict[str, Any] = {
        **_record(run),
        **origin,
        "split": run.evaluation.eval_split,
        "window": run.window,
        "num_windows": len(blocks),
        "weight_update": run.prune.weight_update,
        "shape": asdict(shape),
        "widths": describe_widths(plan),
        "sparsity_definition": "decoder layers' projections and norms; embeddings, lm_head, final norm not counted",
        "parameters": {"dense": total_parameters(*full, shape), "pruned": plan.num_parameters},
        "perplexity": {"dense": perplexity(dense, blocks, batch_size, "dense perplexity")},
    }
    timed = run.evaluation.speed_batches > 0
    # In place where nothing needs the dense model any more: then the peak is the dense model's.
    models = _dense_and_pruned(run, plan, timed or run.evaluation.compare_dense)
    pruned = models[PRUNED]
    results["perplexity"]["pruned"] = perplexity(pruned, blocks, batch_size, "pruned perplexity")
    if timed:
        torch.manual_seed(run.training.seed)
        measured = speed_up(dense, pruned, blocks, batch_size, run.evaluation.speed_batches)
        results["speed_up"] = asdict(measured)
    zero_report.merge(run.save_loc / "results.json", results)
    print(report.table([*report.summary_rows(results), ("results, plan and plots", str(run.save_loc))]))
    return models
