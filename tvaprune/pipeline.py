"""The order of the stages. Page one for a reader.

flags -> stock model -> gates trained, or units scored -> mask file -> keep plan -> narrower model -> results and folder
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from tvaprune import report, runtime, zero_report
from tvaprune.apply import apply_plan
from tvaprune.baselines.flap import compensate_bias
from tvaprune.checkpoint import check_output, save_pruned
from tvaprune.choose import choose_masks
from tvaprune.errors import InputError
from tvaprune.evaluation.perplexity import perplexity
from tvaprune.evaluation.speed import speed_up
from tvaprune.evaluation.zeroshot import RELEASED_TASKS, ZeroShot
from tvaprune.families import shape_of
from tvaprune.masks import Masks, load_masks
from tvaprune.param_count import SPARSITY_DEFINITION, dense_parameters
from tvaprune.plan import TOLERANCE, KeepPlan, describe_widths, plan_from_masks
from tvaprune.refit import refit
from tvaprune.run import Arguments, Run
from tvaprune.update import fold
from tvaprune.zero_report import DENSE, PRUNED


def run_prune(args: Arguments) -> None:
    """Chooses units, writes a mask for every target, applies each and measures the narrower models."""
    tasks, checkpoint = zero_shot_tasks(args), given_checkpoint(args)
    targets = args.each_target()
    for one in targets.values():
        _check_save(one)
    _check_results(args, checkpoint is not None)
    runtime.prepare_folder("output_dir", args.output_dir, args.training.overwrite_output_dir or checkpoint is not None)
    runtime.prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    run = Run.load(args)
    blocks = run.blocks(args.evaluation.eval_split, run.window, args.data.max_eval_samples)
    dense = perplexity(run.model, blocks, args.training.per_device_eval_batch_size, "dense perplexity")
    masks = choose_masks(run, checkpoint)
    for target, one in targets.items():
        one.save_loc.mkdir(parents=True, exist_ok=True)
        plan = plan_from_masks(load_masks(masks[target]), run.shape, *run.plan_options)
        origin, is_last = {"mask": str(masks[target])}, target == max(targets)
        _evaluate(replace(run, args=one), plan, origin, blocks, tasks, dense, keep_dense=not is_last)
        if abs(plan.sparsity - target) > TOLERANCE:
            print(
                f"note: with --dim_multiple {plan.dim_multiple} the nearest to --target_sparsity {target} is "
                f"{plan.sparsity:.4f}; a smaller multiple comes nearer"
            )


def run_evaluate(args: Arguments) -> None:
    """Applies a mask file and measures the narrower model; zero-shot results join those that are there."""
    masks, evaluation = given_masks(args), args.evaluation
    results_path = args.save_loc / "results.json"
    _check_results(args, evaluation.do_zero_eval)
    tasks = zero_shot_tasks(args)
    _check_save(args)
    runtime.prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    run = Run.load(args)
    plan = None if masks is None else plan_from_masks(masks, run.shape, *run.plan_options)
    origin = {"mask": args.prune.mask_loc, "target_sparsity": None}
    if not args.training.overwrite_output_dir:
        zero_report.check_same(results_path, identity(run, plan) | origin)
    if plan is None:
        zero_shot(run, tasks, {"model": run.model}, identity(run, plan) | origin)
        return
    blocks, dense, batch_size = None, None, args.training.per_device_eval_batch_size
    if args.training.do_eval:
        blocks = run.blocks(evaluation.eval_split, run.window, args.data.max_eval_samples)
        dense = perplexity(run.model, blocks, batch_size, "dense perplexity")
    _evaluate(run, plan, origin, blocks, tasks, dense)


def run_save(args: Arguments) -> None:
    """Applies a mask file and writes the narrower model, unmeasured."""
    masks = given_masks(args)
    assert masks is not None
    _check_save(args)
    run = Run.load(args)
    plan = plan_from_masks(masks, run.shape, *run.plan_options)
    model, update = narrow(run, plan, keep_dense=False)
    _save(run, model, plan, run.record() | {"mask": args.prune.mask_loc} | update)


def given_masks(args: Arguments) -> Masks | None:
    """Reads ``--mask_loc``, and compares it with the model's config before the weights are read."""
    path = args.prune.mask_loc
    if path is None:
        return None
    masks = load_masks(path)
    masks.check_fits(shape_of(runtime.load_config(args.source.model_name_or_path)), f"--mask_loc {path}")
    return masks


