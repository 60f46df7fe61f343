"""What the stages share: measure, score, save, write, tell."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.budget import times
from tvaprune.checkpoint.eval_results import write_eval_results
from tvaprune.checkpoint.folder import save_pruned
from tvaprune.errors import EVALUATING, InputError, reason, running_out_in
from tvaprune.files import write_text
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.recipes import RECIPE_NAME
from tvaprune.measure.generations import answers
from tvaprune.measure.perplexity import TextLoss, text_loss, windows_per_pass
from tvaprune.measure.speed import SpeedUp, speed_up
from tvaprune.measure.zeroshot import ZeroShot
from tvaprune.models.layers import Streamed
from tvaprune.models.parameters import SPARSITY_DEFINITION, model_parameters
from tvaprune.outputs import GENERATIONS_NAME, OF_GATES, OF_TUNING, PAGE_NAME, PLAN_NAME, WIDTHS_NAME, drop
from tvaprune.phases import PRUNED_PERPLEXITY
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.rotation import drop_rotations, save_rotation
from tvaprune.report import plots, tables
from tvaprune.report.folders import read_runs, write_generations
from tvaprune.report.results import Parameters, Perplexities, Results, ScoringRun
from tvaprune.report.runs import page_of
from tvaprune.report.zero_shot import DENSE, PRUNED, ZeroShotRecord
from tvaprune.run import Run


def write_plan(run: Run, plan: KeepPlan, folder: Path) -> None:
    """Writes the decision down, before anything is cut: the plan as JSON, its rotation, its widths as a picture."""
    ranks.on_main(_write_plan, run, plan, folder)


def _write_plan(run: Run, plan: KeepPlan, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if run.rotation is not None:
        save_rotation(run.rotation, folder)
    plan.save(folder / PLAN_NAME)
    drop_rotations(folder)
    plots.plot_widths(plan, folder / WIDTHS_NAME)


def measure(
    run: Run, plan: KeepPlan, pruned: PreTrainedModel | Streamed, windows: Dataset, dense: TextLoss, results: Results
) -> None:
    """Measures the pruned model, its speed beside the dense one's where both are in memory, and what it says.

    Args:
        dense: What the dense model makes of the same windows.
        results: What is measured goes in there.
    """
    evaluation, batch_size = run.args.evaluation, run.args.training.per_device_eval_batch_size
    results.protocol = run.evaluation_text(windows)
    results.shape, results.sparsity_definition = plan.shape, SPARSITY_DEFINITION
    came = replace(plan.shape, tie_word_embeddings=run.tied)  # turning it may have untied the head
    results.parameters = Parameters(model_parameters(came), plan.num_parameters)
    with running_out_in(EVALUATING):
        loss = text_loss(pruned, windows, batch_size, PRUNED_PERPLEXITY, partial(run.phases.at, PRUNED_PERPLEXITY))
    results.perplexity = Perplexities.of(dense, loss)
    if evaluation.speed_batches and not isinstance(pruned, Streamed):
        results.speed_up = ranks.on_main(_speed_up, run, plan, pruned, windows)
    ask(run, PRUNED, pruned)


def _speed_up(run: Run, plan: KeepPlan, pruned: PreTrainedModel, windows: Dataset) -> SpeedUp | None:
    """Times both models; None, and a note: they do not fit beside each other. What was measured before is kept."""
    timed = windows_per_pass(windows, run.args.training.per_device_eval_batch_size)
    try:
        if times(run.args, plan):
            return speed_up(run.dense_model(), pruned, windows, timed, run.args.evaluation.speed_batches)
    except torch.OutOfMemoryError:
        pass
    print("note: both models do not fit beside each other: no speed-up; a larger --memory lets them, if there is more")
    return None


def ask(run: Run, name: str, model: Any) -> None:
    """Lets one of a run's models continue the prompts, and writes what its models said so far; main does it alone.

    Args:
        name: By which the page calls it; the dense one is asked first, and nothing is written before another is.
    """
    if not run.args.evaluation.prompt_tokens:
        return
    if run.streamed is None and not run.args.source.shard:
        ranks.on_main(_ask, run, name, model)
    elif name == DENSE:
        print("note: --shard and --stream keep no whole model in memory, so the page does not show what models say")


def _ask(run: Run, name: str, model: Any) -> None:
    """Does so; what goes wrong is a note: the figures are there without."""
    run.answers.pop(name, None)  # of the target before
    try:
        run.answers[name] = answers(model, run.tokenizer, run.args.evaluation.prompt_tokens)
    except Exception as error:  # whatever the checkpoint's tokenizer or way of generating makes of it
        print(f"note: the {name} model does not continue the prompts ({reason(error)}); the page is without its words")
    if name != DENSE and DENSE in run.answers:
        write_generations(run.args.save_loc, run.record()["command"], run.answers)


def write_results(args: Arguments, results: Results) -> None:
    """Writes what a run ends with: its results, the flags that repeat it, and the page, of all that lies there.

    A file there that the page cannot be made of, somebody else's perhaps, ends no run.
    """
    results.write(args.save_loc)
    drop_rotations(args.save_loc)  # that of the results which these replace
    if args.training.overwrite_output_dir:
        _drop_older(args, results)
    write_recipe(args)
    try:
        write_page([args.save_loc], args.save_loc)
    except InputError as error:
        (args.save_loc / PAGE_NAME).unlink(missing_ok=True)  # an older run's
        print(f"note: no {PAGE_NAME} is written: {error}")


def _drop_older(args: Arguments, results: Results) -> None:
    """Removes what another run left; the logs of the gates stay where the mask or plan that is cut lies."""
    if results.widths is None:  # nothing is cut
        drop(args.save_loc, (PLAN_NAME, WIDTHS_NAME))
    if results.widths is None or not args.evaluation.prompt_tokens:
        drop(args.save_loc, (GENERATIONS_NAME,))
    cut = args.prune.mask_loc or args.prune.plan
    if not results.trained_gates and (cut is None or args.save_loc.resolve() not in Path(cut).resolve().parents):
        drop(args.save_loc, OF_GATES)
    if results.finetune is None:
        drop(args.save_loc, OF_TUNING)


def write_page(folders: Sequence[Path], place: Path) -> None:
    """Writes the page of what runs left in some folders to another, or to one of them."""
    page_of(read_runs(folders)).write(place / PAGE_NAME)


_OF_THE_FOLDER = ("resume_from_checkpoint", "overwrite_output_dir")  # what another folder needs not


def write_recipe(args: Arguments) -> None:
    """Writes the flags that repeat the run: ``tvaprune VERB --config recipe.yaml``; not what its folder held before."""
    recipe = {name: value for name, value in args.recipe.items() if name not in _OF_THE_FOLDER}
    write_text(yaml.safe_dump(recipe, sort_keys=False), args.save_loc / RECIPE_NAME)


def tell(args: Arguments, results: Results) -> None:
    """Writes the results of one measurement and prints the closing table."""
    ranks.on_main(_tell, args, results)


def _tell(args: Arguments, results: Results) -> None:
    write_results(args, results)
    written = " ".join(sorted(path.name for path in args.save_loc.glob("[!.]*") if path.is_file()))
    cut = results.widths is not None
    rows = [*tables.summary_rows(results), tables.origin(results)] if cut else tables.model_rows(results)
    rows += [tables.page(args.save_loc), (f"in {args.save_loc}", written)]
    print("\n" + tables.table(rows))


def save(run: Run, plan: KeepPlan, pruned: PreTrainedModel | Streamed, results: Results) -> None:
    """Writes the pruned model to ``--save_pruned``, where that is given."""
    folder, overwrite = run.args.prune.save_pruned, run.args.training.overwrite_output_dir
    if folder is not None:
        ranks.on_main(save_pruned, pruned, plan, run.tokenizer, folder, overwrite, results.content())
        print(f"checkpoint: {folder}")


def zero_shot(
    run: Run,
    tasks: ZeroShot | None,
    models: dict[str, PreTrainedModel],
    results: Results,
    saved: Mapping[str, str | Path | None] | None = None,
) -> None:
    """Scores the models at hand on the tasks, each result written as it comes, and prints the table.

    Args:
        saved: The folders that models stand in, by the models' names: the scores join what these say.
    """
    if tasks is None:
        return
    wanted = {name: model for name, model in models.items() if name != DENSE or run.args.evaluation.compare_dense}
    if DENSE in wanted:
        wanted[DENSE] = run.dense_model()
    ranks.on_main(_zero_shot, run, tasks, wanted, results)
    for name, folder in (saved or {}).items():
        if folder is not None:
            ranks.on_main(write_eval_results, folder, results.content(), name)


def _zero_shot(run: Run, tasks: ZeroShot, wanted: dict[str, PreTrainedModel], results: Results) -> None:
    made = run.record()
    scored_by = ScoringRun(made["seed"], made["hardware"], made["versions"], made["command"])
    record = ZeroShotRecord(results, run.args.save_loc, run.args.evaluation.write_out, scored_by)
    missing = tasks.run(wanted, run.tokenizer, record.add)
    print("\n" + record.finish(missing))
    write_results(run.args, results)
    print(f"results: {run.args.save_loc}/")
    print(f"page: {run.args.save_loc / PAGE_NAME}")
