"""Recovering the narrower model's quality: mask -> pruned checkpoint -> fine-tuning -> adapter and merged model.

What is trained is the pruned checkpoint as it is read from disk, not the sliced model in memory: the adapter then fits
what everybody loads, also where a layer lost its heads or channels (on disk a group of zeros, which gets no gradient
and stays zero).
"""

import copy
import gc
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

from tvaprune.checkpoint.card import adapter_card, model_card
from tvaprune.checkpoint.folder import save_pruned, write_checkpoint
from tvaprune.cut.narrow import narrow
from tvaprune.errors import InputError
from tvaprune.files import check_output, discard, holding_folders, holds_files, new_folder, prepare_folder, write_json
from tvaprune.flags.arguments import Arguments
from tvaprune.measure.perplexity import perplexity
from tvaprune.measure.speed import training_speed_up
from tvaprune.recover.job import Job
from tvaprune.recover.lora import add_lora, load_adapter, merge, save_adapter, trainable
from tvaprune.recover.teacher import CachedTeacher, LiveTeacher, Teacher, cache_teacher
from tvaprune.recover.trainer import FinetuneTrainer, LossWeights
from tvaprune.report import plots, tables
from tvaprune.report.results import identity, measure, write_plan, write_recipe, zero_shot
from tvaprune.report.zero_shot import DENSE, FINETUNED, PRUNED
from tvaprune.run import check_save, given_checkpoint, given_masks, goes_on, zero_shot_tasks

COMPARED_WINDOWS = 4  # on which the adapter and the merged model are compared


UPDATE_NAME = "weight_update.json"  # in the pruned checkpoint: what the instant weight update did, for a resumed run


@holding_folders()
def run_finetune(args: Arguments) -> None:
    """Prunes by a mask, fine-tunes, and leaves an adapter, a merged model and what was measured before and after."""
    tasks, masks = zero_shot_tasks(args), given_masks(args)
    assert masks is not None
    if args.finetune.epoch_f is not None:
        args.training.num_train_epochs = args.finetune.epoch_f
    _check_patience(args)
    found = given_checkpoint(args, may_be_none=_may_begin_anew(args))
    checkpoint = None if found is None else Path(found)
    _prepare_folders(args, checkpoint)
    job = Job.load(args, masks, checkpoint)
    student, results = _tuned(job)
    _write(job, student, results)
    compares = tasks is not None and args.evaluation.compare_dense
    del student
    if not compares:
        del job.run.model
    gc.collect()  # what trained them refers to itself
    _verify(job, results)
    write_json(results, args.save_loc / "results.json")
    write_recipe(args)
    print("\n" + tables.table(_rows(job, results)))
    if tasks is not None:
        dense = {DENSE: job.run.model} if compares else {}
        zero_shot(job.run, tasks, {**dense, PRUNED: job.load_pruned(), FINETUNED: job.load_merged()}, results)


def _check_patience(args: Arguments) -> None:
    patience = args.finetune.early_stopping_patience
    if patience is not None and args.training.eval_strategy == "no":
        raise InputError(f"--early_stopping_patience {patience} counts evaluations: leave --eval_strategy no out")


def _may_begin_anew(args: Arguments) -> bool:
    """Returns whether the folders hold no more than an interrupted fine-tuning left, or may be overwritten."""
    nothing = not holds_files(args.output_dir)
    begun = (args.save_loc / "plan.json").is_file() and not (args.save_loc / "results.json").exists()
    return nothing or begun or args.training.overwrite_output_dir


def _prepare_folders(args: Arguments, checkpoint: Path | None) -> None:
    """Refuses folders that are in use, before any work."""
    overwrite = args.training.overwrite_output_dir
    if checkpoint is None:
        check_save(args)
    for name in ("adapter", "merged", "pruned"):
        check_output("output_dir", args.output_dir / name, overwrite=True)
    prepare_folder("output_dir", args.output_dir, overwrite or goes_on(args))
    prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    if (args.save_loc / "results.json").exists() and not (overwrite or checkpoint):
        raise InputError(f"--save_loc {args.save_loc}: holds results.json; --overwrite_output_dir replaces it")


