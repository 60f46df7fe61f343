"""Settings of a gate training of a tiny model."""

from tvaprune.choose.settings import gate_settings
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.plan.widths import WidthRules


def settings(num_steps=8, distill=True, **prune):
    prune = {"lagrangian_warmup_epochs": 0.25, "dim_multiple": 4} | prune
    arguments = PruneSettings(target_sparsity=[0.3], **prune)
    return gate_settings(arguments, DistillSettings(distill=distill), num_steps, num_steps, 5.0, WidthRules(4))
