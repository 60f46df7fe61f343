"""The instant weight updates of two models in memory, their texts, and how near they come."""

import torch
from datasets import Dataset

from support.families import logits
from tvaprune.cut.reconstruct import reconstruct_layers
from tvaprune.cut.refit import refit_layers
from tvaprune.losses import distillation_loss
from tvaprune.models.layers import Layers


def windows(count, seed, length=16):
    """Text with a pattern, so that inputs are correlated as those of real text are."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 47, (count, length), generator=generator)
    ids[:, 1::2] = (ids[:, ::2] * 3 + 1) % 47
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


CALIBRATION, HELD_OUT = windows(24, seed=1), windows(8, seed=2)


def divergence(model, dense, blocks=HELD_OUT):
    """KL from the dense predictions on some windows."""
    ids = blocks[:]["input_ids"]
    return float(distillation_loss(logits(model, ids), logits(dense, ids)))


def weights_differ(model, other):
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def refit(dense, pruned, *texts, before=None, **options):
    dense.eval(), pruned.eval()
    return refit_layers(Layers(dense, pruned.device), Layers(pruned, before=before), *texts, **options)


def reconstruct(dense, pruned, *texts, is_used_up=False, **options):
    return reconstruct_layers(Layers(dense, pruned.device, is_used_up), Layers(pruned), *texts, **options)
