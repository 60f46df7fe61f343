"""TVA-Prune: learned structured pruning of large language models into narrower, plain, dense checkpoints.

The front door is light: what it names is imported when it is used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_FRONT_DOOR = {
    "load_pruned": "tvaprune.checkpoint.folder",
    "save_pruned": "tvaprune.checkpoint.folder",
    "load_masks": "tvaprune.plan.masks",
    "plan_from_masks": "tvaprune.plan.keep_plan",
    "register": "tvaprune.models.auto_classes",
}
__all__ = ["__version__", *_FRONT_DOOR]


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'tvaprune' has no attribute {name!r}")
    return getattr(import_module(_FRONT_DOOR[name]), name)
