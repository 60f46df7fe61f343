"""What models add to the same prompts, greedily: where their predictions part, which no figure shows."""

from typing import Any

import torch

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


def continuation(model: Any, tokenizer: Any, prompt: str, tokens: int, chat: bool = False) -> list[int]:
    """Returns what a model adds to a prompt, greedily; as an answer, by the tokenizer's chat template, if asked."""
    if chat:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer(prompt).input_ids
    inputs = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        found = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=tokens, do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
    return [int(token) for token in found[0, inputs.shape[1] :]]


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Returns the text that each token adds to those before it; together they are the text of all."""
    texts = [str(tokenizer.decode(ids[:count], skip_special_tokens=True)) for count in range(len(ids) + 1)]
    # A character may need several tokens: until the last of them its place is taken by a sign that is no part of it.
    whole = [text.rstrip("\ufffd") for text in texts[:-1]] + texts[-1:]
    return [after[len(before) :] for before, after in zip(whole, whole[1:], strict=False)]
