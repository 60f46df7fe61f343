"""What the models of some runs are worth: perplexities and gaps, zero-shot scores, what they say."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from tvaprune.measure.figures import ERRORS, log_gap, with_error
from tvaprune.measure.generations import in_a_line
from tvaprune.report.charts import BARS, Point, Series, line_chart
from tvaprune.report.folders import Generations, RunFolder
from tvaprune.report.page import Answer, Block, Note, PromptAnswers, Table, charts
from tvaprune.report.results import Perplexities, TaskResults
from tvaprune.report.several import NONE, alone, named
from tvaprune.report.zero_shot import AVERAGED, DENSE, FINETUNED, PRUNED

SCORED = ("model", DENSE, PRUNED, FINETUNED)
MAX_PROMPTS = 8


def gap_told(perplexities: Perplexities, name: str = PRUNED) -> str:
    """Returns the gap of the pruned model, or of another, with its error."""
    error = perplexities.error("gap" if name == PRUNED else f"{name}_gap")
    return with_error(log_gap(getattr(perplexities, name), perplexities.dense), error)


def protocol(runs: Sequence[RunFolder]) -> str:
    """Returns what the perplexities are of, and what their errors are."""
    texts = dict.fromkeys(
        f"{text.dataset_name} {text.split}, {text.line}" for run in runs if (text := run.results.protocol) is not None
    )
    return " ".join([*([f"On {'; '.join(texts)}."] if texts else []), *_where_errors(runs, ERRORS)])


def gap_meaning(runs: Sequence[RunFolder]) -> str:
    """Returns what a gap is, and what its bars are."""
    return " ".join(["Gap: log perplexity, pruned minus dense.", *_where_errors(runs, BARS)])


def _where_errors(runs: Sequence[RunFolder], words: str) -> list[str]:
    """Returns words of errors; nothing where no run has any."""
    some = any(run.results.perplexity is not None and run.results.perplexity.stderr for run in runs)
    return [words] if some else []


def perplexities(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the perplexities and gaps, a row for each run."""
    rows = []
    for run in runs:
        ppl = run.results.perplexity
        if ppl is not None:
            names = (DENSE, PRUNED) if ppl.finetuned is None else (DENSE, PRUNED, FINETUNED)
            told = [with_error(getattr(ppl, name), ppl.error(name), digits=2) for name in names]
            tuned = [NONE, NONE] if ppl.finetuned is None else [told[2], gap_told(ppl, FINETUNED)]
            rows.append([run.name, *told[:2], gap_told(ppl), *tuned])
    head = ["run", DENSE, PRUNED, "gap", "fine-tuned", "gap"]
    if all(row[-1] == NONE for row in rows):
        head, rows = head[:4], [row[:4] for row in rows]
    return [Table(head, rows, numbers=True)] if rows else []


def gaps(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the gap over the sparsity: a line for each model and way of choosing; nothing for a single point."""
    lines: dict[str, list[Point]] = {}
    for run in runs:
        results = run.results
        if results.perplexity is not None and results.widths is not None:
            sparsity, ppl = results.widths.decoder_sparsity, results.perplexity
            name = f"{Path(results.model).name}, {results.prune_method}, {results.weight_update}"
            lines.setdefault(name, []).append(Point(sparsity, log_gap(ppl.pruned, ppl.dense), ppl.error("gap")))
            if ppl.finetuned is not None:
                tuned = Point(sparsity, log_gap(ppl.finetuned, ppl.dense), ppl.error("finetuned_gap"))
                lines.setdefault(f"{name}, fine-tuned", []).append(tuned)
    if len({point.x for points in lines.values() for point in points}) < 2:
        return []
    series = [Series(name, sorted(points, key=lambda point: point[:2]), "marked") for name, points in lines.items()]
    return charts([line_chart("All runs", series, "sparsity of the decoder", "gap", from_zero=True)])


def zero_shot(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns a table of scores for each run that has some."""
    blocks: list[Block] = []
    for run in runs:
        told = run.results.zero_shot
        if told is None or not told.tasks:
            continue
        models = [name for name in SCORED if any(getattr(task, name) is not None for task in told.tasks.values())]
        pairs = [
            name
            for name in ("difference", "recovered")
            if any(getattr(t, name) is not None for t in told.tasks.values())
        ]
        rows = [_task(name, task, models, pairs) for name, task in told.tasks.items()]
        if told.average:
            averages = (told.average.get(name) for name in models)
            values = [NONE if found is None else with_error(found.value, found.stderr) for found in averages]
            name = f"average of the last run's ({', '.join(AVERAGED)})"
            rows.append([name, "", "", "", *values, *("" for _ in pairs)])
        blocks.append(
            Table(["task", "metric", "examples", "chance", *models, *pairs], rows, alone(run, runs), numbers=True)
        )
        if told.missing:
            blocks.append(Note(f"Not scored, for want of data: {', '.join(told.missing)}."))
    return blocks


def _task(name: str, task: TaskResults, models: Sequence[str], pairs: Sequence[str]) -> list[str]:
    scores = [getattr(task, model) for model in models]
    one = next(score for score in scores if score is not None)
    values = [NONE if score is None else with_error(score.value, score.stderr) for score in scores]
    differences = (getattr(task, pair) for pair in pairs)
    values += [NONE if found is None else with_error(found.value, found.stderr, "+") for found in differences]
    return [name, one.metric, f"{one.num_examples:,}", NONE if one.chance is None else f"{one.chance:.3f}", *values]


def answers(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns what the models of each run add to the prompts."""
    blocks: list[Block] = []
    for run in runs:
        if run.generations is not None:
            blocks += [*named(run, runs, "prompts"), *_said(run.generations)]
    return blocks


def _said(told: Generations) -> Iterator[PromptAnswers]:
    for place, prompt in enumerate(told.prompts[:MAX_PROMPTS]):
        every = [(name, said[place]) for name, said in told.models.items()]
        first = every[0][1] if every else ()
        yield PromptAnswers(prompt, tuple(answer(name, first, said) for name, said in every))


def answer(name: str, first: Sequence[str], said: Sequence[str]) -> Answer:
    """Returns what a model said, parted at the first piece that is not the first model's."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, said, strict=False)))
    parts = said[:same], said[same : same + 1], said[same + 1 :]
    return Answer(name, *(in_a_line("".join(part)) for part in parts))
