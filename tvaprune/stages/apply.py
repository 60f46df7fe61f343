"""Mask, or plan -> keep plan -> narrower model -> results, zero-shot scores and folder."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.budget import fit, times
from tvaprune.cut.narrow import narrow
from tvaprune.cut.stream import narrow_streamed
from tvaprune.errors import InputError
from tvaprune.estimates import announce
from tvaprune.files import prepare_folder, scratch_folder
from tvaprune.flags.arguments import Arguments
from tvaprune.given import given_units, settle_multiple, zero_shot_tasks
from tvaprune.locks import holding_folders
from tvaprune.measure.zeroshot import ZeroShot
from tvaprune.models.layers import Streamed
from tvaprune.outputs import RESULTS_NAME
from tvaprune.phases import CUT, DENSE_MODEL, DENSE_PERPLEXITY, NARROWING, PRUNED_PERPLEXITY, ZERO_SHOT, Phases
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks
from tvaprune.refusals import check_beside_model, check_results, check_save, check_widths
from tvaprune.report.results import ModelPerplexity, Results
from tvaprune.report.steps import ask, measure, save, tell, write_plan, zero_shot
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.run import Run


@holding_folders()
def run_apply(args: Arguments) -> Results:
    """Applies a mask file or a plan: measures the narrower model, scores it, saves it, as asked.

    Without either the model is measured and scored as it is. Zero-shot scores join those of the same model and mask.

    Raises:
        InputError: If there is nothing to do, or something that was given cannot be used.
    """
    tasks, units = zero_shot_tasks(args), given_units(args)
    if units is None and not _leaves_results(args):
        raise InputError("nothing to do: give --mask_loc FILE or --plan FILE, --do_eval True or --do_zero_eval True")
    settle_multiple(args)
    ranks.on_main(_prepare, args)
    with _scratch(args) as scratch:
        return _apply(args, units, tasks, scratch)


def _leaves_results(args: Arguments) -> bool:
    return args.training.do_eval or args.evaluation.do_zero_eval


@contextmanager
def _scratch(args: Arguments) -> Iterator[Path | None]:
    """Yields the folder in which ``--stream`` works; None without it."""
    if not args.prune.stream:
        yield None
        return
    saved = args.prune.save_pruned
    with scratch_folder(args.save_loc / "streams" if saved is None else Path(saved)) as folder:
        yield folder


def _apply(args: Arguments, units: Masks | KeepPlan | None, tasks: ZeroShot | None, scratch: Path | None) -> Results:
    counted: Mapping[str, float] = {}
    if _measures(args, tasks) if units is None else not args.prune.stream:  # it tells its need itself
        counted = announce(args, units, cuts=units is not None).counted
    phases = _phases(args, units is not None, tasks, counted)
    run = Run.load(args, scratch, args.prune.reconstructs, phases)
    plan = None if units is None else run.plan(units)
    if plan is not None and run.streamed is None:
        fit(run.args, plan)
    results = Results.begin(run, plan, args.prune.mask_loc)
    earlier = ranks.on_main(_joined, args, results) if _leaves_results(args) else None
    if plan is None:
        return _as_it_is(run, tasks, results, earlier)
    windows = dense = None
    if args.training.do_eval:
        phases.begin(DENSE_MODEL)
        windows = run.windows()
        dense = run.dense_loss(windows)
        ask(run, DENSE, run.model)
    if _leaves_results(args):
        write_plan(run, plan, args.save_loc)
    phases.begin(CUT)
    timed = windows is not None and times(run.args, plan)
    pruned: PreTrainedModel | Streamed
    if run.streamed is not None:
        pruned, update = narrow_streamed(run, run.streamed, plan)
    else:
        pruned, update = narrow(run, plan, keep_dense=timed or args.evaluation.compare_dense)
    results.note_update(update)
    if windows is not None and dense is not None:
        results.zero_shot = None if earlier is None else earlier.zero_shot
        measure(run, plan, pruned, windows, dense, results)
        tell(args, results)
    save(run, plan, pruned, results)
    if windows is None and earlier is not None:  # what was measured stays, and is scored now
        results = earlier
    if not isinstance(pruned, Streamed):
        phases.begin(ZERO_SHOT)
        zero_shot(run, tasks, {DENSE: run.model, PRUNED: pruned}, results, {PRUNED: args.prune.save_pruned})
    return results


def _measures(args: Arguments, tasks: ZeroShot | None) -> bool:
    """Tells whether a model that nothing is cut of is measured: for zero-shot scores C4 is no text to fetch unasked."""
    return args.training.do_eval and (tasks is None or "dataset_name" in args.recipe)


def _as_it_is(run: Run, tasks: ZeroShot | None, results: Results, earlier: Results | None) -> Results:
    """Measures and scores a model that nothing is cut of; what an earlier run measured stays where this does not."""
    args = run.args
    if _measures(args, tasks):
        run.phases.begin(DENSE_MODEL)
        windows = run.windows()
        loss = run.dense_loss(windows)
        results.protocol = run.evaluation_text(windows)
        results.model_perplexity = ModelPerplexity(loss.perplexity, loss.perplexity_stderr)
        results.zero_shot = None if earlier is None else earlier.zero_shot
        tell(args, results)
    elif earlier is not None:
        results = earlier
    zero_shot(run, tasks, {"model": run.model}, results)
    return results


def _phases(args: Arguments, cuts: bool, tasks: ZeroShot | None, counted: Mapping[str, float]) -> Phases:
    measures = args.training.do_eval if cuts else _measures(args, tasks)
    dense = {DENSE_MODEL: (DENSE_PERPLEXITY,)} if measures else {}
    cut = {CUT: (*NARROWING, PRUNED_PERPLEXITY) if measures else NARROWING} if cuts else {}
    return Phases(dense | cut | ({} if tasks is None else {ZERO_SHOT: None}), counted)


def _prepare(args: Arguments) -> None:
    """Refuses folders that are in use, and makes the one of the results."""
    check_save(args)
    check_widths(args)
    if _leaves_results(args):
        check_beside_model(args)
        check_results(args, args.evaluation.do_zero_eval)
        prepare_folder("save_loc", args.save_loc, may_hold_files=True)


def _joined(args: Arguments, results: Results) -> Results | None:
    """Returns what is there of the same model and mask, unless it is to be overwritten."""
    earlier = None if args.training.overwrite_output_dir else Results.read(args.save_loc)
    differing = earlier.differing(results) if earlier is not None else []
    if differing:
        raise InputError(
            f"--save_loc {args.save_loc}: its {RESULTS_NAME} is of another {' and '.join(differing)}; give another "
            "--save_loc, or --overwrite_output_dir to replace it"
        )
    return earlier
