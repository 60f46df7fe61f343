"""TVA-Prune: learned structured pruning of large language models into narrower, plain, dense checkpoints.

The front door is light: what it names is imported when it is used.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_VERBS = (
    "prune", "apply", "finetune", "compare", "report", "describe", "export", "fetch", "sample", "estimate",
)  # fmt: skip
_SETTINGS = ("Model", "Data", "Prune", "Distill", "Finetune", "Eval", "Compare", "Sample")
_FRONT_DOOR = {
    **{name: "tvaprune.library" for name in _VERBS},
    **{f"{name}Settings": "tvaprune.flags.settings" for name in _SETTINGS},
    "InputError": "tvaprune.errors",
    "KeepPlan": "tvaprune.plan.keep_plan",
    "Results": "tvaprune.report.results",
    "load_pruned": "tvaprune.checkpoint.folder",
    "save_pruned": "tvaprune.checkpoint.folder",
    "load_masks": "tvaprune.plan.masks",
    "plan_from_masks": "tvaprune.plan.keep_plan",
    "register": "tvaprune.models.auto_classes",
}
__all__ = ["VerbModule", "__version__", *_FRONT_DOOR]


def __getattr__(name: str) -> object:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'tvaprune' has no attribute {name!r}")
    return getattr(import_module(_FRONT_DOOR[name]), name)


class VerbModule(ModuleType):
    """A module of a verb's name: once it is imported it stands where the verb stood, and called, it is the verb."""

    def __call__(self, *args: object, **options: object) -> object:
        """Does what the verb does."""
        name = self.__name__.removeprefix("tvaprune.")
        return getattr(import_module("tvaprune.library"), name)(*args, **options)
