"""Where a model's weights are: on one device, or spread over several, layer by layer (accelerate's device map)."""

from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module

from tvaprune.errors import InputError

Place = torch.device | dict[str, Any]


def place_of(model: Any) -> Place:
    """Returns the device of a model, or the map of its parts to devices."""
    place: Place = getattr(model, "hf_device_map", None) or model.device
    return place


def put(model: Any, place: Place) -> None:
    """Moves a model, in place, with what hands its activations on from device to device."""
    remove_hook_from_module(model, recurse=True)
    model.__dict__.pop("hf_device_map", None)
    if isinstance(place, dict):
        dispatch_model(model, device_map=place, force_hooks=True)
    else:
        torch.nn.Module.to(model, place)


def check_placed(model: Any, named: str) -> None:
    """Refuses a model that did not go on the GPUs: what is offloaded cannot be cut.

    Args:
        named: How the message begins: the flag and the folder.

    Raises:
        InputError: If the CPU or the disk had to take a part of it.
    """
    placed = getattr(model, "hf_device_map", {})  # without a GPU there is none
    elsewhere = sorted({str(place) for place in placed.values()} & {"cpu", "disk"})
    if elsewhere and torch.cuda.is_available():
        raise InputError(
            f"{named}: does not fit the GPUs, {' and '.join(elsewhere)} would have to hold a part of it; give "
            "--dtype bfloat16, more GPUs, or a smaller model"
        )
