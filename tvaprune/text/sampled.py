"""Text that a model writes itself, to learn masks and updates from where no text of its own training is at hand.

A page is an opening of a token or a few, and what the model adds to it, drawn at a temperature:

- a *document* opens with a word drawn from the vocabulary: without one a model begins its pages all alike
  (Liu et al. 2023, LLM-QAT, arXiv:2305.17888);
- a *conversation*, where the tokenizer has a chat template, opens with what stands before a user's words, so that the
  model asks and answers (Xu et al. 2024, Magpie, arXiv:2406.08464).

Pages go on over the ends of texts: each has as many tokens as it is asked for.
"""

from functools import lru_cache

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from tvaprune.errors import InputError, reason

KINDS = ("document", "conversation")
_MARK = "user's words"
_WORD_STARTS = ("Ġ", "▁")  # how byte-level and SentencePiece vocabularies write the space before a word
_LETTERS = 3  # of a word, at least
_ROWS = 16  # pages whose next tokens are drawn at once: what a large vocabulary takes stays in a CPU's cache


def kinds_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Returns the kinds of pages that a model can open: conversations where its tokenizer knows how they begin.

    Raises:
        InputError: If the tokenizer's chat template cannot be used.
    """
    return KINDS if getattr(tokenizer, "chat_template", None) and _before_a_user(tokenizer) else KINDS[:1]


def longest_page(config: PretrainedConfig) -> int:
    """Returns how many tokens a page may have: what the model was trained on.

    Past that a rotary embedding of long texts (Phi-3's) turns all tokens otherwise, those that a cache holds too.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    longest: int = config.max_position_embeddings
    return min(longest, rope.get("original_max_position_embeddings") or longest)


def check_page(tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Refuses pages that one of the kinds fills with its opening alone, before any page of another kind is written.

    Raises:
        InputError: Naming the kind, and how many tokens would do.
    """
    for kind in kinds_of(tokenizer):
        opening = openings(tokenizer, kind, 1, np.random.default_rng(0)).shape[1]
        if opening >= tokens:
            raise InputError(f"--page {tokens}: a {kind} opens with {opening} tokens; give {opening + 1} or more")


@lru_cache(maxsize=1)
def words_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that begin a word of letters; of a vocabulary that marks none, all but the special ones."""
    vocabulary = {place: token for token, place in tokenizer.get_vocab().items()}
    begun = [place for place, token in sorted(vocabulary.items()) if token[:1] in _WORD_STARTS]
    words = [place for place in begun if _is_word(str(tokenizer.decode([place])).strip())]
    return words or sorted(set(vocabulary) - set(tokenizer.all_special_ids))


def _is_word(text: str) -> bool:
    return text.isalpha() and len(text) >= _LETTERS


def openings(tokenizer: PreTrainedTokenizerBase, kind: str, count: int, generator: np.random.Generator) -> torch.Tensor:
    """Returns the tokens that pages open with, shape ``(count, tokens)``.

    Args:
        kind: Of `KINDS`.
        generator: Draws the words.
    """
    if kind == "conversation":
        before = tokenizer(_before_a_user(tokenizer), add_special_tokens=False)["input_ids"]
        return torch.tensor([before]).repeat(count, 1)
    words = generator.choice(words_of(tokenizer), size=count)
    return torch.tensor([[*_start(tokenizer), word] for word in words.tolist()])


def _before_a_user(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what a chat template puts before the words of a user."""
    try:
        said = str(tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False))
    except Exception as error:  # a template is a program of the checkpoint's
        raise InputError(
            f"the tokenizer's chat template cannot be used ({reason(error)}); mend it, or take it away: then all pages "
            "are documents"
        ) from error
    return said.partition(_MARK)[0]


def _start(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token that the tokenizer puts before every text; nothing where it puts none."""
    return list(tokenizer("")["input_ids"][:1])


def pages(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    count: int,
    tokens: int,
    temperature: float,
    seed: tuple[int, ...],
) -> list[str]:
    """Returns pages that a model writes, all in one batch.

    Args:
        kind: Of `KINDS`.
        tokens: Of a page, opening and all; `check_page` says whether there is room.
        temperature: That the predictions are divided by: 1 draws as the model predicts, less keeps to the likely.
        seed: Settles the openings and the draws, with the device.
    """
    generator = np.random.default_rng(seed)
    given = openings(tokenizer, kind, count, generator).to(model.device)
    torch.manual_seed(int(generator.integers(2**63)))
    found = _drawn(model, given, tokens, temperature)
    start = _start(tokenizer)  # blocks of text get one of their own, where the model needs it
    return [str(tokenizer.decode(row[len(start) :] if row[: len(start)] == start else row)) for row in found.tolist()]


@torch.inference_mode()
def _drawn(model: PreTrainedModel, ids: torch.Tensor, tokens: int, temperature: float) -> torch.Tensor:
    """Returns openings, shape ``(pages, opening)``, drawn on to so many tokens.

    Not by transformers' ``generate``, which takes what it is not told from the checkpoint: what ends a text, penalties.
    """
    found, cache, last = [ids], None, ids
    for _ in range(tokens - ids.shape[1]):
        answer = model(last, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = answer.past_key_values
        last = torch.cat([_draw(rows, temperature) for rows in answer.logits[:, -1].split(_ROWS)])
        found.append(last)
    return torch.cat(found, dim=1)


def _draw(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Returns a token for each row of logits, shape ``(rows, 1)``: where a number below 1 falls among their shares."""
    scores = logits.float() / temperature
    if not bool(scores.isfinite().all()):
        raise InputError(
            "the model's logits are no finite numbers: its weights are damaged, float16 overflows, or --temperature is "
            "next to 0; mend the checkpoint, or give --dtype float32"
        )
    shares = scores.softmax(-1).cumsum(-1)
    drawn = torch.rand(len(logits), 1, device=logits.device) * shares[:, -1:]
    return torch.searchsorted(shares, drawn, right=True).clamp(max=shares.shape[1] - 1)
