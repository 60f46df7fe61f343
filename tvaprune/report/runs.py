"""The page of one run, or of several side by side: every section has a column, a chart or a table for each."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tvaprune.measure.figures import with_error
from tvaprune.report.folders import RunFolder
from tvaprune.report.making import speed, training, update, widths
from tvaprune.report.page import Block, Code, Page, Section, Tile
from tvaprune.report.quality import answers, gap_meaning, gap_told, gaps, perplexities, protocol, zero_shot
from tvaprune.report.results import Results
from tvaprune.report.several import columns
from tvaprune.report.zero_shot import FINETUNED


def page_of(runs: Sequence[RunFolder]) -> Page:
    """Returns the page of some runs; what none of them measured is left out."""
    first = runs[0].results
    single = len(runs) == 1
    model = Path(first.model).name
    title = _headline(first, model) if single else f"{len(runs)} runs side by side"
    lead = f"{first.hardware}. {_counted(first)}" if single else ", ".join(run.name for run in runs)
    sections = [
        Section("Asked and reached", _asked(runs)),
        Section("Perplexity", perplexities(runs), protocol(runs)),
        Section("Gap over sparsity", gaps(runs), gap_meaning(runs)),
        Section("Zero-shot", zero_shot(runs), "Accuracy and standard error; of a difference, over the same examples."),
        Section("Training", training(runs)),
        Section("Kept widths", widths(runs), "What each layer keeps of the dense model's."),
        Section("What the weight update did", update(runs)),
        Section("Speed and memory", speed(runs), "Ideal: as many times as there are fewer parameters."),
        Section("What the models say", answers(runs), "Greedy; the first token that differs is marked."),
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
        before, after = (with_error(value, None, digits=2) for value in (ppl.dense, ppl.pruned))
        found.append(Tile("perplexity", f"{before} → {after}", f"gap {gap_told(ppl)}"))
        if ppl.finetuned is not None:
            finetuned = with_error(ppl.finetuned, None, digits=2)
            found.append(Tile("fine-tuned", finetuned, f"gap {gap_told(ppl, FINETUNED)}"))
    if (alone := results.model_perplexity) is not None:
        found.append(Tile("perplexity", with_error(alone.value, alone.stderr, digits=2), "of the model as it is"))
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


def _asked(runs: Sequence[RunFolder]) -> list[Block]:
    return columns(
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
    return [*blocks, *columns(runs, rows)]
