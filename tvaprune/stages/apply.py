"""Mask -> keep plan -> narrower model -> results, zero-shot scores and folder."""

from tvaprune.checkpoint.folder import save_pruned
from tvaprune.cut.narrow import narrow
from tvaprune.files import holding_folders, prepare_folder
from tvaprune.flags.arguments import Arguments
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.report.results import identity, measure, tell, write_plan, zero_shot
from tvaprune.report.zero_shot import DENSE, PRUNED, check_same
from tvaprune.run import Run, check_results, check_save, given_masks, zero_shot_tasks


@holding_folders()
def run_apply(args: Arguments) -> None:
    """Applies a mask file: measures the narrower model, scores it, saves it, as asked.

    Without a mask the dense model is scored. Zero-shot scores join those of the same model and mask that are there.
    """
    masks, evaluation, training = given_masks(args), args.evaluation, args.training
    measures = training.do_eval or evaluation.do_zero_eval
    tasks = zero_shot_tasks(args)
    check_save(args)
    if measures:
        check_results(args, evaluation.do_zero_eval)
        prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    run = Run.load(args)
    plan = None if masks is None else plan_from_masks(masks, run.shape, run.rules)
    results = identity(run, plan) | {"mask": args.prune.mask_loc, "target_sparsity": None}
    if measures and not training.overwrite_output_dir:
        check_same(args.save_loc / "results.json", results)
    if plan is None:
        zero_shot(run, tasks, {"model": run.model}, results)
        return
    windows = dense = None
    if training.do_eval:
        windows = run.blocks(evaluation.eval_split, run.window, args.data.max_eval_samples)
        dense = run.dense_perplexity(windows)
    if measures:
        write_plan(plan, args.save_loc)
    times = windows is not None and evaluation.speed_batches > 0
    pruned, update = narrow(run, plan, keep_dense=times or evaluation.compare_dense)
    results |= update
    if windows is not None and dense is not None:
        results |= measure(run, plan, pruned, windows, dense)
        tell(args, results)
    if args.prune.save_pruned is not None:
        save_pruned(pruned, plan, run.tokenizer, args.prune.save_pruned, training.overwrite_output_dir, results)
        print(f"checkpoint: {args.prune.save_pruned}")
    zero_shot(run, tasks, {DENSE: run.model, PRUNED: pruned}, results)