def given_checkpoint(
    args: Arguments, last: Callable[[Path], Path | str | None] = get_last_checkpoint, may_be_none: bool = False
) -> str | None:
    """Returns the checkpoint to go on from; ``--resume_from_checkpoint True`` is the last of the output folder.

    Args:
        last: Finds that one.
        may_be_none: Whether a run that has no checkpoint yet begins anew, in place of an error.
    """
    asked = args.training.resume_from_checkpoint
    if asked is None or asked.lower() == "false":
        return None
    found: Path | str | None = asked
    if asked.lower() == "true":
        found = last(args.output_dir) if args.output_dir.is_dir() else None
        if found is None and may_be_none:
            print(f"note: there is no checkpoint in {args.output_dir} yet: the run begins anew")
            return None
    if found is None or not Path(found).is_dir():
        raise InputError(
            f"--resume_from_checkpoint {asked}: no checkpoint there; give a checkpoint-* folder, or leave the flag out"
        )
    return str(found)


def _check_results(args: Arguments, may_hold_some: bool) -> None:
    """Refuses to replace results that nothing says to touch."""
    if (args.save_loc / "results.json").exists() and not (args.training.overwrite_output_dir or may_hold_some):
        raise InputError(f"--save_loc {args.save_loc}: holds results.json; --overwrite_output_dir replaces it")


def _check_save(args: Arguments) -> None:
    """Refuses a checkpoint folder that is in use, before the work begins."""
    if args.prune.save_pruned is not None:
        check_output("save_pruned", args.prune.save_pruned, args.training.overwrite_output_dir)


def zero_shot_tasks(args: Arguments) -> ZeroShot | None:
    """Finds the tasks that the flags name, before any work: a wrong name fails at once."""
    evaluation = args.evaluation
    if not evaluation.do_zero_eval:
        return None
    names = evaluation.zero_eval_tasks or RELEASED_TASKS
    return ZeroShot(names, args.data.data_dir, evaluation.num_fewshot, evaluation.zero_eval_limit)


def _evaluate(
    run: Run, plan: KeepPlan, origin: dict[str, Any], blocks: Dataset | None, tasks: ZeroShot | None,
    dense: float | None, keep_dense: bool = False,
) -> None:  # fmt: skip
    """Narrows the model by the plan, measures what is asked for, and writes everything down.

    Args:
        origin: Where the plan comes from, for the results.
        blocks: Windows for perplexity and speed; ``None``: neither is measured.
        tasks: Zero-shot tasks; ``None``: none is scored.
        dense: The unpruned model's perplexity on them.
        keep_dense: Whether the unpruned model is needed afterwards.
    """
    args = run.args
    plan.save(args.save_loc / "plan.json")
    report.plot_widths(plan, args.save_loc / "widths.png")
    results = identity(run, plan) | origin
    timed = blocks is not None and args.evaluation.speed_batches > 0
    pruned, update = narrow(run, plan, keep_dense or timed or args.evaluation.compare_dense)
    results |= update
    if blocks is not None:
        results |= measure(run, plan, pruned, blocks)
        results["perplexity"] = {"dense": dense, **results["perplexity"]}
        zero_report.merge(args.save_loc / "results.json", results)
        written = " ".join(sorted(path.name for path in args.save_loc.iterdir() if path.is_file()))
        rows = [*report.summary_rows(results), ("mask", results["mask"]), (f"in {args.save_loc}", written)]
        print("\n" + report.table(rows))
    _save(run, pruned, plan, results)
    zero_shot(run, tasks, {DENSE: run.model, PRUNED: pruned}, results)


def identity(run: Run, plan: KeepPlan | None) -> dict[str, Any]:
    """Returns what repeats the run, and what tells its results from another model's."""
    if plan is None:
        return run.record()
    prune = run.args.prune
    pruning: dict[str, Any] = {"weight_update": prune.weight_update, "widths": describe_widths(plan)}
    if prune.weight_update == "refit":
        data, seed = run.args.data, run.args.training.seed
        pruning["calibration"] = [data.dataset_name, data.block_size, prune.refit_samples, seed]
    return run.record() | pruning


