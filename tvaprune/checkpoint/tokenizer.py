"""A tokenizer's files beside a model, in words that transformers 4 knows too."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from tvaprune.files import read_json, write_json
from tvaprune.models.vetting import drop_code

TOKENIZER_CONFIG = "tokenizer_config.json"
_CLASS, _NAMES = "tokenizer_class", {"TokenizersBackend": "PreTrainedTokenizerFast"}  # both mean the same in 5
_SPECIAL, _SPECIAL_OF_4 = "extra_special_tokens", "additional_special_tokens"
_LEGACY = "legacy"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a tokenizer, without what would run as code.

    transformers 5 has other names for the class of most and for a list of special tokens, at which 4.57 ends. A Llama's
    tokenizer it opens anew as one that puts no space behind a special token, whichever it saved.
    """
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    drop_code(path)
    content = read_json(path)
    if content.get(_CLASS) in _NAMES:
        content[_CLASS] = _NAMES[content[_CLASS]]
    if isinstance(content.get(_SPECIAL), list):
        content[_SPECIAL_OF_4] = content.pop(_SPECIAL)
    if hasattr(tokenizer, _LEGACY):
        content[_LEGACY] = getattr(tokenizer, _LEGACY)
    write_json(content, path)
