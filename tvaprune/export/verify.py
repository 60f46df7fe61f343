"""What every exporter shares: the fixed prompt and its logits, how far off they are, and odd widths."""

import importlib.util

import torch
from transformers import PretrainedConfig, PreTrainedModel

from tvaprune.errors import InputError
from tvaprune.models.shape import shape_of

PROMPT_LENGTH = 12
NUM_CACHED = 5  # tokens of the prompt that a check with a cache reads first
TOLERANCE = 1e-2  # of logits, relative to their largest: above it float32 weights were not written as they are


def require(format_name: str, *packages: str) -> None:
    """Raises `InputError` if a package of an extra is not installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format {format_name} needs {', '.join(missing)}: pip install 'tvaprune[{format_name}]'")


def fixed_prompt(vocab_size: int) -> torch.Tensor:
    """Returns the same tokens at each call, spread over the vocabulary; shape ``(1, PROMPT_LENGTH)``."""
    return torch.linspace(0, vocab_size - 1, PROMPT_LENGTH).long().unsqueeze(0)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Returns the checkpoint's logits in float32, shape ``(batch, length, vocabulary)``."""
    logits: torch.Tensor = model(input_ids=input_ids, use_cache=False).logits
    return logits.float()


def tell_odd_widths(config: PretrainedConfig, block: int, meaning: str) -> None:
    """Prints which of a model's linear layers have inputs that are no multiple of what a quantiser takes together.

    Args:
        block: Numbers of a row that share a scale.
        meaning: What comes of it.
    """
    shape = shape_of(config)
    heads = {count * shape.group_size * shape.head_dim for count in shape.num_key_value_heads}
    odd = sorted(size for size in {shape.hidden_size, *heads, *shape.intermediate_size} if size % block)
    if odd:
        told = ", ".join(map(str, odd[:6])) + (", ..." if len(odd) > 6 else "")
        print(f"note: {told}: no multiples of {block}, {meaning}; --dim_multiple {block} avoids it for new masks")


def report_difference(what: str, found: object, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """Prints the largest difference between logits.

    Raises:
        InputError: If it is beyond what the precision of the export explains.
    """
    found = torch.as_tensor(found, dtype=torch.float32)
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    same = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    print(
        f"verified {what}: largest difference of logits {difference:.2e} (largest logit {largest:.1f}), "
        f"same best token at {float(same):.0%} of positions"
    )
    if not difference <= tolerance * largest:
        raise InputError(
            f"{what}: the written model's logits are off by {difference:.2e}; do not use it, report it with the "
            "checkpoint's config.json"
        )
