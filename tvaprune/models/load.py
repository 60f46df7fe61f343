"""A checkpoint in: its config, its weights, its tokenizer; whole and without code of its own, or one line of error."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from tvaprune.errors import InputError, out_of_memory, quoted, reason
from tvaprune.models.auto_classes import auto_map
from tvaprune.models.families import FAMILIES, PREFIX, base_type, family_of, row_of
from tvaprune.models.from_gguf import SUFFIX, gguf_config, gguf_file, gguf_header, gguf_model, gguf_tokenizer
from tvaprune.models.placement import check_placed
from tvaprune.models.pruned import bare_model, with_kernel
from tvaprune.models.published import located
from tvaprune.models.shards import Shards, files_of
from tvaprune.models.vetting import (
    CODE_KEYS,
    FLOATS,
    Stored,
    check_config,
    check_folder,
    check_sizes,
    check_stored,
    finite,
    shards,
    stored_in,
)
from tvaprune.models.vocabulary import strays, without_strays

Where = torch.device | Literal["auto"] | None


def load_config(path: str | None) -> Any:
    """Loads the config of a supported checkpoint.

    Raises:
        InputError: If there is none, it is broken, or its family is not supported.
    """
    if path is None:
        raise InputError("--model_name_or_path is missing: give a checkpoint's folder or hub id")
    named, path = f"--model_name_or_path {path}", located(path)
    _check_there(path, named)
    file = gguf_file(path, named)
    check_folder(path if file is None else file.parent, named)
    with _in_one_line(named, file or path):
        if file is None:
            raw, _ = PretrainedConfig.get_config_dict(path)
            check_config(raw, named)
        config = read_config(path) if file is None else gguf_config(file, named)
        family_of(config)
        if config.dtype is None:  # older configs do not say it
            config.dtype = _precision_in(stored_in(shards(path, named)[:1], named))
    return config


def read_config(path: str | Path) -> PretrainedConfig:
    """Reads a config as transformers does, but runs no code, passes none on but ours, leaves attention to us."""
    config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config._attn_implementation = _kernel(config)
    for key in CODE_KEYS:
        config.__dict__.pop(key, None)
    if config.model_type.startswith(PREFIX):
        config.auto_map = auto_map(config.model_type.removeprefix(PREFIX))
    return with_kernel(config) if base_type(config) in FAMILIES else config


def _kernel(config: PretrainedConfig) -> str:
    """Returns the implementation of attention, ours to choose: a config may name one to be fetched from the hub."""
    return row_of(config.model_type).attention_kernel


def load_tokenizer(path: str | Path, vocab_size: int, named: str) -> Any:
    """Loads the tokenizer of a model; runs no code and passes none on.

    Args:
        named: How a message begins: the flag and the folder.

    Raises:
        InputError: If it cannot be read, knows no text, or gives tokens that the model has no embedding for.
    """
    file = gguf_file(str(path), named)
    with _in_one_line(named if file else f"{named}: its tokenizer", file or path):
        if file is None:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        else:
            tokenizer = gguf_tokenizer(file, named)
        if left_out := strays(tokenizer, vocab_size):
            print(f"note: {path}: the model has no embedding for {', '.join(map(quoted, left_out[:3]))}, which stands "
                  "for no text: left out of the tokenizer")  # fmt: skip
            tokenizer = without_strays(tokenizer, vocab_size)
        tokenizer("a", add_special_tokens=False, verbose=False)  # some settings are wrong only in use
        token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if not 0 <= largest < vocab_size:
        told = f"{quoted(token)} is token {largest}" if largest >= 0 else "it is empty"
        raise InputError(
            f"{named}: the tokenizer is not the model's, which has {vocab_size} tokens ({told}); give the tokenizer "
            "that the model was trained with"
        )
    for key in CODE_KEYS:
        tokenizer.init_kwargs.pop(key, None)
    return tokenizer


def read_model(path: str | Path, config: PretrainedConfig, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Reads weights as transformers does, but runs no code; tied is what shares storage, and the config says so.

    Returns:
        The model in evaluation mode, and transformers' account of what it found.
    """
    found: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        attn_implementation=_kernel(config),
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    model, loaded = found
    _settle_tie(path, model)
    for key in CODE_KEYS:
        model.generation_config.__dict__.pop(key, None)
    return model.eval(), loaded


