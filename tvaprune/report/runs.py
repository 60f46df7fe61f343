"""The page of one run, or of several side by side: every section has a column, a chart or a table for each."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path

from tvaprune.cut.reconstruct import Reconstruction
from tvaprune.measure.figures import ERRORS, with_error
from tvaprune.measure.speed import SpeedUp
from tvaprune.models.shape import ModelShape
from tvaprune.report.charts import Chart, Series, bar_chart, line_chart
from tvaprune.report.folders import Generations, Row, RunFolder
from tvaprune.report.page import Answer, Answers, Block, Code, Note, Page, Section, Table, Tile, charts
from tvaprune.report.results import KeptWidths, Perplexities, Refit, Results, TaskResults
from tvaprune.report.zero_shot import AVERAGED, DENSE, FINETUNED, PRUNED

NONE = "–"  # of what was not measured
SCORED = ("model", DENSE, PRUNED, FINETUNED)
MAX_PROMPTS = 8
_HALF = 2  # bytes of a weight in bfloat16 or float16


def page_of(runs: Sequence[RunFolder]) -> Page:
    """Returns the page of some runs; what none of them measured is left out."""
    first = runs[0].results
    single = len(runs) == 1
    model = Path(first.model).name
    title = _headline(first, model) if single else f"{len(runs)} runs side by side"
    lead = f"{first.hardware}. {_counted(first)}" if single else ", ".join(run.name for run in runs)
    sections = [
        Section("Asked and reached", _asked(runs)),
        Section("Perplexity", _perplexities(runs), _protocol(runs)),
        Section("Gap over sparsity", _gaps(runs), "Gap: log perplexity, pruned minus dense."),
        Section("Zero-shot", _zero_shot(runs), "Accuracy and standard error; of a difference, over the same examples."),
        Section("Training", _training(runs)),
        Section("Kept widths", _widths(runs), "What each layer keeps of the dense model's."),
        Section("What the weight update did", _update(runs)),
        Section("Speed and memory", _speed(runs), "Ideal: as many times as there are fewer parameters."),
        Section("What the models say", _answers(runs), "Greedy; the first token that differs is marked."),
        Section("To repeat it", _origin(runs)),
    ]  # fmt: skip
    return Page(title, lead, sections, _tiles(first) if single else ())


def _headline(results: Results, model: str) -> str:
    if results.widths is None:
        return model
    gone = f"{model}, {results.widths.decoder_sparsity:.1%} of the decoder gone"
    return gone if results.finetune is None else f"{gone}, fine-tuned"


def _counted(results: Results) -> str:
    return "" if results.sparsity_definition is None else f"Counted in sparsity: {results.sparsity_definition}."


def _tiles(results: Results) -> list[Tile]:
    """Returns the figures that one looks for first."""
    found, ppl, widths, speed = [], results.perplexity, results.widths, results.speed_up
    if ppl is not None:
        found.append(Tile("perplexity", f"{ppl.dense:.2f} → {ppl.pruned:.2f}", f"gap {_gap(ppl)}"))
        if ppl.finetuned is not None:
            found.append(Tile("fine-tuned", f"{ppl.finetuned:.2f}", f"gap {_gap(ppl, FINETUNED)}"))
    if widths is not None:
        asked = f"asked: {results.target_sparsity:g}" if results.target_sparsity is not None else "of the mask or plan"
        found.append(Tile("decoder sparsity", f"{widths.decoder_sparsity:.4f}", asked))
    if results.parameters is not None:
        dense, pruned = results.parameters.dense, results.parameters.pruned
        found.append(Tile("parameters", _short(pruned), f"of {_short(dense)}"))
        if speed is not None:
            found.append(Tile("forward pass", f"{speed.per_batch:.2f}×", f"ideal {dense / pruned:.2f}×"))
    return found


def _short(count: int) -> str:
    """Returns a count in at most four digits."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def gap(perplexities: Perplexities, value: float) -> float:
    """Returns log perplexity minus the dense model's."""
    return math.log(value / perplexities.dense)


def _gap(perplexities: Perplexities, name: str = PRUNED) -> str:
    error = perplexities.error("gap" if name == PRUNED else f"{name}_gap")
    return with_error(gap(perplexities, getattr(perplexities, name)), error)


def _columns(runs: Sequence[RunFolder], rows: dict[str, Callable[[Results], str | None]]) -> list[Block]:
    """Returns a table of a row for each fact that some run knows, and a column for each run."""
    cells = [[name, *(value(run.results) for run in runs)] for name, value in rows.items()]
    known = [[cell or NONE for cell in row] for row in cells if any(cell for cell in row[1:])]
    return [Table(["", *(run.name for run in runs)], known)] if known else []


