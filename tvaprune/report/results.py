"""What results.json holds of a run: what repeats it, what was measured."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune.files import write_text
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.recipes import RECIPE_NAME
from tvaprune.measure.perplexity import perplexity
from tvaprune.measure.speed import speed_up
from tvaprune.measure.zeroshot import ZeroShot
from tvaprune.models.parameters import SPARSITY_DEFINITION, dense_parameters
from tvaprune.plan.keep_plan import KeepPlan, describe_widths
from tvaprune.report import plots, tables
from tvaprune.report import zero_shot as zero_shot_report
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.run import Run


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


def write_plan(plan: KeepPlan, folder: Path) -> None:
    """Writes the decision down, before anything is cut: the plan as JSON, its widths as a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder / "plan.json")
    plots.plot_widths(plan, folder / "widths.png")


def measure(run: Run, plan: KeepPlan, pruned: PreTrainedModel, blocks: Dataset, dense: float) -> dict[str, Any]:
    """Measures the pruned model, and its speed beside the dense one's.

    Args:
        dense: The dense model's perplexity on the same windows.
    """
    evaluation, batch_size = run.args.evaluation, run.args.training.per_device_eval_batch_size
    results: dict[str, Any] = {
        "split": evaluation.eval_split,
        "window": run.window,
        "num_windows": len(blocks),
        "shape": asdict(plan.shape),
        "sparsity_definition": SPARSITY_DEFINITION,
        "parameters": {"dense": dense_parameters(plan.shape), "pruned": plan.num_parameters},
        "perplexity": {DENSE: dense, PRUNED: perplexity(pruned, blocks, batch_size, "pruned perplexity")},
    }
    if evaluation.speed_batches:
        results["speed_up"] = asdict(speed_up(run.model, pruned, blocks, batch_size, evaluation.speed_batches))
    return results


def write_recipe(args: Arguments) -> None:
    """Writes the flags that repeat the run: ``tvaprune VERB --config recipe.yaml``."""
    write_text(yaml.safe_dump(args.recipe, sort_keys=False), args.save_loc / RECIPE_NAME)


def tell(args: Arguments, results: dict[str, Any]) -> None:
    """Writes the results of one measurement and prints the closing table."""
    path = args.save_loc / "results.json"
    if args.training.overwrite_output_dir:
        path.unlink(missing_ok=True)
    zero_shot_report.merge(path, results)
    write_recipe(args)
    written = " ".join(sorted(path.name for path in args.save_loc.glob("[!.]*") if path.is_file()))
    rows = [*tables.summary_rows(results), ("mask", results["mask"]), (f"in {args.save_loc}", written)]
    print("\n" + tables.table(rows))


def zero_shot(run: Run, tasks: ZeroShot | None, models: dict[str, PreTrainedModel], identity: dict[str, Any]) -> None:
    """Scores the models at hand on the tasks, each result written as it comes, and prints the table."""
    if tasks is None:
        return
    wanted = {name: model for name, model in models.items() if name != DENSE or run.args.evaluation.compare_dense}
    record = zero_shot_report.ZeroShotRecord(run.args.save_loc, identity, run.args.evaluation.write_out)
    missing = tasks.run(wanted, run.tokenizer, record.add, run.args.data.ctx_length)
    print("\n" + record.finish(missing))
    print(f"results: {run.args.save_loc}/")