def load_model(
    path: str | None, dtype: str, device: torch.device, place: Where = None, trains: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Loads a supported checkpoint and its tokenizer.

    Args:
        device: What computes with it.
        place: Where the weights are put, if not there; auto: over all GPUs, layer by layer.
        trains: Whether gradients will flow through it.

    Raises:
        InputError: If there is no such checkpoint, its weights are not its config's, its tokenizer is not its own, or
            its family is not supported.
    """
    config = load_config(path)
    is_known = dtype != "auto" or device.type != "cuda" or config.dtype is not None
    torch_dtype = precision(dtype, device, config.dtype, trains) if is_known else "auto"  # as the first weight is
    named = f"--model_name_or_path {path}"
    tokenizer = load_tokenizer(config.name_or_path, config.vocab_size, named)
    if place == "auto":
        if gguf_file(str(config.name_or_path), named) is not None:
            raise InputError(f"--device_map auto: reads no GGUF file; give {path} as a Hugging Face folder")
        model = load_whole(config.name_or_path, config, named, dtype=torch_dtype, device_map="auto")
        check_placed(model, named)
        return model, tokenizer
    return load_whole(config.name_or_path, config, named, dtype=torch_dtype).to(place or device), tokenizer


def precision(dtype: str, device: torch.device, stored: torch.dtype | None, trains: bool = False) -> torch.dtype:
    """Returns what weights are loaded in: ``--dtype``, whose ``auto`` is as stored on a GPU, and float32 on a CPU.

    In float16, without scaling the loss, a third of the gradients of a 7B model's gates are 0: what is trained is in
    bfloat16 where the GPU has it, else in float32. Without a GPU, for an estimate, it is taken to have it.
    """
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type != "cuda" or stored is None:
        return torch.float32
    if trains and stored == torch.float16:
        has = not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has else torch.float32
    return stored


def load_whole(path: str | Path, config: PretrainedConfig, named: str, **options: Any) -> Any:
    """Loads weights that are exactly those of a config: no tensor missing, none unknown, each of its size.

    Raises:
        InputError: Naming the first tensor that is not.
    """
    file = gguf_file(str(path), named)
    with _in_one_line(named, file or path):
        if file is None:
            check_stored(path, _sizes_of(config), named)
            _generation_config(path, named)
            model, loaded = read_model(path, config, **options)
        else:
            model, loaded = gguf_model(file, config, named, attn_implementation=_kernel(config), **options)
            stored, precision = gguf_header(file).precision, str(model.dtype).removeprefix("torch.")
            print(f"note: {file}: {stored} weights, dequantised to {precision}")
    _check_whole(named, loaded)
    check_finite(model, named)
    return model.eval()


def open_model(
    path: str | None, dtype: str, device: torch.device, trains: bool = False
) -> tuple[PreTrainedModel, Any, Shards]:
    """Opens a checkpoint as `load_model` loads it, and leaves its weights on disk.

    Returns:
        The model on the meta device, its tokenizer, and where its weights are read.

    Raises:
        InputError: As `load_model`; that a weight holds NaN shows when it is read.
    """
    config, named = load_config(path), f"--model_name_or_path {path}"
    path = config.name_or_path
    if gguf_file(path, named) is not None:
        raise InputError(f"{named}: a GGUF file is dequantised whole, and --stream True reads safetensors alone; leave "
                         "--stream out, or give the checkpoint that it was made of")  # fmt: skip
    if FAMILIES[base_type(config)].experts is not None:
        raise InputError(f"{named}: --stream True reads no mixture of experts, whose tensors transformers joins on "
                         "loading; leave --stream out")  # fmt: skip
    tokenizer = load_tokenizer(path, config.vocab_size, named)
    with _in_one_line(named, path):
        stored = stored_in(files_of(path, named), named)
        check_sizes(stored, _sizes_of(config), named)
        read_as = precision(dtype, device, config.dtype or _precision_in(stored), trains)
        model = bare_model(config, read_as, _kernel(config), device)
        found = Shards(model, stored, read_as, named)
        if not found.tied():
            _take_tie(path, config, False)
            model = bare_model(config, read_as, _kernel(config), device)
            found = Shards(model, stored, read_as, named)
        model.generation_config = _generation_config(path, named) or model.generation_config
    for key in CODE_KEYS:
        model.generation_config.__dict__.pop(key, None)
    _check_whole(named, {"missing_keys": found.missing, "unexpected_keys": found.unknown})
    return model, tokenizer, found


def _generation_config(path: str | Path, named: str) -> GenerationConfig | None:
    """Returns how a checkpoint generates; None: it does not say so.

    Raises:
        InputError: If transformers refuses what it says.
    """
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(path)
    except OSError:
        return None
    except Exception as error:  # whatever values of a wrong kind raise
        raise InputError(
            f"{named}: generation_config.json cannot be used ({reason(error)}); mend it, or move it away"
        ) from error
    return found


def _precision_in(stored: dict[str, Stored]) -> torch.dtype | None:
    """Returns the precision of the first weight that files hold, as transformers takes it; None: they hold none."""
    return next((FLOATS[entry.dtype] for entry in stored.values() if entry.dtype in FLOATS), None)


def check_finite(model: nn.Module, named: str) -> None:
    """Refuses a model that holds NaN or infinity: whatever is cut of it or measured would hold them too.

    Raises:
        InputError: Naming the first tensor that does.
    """
    for name, tensor in model.state_dict().items():
        finite(name, tensor, named)


def _sizes_of(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the tensors that a config builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _settle_tie(path: str | Path, model: Any) -> None:
    """Makes the config say what is true: transformers leaves a head untied that differs from the embedding in the file.

    Whatever counts, cuts or saves asks the config.
    """
    _take_tie(path, model.config, model.get_output_embeddings().weight is model.get_input_embeddings().weight)


def _take_tie(path: str | Path, config: PretrainedConfig, tied: bool) -> None:
    if bool(config.tie_word_embeddings) != tied:
        print(
            f"note: {path}: config.json says tie_word_embeddings {str(not tied).lower()}, but the file's lm_head "
            f"{'is' if tied else 'is not'} the embedding: taken as {'tied' if tied else 'untied'}"
        )
        config.tie_word_embeddings = tied


def _check_whole(named: str, loaded: dict[str, Any]) -> None:
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
        f"{named}: the weights are not those of its config ({'; '.join(parts)}); give a whole, "
        "unquantised checkpoint of a causal language model"
    )


def _check_there(path: str, named: str) -> None:
    """Refuses a file that is no GGUF, and what is no path here and no name that the hub could have.

    Of a file transformers would take the config, and miss the rest on the hub, which would tell of the name alone.
    """
    if Path(path).is_file() and Path(path).suffix != SUFFIX:
        raise InputError(f"{named}: is a file; give the folder that it is in")
    if Path(path).exists():
        return
    try:
        validate_repo_id(path)
        is_hubs = not path.endswith(SUFFIX)
    except HFValidationError:
        is_hubs = False
    if not is_hubs:
        raise InputError(f"{named}: is not there, nor a hub id; give {_needed(Path(path))}")


@contextmanager
def _in_one_line(named: str, path: str | Path) -> Iterator[None]:
    """Turns whatever a library raises over a broken file into one line: some of it is no `Exception`, but a panic."""
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if out_of_memory(error) is not None:
            raise
        raise InputError(f"{named}: cannot be loaded ({reason(error)}); give {_needed(Path(path))}") from error


def _needed(folder: Path) -> str:
    if folder.suffix == SUFFIX:
        return "a whole GGUF file of an architecture and of number types that transformers reads, or a folder"
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        if importlib.util.find_spec("sentencepiece") is None:
            return "its tokenizer.json too, or install what reads tokenizer.model: pip install sentencepiece protobuf"
    return "a folder with config.json, safetensors weights and a tokenizer, or a hub id that is cached or reachable"
