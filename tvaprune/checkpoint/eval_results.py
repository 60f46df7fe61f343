"""``.eval_results/`` of a saved folder: what was measured, in the hub's present form, a file for each data set.

The hub shows such a figure on the model's page, and on the leaderboard of a data set that is registered there as a
benchmark, by the task's name; one that is not registered has no leaderboard to be listed on
(https://huggingface.co/docs/hub/eval-results). Texts without a hub id have no place in this form.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from tvaprune.files import add_files
from tvaprune.text.sources import HUB_SETS, SPLITS

FOLDER = ".eval_results"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Perplexity:
    """One model's, and the text that it is of.

    Attributes:
        stderr: None: it was not measured.
        dataset: The hub id; None: the text is not on the hub.
        config: Its configuration there.
        split: As the hub calls it: of C4 our test split is its validation file.
        window: Tokens.
    """

    value: float
    stderr: float | None
    dataset: str | None
    config: str | None
    split: str
    window: int

    @classmethod
    def of(cls, record: Mapping[str, Any], model: str) -> "Perplexity | None":
        """Reads it from a run's results; None: it was not measured, or is none, as of weights that overflow.

        Args:
            record: The content of the results so far; each entry may be missing.
            model: ``pruned`` or ``finetuned``.
        """
        values, text = record.get("perplexity") or {}, record.get("protocol")
        if not text or values.get(model) is None:
            return None
        error, split, window = (values.get("stderr") or {}).get(model), text["split"], text["window"]
        hub_set = HUB_SETS.get(text["dataset_name"])
        if hub_set is None:
            return cls(values[model], error, None, None, split, window)
        file = hub_set.files[split]
        split = next(split for split in SPLITS if split in file)
        return cls(values[model], error, hub_set.repo, file.split("/")[0], split, window)


def eval_results(record: Mapping[str, Any], model: str) -> dict[str, str]:
    """Returns the files of `FOLDER`, by their names within a model's folder.

    Args:
        record: As for `Perplexity.of`.
        model: The one that stands in the folder: ``pruned`` or ``finetuned``.
    """
    by_file: dict[str, list[EvalResultEntry]] = {}
    for entry in [*_perplexities(record, model), *_scores(record, model)]:
        by_file.setdefault(f"{FOLDER}/{entry.dataset_id.replace('/', '--')}.yaml", []).append(entry)
    return {
        name: yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) for name, entries in by_file.items()
    }


def write_eval_results(folder: str | Path, record: Mapping[str, Any], model: str) -> None:
    """Writes them into a folder of this tool, saved already or on its way; arguments as for `eval_results`."""
    add_files(Path(folder), eval_results(record, model))


def _perplexities(record: Mapping[str, Any], model: str) -> list[EvalResultEntry]:
    found = Perplexity.of(record, model)
    if found is None or found.dataset is None or found.config is None:
        return []
    text = record["protocol"]
    number = f"{text['num_windows']} " if "num_windows" in text else ""
    told = f"perplexity (less is better), {found.split} split, {number}windows of {found.window} tokens"
    return [EvalResultEntry(found.dataset, found.config, round(found.value, 4), notes=_noted(told, found.stderr))]


def _scores(record: Mapping[str, Any], model: str) -> list[EvalResultEntry]:
    """Returns the zero-shot scores on all of a task's examples: a part's would stand beside other models' wholes."""
    entries = []
    for task, by_model in ((record.get("zero_shot") or {}).get("tasks") or {}).items():
        score = by_model.get(model)
        if score is None or score["limit"] is not None or not HUB_ID.fullmatch(score.get("data_set") or ""):
            continue
        how = f"{score['num_fewshot']}-shot, all {score['num_examples']} examples"
        notes = _noted(f"{score['metric']} of the lm-evaluation-harness, {how}", score["stderr"])
        entries.append(EvalResultEntry(score["data_set"], task, round(score["value"], 4), notes=notes))
    return entries


def _noted(told: str, stderr: float | None) -> str:
    """Returns the note with the standard error, for which the form has no place of its own."""
    return told if stderr is None else f"{told}; standard error {stderr:.2g}"
