"""Zero-shot scores in `results.json`, in one table, and as JSONL: every example with its log-likelihoods.

Scores are merged into the file one by one, so a crash in a later task loses nothing, and a later run adds to it.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tvaprune.errors import InputError
from tvaprune.files import replacing, write_json
from tvaprune.measure.zeroshot import Score

IDENTITY = (
    "model",
    "model_digest",
    "mask",
    "weight_update",
    "calibration",
    "widths",
)  # what makes two results those of the same pruned model
AVERAGED = ("acc", "acc_norm")
DENSE, PRUNED, FINETUNED = "dense", "pruned", "finetuned"
_ORDER = (DENSE, PRUNED, FINETUNED)
_PAIRS = {"difference": (DENSE, PRUNED), "recovered": (PRUNED, FINETUNED)}  # what each column subtracts: second - first


def read(path: Path) -> dict[str, Any]:
    """Returns what an earlier run wrote; nothing where there is no file.

    Raises:
        InputError: If the file is not a JSON object.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); remove it, or give another --save_loc") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a JSON object; remove it, or give another --save_loc")
    return content


def check_same(path: Path, identity: Mapping[str, Any]) -> None:
    """Refuses to mix the results of two models.

    Raises:
        InputError: If the file holds the results of another model, mask or pruning.
    """
    differing = _differing(read(path), identity)
    if differing:
        raise InputError(
            f"--save_loc {path.parent}: its results.json is of another {' and '.join(differing)}; give another "
            "--save_loc, or --overwrite_output_dir to replace it"
        )


def merge(path: Path, results: Mapping[str, Any]) -> None:
    """Adds results to the file: what it holds of the same model and mask stays, what is of another goes."""
    old = read(path)
    write_json(_merged({} if _differing(old, results) else old, dict(results)), path)


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    new = json.loads(json.dumps(dict(new)))  # tuples are lists in the file
    return [key for key in IDENTITY if old and old.get(key) != new.get(key)]


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
        for key, value in new.items()
    }
    return old | both


class ZeroShotRecord:
    """Collects the scores of one run and writes each as it comes.

    Args:
        save_loc: Folder of ``results.json`` and, with ``write_out``, of ``zero_shot/<model>_<task>.jsonl``.
        identity: The entries of the results that say what was scored.
    """

    def __init__(self, save_loc: Path, identity: dict[str, Any], write_out: bool) -> None:
        self.save_loc, self.write_out = save_loc, write_out
        self.scores: dict[str, dict[str, Score]] = {}
        # The run's own record stays out of what an earlier measurement of the same model says of itself.
        merge(save_loc / "results.json", {key: identity[key] for key in IDENTITY if key in identity})
        run = {key: value for key, value in identity.items() if key not in IDENTITY}
        if run:
            self._merge({"run": run})

    def add(self, task: str, model: str, score: Score) -> None:
        """Writes one score."""
        self.scores.setdefault(task, {})[model] = score
        if self.write_out:
            write_examples(score, self.save_loc / "zero_shot" / f"{model}_{task}.jsonl")
        entry: dict[str, Any] = {model: _entry(score)}
        for name, pair in _PAIRS.items():
            if set(pair) <= set(self.scores[task]):
                entry[name] = _difference(self.scores[task], pair)
        self._merge({"tasks": {task: entry}})

    def finish(self, missing: dict[str, str]) -> str:
        """Writes the averages of this run's tasks and what was missing, and returns the table."""
        averages = {model: self._average(model) for model in self._models()}
        complete = {model: average for model, average in averages.items() if average is not None}
        self._merge({"average": complete, "missing": missing})
        return self._table(complete)

    def _merge(self, zero_shot: dict[str, Any]) -> None:
        path = self.save_loc / "results.json"
        content = read(path)
        # Averages and missing tasks are those of one run: replaced whole, unlike the tasks.
        kept = {
            key: value for key, value in content.get("zero_shot", {}).items() if key not in zero_shot or key == "tasks"
        }
        write_json(content | {"zero_shot": _merged(kept, zero_shot)}, path)

    def _models(self) -> list[str]:
        found = {model for scores in self.scores.values() for model in scores}
        return sorted(found, key=lambda model: (_ORDER.index(model) if model in _ORDER else len(_ORDER), model))

    def _average(self, model: str) -> dict[str, Any] | None:
        """Returns the mean over the tasks that have an accuracy, with the error of independent tasks."""
        scores = [by_model[model] for by_model in self.scores.values()]
        scores = [score for score in scores if score.metric in AVERAGED]
        if not scores:
            return None
        error = math.sqrt(sum((score.stderr or 0.0) ** 2 for score in scores)) / len(scores)
        return {"value": mean(score.value for score in scores), "stderr": error, "num_tasks": len(scores)}

    def _table(self, averages: dict[str, Any]) -> str:
        models = self._models()
        pairs = {name: pair for name, pair in _PAIRS.items() if set(pair) <= set(models)}
        rows = [["zero-shot task", "metric", "examples", "chance", *models, *pairs]]
        for task, scores in self.scores.items():
            first = scores[models[0]]
            chance = "" if first.chance is None else f"{first.chance:.3f}"
            row = [task, first.metric, str(first.settings["num_examples"]), chance]
            row += [_with_error(scores[model].value, scores[model].stderr) for model in models]
            rows.append([*row, *(_signed(_difference(scores, pair)) for pair in pairs.values())])
        if averages:
            row = ["average", "", "", "", *(_with_error(averages[m]["value"], averages[m]["stderr"]) for m in models)]
            gaps = (averages[after]["value"] - averages[before]["value"] for before, after in pairs.values())
            rows.append([*row, *(f"{gap:+.3f}" for gap in gaps)])
        return _columns(rows)


def write_examples(score: Score, path: Path) -> None:
    """Writes each example as a line: the document, every continuation with its log-likelihood, and the metrics."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in score.samples:
            file.write(json.dumps(_example(sample), default=str) + "\n")


def _example(sample: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(sample["arguments"], sample["filtered_resps"], strict=False)
    return {
        "doc_id": sample["doc_id"],
        "doc": sample["doc"],
        "target": sample["target"],
        "requests": [_request(arguments, response) for arguments, response in pairs],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }


def _request(arguments: Sequence[Any], response: Any) -> dict[str, Any]:
    if isinstance(response, tuple | list) and len(response) == 2:  # what the harness gives for a log-likelihood
        log_likelihood, is_greedy = response
        result = {"log_likelihood": log_likelihood, "is_greedy": is_greedy}
    else:
        result = {"response": response}
    return {"context": arguments[0], "continuation": arguments[1]} | result


def _entry(score: Score) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "value": score.value,
        "stderr": score.stderr,
        "chance": score.chance,
        "metrics": score.metrics,
        **score.settings,
    }


def _difference(scores: Mapping[str, Score], pair: tuple[str, str]) -> dict[str, float | None]:
    """Returns the second model minus the first, with its standard error over the same examples, pair by pair."""
    first, second = (scores[name] for name in pair)
    error = None
    if len(first.per_example) == len(second.per_example) > 1:
        pairs = zip(second.per_example, first.per_example, strict=True)
        error = stdev(after - before for after, before in pairs) / math.sqrt(len(first.per_example))
    return {"value": second.value - first.value, "stderr": error}


def _signed(difference: Mapping[str, float | None]) -> str:
    value = difference["value"]
    assert value is not None
    return _with_error(value, difference["stderr"], sign="+")


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if error is None else f"{value:{sign}.3f} ± {error:.3f}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