def _asked(runs: Sequence[RunFolder]) -> list[Block]:
    return _columns(
        runs,
        {
            "model": lambda r: r.model,
            "units chosen by": lambda r: r.prune_method if r.target_sparsity is not None else None,
            "mask or plan": lambda r: r.plan or r.mask,
            "text": lambda r: f"{r.dataset_name}, blocks of {r.block_size} tokens",
            "target sparsity": lambda r: None if r.target_sparsity is None else f"{r.target_sparsity:g}",
            "sparsity reached": lambda r: None if r.widths is None else f"{r.widths.decoder_sparsity:.4f}",
            "parameters": lambda r: None if r.parameters is None else _change(r.parameters.dense, r.parameters.pruned),
            "hidden dims": _hidden,
            "weight update": lambda r: r.weight_update,
            "fine-tuning": _tuned,
            "seed": lambda r: str(r.seed),
        },
    )


def _change(before: int, after: int) -> str:
    return f"{before:,} → {after:,}"


def _hidden(results: Results) -> str | None:
    if results.widths is None or results.shape is None:
        return None
    return _change(results.shape.hidden_size, results.widths.hidden_size)


def _tuned(results: Results) -> str | None:
    told = results.finetune
    if told is None:
        return None
    return f"{told.method}, {told.steps:,} steps of {told.blocks_per_step} blocks, {told.seconds:.0f} s"


def _protocol(runs: Sequence[RunFolder]) -> str:
    texts = dict.fromkeys(
        f"{text.dataset_name} {text.split}, {text.line}" for run in runs if (text := run.results.protocol) is not None
    )
    errors = any(run.results.perplexity is not None and run.results.perplexity.stderr for run in runs)
    return " ".join([*([f"On {'; '.join(texts)}."] if texts else []), *([ERRORS] if errors else [])])