def narrow(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Slices the model by the plan and updates its weights as ``--weight_update`` says.

    Args:
        keep_dense: Whether ``run.model`` is needed again on its device; else it may be cut itself (``none``, ``fold``)
            or stay on the CPU (``refit`` with ``--refit_offload``).

    Returns:
        The narrower model, and what the refit did, for the results.
    """
    if run.args.prune.weight_update == "refit":
        return _refitted(run, plan, keep_dense)
    model, folds = copy.deepcopy(run.model) if keep_dense else run.model, run.args.prune.weight_update == "fold"
    if folds and run.args.prune.prune_method == "flap" and (run.shape.output_bias or run.shape.mlp_bias):
        compensate_bias(model, plan, run.refit_blocks())
    model = apply_plan(model, plan)
    return (fold(model, plan) if folds else model), {}


def _refitted(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns a narrower copy of the model, its kept weights refitted, and what the refit did."""
    begin, device, batch_size = time.perf_counter(), run.model.device, run.args.training.per_device_eval_batch_size
    try:
        calibration, held_out = run.refit_blocks(), run.choice_blocks()
    except InputError as error:
        raise InputError(f"{error}; --weight_update fold needs no text") from error
    stock: nn.Module = run.model
    stock.to("cpu")  # the copy is cut there: a GPU never holds the unpruned model twice
    try:
        model = fold(apply_plan(copy.deepcopy(run.model), plan), plan)
        moved: nn.Module = model
        moved.to(device)
        if not run.args.prune.refit_offload:
            stock.to(device)
        done = refit(run.model, model, plan, calibration, held_out, batch_size)
    finally:
        if keep_dense:
            stock.to(device)
    blocks = {"calibration_blocks": len(calibration), "held_out_blocks": len(held_out)}
    return model, {"refit": asdict(done) | blocks | {"seconds": time.perf_counter() - begin}}


def measure(run: Run, plan: KeepPlan, pruned: PreTrainedModel, blocks: Dataset) -> dict[str, Any]:
    """Measures the pruned model, and its speed beside the dense one's."""
    evaluation, batch_size = run.args.evaluation, run.args.training.per_device_eval_batch_size
    results: dict[str, Any] = {
        "split": evaluation.eval_split,
        "window": run.window,
        "num_windows": len(blocks),
        "shape": asdict(plan.shape),
        "sparsity_definition": SPARSITY_DEFINITION,
        "parameters": {"dense": dense_parameters(plan.shape), "pruned": plan.num_parameters},
        "perplexity": {"pruned": perplexity(pruned, blocks, batch_size, "pruned perplexity")},
    }
    if evaluation.speed_batches:
        results["speed_up"] = asdict(speed_up(run.model, pruned, blocks, batch_size, evaluation.speed_batches))
    return results


def _save(run: Run, pruned: PreTrainedModel, plan: KeepPlan, record: dict[str, Any]) -> None:
    """Writes the narrower model where ``--save_pruned`` says so."""
    folder = run.args.prune.save_pruned
    if folder is None:
        return
    record = record | {"weight_update": run.args.prune.weight_update}
    save_pruned(pruned, plan, run.tokenizer, folder, run.args.training.overwrite_output_dir, record)
    print(f"checkpoint: {folder}")


def zero_shot(run: Run, tasks: ZeroShot | None, models: dict[str, PreTrainedModel], identity: dict[str, Any]) -> None:
    """Scores the models at hand on the tasks, each result written as it comes, and prints the table."""
    if tasks is None:
        return
    wanted = {name: model for name, model in models.items() if name != DENSE or run.args.evaluation.compare_dense}
    record = zero_report.ZeroShotRecord(run.args.save_loc, identity, run.args.evaluation.write_out)
    missing = tasks.run(wanted, run.tokenizer, record.add, run.args.data.ctx_length)
    print("\n" + record.finish(missing))
    print(f"results: {run.args.save_loc}/")
