"""What a fine-tuning leaves: the adapter and the merged model, written, and read again."""

import copy
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel

from tvaprune.checkpoint.card import adapter_card, model_card
from tvaprune.checkpoint.eval_results import write_eval_results
from tvaprune.checkpoint.folder import write_checkpoint
from tvaprune.cut.narrow import as_stored
from tvaprune.files import CARD_NAME, discard, new_folder
from tvaprune.losses import largest_difference
from tvaprune.models.logits import predictions
from tvaprune.recover.job import Job
from tvaprune.recover.lora import Student, load_adapter, merge, save_adapter

COMPARED_WINDOWS = 4  # on which the adapter and the merged model are compared


def write_adapter(job: Job, student: Student, record: dict[str, Any]) -> None:
    """Writes the adapter; where all weights were trained there is none to write.

    Args:
        record: The content of the results so far, for the card.
    """
    if not isinstance(student, PeftModel):
        return
    with new_folder("output_dir", job.output / "adapter", overwrite=True) as folder:
        save_adapter(student, folder, job.identity)
        card = adapter_card(job.plan, record, "adapter", str(job.pruned_folder))
        (folder / CARD_NAME).write_text(card, encoding="utf-8")


def write_merged(job: Job, merged: Any, record: dict[str, Any]) -> None:
    """Writes the merged model as an ordinary checkpoint.

    Args:
        merged: The model; None: the adapter on disk is merged into the pruned checkpoint, whole.
    """
    if merged is None:
        merged = as_stored(merge(load_adapter(job.load_pruned(), job.output / "adapter", job.identity)), job.stored)
    config = copy.deepcopy(merged.config)
    config.tie_word_embeddings = config.tie_word_embeddings and not job.unties
    config.use_cache = job.use_cache
    with new_folder("output_dir", job.merged_folder, overwrite=True) as folder:
        write_checkpoint(merged, config, job.run.tokenizer, folder)
        (folder / CARD_NAME).write_text(model_card(config, job.plan, record, "merged"), encoding="utf-8")
        write_eval_results(folder, record, "finetuned")
    if job.lora is None:  # an earlier run's, which fits this one's pruned model no more
        discard(job.output / "adapter")


def read_again(job: Job) -> float | None:
    """Returns the largest difference in logits of adapter and merged model as they stand on disk.

    The merged model's weights are rounded to the checkpoint's precision: in bfloat16 that is most of it.
    """
    if job.lora is None or job.sharded:  # of a sharded model there is no room for two
        return None
    tuned = load_adapter(job.load_pruned(), job.output / "adapter", job.identity)
    return _difference(tuned, job.load_merged(), job.windows)


@torch.inference_mode()
def _difference(first: Student, second: Student, windows: Dataset) -> float:
    ids = windows[:COMPARED_WINDOWS]["input_ids"].to(next(first.parameters()).device)
    differences = []
    for window in ids.split(1):
        own, other = (predictions(model, input_ids=window, use_cache=False)[0] for model in (first, second))
        differences.append(largest_difference(own, other))
    return float(torch.stack(differences).max())
