"""How the narrower models of some runs came about and what they take: training, update, widths, speed and memory."""

from collections.abc import Iterator, Sequence

from tvaprune.cut.reconstruct import Reconstruction
from tvaprune.measure.speed import SpeedUp
from tvaprune.models.shape import ModelShape
from tvaprune.report.charts import Chart, Series, bar_chart, line_chart
from tvaprune.report.folders import Row, RunFolder
from tvaprune.report.page import Block, Note, Table, charts
from tvaprune.report.results import KeptWidths, Perplexities, Refit
from tvaprune.report.several import NONE, alone, named, of
from tvaprune.report.zero_shot import DENSE, PRUNED

_HALF = 2  # bytes of a weight in bfloat16 or float16


def training(runs: Sequence[RunFolder]) -> list[Block]:
    """Returns the curves of every training, once where runs share it."""
    blocks: list[Block] = []
    seen = set()
    for run in runs:
        if run.gates is not None and run.gates[0] not in seen:
            seen.add(run.gates[0])
            blocks += [*named(run, runs, "gates"), *charts(_gate_charts(run.gates[1]))]
        if run.tuning is not None:
            blocks += [*named(run, runs, "fine-tuning"), *charts(_tuning_charts(run.tuning, run.results.perplexity))]
    return blocks


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


def widths(runs: Sequence[RunFolder]) -> list[Block]:
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
        pictures = [bar_chart(of(run, runs, what), some, full, "layer", what) for what, some, full in pairs]
        blocks += [*charts(pictures), _width_table(of(run, runs, "figures of every layer"), kept, shape)]
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


def update(runs: Sequence[RunFolder]) -> list[Block]:
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
                of(run, runs, "Divergence"), series, "share of the way from fold to refit", "KL to the dense model"
            )
        )
        notes.append(Note(of(run, runs, _refit(done))))
        if run.results.reconstruct is not None:
            notes.append(Note(of(run, runs, _reconstructed(run.results.reconstruct))))
    return [*charts(pictures), *notes]


def _reconstructed(done: Reconstruction) -> str:
    first, last = done.ends
    nearer = sum(after < before for before, after in done.errors)
    return (
        f"then reconstructed, {nearer} of {len(done.errors)} windows of half layers nearer to the dense hidden states, "
        f"and left at {done.way} of the way: KL from {first:.3f} to {last:.3f}."
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
        f"refitted on {done.calibration_blocks} blocks and left at {done.way} of the way; KL from {first:.3f} to "
        f"{last:.3f} on {done.held_out_blocks} held-out blocks; {refused}. The whole update took {done.seconds:.0f} s."
    )


def speed(runs: Sequence[RunFolder]) -> list[Block]:
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
        blocks.append(Table(head, [row for row in rows if row], alone(run, runs), numbers=True))
    return blocks


def _times(name: str, speed: SpeedUp | None, ideal: str) -> list[str]:
    if speed is None:
        return []
    batches = "1 batch" if speed.num_batches == 1 else f"{speed.num_batches} batches"
    what = f"{name}, {batches} of {speed.batch_size} × {speed.window} tokens"
    seconds = f"{speed.reference_seconds:.2f} s", f"{speed.seconds:.2f} s"
    return [what, *seconds, f"{speed.whole_set:.2f}×", f"{speed.per_batch:.2f}×", ideal]


def _bytes(count: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
