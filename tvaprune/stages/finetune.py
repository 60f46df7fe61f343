"""Recovering the narrower model's quality: mask -> pruned checkpoint -> fine-tuning -> adapter and merged model.

What is trained is the pruned checkpoint as it is read from disk, not the sliced model in memory: the adapter then fits
what everybody loads, also where a layer lost its heads or channels (on disk a group of zeros, which gets no gradient
and stays zero).
"""

import gc
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.checkpoint.eval_results import write_eval_results
from tvaprune.checkpoint.folder import save_pruned
from tvaprune.cut.narrow import as_stored, narrow
from tvaprune.errors import InputError, reason
from tvaprune.estimates import Estimate, announce
from tvaprune.files import CONFIG_NAME, read_json, write_json
from tvaprune.flags.arguments import Arguments
from tvaprune.given import given_units, settle_multiple, zero_shot_tasks
from tvaprune.locks import holding_folders
from tvaprune.measure.perplexity import TextLoss, text_loss
from tvaprune.measure.zeroshot import ZeroShot
from tvaprune.models.sharding import shard
from tvaprune.outputs import OF_TUNING
from tvaprune.phases import DENSE_PERPLEXITY, FINE_TUNING, NARROWING, PRUNED_PERPLEXITY, ZERO_SHOT, Phases
from tvaprune.recover.folders import found_checkpoint, prepare_folders
from tvaprune.recover.job import Job
from tvaprune.recover.lora import Student, merge
from tvaprune.recover.output import read_again, write_adapter, write_merged
from tvaprune.recover.training import prepare_student, train, training_speed, write_teacher_cache
from tvaprune.report import plots, tables
from tvaprune.report.results import Results
from tvaprune.report.steps import ask, measure, write_plan, write_results, zero_shot
from tvaprune.report.zero_shot import DENSE, FINETUNED, PRUNED

PRUNING, TUNING, MERGING = "dense and pruned model", "training", "tuned model"
UPDATE_NAME = "weight_update.json"  # in the pruned checkpoint: what the instant weight update did, for a resumed run


@holding_folders()
def run_finetune(args: Arguments) -> Results:
    """Prunes by a mask, fine-tunes, and leaves an adapter, a merged model and what was measured before and after."""
    tasks, units = zero_shot_tasks(args), given_units(args)
    if units is None:
        raise InputError("finetune needs --mask_loc or --plan: it begins with the model that they leave")
    if args.finetune.epoch_f is not None:
        args.training.num_train_epochs = args.finetune.epoch_f
    settle_multiple(args)
    checkpoint = ranks.on_main(_prepared, args)
    phases = _phases(tasks, announce(args, units))
    phases.begin(PRUNING)
    job = Job.load(args, units, checkpoint, phases)
    write_plan(job.run, job.plan, args.save_loc)
    results = Results.begin(job.run, job.plan, args.prune.mask_loc)
    pruned, dense_loss = _pruned(job, results)
    phases.begin(TUNING)
    student = _tuned(job, pruned, results)
    del pruned
    phases.begin(MERGING)
    _written(job, student, dense_loss, results)
    compares = tasks is not None and args.evaluation.compare_dense
    del student
    if not compares:
        del job.run.model
    gc.collect()  # what trained them refers to itself
    assert results.finetune is not None
    results.finetune.adapter_merged_difference = ranks.on_main(read_again, job)
    ranks.on_main(_tell, job, results)
    if tasks is not None:
        phases.begin(ZERO_SHOT)
        dense = {DENSE: job.run.model} if compares else {}
        models = {**dense, PRUNED: job.load_pruned(), FINETUNED: job.load_merged()}
        zero_shot(job.run, tasks, models, results, {PRUNED: job.pruned_folder, FINETUNED: job.merged_folder})
    return results


def _phases(tasks: ZeroShot | None, estimate: Estimate) -> Phases:
    phases: dict[str, Sequence[str] | None] = {
        PRUNING: (DENSE_PERPLEXITY, *NARROWING, PRUNED_PERPLEXITY),
        TUNING: (FINE_TUNING,),
        MERGING: (PRUNED_PERPLEXITY,),  # as large, though counted in fine-tuning
    }
    return Phases(phases if tasks is None else phases | {ZERO_SHOT: None}, estimate.counted)


def _prepared(args: Arguments) -> Path | None:
    """Refuses folders that are in use, makes the others, and returns the checkpoint to go on from, if any."""
    checkpoint = found_checkpoint(args)
    prepare_folders(args, checkpoint)
    return checkpoint


