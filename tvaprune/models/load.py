"""A stock checkpoint in: its config, its weights, its tokenizer."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)

from tvaprune.errors import InputError
from tvaprune.models.families import family_of


def load_config(path: str | None) -> Any:
    """Loads the config of a supported checkpoint.

    Raises:
        InputError: If there is none, or its family is not supported.
    """
    if path is None:
        raise InputError("--model_name_or_path is missing: give a checkpoint's folder or hub id")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from error
    family_of(config)
    if getattr(config, "quantization_config", None):
        raise InputError(
            f"--model_name_or_path {path}: its weights are quantised (quantization_config in config.json), and pruning "
            "needs plain ones: give the unquantised checkpoint, or dequantise this one first"
        )
    return config


def load_model(path: str | None, dtype: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Loads a supported checkpoint and its tokenizer.

    Raises:
        InputError: If there is no such checkpoint, its weights are not its config's, or its family is not supported.
    """
    config = load_config(path)
    torch_dtype = ("auto" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, trust_remote_code=False)
        found: Any = AutoModelForCausalLM.from_pretrained(
            config.name_or_path, config=config, dtype=torch_dtype, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise _unloadable(path, error) from error
    model, loaded = found
    _check_whole(path, loaded)
    module: torch.nn.Module = model
    module.to(device).eval()
    return model, tokenizer


def _check_whole(path: str | None, loaded: dict[str, Any]) -> None:
    """Refuses a partial load: what the file lacks would be drawn at random. Tied heads are not missing."""
    missing, unknown = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    if not missing and not unknown:
        return
    parts = [
        f"{len(names)} {what}, such as {names[0]!r}"
        for names, what in (
            (missing, "of the model's tensors are missing"),
            (unknown, "of the file's are unknown to it"),
        )
        if names
    ]
    raise InputError(
        f"--model_name_or_path {path}: the weights are not those of its config ({'; '.join(parts)}); give a whole, "
        "unquantised checkpoint of a causal language model"
    )


def _unloadable(path: str | None, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"--model_name_or_path {path}: cannot be loaded ({reason}); give a folder with config.json, safetensors "
        "weights and a tokenizer, or a hub id that is in the cache or reachable"
    )
