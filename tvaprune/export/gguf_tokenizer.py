"""The tokenizer of a checkpoint as GGUF fields: byte-level BPE as ``gpt2``, SentencePiece as ``llama``.

A GGUF file carries no regular expressions: llama.cpp knows each way of splitting text by a name, and one that it has
no name for is refused here rather than guessed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvaprune.checkpoint.tokenizer import TOKENIZER_CONFIG
from tvaprune.errors import InputError, quoted
from tvaprune.files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types
LOWEST_SCORE = -1e6  # of a SentencePiece token that no merge makes
_LLAMA3 = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
SPLITS = {_CONTRACTIONS + _LLAMA3: "llama-bpe", _CONTRACTIONS + _QWEN2: "qwen2"}


def tokenizer_fields(folder: Path, config: Any) -> dict[str, Any]:
    """Returns the ``tokenizer.*`` fields; without a tokenizer llama.cpp is told that there is none.

    Raises:
        InputError: If llama.cpp has no tokenizer that splits and merges the same way.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        if (folder / TOKENIZER_CONFIG).is_file():
            raise InputError(
                f"--format gguf: the tokenizer of {folder} is not in a tokenizer.json, all that is read here: save "
                "it there as a fast tokenizer, or move its files away for a GGUF file that takes no text"
            )
        print(f"note: {folder} has no tokenizer: the GGUF file will take tokens, and no text")
        return {"tokenizer.ggml.model": "no_vocab"}
    content = read_json(path)
    model = content["model"]
    if model.get("type") != "BPE":
        raise InputError(f"--format gguf: a tokenizer of type {model.get('type')} is not supported, only BPE")
    fields = _sentencepiece(content) if model.get("byte_fallback") else _byte_level(content)
    fields |= _tokens(content, config.vocab_size) | _special_tokens(folder, content, config)
    if model.get("byte_fallback"):
        fields["tokenizer.ggml.scores"] = _scores(model, fields["tokenizer.ggml.tokens"])
    return fields


def _check_normalizer(content: Mapping[str, Any], known: Mapping[str, Mapping[str, object]]) -> None:
    """Refuses what a tokenizer changes in a text before it splits it, and llama.cpp does not.

    Args:
        known: The steps that it does too, by their type: what each must say.
    """
    normalizer = content.get("normalizer") or {"type": "Sequence", "normalizers": []}
    for step in normalizer.get("normalizers", [normalizer]):
        said = known.get(step.get("type"))
        if said is None or any(step.get(name) != value for name, value in said.items()):
            raise InputError(
                f"--format gguf: the tokenizer changes a text by {quoted(step.get('type'))} before it splits it, which "
                "llama.cpp does not: use the checkpoint itself, or another format"
            )


def _byte_level(content: dict[str, Any]) -> dict[str, Any]:
    _check_normalizer(content, {"NFC": {}})  # of Qwen's, whose texts are in that form nearly always
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _split_name(content.get("pre_tokenizer") or {}),
        "tokenizer.ggml.merges": merges,
    }


def _split_name(pre_tokenizer: dict[str, Any]) -> str:
    """Returns llama.cpp's name of a pre-tokenizer: GPT-2's own split, SmolLM's, or the pattern of Llama-3 or Qwen2."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    bytes_last = bool(steps) and steps[-1].get("type") == "ByteLevel"
    if bytes_last and steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space"):
        if len(steps) == 1:
            return "gpt-2"
        if len(steps) == 2 and steps[0].get("type") == "Digits" and steps[0].get("individual_digits"):
            return "smollm"
    plain = bytes_last and not (steps[-1].get("use_regex", True) or steps[-1].get("add_prefix_space"))
    if plain and len(steps) == 2 and steps[0].get("type") == "Split" and steps[0].get("behavior") == "Isolated":
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name:
            return name
    raise InputError(
        "--format gguf: llama.cpp has no name for this tokenizer's way to split text; supported are those of GPT-2, "
        "SmolLM, Llama-3, Qwen2 and SentencePiece"
    )


def _sentencepiece(content: Mapping[str, object]) -> dict[str, Any]:
    """Returns SentencePiece's fields; a prefix space is there where the normalizer prepends one."""
    _check_normalizer(content, {"Prepend": {"prepend": "▁"}, "Replace": {"pattern": {"String": " "}, "content": "▁"}})
    described = json.dumps([content.get("normalizer"), content.get("pre_tokenizer")])
    prefix = '"Prepend"' in described or '"prepend_scheme": "first"' in described or '"always"' in described
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": prefix}


