"""What models add to the same prompts, greedily: where their predictions part, which no figure shows."""

from collections.abc import Sequence
from typing import Any

import torch

from tvaprune.models.modes import in_mode

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "Once upon a time, a small robot",
    "The three most important rules of cooking are",
    "Return the number of",
    "To read a file in Python, open it with",
    "A list differs from a tuple in that",
    "The following example shows how to",
)
TOKENS = 32  # that a model adds to a prompt, at most
Answers = list[list[str]]  # a model's, for each prompt: the pieces of text, one for a token


def answers(model: Any, tokenizer: Any, tokens: int = TOKENS, chat: bool = False) -> Answers:
    """Returns what a model adds to the `PROMPTS`, greedily, as `pieces`.

    Args:
        tokens: Added at most.
        chat: Whether it is asked by the tokenizer's chat template, in place of continuing the text.
    """
    given = [_ids(tokenizer, prompt, chat) for prompt in PROMPTS]
    return [pieces(tokenizer, ids) for ids in continuations(model, given, tokens, tokenizer.eos_token_id)]


def _ids(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        return list(tokenizer(prompt).input_ids)
    turns = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def continuations(model: Any, prompts: Sequence[list[int]], tokens: int, end: int | None) -> list[list[int]]:
    """Returns the ids that a model adds to prompts of any lengths, greedily: all in one batch, filled up on the left.

    Args:
        tokens: Added at most; fewer where the model ends its text, which the last of them then says.
        end: The id that fills up what is shorter; None: the model's own, or none, if it ends no text.
    """
    longest, device = max(map(len, prompts)), next(model.parameters()).device
    empty = [longest - len(ids) for ids in prompts]
    inputs = torch.tensor([[0] * gap + ids for gap, ids in zip(empty, prompts, strict=True)], device=device)
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in empty], device=device)
    with in_mode(False, model), torch.inference_mode():
        found = model.generate(  # settings that came with the checkpoint make no other choice of it
            inputs, attention_mask=mask, max_new_tokens=tokens, do_sample=False, num_beams=1, repetition_penalty=1.0,
            no_repeat_ngram_size=0, use_cache=True, pad_token_id=end,
        )  # fmt: skip
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    return [_until(row, stops) for row in found[:, longest:].tolist()]


def _until(ids: list[int], stops: set[int | None]) -> list[int]:
    """Returns ids up to the first that ends the text, with it."""
    return ids[: next((place for place, one in enumerate(ids, 1) if one in stops), len(ids))]


def in_a_line(text: str) -> str:
    """Returns a text on one line, its line ends shown: a small model may say little else."""
    return text.replace("\n", " ⏎ ")


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Returns the text that each token adds to those before it; together they are the text of all."""
    texts = [str(tokenizer.decode(ids[:count], skip_special_tokens=True)) for count in range(len(ids) + 1)]
    # A character may need several tokens: until the last of them its place is taken by a sign that is no part of it.
    whole = [text.rstrip("\ufffd") for text in texts[:-1]] + texts[-1:]
    return [after[len(before) :] for before, after in zip(whole, whole[1:], strict=False)]
