"""A frozen model that is larger than one GPU: each process of a run holds a share of its layers (torch's FSDP2).

A layer is whole only while it computes. Embeddings, final norm and lm_head, a few percent of the weights, are whole in
every process; what is trained beside the frozen weights (gates, LoRA, a trained lm_head) is too, and its gradients are
averaged as in any data-parallel training. So checkpoints, masks and adapters are what they are without sharding.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.models.families import family_of


def shard(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Freezes a model, spreads its layers over the processes and puts its ends on the device; returns it.

    Args:
        model: A whole model, the same in every process, on the CPU: a layer at a time goes to the device.
    """
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (ranks.count(),))
    layers: Any = model.get_submodule(family_of(model.config).layers)
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    ends = set(model.parameters()) - set(layers.parameters())
    decoder: Any = model.get_decoder()
    fully_shard(decoder, mesh=mesh, ignored_params=ends)  # one root, so that a layer is fetched while another computes
    module: torch.nn.Module = model
    module.to(device)
    with torch.no_grad():  # room for whole layers is made here: what inference mode made could be trained under no more
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device), use_cache=False)
    return model