def _tuned(job: Job) -> tuple[Any, dict[str, Any]]:
    """Prunes and fine-tunes; returns the trained model, and what was measured and is to be told."""
    pruned, results = _before(job)
    student, told = _train(job, pruned, results)
    return student, results | told


def _before(job: Job) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Measures the dense model, writes the pruned checkpoint, and returns that as loaded, with both's measurements."""
    run, plan, args = job.run, job.plan, job.run.args
    write_plan(plan, args.save_loc)
    origin = {"mask": args.prune.mask_loc, "target_sparsity": None}
    results = identity(run, plan) | origin
    dense = run.dense_perplexity(job.windows)
    job.teacher_cache = _teacher_cache(job)
    results |= _prune(job, results)
    pruned = job.load_pruned()
    job.began_with(pruned)
    if not job.needs_dense:
        run.model = pruned  # the dense one leaves the memory
    results |= measure(run, plan, pruned, job.windows, dense)
    return pruned, results


def _prune(job: Job, record: dict[str, Any]) -> dict[str, Any]:
    """Writes the pruned checkpoint, unless the run goes on with it; returns what the weight update did."""
    path = job.pruned_folder / UPDATE_NAME
    if job.checkpoint is not None and (job.pruned_folder / "config.json").is_file():
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    model, update = narrow(job.run, job.plan, keep_dense=job.needs_dense)
    overwrite = job.run.args.training.overwrite_output_dir or job.run.args.prune.save_pruned is None
    beside = {UPDATE_NAME: update} if update else {}
    save_pruned(model, job.plan, job.run.tokenizer, job.pruned_folder, overwrite, record | update, beside)
    return update


def _teacher_cache(job: Job) -> Path | None:
    """Returns the folder of the teacher's predictions, written if it is not there; None without one."""
    args = job.run.args
    if args.finetune.teacher_cache is None or not args.distill.distill:
        return None
    k, temperature = args.finetune.teacher_top_k, args.distill.distill_temp
    batch_size = args.training.per_device_eval_batch_size
    return cache_teacher(args.finetune.teacher_cache, job.run.model, job.train_blocks, k, temperature, batch_size)


def _teacher(job: Job) -> Teacher | None:
    args = job.run.args
    if job.teacher_cache is not None:
        return CachedTeacher(job.teacher_cache, args.distill.distill_temp)
    if not args.distill.distill:
        return None
    kept = job.plan.kept.hidden if args.finetune.distill_hidden_alpha else None
    return LiveTeacher(job.run.model, args.distill.distill_temp, kept)


