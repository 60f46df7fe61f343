"""A GGUF file in: transformers' own reader dequantises it; what it would leave out or misread in silence is refused.

transformers reads the sizes, the weights and the vocabulary. It leaves out tensors that it has no name for, rotary
embeddings that are scaled or of a part of the head, and ways to split text that it does not know: a model that is not
the file's. And what it returns calls itself quantised, which neither trains nor saves.
"""

import copy
import importlib.util
import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from tvaprune.errors import InputError, quoted
from tvaprune.models.families import row_of
from tvaprune.models.formats import LARGEST_GEMMA
from tvaprune.models.pruned import empty_model
from tvaprune.models.vetting import FLOATS, check_config
from tvaprune.models.vocabulary import without_strays

SUFFIX = ".gguf"
_OTHER_WEIGHTS = ("*.safetensors", "*.bin")
# How llama.cpp splits text before byte-level BPE, by its names: those that transformers knows for our families, those
# that are GPT-2's own split, which is its default, and those that we add.
_SPLITS = ("llama3", "llama-v3", "llama-bpe", "smaug-bpe", "dbrx", "falcon3", "tekken", "qwen2", "deepseek-r1-qwen")
_GPT2 = ("gpt-2",)
_DIGITS_FIRST = ("smollm",)
_WIDTHS = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")


@dataclass(frozen=True)
class GgufHeader:
    """What a file says of itself.

    Attributes:
        types: Names of the types of its numbers -> tensors that have it.
        elements: Numbers in all its tensors.
        head_dim: Width of a head; None: the file does not say.
        sliding_window: Tokens that its attention looks back; 0: all.
        rotary: The entry or the tensor that scales its rotary embedding or leaves a part of the head out; None: none.
        tokenizer: llama.cpp's name of the kind of its tokenizer.
        split: llama.cpp's name of how it splits text.
        by_layer: Whether its layers have widths of their own.
        files: That it is split into; 1: it is whole.
    """

    types: dict[str, int]
    elements: int
    head_dim: int | None
    sliding_window: int
    rotary: str | None
    tokenizer: str
    split: str
    by_layer: bool
    files: int

    @property
    def dtype(self) -> torch.dtype:
        """The precision to store its weights in: of plain numbers their own, of quantised ones bfloat16."""
        plain = [FLOATS[name] for name in self.types if name in FLOATS]
        if len(plain) < len(self.types):
            return torch.bfloat16
        return min(plain, key=lambda dtype: dtype.itemsize)  # norms are F32 beside half matrices

    @property
    def precision(self) -> str:
        """The type of most of its matrices, for reports."""
        matrices = {name: count for name, count in self.types.items() if name != "F32"} or self.types
        return max(matrices, key=lambda name: matrices[name])


def gguf_file(path: str, named: str) -> Path | None:
    """Returns the GGUF file that a path means: itself, or the one of a folder that holds no other weights.

    Args:
        named: How a message begins, here and below: the flag and the path.

    Raises:
        InputError: If the folder holds several, or the package that reads them is missing.
    """
    place = Path(path)
    found = [place] if place.suffix == SUFFIX and place.is_file() else []
    if place.is_dir() and not any(next(place.glob(pattern), None) for pattern in _OTHER_WEIGHTS):
        found = sorted(place.glob(f"*{SUFFIX}"))
    if len(found) > 1:
        names = ", ".join(quoted(file.name) for file in found[:3])
        raise InputError(f"{named}: holds {len(found)} GGUF files ({names}); name a whole one, as FOLDER/FILE.gguf, or "
                         "join the parts of one with `llama-gguf-split --merge`")  # fmt: skip
    if found:
        require_gguf(named)
    return found[0] if found else None


def require_gguf(named: str) -> None:
    """Raises `InputError` if the package that reads the files is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{named}: reading a GGUF file needs gguf: pip install 'tvaprune[gguf]'")


def gguf_config(file: Path, named: str) -> PretrainedConfig:
    """Returns the config that a file's fields make; its precision is the one to store the weights in."""
    return copy.deepcopy(_config(file, named, _stamp(file)))


def gguf_header(file: Path) -> GgufHeader:
    """Returns what a file says of itself."""
    return _header(file, _stamp(file))


