"""The metadata above a model card: what the hub files a model under, and what is inherited from the card of its source.

Perplexities stand in ``model-index``, which takes any text's. The hub's present form, which asks for a data set's hub
id, is `tvaprune.checkpoint.eval_results`.
"""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, hf_hub_download
from huggingface_hub.repocard import metadata_load

from tvaprune.checkpoint.eval_results import HUB_ID, Perplexity
from tvaprune.files import CARD_NAME
from tvaprune.models.published import PUBLISHED, folder_of

TAGS = ["pruned", "tvaprune"]
_INHERITED = ("license", "license_name", "license_link", "language")
_LONGEST = 200  # characters of what is inherited: a licence's name or address, a language


def made_of(base: str | None) -> str | None:
    """Returns the name of the fetched model that a checkpoint is, or was made of on this machine; None: of none.

    Args:
        base: The checkpoint as it was given.
    """
    name = None if base is None else _fetched(base)
    if name is not None or base is None or not Path(base).exists():
        return name
    origin = source_metadata(base).get("base_model")
    return next((name for name, model in PUBLISHED.items() if model.origin == origin), None)


def _fetched(base: str) -> str | None:
    """Returns the name of the fetched model that a name or a folder means; a folder of that name goes first."""
    if not Path(base).exists():
        return base if base in PUBLISHED else None
    return next((name for name in PUBLISHED if folder_of(name).resolve() == Path(base).resolve()), None)


def model_metadata(record: Mapping[str, Any], name: str) -> str:
    """Returns the lines above a pruned model's card, ``---`` included.

    Args:
        record: As for `tvaprune.checkpoint.card.model_card`.
        name: The folder's name.
    """
    above, results = source_metadata(record.get("model")), _results(record)
    if "base_model" in above:
        above["base_model_relation"] = "finetune"  # the hub's word for a model that is made of another's weights
    named = {"model_name": name, "eval_results": results} if results else {}
    return _lines(library_name="transformers", tags=TAGS, **named, **above)


def adapter_metadata(record: Mapping[str, Any]) -> str:
    """Returns those above an adapter's: its base is the pruned model, of which no hub id is known."""
    above = {key: value for key, value in source_metadata(record.get("model")).items() if key != "base_model"}
    return _lines(library_name="peft", tags=["lora", *TAGS], **above)


def _lines(**entries: Any) -> str:
    return f"---\n{ModelCardData(pipeline_tag='text-generation', **entries).to_yaml()}\n---\n"


def source_metadata(base: str | None) -> dict[str, Any]:
    """Returns what a model has from the one that it is made of: ``base_model``, its licence and languages.

    The hub takes an id as ``base_model``: of a folder it is known where the folder is ours and its card says so.

    Args:
        base: The checkpoint as it was given: a folder, a hub id, a fetched model's name.
    """
    if base is None:
        return {}
    if (name := _fetched(base)) is not None:
        return {"base_model": PUBLISHED[name].origin, "license": PUBLISHED[name].license}
    if Path(base).exists():
        above = _read(Path(base, CARD_NAME))
        is_ours = set(TAGS) <= set(_texts(above.get("tags")))
        names = (*_INHERITED, "base_model") if is_ours else _INHERITED
        return _plain({name: above[name] for name in names if name in above}, None)
    if not HUB_ID.fullmatch(base):
        return {}
    above = _of_hub(base)
    return {"base_model": base} | _plain({name: above[name] for name in _INHERITED if name in above}, base)


def _read(path: Path) -> dict[str, Any]:
    """Returns the metadata of a card; none where there is none, or it cannot be read."""
    try:
        return (metadata_load(path) or {}) if path.is_file() else {}
    except Exception:  # a stranger's card raises nearly anything, and nothing rests on it
        return {}


@cache
def _of_hub(hub_id: str) -> dict[str, Any]:
    """Returns the metadata of a hub id's card; none where it cannot be had."""
    try:
        return _read(Path(hf_hub_download(hub_id, CARD_NAME)))
    except Exception:  # the hub's client raises a dozen kinds for "no network" and "no card"
        return {}


def _plain(found: dict[str, Any], hub_id: str | None) -> dict[str, Any]:
    """Returns the entries that are a text, or a list of them; a link within the source's repository leads there."""
    kept: dict[str, Any] = {}
    for name, value in found.items():
        texts = _texts(value)
        if texts:
            kept[name] = texts if isinstance(value, list) else texts[0]
    link = kept.get("license_link")
    if isinstance(link, str) and not link.startswith("https://"):
        kept.pop("license_link")
        if hub_id is not None:
            kept["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    return kept


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text for text in values if isinstance(text, str) and text.isprintable() and 0 < len(text) <= _LONGEST]


def _results(record: Mapping[str, Any]) -> list[EvalResult]:
    """Returns the perplexity that was measured last, under the text's hub id; a text without one is its own name.

    Its standard error is a figure beside it: the hub's form has no place for one. Nothing where the perplexity is none,
    as of a model whose weights overflow.
    """
    last = "finetuned" if "finetuned" in (record.get("perplexity") or {}) else "pruned"
    measured = Perplexity.of(record, last)
    if measured is None:
        return []
    name = record["protocol"]["dataset_name"]
    found = partial(
        EvalResult,
        task_type="text-generation",
        dataset_type=measured.dataset or Path(name).stem,
        dataset_name=name if measured.dataset else Path(name).stem,
        dataset_config=measured.config,
        dataset_split=measured.split,
    )
    told = f"perplexity, windows of {measured.window}"
    results = [found(metric_type="perplexity", metric_name=told, metric_value=round(measured.value, 4))]
    if measured.stderr is not None:
        told = f"standard error of the {told}"
        results.append(found(metric_type="perplexity_stderr", metric_name=told, metric_value=round(measured.stderr, 4)))
    return results
