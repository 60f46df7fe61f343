"""A small grid to compare on, and the command in this process."""

import random
import sys
from unittest.mock import patch

from support import tiny
from tvaprune.cli import advice_of, run_command, run_verb


def small_grid(make_model, folder):
    """Returns the flags of one learned and one scored method at two sparsities, of one seed."""
    checkpoint = tiny.save_checkpoint(make_model("llama"), folder / "tiny")
    first = tiny.write_text(folder / "first.txt", 2400)
    second = folder / "second.txt"
    choose = random.Random(1)
    second.write_text("\n\n".join(" ".join(choose.choices(tiny.WORDS[:6], k=12)) for _ in range(300)))
    return [
        "--models", checkpoint, "--dataset", first, "--other_texts", second, "--methods", "vib", "magnitude",
        "--weight_updates", "none", "fold", "refit", "--sparsities", 0.3, 0.5, "--seeds", 0, "--block_size", 16,
        "--train_samples", 16, "--calibration_samples", 8, "--max_eval_samples", 6, "--zero_eval_sparsities",
        "--threads", 1, "--dim_multiple", 4, "--use_cpu",
    ]  # fmt: skip


def compare(flags, output):
    """Compares, and returns the exit code."""
    words = [*map(str, flags), "--output", str(output)]
    with patch.object(sys, "argv", ["tvaprune"]):
        return run_command(lambda: run_verb("compare", words), advice_of("compare", words))
