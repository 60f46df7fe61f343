"""ONNX graphs for ONNX Runtime: ``model.onnx`` reads a whole text, ``model_with_past.onnx`` goes on from a KV cache.

The cache's inputs and outputs are per layer, ``past_key_values.{i}.key`` of shape ``(batch, KV heads of layer i, past
tokens, head_dim)``: their second size differs between the layers. No generation loop comes with them.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.checkpoint.folder import CONFIG_NAME
from tvaprune.checkpoint.tokenizer import write_tokenizer
from tvaprune.export.verify import NUM_CACHED, fixed_prompt, reference_logits, report_difference
from tvaprune.files import new_folder
from tvaprune.models.formats import check_graph
from tvaprune.models.shape import shape_of
from tvaprune.models.vetting import drop_code
from tvaprune.phases import told_bar

MODEL_NAME = "model.onnx"
WITH_PAST_NAME = "model_with_past.onnx"


class _Text(nn.Module):
    """Tokens to logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class _Step(nn.Module):
    """Tokens and each layer's keys and values so far, to logits and the keys and values with these tokens."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> object:
        output = self.model(input_ids=input_ids, past_key_values=DynamicCache(past), use_cache=True)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


def export_onnx(
    model: PreTrainedModel,
    source: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    overwrite: bool,
    verify: bool,
) -> None:
    """Writes both graphs in float32, the checkpoint's config and its tokenizer into a folder.

    ONNX Runtime lacks half-precision kernels on a CPU.

    Args:
        source: The checkpoint's folder.
        tokenizer: Of the checkpoint; None writes none.

    Raises:
        InputError: If no graph holds the model's rotary embedding, or the folder cannot be written.
    """
    check_graph(model.config)
    model = model.float()
    with new_folder("format onnx", out, overwrite) as temporary:
        with _quiet(), told_bar(2, "exporting", "graph") as advance:
            for written, name in ((_export_text, MODEL_NAME), (_export_step, WITH_PAST_NAME)):
                written(model, temporary / name)
                advance()
        if tokenizer is not None:  # with its chat template, in whatever files it has
            write_tokenizer(tokenizer, temporary)
        for name in (CONFIG_NAME, "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, temporary / name)
                drop_code(temporary / name)
        if verify:
            _verify(model, temporary)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drops what torch's exporter tells of its own parts: packages that no graph needs, axes that it renames."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Returns the names of the cache's tensors in order."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(num_layers) for kind in ("key", "value")]


def _export_text(model: PreTrainedModel, path: Path) -> None:
    batch, length = Dim("batch"), Dim("length")
    torch.onnx.export(
        _Text(model).eval(),
        (fixed_prompt(model.config.vocab_size).repeat(2, 1),),
        str(path),
        dynamo=True,
        dynamic_shapes=({0: batch, 1: length},),
        input_names=["input_ids"],
        output_names=["logits"],
        verbose=False,
    )


def _export_step(model: PreTrainedModel, path: Path) -> None:
    batch, length, past = Dim("batch"), Dim("length"), Dim("past")
    layers = model.config.num_hidden_layers
    sizes: dict[int, Any] = {0: batch, 2: past}
    torch.onnx.export(
        _Step(model).eval(),
        (fixed_prompt(model.config.vocab_size).repeat(2, 1), _empty_past(model, 2, NUM_CACHED)),
        str(path),
        dynamo=True,
        dynamic_shapes=({0: batch, 1: length}, [(sizes, sizes)] * layers),
        input_names=["input_ids", *cache_names("past_key_values", layers)],
        output_names=["logits", *cache_names("present", layers)],
        verbose=False,
    )


def _empty_past(model: PreTrainedModel, batch: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns a cache of zeros at each layer's own number of KV heads."""
    sizes = shape_of(model.config)
    shapes = [(batch, count, length, sizes.head_dim) for count in sizes.num_key_value_heads]
    return [(torch.zeros(shape, dtype=model.dtype), torch.zeros(shape, dtype=model.dtype)) for shape in shapes]


def _verify(model: PreTrainedModel, folder: Path) -> None:
    """Compares both graphs with the checkpoint: a whole text, and the same text in two parts."""
    import onnxruntime

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(str(folder / name), providers=["CPUExecutionProvider"])

    input_ids = fixed_prompt(model.config.vocab_size)
    expected = reference_logits(model, input_ids)
    whole = session(MODEL_NAME).run(["logits"], {"input_ids": input_ids.numpy()})[0]
    report_difference(f"{MODEL_NAME} in ONNX Runtime", whole, expected)
    step, names = session(WITH_PAST_NAME), cache_names("past_key_values", model.config.num_hidden_layers)
    cache = [tensor.numpy() for pair in _empty_past(model, 1, 0) for tensor in pair]
    parts = []
    for chunk in (input_ids[:, :NUM_CACHED], input_ids[:, NUM_CACHED:-1], input_ids[:, -1:]):
        logits, *cache = step.run(None, {"input_ids": chunk.numpy()} | dict(zip(names, cache, strict=True)))
        parts.append(torch.as_tensor(logits))
    report_difference(f"{WITH_PAST_NAME} in ONNX Runtime", torch.cat(parts, dim=1), expected)