def gguf_tokenizer(file: Path, named: str) -> Any:
    """Returns the tokenizer of a file, which splits text as llama.cpp does.

    Raises:
        InputError: If its way to split text is not known here.
    """
    header = gguf_header(file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    if header.tokenizer == "gpt2" and header.split in _DIGITS_FIRST:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif header.tokenizer == "gpt2" and header.split not in (*_SPLITS, *_GPT2):
        known = ", ".join((*_SPLITS, *_GPT2, *_DIGITS_FIRST))
        raise InputError(
            f"{named}: splits text in a way that is not known here ({quoted(header.split)}; known are {known}): give "
            "the model as a Hugging Face folder"
        )
    config = gguf_config(file, named)
    tokenizer = without_strays(tokenizer, config.vocab_size)
    tokenizer.model_max_length = config.max_position_embeddings
    return tokenizer


def gguf_model(
    file: Path, config: PretrainedConfig, named: str, dtype: torch.dtype | str = "auto", **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns a plain model of a file's weights, dequantised, and transformers' account of what it found.

    Raises:
        InputError: If the file holds what transformers leaves out.
    """
    header = gguf_header(file)
    if isinstance(dtype, str):
        dtype = header.dtype if dtype == "auto" else getattr(torch, dtype)
    if header.rotary is not None:
        raise InputError(
            f"{named}: its rotary embedding is scaled or of a part of the head ({header.rotary}), which transformers "
            "does not read from GGUF: give the model as a Hugging Face folder"
        )
    found: Any = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, config=copy.deepcopy(config), dtype=dtype, output_loading_info=True,
        trust_remote_code=False, **options,
    )  # fmt: skip
    read, loaded = found
    model = empty_model(config, read)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    number = sum(parameter.numel() for parameter in model.parameters())
    if number != header.elements:
        raise InputError(
            f"{named}: holds {header.elements:,} numbers, and a {config.model_type} of its sizes has {number:,}: "
            "transformers leaves out what it has no name for; give the model as a Hugging Face folder"
        )
    return model, loaded


def _stamp(file: Path) -> tuple[int, int]:
    """Returns what tells whether a file is still the one that was read: a vocabulary takes seconds each time."""
    status = file.stat()
    return status.st_mtime_ns, status.st_size


@lru_cache(maxsize=4)
def _config(file: Path, named: str, stamp: tuple[int, int]) -> PretrainedConfig:
    raw, _ = PretrainedConfig.get_config_dict(file.parent, gguf_file=file.name)
    if row_of(raw.get("model_type")).experts is not None:
        raise InputError(
            f"{named}: a mixture of experts is not read from GGUF: give the model as a Hugging Face folder"
        )
    header = gguf_header(file)
    if header.files > 1:
        raise InputError(
            f"{named}: is one of {header.files} files of a model; join them with `llama-gguf-split --merge` and give "
            "the whole one"
        )
    if header.by_layer:
        raise InputError(
            f"{named}: its layers have widths of their own, which llama.cpp reads and transformers does not: give the "
            "folder that it was made of"
        )
    check_config(raw, named)
    raw.pop("_model_name_or_path", None)  # a title, which a saved config would name as a path
    if header.head_dim is not None:  # transformers reads these for some architectures only
        raw["head_dim"] = header.head_dim
    if header.sliding_window:
        raw["sliding_window"] = header.sliding_window
    if raw["model_type"] in LARGEST_GEMMA:  # no file says it: llama.cpp knows it by the number of layers
        is_largest = raw["num_hidden_layers"] == LARGEST_GEMMA[raw["model_type"]]
        width = raw["hidden_size"] // raw["num_attention_heads"]
        raw["query_pre_attn_scalar"] = width if is_largest else header.head_dim or width
    config: PretrainedConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(raw)
    config.dtype = header.dtype
    config.name_or_path = str(file)
    return config


@lru_cache(maxsize=4)
def _header(file: Path, stamp: tuple[int, int]) -> GgufHeader:
    import gguf

    reader = gguf.GGUFReader(file)

    def entry(name: str, otherwise: Any) -> Any:
        field = reader.fields.get(name)
        return otherwise if field is None else field.contents()

    scalings = {name: field.contents() for name, field in reader.fields.items() if ".rope.scal" in name}
    unscaled = ("none", 1.0, 0.0, 0)
    told = (".finetuned", ".original_context_length")  # where it began: they scale nothing
    rotary = [name for name, value in scalings.items() if value not in unscaled and not name.endswith(told)]
    rotary += [factors.name for factors in reader.tensors if _is_rope(factors) and (factors.data != 1.0).any()]
    of = entry("general.architecture", "")
    head_dim, turned = entry(f"{of}.attention.key_length", None), entry(f"{of}.rope.dimension_count", None)
    if turned is not None:
        width = head_dim or entry(f"{of}.embedding_length", 0) // entry(f"{of}.attention.head_count", 1)
        rotary += [f"{of}.rope.dimension_count"] if turned != width else []
    weights = [tensor for tensor in reader.tensors if not _is_rope(tensor)]
    return GgufHeader(
        types=dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        elements=sum(math.prod(map(int, tensor.shape)) for tensor in weights),
        head_dim=head_dim,
        sliding_window=entry(f"{of}.attention.sliding_window", 0),
        rotary=next(iter(rotary), None),
        tokenizer=str(entry("tokenizer.ggml.model", "")),
        split=str(entry("tokenizer.ggml.pre", "default")),
        files=max(1, int(entry("split.count", 1))),
        by_layer=any(isinstance(entry(f"{of}.{width}", None), list) for width in _WIDTHS),
    )


def _is_rope(tensor: Any) -> bool:
    """Tells whether a tensor holds what the frequencies of the rotary embedding are divided by."""
    return bool(tensor.name.startswith(("rope_freqs", "rope_factors")))
