"""Whether models train or are evaluated, for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_mode(training: bool, *models: nn.Module) -> Iterator[None]:
    """Has models train, or not; each is left as it came."""
    before = [model.training for model in models]
    for model in models:
        model.train(training)
    try:
        yield
    finally:
        for model, was_training in zip(models, before, strict=True):
            model.train(was_training)
