"""A stock checkpoint for engines that know no per-layer widths: every layer zero-padded to the widest one.

Exact, and as large and as slow as the widest layer makes it; ``--uniform`` gives a stock model without padding.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tvaprune.checkpoint.folder import write_checkpoint
from tvaprune.errors import InputError
from tvaprune.export.verify import fixed_prompt, reference_logits, report_difference
from tvaprune.files import new_folder
from tvaprune.models.families import PREFIX
from tvaprune.models.pruned import config_of_widths
from tvaprune.models.shape import shape_of


def export_vanilla(model: PreTrainedModel, tokenizer: object, out: Path, overwrite: bool, verify: bool) -> None:
    """Writes the checkpoint.

    Raises:
        InputError: If no stock config can hold the sizes, or the folder cannot be written.
    """
    shape = shape_of(model.config)
    if shape.norms_all_heads and len(set(shape.num_key_value_heads)) > 1:
        raise InputError(
            "--format vanilla: this family's norms of q and k average over all heads of a layer, and zeros would "
            "count: learn the mask with --uniform True, which needs no padding"
        )
    layers, heads, channels = shape.num_hidden_layers, shape.num_key_value_heads, shape.intermediate_size
    widest = [max(heads)] * layers, [max(channels)] * layers
    config = config_of_widths(model.config, shape.hidden_size, shape.head_dim, *widest, shape.group_size)
    if config.model_type.startswith(PREFIX):
        raise InputError(
            f"--format vanilla: a stock {config.model_type.removeprefix(PREFIX)} config does not take a hidden width "
            f"of {config.hidden_size} with {config.num_attention_heads} query heads of {shape.head_dim}: most want a "
            "multiple of the heads, with a long rope the dense width; prune with another --dim_multiple"
        )
    with new_folder("format vanilla", out, overwrite) as temporary:
        write_checkpoint(model, config, tokenizer, temporary)
        if verify:
            input_ids = fixed_prompt(config.vocab_size)
            with torch.device("cpu"):
                loaded = AutoModelForCausalLM.from_pretrained(temporary, trust_remote_code=False).eval()
            found, expected = reference_logits(loaded, input_ids), reference_logits(model, input_ids)
            report_difference(f"{type(loaded).__name__} in transformers", found, expected)
