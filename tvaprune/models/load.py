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
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from error
    family_of(config)
    return config


def load_model(path: str | None, dtype: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Loads a supported checkpoint and its tokenizer.

    Raises:
        InputError: If there is no such checkpoint, it has no weights, or its family is not supported.
    """
    config = load_config(path)
    torch_dtype = ("auto" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
        model = AutoModelForCausalLM.from_pretrained(config.name_or_path, config=config, dtype=torch_dtype)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise _unloadable(path, error) from error
    module: torch.nn.Module = model
    module.to(device).eval()
    return model, tokenizer


def _unloadable(path: str | None, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"--model_name_or_path {path}: cannot be loaded ({reason}); give a folder with config.json, safetensors "
        "weights and a tokenizer, or a hub id that is in the cache or reachable"
    )