def _train(job: Job, pruned: PreTrainedModel, results: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Trains; returns the trained model, and what is to be told of it."""
    args, training = job.run.args, job.run.args.training
    set_seed(training.seed)  # LoRA's start is drawn
    student = pruned.requires_grad_(True) if job.lora is None else add_lora(pruned, job.lora)
    measured = _training_speed(job, student)
    weights = LossWeights(args.finetune.distill_ce_loss_alpha, args.finetune.distill_hidden_alpha)
    trainer = FinetuneTrainer(
        student, training, job.train_blocks, job.choice_blocks, _teacher(job), weights, job.identity,
        args.finetune.early_stopping_patience,
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if job.checkpoint is None else str(job.checkpoint))
    seconds = time.perf_counter() - begin
    history = trainer.state.log_history
    plots.plot_finetuning(history, args.save_loc / "finetune.png", results["perplexity"])
    write_json({"log": history}, args.save_loc / "finetune_log.json")
    return student, measured | {"finetune": _told(job, trainer, seconds)}


def _training_speed(job: Job, student: Any) -> dict[str, Any]:
    """Times a training step beside that of the dense model, trained in the same way."""
    args = job.run.args
    if not args.evaluation.speed_batches:
        return {}
    try:
        with trainable(job.run.model, job.lora) as dense:
            measured = training_speed_up(dense, student, job.train_blocks, args.training, args.evaluation.speed_batches)
    except torch.cuda.OutOfMemoryError:
        print("note: the dense model does not fit beside the pruned one in training: no speed-up of a training step")
        return {}
    return {"training_speed_up": asdict(measured)}


def _told(job: Job, trainer: FinetuneTrainer, seconds: float) -> dict[str, Any]:
    """Returns the settings that were used, resolved, and how the training went."""
    args, training, state = job.run.args, job.run.args.training, trainer.state
    finetune, distill = args.finetune, args.distill.distill
    cached = f"cached, top {finetune.teacher_top_k}" if finetune.teacher_cache else "live"
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return {
        "method": "full" if finetune.full_ft else "lora",
        **({} if finetune.full_ft else {"r": finetune.lora_r, "alpha_ratio": finetune.lora_alpha_ratio,
                                        "dropout": finetune.lora_dropout}),
        "train_lm_head": job.train_lm_head,
        "trained_parameters": trainer.get_num_trainable_parameters(),
        "teacher": cached if distill else None,
        "distill_ce_loss_alpha": finetune.distill_ce_loss_alpha if distill else 0.0,
        "distill_temp": args.distill.distill_temp,
        "distill_hidden_alpha": finetune.distill_hidden_alpha if distill else 0.0,
        "learning_rate": training.learning_rate,
        "blocks_per_step": batch,
        "train_blocks": len(job.train_blocks),
        "epochs": state.epoch,
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "resumed_from": None if job.checkpoint is None else str(job.checkpoint),
        "seconds": round(seconds, 1),
    }  # fmt: skip


def _write(job: Job, student: Any, results: dict[str, Any]) -> None:
    """Writes the adapter, merges it (in place), measures the merged model and writes that."""
    args, tokenizer = job.run.args, job.run.tokenizer
    merged = student
    if job.lora is not None:
        with new_folder("output_dir", job.output / "adapter", overwrite=True) as folder:
            save_adapter(student, folder, job.identity)
            card = adapter_card(job.plan, results, "adapter", str(job.pruned_folder))
            (folder / "README.md").write_text(card, encoding="utf-8")
        merged = merge(student)
    value = perplexity(merged, job.windows, args.training.per_device_eval_batch_size, "fine-tuned perplexity")
    results["perplexity"][FINETUNED] = value
    config = copy.deepcopy(merged.config)
    config.tie_word_embeddings = config.tie_word_embeddings and not job.unties
    with new_folder("output_dir", job.output / "merged", overwrite=True) as folder:
        write_checkpoint(merged, config, tokenizer, folder)
        (folder / "README.md").write_text(model_card(config, job.plan, results, "merged"), encoding="utf-8")
    if job.lora is None:  # an earlier run's, which fits this one's pruned model no more
        discard(job.output / "adapter")


def _verify(job: Job, results: dict[str, Any]) -> None:
    """Reads the adapter and the merged model again and compares them."""
    if job.lora is None:
        return
    tuned = load_adapter(job.load_pruned(), job.output / "adapter", job.identity)
    results["finetune"]["adapter_merged_difference"] = _difference(tuned, job.load_merged(), job.windows)


@torch.inference_mode()
def _difference(first: Any, second: Any, windows: Dataset) -> float:
    """Returns the largest difference of two models' logits."""
    ids = windows[:COMPARED_WINDOWS]["input_ids"].to(next(first.parameters()).device)
    own, other = (model(input_ids=ids, use_cache=False).logits.float() for model in (first, second))
    return float((own - other).abs().max())


def _rows(job: Job, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the closing table."""
    args = job.run.args
    written = [path.name for path in args.save_loc.glob("[!.]*") if path.is_file()]
    folders = [name for name in ("adapter", "merged") if (job.output / name).is_dir()]
    return [
        *tables.summary_rows(results),
        *tables.finetune_rows(results),
        ("mask", results["mask"]),
        ("pruned checkpoint", str(job.pruned_folder)),
        (f"in {job.output}", " ".join(folders)),
        (f"in {args.save_loc}", " ".join(sorted(written))),
    ]
