"""The files of a run's results, and of a comparison's: their names, and what tells one of ours from a user's own."""

from collections.abc import Iterable
from pathlib import Path

from tvaprune.errors import InputError
from tvaprune.flags.recipes import RECIPE_NAME

PLAN_NAME, WIDTHS_NAME, RESULTS_NAME = "plan.json", "widths.png", "results.json"
TRAINING_LOG, FINETUNE_LOG, GENERATIONS_NAME = "training_log.json", "finetune_log.json", "generations.json"
PAGE_NAME = "report.html"
OF_GATES, OF_TUNING = (TRAINING_LOG, "training.png"), (FINETUNE_LOG, "finetune.png")
COMPARISON_NAME = "compare.json"
# What stands in each file.
_WORDS = {
    RESULTS_NAME: b'"model_digest"',
    PLAN_NAME: b'"dim_multiple"',
    RECIPE_NAME: b"verb:",
    PAGE_NAME: b'<meta name="generator" content="tvaprune">',
    GENERATIONS_NAME: b'"prompts"',
    TRAINING_LOG: b'"log"',
    FINETUNE_LOG: b'"log"',
    COMPARISON_NAME: b'"cells"',
    "compare.md": b"# Learned gates against one-shot scores",
} | dict.fromkeys((WIDTHS_NAME, OF_GATES[1], OF_TUNING[1], "compare.png"), b"Matplotlib")
OF_A_COMPARISON = (COMPARISON_NAME, "compare.md", "compare.png", PAGE_NAME)
BESIDE_RESULTS = tuple(name for name in _WORDS if name != RESULTS_NAME and not name.startswith("compare"))


def check_replaced(flag: str, folder: Path, names: Iterable[str]) -> None:
    """Refuses to replace files of results that this tool did not write.

    Args:
        flag: The flag that named the folder, for the message.
        names: The files that will be written there; those that are not there yet are no matter.

    Raises:
        InputError: If one of the files is somebody else's.
    """
    for name in names:
        if (folder / name).exists() and not wrote(folder / name):
            raise InputError(
                f"--{flag} {folder}: holds {name}, which this tool did not write; move it away, or give another folder"
            )


def wrote(path: Path, name: str | None = None) -> bool:
    """Tells a file of results that this tool wrote from somebody else's, by what stands in it.

    Args:
        name: What the file is called in a run's folder, where its path says something else.
    """
    return path.is_file() and _WORDS[name or path.name] in path.read_bytes()


def drop(folder: Path, names: Iterable[str]) -> None:
    """Removes files of results that this tool wrote, nothing else."""
    for name in names:
        if wrote(folder / name):
            (folder / name).unlink()
