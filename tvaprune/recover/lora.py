"""LoRA on any causal LM: on, off, saved, loaded, merged."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from tvaprune.errors import InputError, reason
from tvaprune.identity import Identity, check_identity, write_identity
from tvaprune.models.families import row_of

Student = PreTrainedModel | PeftModel  # with LoRA, or trained whole


@dataclass(frozen=True)
class LoraSettings:
    """LoRA on every linear layer, of a mixture of experts on those of the attention; the lm_head is trained whole."""

    r: int
    alpha_ratio: float
    dropout: float
    train_lm_head: bool


def add_lora(model: Any, settings: LoraSettings) -> PeftModel:
    """Returns the model with LoRA on its linear layers, in place; at first it computes what the model does.

    What is trained is float32, whatever the model's precision: in half of it AdamW loses its steps.
    """
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha_ratio * settings.r,  # type: ignore[arg-type] # peft divides it by r, whole or not
        lora_dropout=settings.dropout,
        target_modules=_targets(model.config),
        modules_to_save=["lm_head"] if settings.train_lm_head else None,
        task_type="CAUSAL_LM",
    )
    with _quiet():
        tuned = get_peft_model(model, config)
    if settings.train_lm_head:  # peft sees to LoRA's own weights alone
        head = tuned.get_output_embeddings().modules_to_save["default"]
        head.float().register_forward_pre_hook(_in_own_precision)
    return tuned


def _targets(config: Any) -> str | list[str]:
    """Returns the linear layers that LoRA is put on.

    By "all-linear" peft means the experts too, of a stock mixture, and of a pruned one the attention alone.
    """
    family = row_of(config.model_type)
    if family.experts is None:
        return "all-linear"
    return sorted({path.rpartition(".")[2] for path in (family.query, family.key, family.value, family.output)})


def drop_replaced_head(tuned: PeftModel) -> None:
    """Lets go of the lm_head that a trained copy stands for: of 128,256 tokens it is a GiB. It cannot be put back.

    A head that is the embeddings stays.
    """
    head = getattr(tuned.get_output_embeddings(), "original_module", None)
    if head is not None and head.weight is not tuned.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.new_empty(0), requires_grad=False)


def _in_own_precision(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.to(module.weight.dtype) for value in inputs)


@contextmanager
def trainable(model: Any, settings: LoraSettings | None) -> Iterator[Any]:
    """Yields a model as it would be trained, and leaves it frozen, as it was: what LoRA would train is a copy.

    Args:
        settings: What is trained; None: all weights, which are not put back.
    """
    head = model.get_output_embeddings()
    tuned = model.requires_grad_(True) if settings is None else add_lora(model, settings)
    try:
        yield tuned
    finally:
        if settings is not None:
            tuned.unload()
            model.set_output_embeddings(head)  # peft leaves the copy that was trained
        model.requires_grad_(False)


def save_adapter(model: PeftModel, folder: Path, identity: Identity) -> None:
    """Writes the adapter as peft does, and what it belongs to."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    write_identity(folder, identity)


def merge(model: PeftModel) -> Any:
    """Adds LoRA's updates to the weights, in place, and returns the model without LoRA, in its own precision."""
    with _quiet():
        merged = model.merge_and_unload()
    merged.get_output_embeddings().to(merged.dtype)
    return merged


def load_adapter(model: Any, folder: str | Path, identity: Identity) -> PeftModel:
    """Puts a saved adapter on the model that it was trained on.

    Args:
        identity: What the model is: the entries that the adapter was saved with.

    Raises:
        InputError: If the folder holds no adapter, or one of another model.
    """
    check_identity("adapter", Path(folder), identity)
    try:
        with _quiet():
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded ({reason(error)}); train it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops warnings of peft: it asks by a deprecated name, and tells of an lm_head that leaves its tie, as asked."""
    with warnings.catch_warnings():
        for tied in ("Model has .tie_word_embeddings=True.", "Input and output embeddings are no longer tied"):
            warnings.filterwarnings("ignore", tied, UserWarning)
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield
