"""Zero-shot scores in `results.json`, in one table, and as JSONL: every example with its log-likelihoods.

Scores are written one by one, so a crash in a later task loses nothing, and a later run adds its tasks to them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tvaprune.files import as_json, replacing
from tvaprune.measure.figures import with_error
from tvaprune.measure.zeroshot import Score
from tvaprune.report.results import Average, Difference, Results, ScoringRun, TaskResults, TaskScore, ZeroShotResults
from tvaprune.report.tables import table

AVERAGED = ("acc", "acc_norm")
DENSE, PRUNED, FINETUNED = "dense", "pruned", "finetuned"
_ORDER = (DENSE, PRUNED, FINETUNED)
_PAIRS = {"difference": (DENSE, PRUNED), "recovered": (PRUNED, FINETUNED)}  # what each column subtracts: second - first


class ZeroShotRecord:
    """Collects the scores of one run and writes each as it comes.

    Args:
        results: What the scores are a part of; those of other tasks stay in it.
        save_loc: Folder of ``results.json`` and, with ``write_out``, of ``zero_shot/<model>_<task>.jsonl``.
        scored_by: What repeats this run.
    """

    def __init__(self, results: Results, save_loc: Path, write_out: bool, scored_by: ScoringRun | None = None) -> None:
        self.results, self.save_loc, self.write_out = results, save_loc, write_out
        self.scores: dict[str, dict[str, Score]] = {}
        earlier = results.zero_shot or ZeroShotResults()
        # Averages and missing tasks are those of one run, unlike the tasks.
        self.told = results.zero_shot = ZeroShotResults(scored_by, dict(earlier.tasks))
        results.write(save_loc)

    def add(self, task: str, model: str, score: Score) -> None:
        """Writes one score."""
        scores = self.scores.setdefault(task, {})
        scores[model] = score
        if self.write_out:
            write_examples(score, self.save_loc / "zero_shot" / f"{model}_{task}.jsonl")
        entry = TaskResults()
        for name, found in scores.items():
            setattr(entry, name, _entry(found))
        for name, pair in _PAIRS.items():
            if set(pair) <= set(scores):
                setattr(entry, name, _difference(scores, pair))
        self.told.tasks[task] = entry
        self.results.write(self.save_loc)

    def finish(self, missing: dict[str, str]) -> str:
        """Writes the averages of this run's tasks and what was missing, and returns the table."""
        averages = {model: self._average(model) for model in self._models()}
        self.told.average = {model: average for model, average in averages.items() if average is not None}
        self.told.missing = missing
        self.results.write(self.save_loc)
        return self._table(self.told.average)

    def _models(self) -> list[str]:
        found = {model for scores in self.scores.values() for model in scores}
        return sorted(found, key=lambda model: (_ORDER.index(model) if model in _ORDER else len(_ORDER), model))

    def _average(self, model: str) -> Average | None:
        """Returns the mean over the tasks that have an accuracy, with the error of independent tasks."""
        scores = [by_model[model] for by_model in self.scores.values()]
        scores = [score for score in scores if score.metric in AVERAGED]
        if not scores:
            return None
        error = _mean_error([score.stderr for score in scores])
        return Average(mean(score.value for score in scores), error, len(scores))

    def _table(self, averages: Mapping[str, Average]) -> str:
        models = self._models()
        pairs = {name: pair for name, pair in _PAIRS.items() if set(pair) <= set(models)}
        rows = [["zero-shot task", "metric", "examples", "chance", *models, *pairs]]
        for task, scores in self.scores.items():
            first = scores[models[0]]
            chance = "" if first.chance is None else f"{first.chance:.3f}"
            row = [task, first.metric, str(first.settings["num_examples"]), chance]
            row += [with_error(scores[model].value, scores[model].stderr) for model in models]
            rows.append([*row, *(_signed(_difference(scores, pair)) for pair in pairs.values())])
        if averages:
            row = ["average", "", "", "", *(with_error(averages[m].value, averages[m].stderr) for m in models)]
            rows.append([*row, *(_signed(self._average_difference(pair)) for pair in pairs.values())])
        return table(rows)

    def _average_difference(self, pair: tuple[str, str]) -> Difference:
        """Returns the mean of the tasks' differences, with the error of independent tasks."""
        counted = [by_model for by_model in self.scores.values() if by_model[pair[0]].metric in AVERAGED]
        each = [_difference(by_model, pair) for by_model in counted]
        error = _mean_error([difference.stderr for difference in each])
        return Difference(mean(difference.value for difference in each), error)


def write_examples(score: Score, path: Path) -> None:
    """Writes each example as a line: the document, every continuation with its log-likelihood, and the metrics."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for sample in score.samples:
            file.write(as_json(_example(sample), indent=None, default=str) + "\n")


def _example(sample: dict[str, Any]) -> Mapping[str, object]:
    pairs = zip(sample["arguments"], sample["filtered_resps"], strict=False)
    return {
        "doc_id": sample["doc_id"],
        "doc": sample["doc"],
        "target": sample["target"],
        **({} if sample["filter"] == "none" else {"filter": sample["filter"]}),
        "requests": [_request(arguments, response) for arguments, response in pairs],
        **{metric: sample[metric] for metric in sample["metrics"]},
    }


def _request(arguments: Sequence[object], response: object) -> Mapping[str, object]:
    if isinstance(response, tuple | list) and len(response) == 2:  # what the harness gives for a log-likelihood
        log_likelihood, is_greedy = response
        result = {"log_likelihood": log_likelihood, "is_greedy": is_greedy}
    else:
        result = {"response": response}
    return {"context": arguments[0], "continuation": arguments[1]} | result


def _mean_error(errors: Sequence[float | None]) -> float | None:
    """Returns the error of the mean of independent values; None: of one of them nobody knows it."""
    known = [error for error in errors if error is not None]
    return math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None


def _entry(score: Score) -> TaskScore:
    return TaskScore(score.metric, score.value, score.stderr, score.chance, score.metrics, **score.settings)


def _difference(scores: Mapping[str, Score], pair: tuple[str, str]) -> Difference:
    """Returns the second model minus the first, with its standard error over the same examples, pair by pair."""
    first, second = (scores[name] for name in pair)
    error = None
    if len(first.per_example) == len(second.per_example) > 1:
        pairs = zip(second.per_example, first.per_example, strict=True)
        error = stdev(after - before for after, before in pairs) / math.sqrt(len(first.per_example))
    return Difference(second.value - first.value, error)


def _signed(difference: Difference) -> str:
    return with_error(difference.value, difference.stderr, sign="+")
