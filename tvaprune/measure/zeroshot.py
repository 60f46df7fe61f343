"""Zero-shot accuracy by the lm-evaluation-harness, of the model objects it is given: no model is loaded here.

The harness is imported where it is used: its import takes seconds, and most commands do not ask for it.
"""

import contextlib
import copy
import difflib
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tvaprune.errors import InputError

RELEASED_TASKS = ("hellaswag", "winogrande", "openbookqa", "arc_easy", "arc_challenge", "piqa", "boolq", "rte")
OFFLINE_GROUP = "tva_offline"
OFFLINE_DATA = "python_docs"
# Where the released tasks lie in the harness; its whole index of 14,000 tasks takes half a minute to read.
_RELEASED_FOLDERS = ("hellaswag", "winogrande", "openbookqa", "arc", "piqa", "super_glue/boolq", "glue/rte")
_NAME = re.compile(r"^[\s-]*(?:task|group|tag): *[\"']?([\w.-]+)", re.MULTILINE)  # in such a file
_HEADLINES = ("acc_norm", "acc")  # the first that a task has is the one reported
CPU_BATCH = 16
_FEWSHOT_SEED = 1234  # the harness's own default


@dataclass(frozen=True)
class Score:
    """One model's result on one task.

    Attributes:
        metric: The headline metric: ``acc_norm`` where the task has it, else ``acc``, else the task's first; after a
            comma how answers are read, where that has a name.
        metrics: Every metric of the task and its standard error, under the harness's names.
        chance: Accuracy of choosing blindly; ``None`` where the task has no choices.
        settings: What repeats the score: number of examples, few-shot examples, limit, the task's version, its data.
        per_example: The headline metric of each example, in order.
        samples: The harness's record of each example, one for each way that its answers are read.
    """

    metric: str
    value: float
    stderr: float | None
    metrics: dict[str, float]
    chance: float | None
    settings: dict[str, Any]
    per_example: list[float] = field(repr=False)
    samples: list[dict[str, Any]] = field(repr=False)


class ZeroShot:
    """The tasks of one evaluation.

    Args:
        names: Tasks, groups or tags of the harness, or of this project's offline tasks.
        data_dir: Folder that holds local copies of hub repositories: ``<data_dir>/Rowan/hellaswag``.
        num_fewshot: Examples shown before the question; ``None``: as each task says.
        limit: Examples of a task that are scored; ``None``: all.

    Raises:
        InputError: If a name is unknown; the message gives the nearest.
    """

    def __init__(
        self, names: Sequence[str], data_dir: str | Path, num_fewshot: int | None = None, limit: int | None = None
    ) -> None:
        self.data_dir, self.num_fewshot, self.limit = Path(data_dir), num_fewshot, limit
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = _manager(names)
        self.names = list(dict.fromkeys(leaf for name in names for leaf in _leaves(self.manager.task_index, name)))

    def run(
        self, models: Mapping[str, Any], tokenizer: object, on_score: Callable[[str, str, Score], None]
    ) -> dict[str, str]:
        """Scores every model on every task, a task at a time, and hands each score over as soon as it is there.

        Args:
            models: Name -> causal LM.
            on_score: Called with the task, the model's name and its score.

        Returns:
            Tasks that could not run -> their data set.

        Raises:
            InputError: If no task could run.
        """
        harness = {name: _harness_model(model, tokenizer) for name, model in models.items()}
        missing = {}
        for name in self.names:
            try:
                tasks = self._load(name)
            except Exception as error:  # the hub's client raises a dozen kinds for "no network"
                missing[name] = self._data_set(name)
                print(self._missing_line(name, error), file=sys.stderr)
                continue
            for label, model in harness.items():
                for task, score in self._scores(model, tasks, self._data_set(name)).items():
                    on_score(task, label, score)
        if len(missing) == len(self.names):
            raise InputError(
                f"--zero_eval_tasks: none of {', '.join(missing)} could run (see above); "
                f"--zero_eval_tasks {OFFLINE_GROUP} needs no download"
            )
        return missing

    def _load(self, name: str) -> dict[str, object]:
        """Returns the harness's dictionary of one task, its data read from ``data_dir`` where a copy lies there."""
        local = self.data_dir / self._data_set(name)
        if not local.is_dir():
            return dict(self.manager.load([name]))
        # `datasets` knows a local folder by its last name alone: what it kept of another copy is not this one.
        fresh = {"download_mode": "reuse_cache_if_exists", "verification_mode": "no_checks"}
        own = (self.manager.task_index[name].cfg or {}).get("dataset_kwargs") or {}
        override = {"task": name, "dataset_path": str(local), "dataset_kwargs": own | fresh}
        return {"tasks": self.manager.load([{"group": f"local_{name}", "task": [override]}])["tasks"]}

    def _data_set(self, name: str) -> str:
        """Returns the hub id of a task's data."""
        cfg = self.manager.task_index[name].cfg or {}
        return str(cfg.get("dataset_path") or (OFFLINE_DATA if "custom_dataset" in cfg else name))

    def _missing_line(self, name: str, error: Exception) -> str:
        data_set, reason = self._data_set(name), " ".join(str(error).split())[:160]
        remedy = (
            "" if data_set == OFFLINE_DATA else f"; put a copy of the hub's repository at {self.data_dir / data_set}"
        )
        return f"zero-shot task {name}: data set {data_set} cannot be loaded ({type(error).__name__}: {reason}){remedy}"

    def _scores(self, model: Any, tasks: dict[str, Any], data_set: str) -> dict[str, Score]:
        """Runs the loaded tasks on one model."""
        from lm_eval.evaluator import evaluate

        for task in tasks["tasks"].values():
            _set_fewshot(task, self.num_fewshot)
        with _no_chatter():
            results = evaluate(model, tasks, limit=self.limit, bootstrap_iters=1000)
        return {name: _score(results, name, self.limit, data_set) for name in tasks["tasks"]}


