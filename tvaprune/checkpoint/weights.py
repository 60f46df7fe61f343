"""Safetensors files of weights that come one at a time: what ``save_pretrained`` writes, byte for byte.

safetensors itself wants all tensors of a file at once. The format: https://huggingface.co/docs/safetensors.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import PreTrainedModel

from tvaprune.models.pruned import shared_names
from tvaprune.models.vetting import FLOATS, INDEX, WEIGHTS

LARGEST = "50GB"  # of a file, as transformers splits them
_ALIGNED = 8  # bytes that the header's length is a multiple of
_CODES = {dtype: code for code, dtype in FLOATS.items()}


def write_weights(model: PreTrainedModel, fetch: Callable[[str], torch.Tensor], folder: Path) -> None:
    """Writes a model's weights, in the precision that the model has.

    Args:
        model: It has the names, shapes and precision; its weights may be on the meta device.
        fetch: Returns the weight of a name.
    """
    names = [names[0] for names in shared_names(model)]
    tensors = {name: torch.empty_like(model.get_parameter(name), device="meta") for name in names}
    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=LARGEST)
    for file, within in split.filename_to_tensors.items():
        _write(folder / file, {name: tensors[name] for name in sorted(within)}, fetch)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(path: Path, tensors: dict[str, torch.Tensor], fetch: Callable[[str], torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            weight = fetch(name).to(tensor.dtype).contiguous()
            file.write(weight.flatten().view(torch.uint8).numpy().data)