def _tokens(content: dict[str, Any], vocab_size: int) -> dict[str, object]:
    """Returns the tokens by id and their types; ids that the embedding has and the tokenizer lacks are unused."""
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    added_ids = {added["content"]: added["id"] for added in content.get("added_tokens", [])}
    for token, index in (content["model"]["vocab"] | added_ids).items():
        if not 0 <= index < vocab_size:
            raise InputError(
                f"--format gguf: {quoted(token)} in tokenizer.json is token {index}, the model has {vocab_size}: give "
                "the tokenizer that the model was trained with"
            )
    for token, index in content["model"]["vocab"].items():
        is_byte = content["model"].get("byte_fallback") and len(token) == 6 and token.startswith("<0x")
        tokens[index], types[index] = token, BYTE if is_byte else NORMAL
    for added in content.get("added_tokens", []):
        index = added["id"]
        tokens[index], types[index] = added["content"], CONTROL if added["special"] else USER_DEFINED
    unknown = content["model"].get("unk_token")
    if unknown in content["model"]["vocab"]:
        types[content["model"]["vocab"][unknown]] = UNKNOWN
    return {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Returns scores that merge in the order of the merges: llama.cpp joins the pair whose token scores highest.

    It joins any two pieces whose union is a token, so every such pair must be a merge.
    """
    ranks: dict[str, int] = {}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    pairs = {(token[:cut], token[cut:]) for token in ranks for cut in range(1, len(token))} - set(merges)
    if any(left in model["vocab"] and right in model["vocab"] for left, right in pairs):
        raise InputError(
            "--format gguf: the tokenizer joins other pieces than SentencePiece does, by whose rule llama.cpp would "
            "read it; supported are byte-level BPE and tokenizers that were converted from SentencePiece"
        )
    return [-float(ranks[token]) if token in ranks else LOWEST_SCORE for token in tokens]


def _special_tokens(folder: Path, content: dict[str, Any], config: Any) -> dict[str, object]:
    """Returns the ids of the special tokens, and whether texts begin or end with one."""
    path = folder / TOKENIZER_CONFIG
    settings = read_json(path) if path.is_file() else {}
    ids = dict(content["model"]["vocab"]) | {added["content"]: added["id"] for added in content.get("added_tokens", [])}
    fields: dict[str, Any] = {}
    for short, name in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = ids.get(_named(settings, short), getattr(config, f"{short}_token_id", None))
        if isinstance(index, int):
            fields[f"tokenizer.ggml.{name}_token_id"] = index
    for short in ("bos", "eos"):
        fields[f"tokenizer.ggml.add_{short}_token"] = _is_added(settings, content, short)
    template = folder / "chat_template.jinja"
    chat = template.read_text(encoding="utf-8") if template.is_file() else settings.get("chat_template")
    if isinstance(chat, str):
        fields["tokenizer.chat_template"] = chat
    return fields


def _named(settings: Mapping[str, Any], short: str) -> Any:
    """Returns a special token of the settings, which hold it as a text or with how it is found in one."""
    token = settings.get(f"{short}_token")
    return token.get("content") if isinstance(token, dict) else token


def _is_added(settings: Mapping[str, object], content: dict[str, Any], short: str) -> bool:
    """Tells whether the tokenizer itself puts the token around a text, by its template.

    Of the flags ``add_bos_token`` and ``add_eos_token`` transformers reads none beside a tokenizer.json.
    """
    token, processor = _named(settings, short), content.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    pieces = [piece for step in steps for piece in step.get("single", []) if isinstance(piece, dict)]
    return token is not None and any(piece.get("SpecialToken", {}).get("id") == token for piece in pieces)