def _perplexities(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the perplexities and gaps, a row for each run."""
    rows = []
    for run in runs:
        ppl = run.results.perplexity
        if ppl is not None:
            names = (DENSE, PRUNED) if ppl.finetuned is None else (DENSE, PRUNED, FINETUNED)
            told = [with_error(getattr(ppl, name), ppl.error(name), digits=2) for name in names]
            tuned = [NONE, NONE] if ppl.finetuned is None else [told[2], _gap(ppl, FINETUNED)]
            rows.append([run.name, *told[:2], _gap(ppl), *tuned])
    head = ["run", DENSE, PRUNED, "gap", "fine-tuned", "gap"]
    if all(row[-1] == NONE for row in rows):
        head, rows = head[:4], [row[:4] for row in rows]
    return [Table(head, rows, numbers=True)] if rows else []


def _gaps(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the gap over the sparsity: a line for each model and way of choosing; nothing for a single point."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        results = run.results
        if results.perplexity is not None and results.widths is not None:
            sparsity, ppl = results.widths.decoder_sparsity, results.perplexity
            name = f"{Path(results.model).name}, {results.prune_method}, {results.weight_update}"
            lines.setdefault(name, []).append((sparsity, gap(ppl, ppl.pruned)))
            if ppl.finetuned is not None:
                lines.setdefault(f"{name}, fine-tuned", []).append((sparsity, gap(ppl, ppl.finetuned)))
    if len({sparsity for points in lines.values() for sparsity, _ in points}) < 2:
        return []
    series = [Series(name, sorted(points), "marked") for name, points in lines.items()]
    return charts([line_chart("All runs", series, "sparsity of the decoder", "gap", from_zero=True)])


def _zero_shot(runs: Sequence[RunFolder]) -> list[Block]:
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
            Table(["task", "metric", "examples", "chance", *models, *pairs], rows, _alone(run, runs), numbers=True)
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


def _training(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the curves of every training, once where runs share it."""
    blocks: list[Block] = []
    seen = set()
    for run in runs:
        if run.gates is not None and run.gates[0] not in seen:
            seen.add(run.gates[0])
            blocks += [*_named(run, runs, "gates"), *charts(_gate_charts(run.gates[1]))]
        if run.tuning is not None:
            blocks += [*_named(run, runs, "fine-tuning"), *charts(_tuning_charts(run.tuning, run.results.perplexity))]
    return blocks


def _named(run: RunFolder, runs: Sequence[RunFolder], what: str) -> list[Block]:
    return [Note(f"{run.name}, {what}:")] if len(runs) > 1 else []


def _alone(run: RunFolder, runs: Sequence[RunFolder]) -> str:
    return run.name if len(runs) > 1 else ""


def _of(run: RunFolder, runs: Sequence[RunFolder], what: str) -> str:
    """Returns a title or sentence, after the run's name where there are several."""
    return f"{run.name}: {what}" if len(runs) > 1 else what[:1].upper() + what[1:]


def _series(log: Sequence[Row], name: str, label: str, **style: str) -> Series:
    return Series(label, [(row["step"], row[name]) for row in log if name in row], **style)  # type: ignore[arg-type]


def _gate_charts(log: Sequence[Row]) -> Iterator[Chart | None]:
    """Yields the loss, the sparsities, the multipliers and the masks' perplexities over the steps."""
    yield line_chart("Task loss", [_series(log, "task_loss", "task loss")], "step", "nats per token")
    sparsities = [
        _series(log, "expected_sparsity", "expected"),
        _series(log, "target_sparsity", "target", style="dashed"),
        _series(log, "eval_sparsity", "scored masks", style="dots"),
    ]
    yield line_chart("Sparsity", sparsities, "step", "decoder sparsity")
    multipliers = [_series(log, "lambda_1", "λ1"), _series(log, "lambda_2", "λ2")]
    yield line_chart("Multipliers of the constraint", multipliers, "step", "multiplier")
    scored = [_series(log, "eval_perplexity", "mask, folded", style="marked")]
    yield line_chart("Perplexity of the masks", scored, "step", "perplexity")


def _tuning_charts(log: Sequence[Row], before: Perplexities | None) -> Iterator[Chart | None]:
    """Yields the terms of the loss and the perplexity over the steps, beside those of the models before."""
    yield line_chart("Cross-entropy", [_series(log, "ce", "cross-entropy")], "step", "nats per token")
    yield line_chart("Kullback-Leibler to the dense model", [_series(log, "kl", "KL")], "step", "nats per token")
    yield line_chart("Hidden states", [_series(log, "hidden", "1 − cosine")], "step", "1 − cosine")
    scored = _series(log, "eval_perplexity", "fine-tuned, on the windows compared on", style="marked")
    ends = (0, max(row["step"] for row in log)) if log else ()  # a level of one step would have no length
    levels = {} if before is None or not scored.points else {DENSE: before.dense, PRUNED: before.pruned}
    lines = [Series(f"{name}, on those reported", [(end, value) for end in ends], "dashed")
             for name, value in levels.items()]  # fmt: skip
    yield line_chart("Perplexity", [scored, *lines], "step", "perplexity")


def _widths(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the kept heads and channels of every layer, as charts and as figures."""
    blocks: list[Block] = []
    for run in runs:
        kept, shape = run.results.widths, run.results.shape
        if kept is None or shape is None:
            continue
        pairs = (
            ("KV heads", kept.num_key_value_heads, shape.num_key_value_heads),
            ("MLP channels", kept.intermediate_size, shape.intermediate_size),
        )
        pictures = [bar_chart(_of(run, runs, what), some, full, "layer", what) for what, some, full in pairs]
        blocks += [*charts(pictures), _width_table(_of(run, runs, "figures of every layer"), kept, shape)]
    return blocks


def _width_table(name: str, kept: KeptWidths, shape: ModelShape) -> Table:
    heads, channels = kept.num_key_value_heads, kept.intermediate_size
    rows = [
        [str(layer), f"{kept.hidden_size:,} of {shape.hidden_size:,}",
         f"{heads[layer] * shape.group_size} of {shape.num_key_value_heads[layer] * shape.group_size}",
         f"{heads[layer]} of {shape.num_key_value_heads[layer]}",
         "all, of experts" if shape.experts[layer] else f"{channels[layer]:,} of {shape.intermediate_size[layer]:,}"]
        for layer in range(len(heads))
    ]  # fmt: skip
    return Table(
        ["layer", "hidden dims", "query heads", "KV heads", "MLP channels"], rows, name, numbers=True, folded=True
    )


def _update(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns, for each run that refitted, the divergence over the share of the way, and which weights refused."""
    pictures, notes = [], []
    for run in runs:
        done = run.results.refit
        if done is None:
            continue
        points = list(zip(done.shares, done.divergences, strict=True))
        taken = [point for point in points if point[0] == done.share]
        series = [Series("held-out KL", points, "marked"), Series("taken", taken, "dots")]
        pictures.append(
            line_chart(
                _of(run, runs, "Divergence"), series, "share of the way from fold to refit", "KL to the dense model"
            )
        )
        notes.append(Note(_of(run, runs, _refit(done))))
        if run.results.reconstruct is not None:
            notes.append(Note(_of(run, runs, _reconstructed(run.results.reconstruct))))
    return [*charts(pictures), *notes]


def _reconstructed(done: Reconstruction) -> str:
    first, last = done.ends
    nearer = sum(after < before for before, after in done.errors)
    return (
        f"then reconstructed, {nearer} of {len(done.errors)} windows of half layers nearer to the dense hidden states, "
        f"and left at {done.share:g} of the way: KL from {first:.3f} to {last:.3f}."
    )


def _refit(done: Refit) -> str:
    first, last = done.ends
    stayed = [name for name, strength in done.strengths.items() if strength is None]
    refused = (
        f"{len(stayed)} of {len(done.strengths)} linears refused it and stayed folded: {', '.join(stayed)}"
        if stayed
        else f"none of {len(done.strengths)} linears refused it"
    )
    return (
        f"refitted on {done.calibration_blocks} blocks and left at {done.share:g} of the way; KL from {first:.3f} to "
        f"{last:.3f} on {done.held_out_blocks} held-out blocks; {refused}. The whole update took {done.seconds:.0f} s."
    )


def _speed(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns times and sizes of the dense and the pruned model, and how many times less, beside the ideal."""
    blocks: list[Block] = []
    for run in runs:
        results = run.results
        if results.parameters is None:
            continue
        dense, pruned = results.parameters.dense, results.parameters.pruned
        ideal = f"{dense / pruned:.2f}×"
        rows = [
            _times("forward pass", results.speed_up, ideal),
            _times("training step", results.training_speed_up, ideal),
        ]
        rows.append(["weights, 2 bytes each", _bytes(dense * _HALF), _bytes(pruned * _HALF), ideal, "", ideal])
        if results.shape is not None and results.widths is not None:
            before, after = (
                sum(heads) * results.shape.head_dim * 2 * _HALF
                for heads in (results.shape.num_key_value_heads, results.widths.num_key_value_heads)
            )
            factor = f"{before / after:.2f}×" if after else NONE
            rows.append(["KV cache of a token, 2 bytes each", _bytes(before), _bytes(after), factor, "", ideal])
        head = ["", DENSE, PRUNED, "over all", "per batch", "ideal"]
        blocks.append(Table(head, [row for row in rows if row], _alone(run, runs), numbers=True))
    return blocks


def _times(name: str, speed: SpeedUp | None, ideal: str) -> list[str]:
    if speed is None:
        return []
    what = f"{name}, {speed.num_batches} batches of {speed.batch_size} × {speed.window} tokens"
    seconds = f"{speed.reference_seconds:.2f} s", f"{speed.seconds:.2f} s"
    return [what, *seconds, f"{speed.whole_set:.2f}×", f"{speed.per_batch:.2f}×", ideal]


def _bytes(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"


def _answers(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns what the models of each run add to the prompts."""
    blocks: list[Block] = []
    for run in runs:
        if run.generations is not None:
            blocks += [*_named(run, runs, "prompts"), *_said(run.generations)]
    return blocks


def _said(told: Generations) -> Iterator[Answers]:
    for place, prompt in enumerate(told.prompts[:MAX_PROMPTS]):
        every = [(name, said[place]) for name, said in told.models.items()]
        first = every[0][1] if every else ()
        yield Answers(prompt, tuple(answer(name, first, said) for name, said in every))


def answer(name: str, first: Sequence[str], said: Sequence[str]) -> Answer:
    """Returns what a model said, parted at the first piece that is not the first model's."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, said, strict=False)))
    return Answer(name, "".join(said[:same]), "".join(said[same : same + 1]), "".join(said[same + 1 :]))


def _origin(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns each run's command and recipe, and a table of versions and hardware."""
    blocks: list[Block] = []
    for run in runs:
        of = f" of {run.name}" if len(runs) > 1 else ""
        blocks.append(Code(f"The command{of}", run.results.command, wraps=True))
        if run.recipe is not None:
            blocks.append(Code(f"The recipe{of}: tvaprune VERB --config recipe.yaml", run.recipe))
    names = list(dict.fromkeys(name for run in runs for name in run.results.versions))
    rows: dict[str, Callable[[Results], str | None]] = {"hardware": lambda r: r.hardware}
    rows |= {name: lambda r, name=name: r.versions.get(name) for name in names}  # type: ignore[misc]
    rows["the model's digest"] = lambda r: r.model_digest
    return [*blocks, *_columns(runs, rows)]
