"""A tokenizer within the vocabulary of a model: what it was given on top and the model has no embedding for goes."""

import json
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")  # of tokens that come up without a text naming them


def without_strays(tokenizer: Any, vocab_size: int) -> Any:
    """Returns a tokenizer without the added tokens that lie behind the vocabulary.

    transformers adds GPT-2's own special tokens behind a GGUF file's.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    added = content["added_tokens"]
    content["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    if len(content["added_tokens"]) == len(added):
        return tokenizer
    others = {token["content"] for token in added} - {token["content"] for token in content["added_tokens"]}
    special = {role: token for role, token in tokenizer.special_tokens_map.items() if token not in others}
    more = [token for token in tokenizer.extra_special_tokens if token not in others]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), chat_template=tokenizer.chat_template,
        padding_side=tokenizer.padding_side, model_max_length=tokenizer.model_max_length,
        extra_special_tokens=more, **special,
    )  # fmt: skip


def strays(tokenizer: Any, vocab_size: int) -> list[str]:
    """Returns the special tokens behind a model's vocabulary that stand for what is no text, where all there are such.

    Every Gemma 3 comes with the tokenizer of those that see: behind the embedding of the small ones is a place for
    images.
    """
    behind = [token for token, index in tokenizer.get_vocab().items() if index >= vocab_size]
    added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
    roles = {str(getattr(tokenizer, role, None)) for role in _ROLES}
    is_placed = tokenizer.is_fast and all(added.get(token, False) and token not in roles for token in behind)
    return behind if is_placed else []
