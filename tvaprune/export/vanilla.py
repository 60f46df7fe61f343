"""A stock checkpoint for engines that know no per-layer widths: every layer zero-padded to the widest one.

Exact, and as large and as slow as the widest layer makes it; ``--uniform`` gives a stock model without padding.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tvaprune.checkpoint.folder import write_checkpoint
from tvaprune.export.verify import fixed_prompt, reference_logits, report_difference, tell_odd_widths
from tvaprune.files import new_folder
from tvaprune.models.formats import vanilla_config

GROUP = 128  # numbers that share a scale, as most quantisers of transformers' and vLLM's have it


def export_vanilla(model: PreTrainedModel, tokenizer: object, out: Path, overwrite: bool, verify: bool) -> None:
    """Writes the checkpoint.

    Raises:
        InputError: If no stock config can hold the sizes, or the folder cannot be written.
    """
    config = vanilla_config(model.config)
    with new_folder("format vanilla", out, overwrite) as temporary:
        write_checkpoint(model, config, tokenizer, temporary)
        if verify:
            input_ids = fixed_prompt(config.vocab_size)
            with torch.device("cpu"):
                loaded = AutoModelForCausalLM.from_pretrained(temporary, trust_remote_code=False).eval()
            found, expected = reference_logits(loaded, input_ids), reference_logits(model, input_ids)
            report_difference(f"{type(loaded).__name__} in transformers", found, expected)
    tell_odd_widths(config, GROUP, "as FP8 blocks and the groups of AWQ and GPTQ are")
