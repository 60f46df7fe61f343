"""The closing table of a command."""

from collections.abc import Sequence
from pathlib import Path

from tvaprune.measure.figures import log_gap, with_error
from tvaprune.models.shape import in_words
from tvaprune.outputs import PAGE_NAME
from tvaprune.report.results import Perplexities, Results


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def summary_rows(results: Results) -> list[tuple[str, str]]:
    """Returns the closing table's rows for the results of one measurement."""
    ppl, speed, widths, shape = results.perplexity, results.speed_up, results.widths, results.shape
    assert ppl is not None and widths is not None and shape is not None and results.parameters is not None
    text = results.protocol
    assert text is not None
    rows = [
        (
            f"perplexity ({text.dataset_name} {text.split}, windows of {text.window})",
            f"{_perplexity(ppl, 'dense')} dense -> {_perplexity(ppl, 'pruned')} pruned (gap in log perplexity "
            f"{with_error(log_gap(ppl.pruned, ppl.dense), ppl.error('gap'))})",
        ),
        ("protocol", text.line),
        ("sparsity of the decoder layers", _sparsity(widths.decoder_sparsity, results.target_sparsity)),
        ("parameters", f"{results.parameters.dense:,} -> {results.parameters.pruned:,}"),
        ("kept hidden dims", f"{widths.hidden_size} of {shape.hidden_size}"),
        ("kept KV heads per layer", _of(widths.num_key_value_heads, shape.num_key_value_heads)),
        ("kept MLP channels per layer", _of(widths.intermediate_size, shape.intermediate_size)),
        ("instant weight update", _update(results)),
    ]
    if any(shape.experts):
        rows.insert(-1, ("experts per layer", f"{in_words(shape.experts)}, with all their channels"))
    if speed:
        rows.append(
            (
                f"speed-up (forward, batch {speed.batch_size} x {speed.window}, {results.hardware})",
                f"{speed.per_batch:.2f}x per batch, {speed.whole_set:.2f}x over {speed.num_batches} batches",
            )
        )
    return rows


def model_rows(results: Results) -> list[tuple[str, str]]:
    """Returns the closing table's rows for a model that was measured as it is."""
    found, text = results.model_perplexity, results.protocol
    assert found is not None and text is not None
    name = f"perplexity ({text.dataset_name} {text.split}, windows of {text.window})"
    return [(name, with_error(found.value, found.stderr, digits=2)), ("protocol", text.line), ("model", results.model)]


def origin(results: Results) -> tuple[str, str]:
    """Returns the row of what was cut by."""
    return ("plan", results.plan) if results.plan is not None else ("mask", str(results.mask))


def page(folder: Path) -> tuple[str, str]:
    """Returns the row of where the page is."""
    return ("page", str(folder / PAGE_NAME))


def finetune_rows(results: Results) -> list[tuple[str, str]]:
    """Returns the closing table's rows for what fine-tuning did."""
    ppl, told, speed = results.perplexity, results.finetune, results.training_speed_up
    assert ppl is not None and ppl.finetuned is not None and told is not None
    before, after = log_gap(ppl.pruned, ppl.dense), log_gap(ppl.finetuned, ppl.dense)
    closed = f", {1 - after / before:.0%} of it closed" if before > 0 else ""
    since = "" if told.resumed_from is None else f" since {Path(told.resumed_from).name}"
    rows = [
        (
            "perplexity, fine-tuned",
            f"{with_error(ppl.pruned, None, digits=2)} pruned -> {_perplexity(ppl, 'finetuned')} "
            f"(gap {before:.3f} -> {with_error(after, ppl.error('finetuned_gap'))}{closed})",
        ),
        (
            f"fine-tuning ({told.method}, {told.steps} steps of {told.blocks_per_step} blocks)",
            f"{told.seconds:.0f} s{since}, weights of step {told.best_step}",
        ),
    ]
    if speed:
        name = f"speed-up of a training step (batch {speed.batch_size} x {speed.window}, both {told.method})"
        rows.append((name, f"{speed.per_batch:.2f}x per batch, {speed.whole_set:.2f}x over all"))
    if told.adapter_merged_difference is not None:
        rows.append(("adapter and merged model differ by at most", f"{told.adapter_merged_difference:.1e} in logits"))
    return rows


def _perplexity(perplexities: Perplexities, name: str) -> str:
    return with_error(getattr(perplexities, name), perplexities.error(name), digits=2)


def _sparsity(achieved: float, target: float | None) -> str:
    return f"{achieved:.4f}" if target is None else f"{achieved:.4f} (target {target})"


def _update(results: Results) -> str:
    done = results.refit
    if done is None:
        return str(results.weight_update)
    before, after = done.ends
    more = results.reconstruct
    trained = "" if more is None else f" -> {more.ends[1]:.3f} reconstructed"
    return (
        f"refit on {done.calibration_blocks} blocks, {done.way} of the way from the fold: "
        f"held-out KL to dense {before:.3f} -> {after:.3f}{trained}, {done.seconds:.0f} s"
    )


def _of(kept: Sequence[int], full: Sequence[int]) -> str:
    return f"{' '.join(map(str, kept))} of {in_words(full)}"
