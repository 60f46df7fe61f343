"""What the models of some runs are worth: perplexities and gaps, zero-shot scores, what they say."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from tvaprune.measure.figures import ERRORS, log_gap, with_error
from tvaprune.measure.generations import in_a_line
from tvaprune.report.charts import BARS, Point, Series, line_chart
from tvaprune.report.folders import Generations, RunFolder
from tvaprune.report.page import Answer, Block, Note, PromptAnswers, Table, charts
from tvaprune.report.results import Perplexities, Results, TaskResults
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
    texts = dict.fromkeys(map(_protocol, runs))
    texts.pop("", None)
    return " ".join([*([f"On {'; '.join(texts)}."] if texts else []), *_where_errors(runs, ERRORS)])


def _protocol(run: RunFolder) -> str:
    text = run.results.protocol
    return "" if text is None else f"{text.dataset_name} {text.split}, windows of {text.window}, {text.line}"


def gap_meaning(runs: Sequence[RunFolder]) -> str:
    """Returns what a gap is, and what its bars are."""
    return " ".join(["Gap: log perplexity, pruned minus dense.", *_where_errors(runs, BARS)])


def _where_errors(runs: Sequence[RunFolder], words: str) -> list[str]:
    """Returns words of errors; nothing where no run has any."""
    results = [run.results for run in runs]
    some = any((r.perplexity and r.perplexity.stderr) or (r.model_perplexity and r.model_perplexity.stderr)
               for r in results)  # fmt: skip
    return [words] if some else []


def perplexities(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the perplexities and gaps, a row for each run; of columns those in which some run has a figure."""
    head = ["run", "text", "as it is", DENSE, PRUNED, "gap", "fine-tuned", "gap"]
    rows = [[run.name, _text(run, runs) or NONE, *_figures(run.results)] for run in runs]
    rows = [row for row in rows if any(cell != NONE for cell in row[2:])]
    shown = [place for place in range(len(head)) if any(row[place] != NONE for row in rows)]
    cut = [[row[place] for place in shown] for row in (head, *rows)]
    return [Table(cut[0], cut[1:], numbers=True)] if rows else []


def _figures(results: Results) -> list[str]:
    """Returns the perplexity of a model as it is; the dense and pruned one's and the gap; the tuned one's, its gap."""
    ppl, alone, found = results.perplexity, results.model_perplexity, [NONE] * 6
    if alone is not None:
        found[0] = with_error(alone.value, alone.stderr, digits=2)
    if ppl is not None:
        names = (DENSE, PRUNED) if ppl.finetuned is None else (DENSE, PRUNED, FINETUNED)
        told = [with_error(getattr(ppl, name), ppl.error(name), digits=2) for name in names]
        found[1:4] = [*told[:2], gap_told(ppl)]
        if ppl.finetuned is not None:
            found[4:] = [told[2], gap_told(ppl, FINETUNED)]
    return found


def _text(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    """Returns what a run's perplexities are of, where those of some runs are of different texts or windows."""
    text = run.results.protocol
    if text is None or len({_protocol(one) for one in runs if one.results.protocol is not None}) < 2:
        return ""
    return f"{text.dataset_name} {text.split}, {text.name}, {text.num_windows} windows of {text.window}"


def gaps(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the gap over the sparsity: a line for each model, choice and text; nothing for a single point."""
    lines: dict[str, list[Point]] = {}
    for run in runs:
        results = run.results
        if results.perplexity is not None and results.widths is not None:
            sparsity, ppl = results.widths.decoder_sparsity, results.perplexity
            parts = (Path(results.model).name, results.prune_method, str(results.weight_update), _text(run, runs))
            name = ", ".join(filter(None, parts))
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
