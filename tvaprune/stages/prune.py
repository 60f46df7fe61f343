"""Flags -> mask for every target -> keep plan -> narrower model -> results and folder."""

from collections.abc import Sequence
from dataclasses import replace

from accelerate.utils import release_memory
from datasets import Dataset

from tvaprune import ranks
from tvaprune.budget import fit, times
from tvaprune.choose.choose import Chosen, choose_masks, clear_results, gate_checkpoint, in_basis
from tvaprune.choose.scores import check_scored
from tvaprune.cut.narrow import narrow
from tvaprune.estimates import Estimate, announce
from tvaprune.files import prepare_folder
from tvaprune.flags.arguments import Arguments
from tvaprune.given import goes_on, settle_multiple, zero_shot_tasks
from tvaprune.locks import holding_folders
from tvaprune.measure.perplexity import TextLoss
from tvaprune.measure.zeroshot import ZeroShot
from tvaprune.models.load import load_config
from tvaprune.models.shape import shape_of
from tvaprune.outputs import OF_GATES, PAGE_NAME, drop
from tvaprune.phases import (
    CUT,
    DENSE_MODEL,
    DENSE_PERPLEXITY,
    GATE_TRAINING,
    NARROWING,
    PRUNED_PERPLEXITY,
    ROTATION,
    UNIT_SCORES,
    ZERO_SHOT,
    Phases,
)
from tvaprune.plan.exact_cut import TOLERANCE
from tvaprune.plan.masks import load_masks
from tvaprune.refusals import check_beside_model, check_results, check_save, check_training, check_widths
from tvaprune.report import plots
from tvaprune.report.results import Results
from tvaprune.report.steps import ask, measure, save, tell, write_page, write_plan, zero_shot
from tvaprune.report.zero_shot import DENSE, PRUNED
from tvaprune.run import Run
from tvaprune.targets import Target, reached, settle_target, settled

CHOICE = "choice of units"


@holding_folders()
def run_prune(args: Arguments) -> dict[float, Results]:
    """Chooses units, writes a mask for every target, applies each and measures the narrower models.

    Returns:
        The results of every target sparsity.
    """
    tasks = zero_shot_tasks(args)
    if (target := settle_target(args)) is not None:
        print(settled(args, target))
    checkpoint = ranks.on_main(_prepared, args)
    settle_multiple(args)
    fit(args)
    check_training(args)
    phases = _phases(args, tasks, announce(args))
    phases.begin(DENSE_MODEL)
    run = Run.load(args, trains=True, phases=phases)
    windows = run.windows()
    dense = run.dense_loss(windows)
    ask(run, DENSE, run.model)
    phases.begin(CHOICE)
    run = in_basis(run, checkpoint)
    chosen = choose_masks(run, checkpoint)
    if chosen.history is not None:
        ranks.on_main(plots.write_training, chosen.history, args.save_loc)
    if not args.source.shard:
        return _measured(run, tasks, chosen, windows, dense, target)
    del run.model  # its shares go: one process cuts and measures the narrower models
    release_memory()
    ranks.wait()  # the whole model goes over all devices: the others have let go of theirs
    return ranks.on_main(_measured, run, tasks, chosen, windows, dense, target)


def _phases(args: Arguments, tasks: ZeroShot | None, estimate: Estimate) -> Phases:
    phases: dict[str, Sequence[str] | None] = {DENSE_MODEL: (DENSE_PERPLEXITY,), CHOICE: None}
    if args.prune.prune_method == "vib":
        phases[CHOICE] = (ROTATION, GATE_TRAINING)
    elif UNIT_SCORES in estimate.counted:
        phases[CHOICE] = (UNIT_SCORES,)
    for target in args.each_target():
        phases[_cut(target)] = (*NARROWING, PRUNED_PERPLEXITY)
        if tasks is not None:
            phases[_scored(target)] = None
    return Phases(phases, estimate.counted)


def _cut(target: float) -> str:
    return f"{CUT} at {target}"


def _scored(target: float) -> str:
    return f"{ZERO_SHOT} at {target}"


def _measured(
    run: Run,
    tasks: ZeroShot | None,
    chosen: Chosen,
    windows: Dataset,
    dense: TextLoss,
    asked: Target | None,
) -> dict[float, Results]:
    """Cuts the masks of all targets and measures what is left.

    Args:
        dense: What the unpruned model makes of the same windows.
        asked: What the target sparsity was made of; None: it was given.
    """
    run, args = run.whole(), run.args
    targets, found = args.each_target(), {}
    if len(targets) > 1:  # each has a folder of its own: what lies here is of an earlier run's only one
        ranks.on_main(clear_results, args.save_loc)
        if chosen.history is None:
            ranks.on_main(drop, args.save_loc, OF_GATES)
    for target, one in targets.items():
        run.phases.begin(_cut(target))
        part = replace(run, args=one)
        plan = part.plan(load_masks(chosen.masks[target]))
        write_plan(part, plan, one.save_loc)
        found[target] = results = Results.begin(part, plan, str(chosen.masks[target]), target)
        keeps = times(one, plan) or args.evaluation.compare_dense or target != max(targets)
        pruned, update = narrow(part, plan, keep_dense=keeps)
        results.note_update(update)
        measure(part, plan, pruned, windows, dense, results)
        tell(one, results)
        if asked is not None:
            print(reached(asked, plan))
        save(part, plan, pruned, results)
        run.phases.begin(_scored(target))
        zero_shot(part, tasks, {DENSE: run.model, PRUNED: pruned}, results, {PRUNED: one.prune.save_pruned})
        if abs(plan.sparsity - target) > TOLERANCE:
            print(
                f"note: with --dim_multiple {plan.dim_multiple} the nearest to --target_sparsity {target} is "
                f"{plan.sparsity:.4f}; a smaller multiple comes nearer"
            )
    if len(targets) > 1:
        ranks.on_main(write_page, [one.save_loc for one in targets.values()], args.save_loc)
        print(f"page of all targets: {args.save_loc / PAGE_NAME}")
    return found


def _prepared(args: Arguments) -> str | None:
    """Refuses a method that does not cut the model, and folders that are in use; makes the others.

    Returns:
        The checkpoint to go on from, if any.
    """
    check_scored(args.prune.prune_method, shape_of(load_config(args.source.model_name_or_path)))
    check_widths(args)
    check_beside_model(args)
    checkpoint = gate_checkpoint(args)
    for one in args.each_target().values():
        check_save(one)
    check_results(args, checkpoint is not None)
    prepare_folder("output_dir", args.output_dir, args.training.overwrite_output_dir or goes_on(args))
    prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    return checkpoint