def _pruned(job: Job, results: Results) -> tuple[PreTrainedModel, TextLoss]:
    """Measures the dense model, writes the pruned checkpoint; returns it as loaded and measured, and the dense loss."""
    dense = job.run.dense_loss(job.windows)
    ask(job.run, DENSE, job.run.model)
    job.teacher_cache = ranks.on_main(write_teacher_cache, job)
    results.note_update(_written_pruned(job, results))
    pruned = job.load_pruned()
    job.began_with(pruned)
    if job.sharded:
        pruned = shard(pruned, job.run.args.training.device)
    if not job.needs_dense:
        job.run.model = pruned  # the dense one leaves the memory
    measure(job.run, job.plan, pruned, job.windows, dense, results)
    ranks.on_main(write_eval_results, job.pruned_folder, results.content(), PRUNED)
    return pruned, dense


def _written_pruned(job: Job, results: Results) -> Mapping[str, object]:
    """Writes the pruned checkpoint, unless the run goes on with it; returns what the weight update did."""
    update = ranks.on_main(_written_before, job, results)
    if update is not None:
        return update
    return ranks.on_main(_cut, job, results) if job.sharded else _cut(job, results)


def _cut(job: Job, results: Results) -> dict[str, Any]:
    """Cuts the dense model, writes what is left and returns what the weight update did."""
    model, update = narrow(job.run.whole(), job.plan, keep_dense=job.needs_dense and not job.sharded)
    overwrite = job.run.args.training.overwrite_output_dir or job.run.args.prune.save_pruned is None
    beside = {UPDATE_NAME: update} if update else {}
    record = results.content() | update
    ranks.on_main(save_pruned, model, job.plan, job.run.tokenizer, job.pruned_folder, overwrite, record, beside)
    return update


def _written_before(job: Job, results: Results) -> dict[str, Any] | None:
    """Returns what the weight update of the run that is gone on with did; None: its pruned checkpoint is not there.

    Raises:
        InputError: If the file that says it is damaged.
    """
    path = job.pruned_folder / UPDATE_NAME
    if job.checkpoint is None or not (job.pruned_folder / CONFIG_NAME).is_file():
        return None
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = read_json(path)
        results.note_update(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read as what the weight update did ({reason(error)}); remove it: the run goes on "
            "without"
        ) from error
    return found


def _tuned(job: Job, pruned: PreTrainedModel, results: Results) -> Student:
    """Trains, and returns the trained model, its log drawn and written."""
    student, folder = prepare_student(job, pruned), job.run.args.save_loc
    results.training_speed_up = ranks.on_main(training_speed, job, student)
    if not job.tunes_beside_dense:
        job.run.model = pruned  # the dense one leaves the memory
    gc.collect()  # what timed them refers to itself
    results.finetune, history = train(job, student)
    assert results.perplexity is not None
    before = results.perplexity.dense, results.perplexity.pruned
    log, picture = OF_TUNING
    ranks.on_main(plots.plot_finetuning, history, folder / picture, *before)
    ranks.on_main(write_json, {"log": history}, folder / log)
    return student


def _written(job: Job, student: Student, dense: TextLoss, results: Results) -> None:
    """Writes the adapter, merges it (in place), measures the merged model and writes that."""
    ranks.on_main(write_adapter, job, student, results.content())
    merged: Student = student
    if not job.sharded:
        merged = as_stored(merge(student) if isinstance(student, PeftModel) else student, job.stored)
    batch_size = job.run.args.training.per_device_eval_batch_size
    assert results.perplexity is not None
    at = partial(job.run.phases.at, PRUNED_PERPLEXITY)
    if job.sharded:
        print("note: --shard True measures the trained weights as they lie in shares, not the merged checkpoint")
    results.perplexity.add_finetuned(text_loss(merged, job.windows, batch_size, "fine-tuned perplexity", at), dense)
    ask(job.run, FINETUNED, merged)
    ranks.on_main(write_merged, job, None if job.sharded else merged, results.content())


def _tell(job: Job, results: Results) -> None:
    """Writes the results and prints the closing table."""
    write_results(job.run.args, results)
    print("\n" + tables.table(_rows(job, results)))


def _rows(job: Job, results: Results) -> list[tuple[str, str]]:
    """Returns the closing table."""
    save_loc = job.run.args.save_loc
    written = [path.name for path in save_loc.glob("[!.]*") if path.is_file()]
    folders = [name for name in ("adapter", "merged") if (job.output / name).is_dir()]
    return [
        *tables.summary_rows(results),
        *tables.finetune_rows(results),
        tables.origin(results),
        ("pruned checkpoint", str(job.pruned_folder)),
        (f"in {job.output}", " ".join(folders)),
        tables.page(save_loc),
        (f"in {save_loc}", " ".join(sorted(written))),
    ]