def task_folder() -> Path:
    """Returns the folder of the offline tasks: the installed package's, else the one of the checkout."""
    spec = importlib.util.find_spec("tva_tasks")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    return Path(__file__).resolve().parents[2] / "lm-evaluation-harness" / "tva_tasks"


def _manager(names: Sequence[str]) -> Any:
    """Returns a task manager that knows the names, reading the harness's whole index only where it must."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None and spec.origin is not None  # a package that this one needs
    released = Path(spec.origin).parent / "tasks"
    folders = [task_folder(), *(released / folder for folder in _RELEASED_FOLDERS)]
    _check_written(names, [*folders, released])
    import lm_eval.tasks

    manager = lm_eval.tasks.TaskManager(include_path=list(folders), include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = lm_eval.tasks.TaskManager(include_path=task_folder())
    check_known(names, manager.all_tasks)
    return manager


def _check_written(names: Sequence[str], folders: Iterable[Path]) -> None:
    """Refuses a name that no file of the harness holds: to look takes seconds, the harness's own index a minute."""
    left, known = set(names), set[str]()
    for text in _texts(folders):
        known.update(_NAME.findall(text))
        left = {name for name in left if name not in text}
        if not left:
            return
    check_known([name for name in names if name in left], sorted(known))


def _texts(folders: Iterable[Path]) -> Iterator[str]:
    """Yields what stands in the files that tasks are read from, those that others include among them: of no suffix."""
    for path in chain.from_iterable(folder.rglob("*") for folder in folders):
        if path.suffix in (".yaml", "") and path.is_file():
            yield path.read_text(encoding="utf-8")


def check_known(names: Sequence[str], known: Sequence[str]) -> None:
    """Refuses a name that is not known.

    Raises:
        InputError: With the nearest names.
    """
    for name in names:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = f"; nearest are {', '.join(nearest)}" if nearest else ""
            raise InputError(
                f"--zero_eval_tasks {name}: no such task, group or tag{hint}; `lm_eval ls tasks` lists all"
            )


def _leaves(index: Mapping[str, Any], name: str) -> list[str]:
    """Returns the tasks of a name, so that each runs and fails alone; a group that changes its members stays whole."""
    entry = index[name]
    members = (entry.cfg or {}).get("task")
    if isinstance(members, list) and all(isinstance(member, str) and member in index for member in members):
        return [leaf for member in members for leaf in _leaves(index, member)]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    return [name]


def _harness_model(model: nn.Module, tokenizer: object) -> object:
    from lm_eval.models.huggingface import HFLM

    # A copy: the harness adds a token to pad with. Without a GPU the search for a batch size ends where it starts, and
    # costs a third of a short task.
    batch_size = "auto" if next(model.parameters()).is_cuda else CPU_BATCH
    return HFLM(
        pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size,
        trust_remote_code=False,
    )  # fmt: skip


def check_tokenizer(tokenizer: Any) -> None:
    """Refuses a tokenizer without a token that the harness could put before a text: call it before the work begins.

    Raises:
        InputError: If it has neither a beginning nor an end.
    """
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(
            "--do_zero_eval: the tokenizer has no bos_token and no eos_token, one of which the harness puts before a "
            "text: name one in tokenizer_config.json"
        )


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Sets the few-shot examples as the harness's command does: a task that fixes 0 keeps it."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


@contextlib.contextmanager
def _no_chatter() -> Iterator[None]:
    """Drops what the harness prints while it looks for a batch size."""
    with contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        yield


def _score(results: Any, name: str, limit: int | None, data_set: str) -> Score:
    """Reads one task's score from the harness's results."""
    found = {key: value for key, value in results["results"][name].items() if isinstance(value, int | float)}
    metrics = {key.removesuffix(",none"): float(value) for key, value in found.items() if "," in key}
    metric = next((headline for headline in _HEADLINES if headline in metrics), next(iter(metrics)))
    bare, _, reading = metric.partition(",")  # gsm8k reads each answer in two ways, and has a record of each
    every = results["samples"][name]
    samples = [sample for sample in every if sample["filter"] == (reading or "none")]
    choices = results["configs"][name]["output_type"] == "multiple_choice"
    return Score(
        metric=metric,
        value=metrics[metric],
        stderr=metrics.get(",".join(filter(None, (f"{bare}_stderr", reading)))),
        metrics=metrics,
        chance=sum(1 / len(sample["arguments"]) for sample in samples) / len(samples) if choices else None,
        settings={
            "num_examples": len(samples),
            "num_fewshot": results["n-shot"].get(name, 0),
            "limit": limit,
            "version": results["versions"][name],
            "data_set": data_set,
        },
        per_example=[float(sample[bare]) for sample in samples if isinstance(sample.get(bare), int | float)],
        samples=every,
    )
