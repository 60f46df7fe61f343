"""What drawing documents before they are tokenised is worth: blocks of a large text, drawn and whole, side by side.

The text stands in C4's place: a compressed file of 40,000 documents of 2,000 characters each, slices of Python's
language reference; C4's own first training file has nine times as many. The tokenizer is the miniature Mistral's.

    python -m benchmarks.draw

    128 blocks: 128 tokenised, 0.5 s
    all blocks: 51,139 tokenised, 109.5 s
    ratio 199 (2 cores)

(Beside other work.)
"""

import gzip
import json
import os
import random
import tempfile
import time
from pathlib import Path
from pydoc_data.topics import topics

from datasets import disable_progress_bars
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tvaprune.text.blocks import token_blocks
from tvaprune.text.sources import HUB_SETS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS, CHARACTERS = 40_000, 2000
BLOCKS, BLOCK_SIZE = 128, 512


def write_text(data_dir: Path) -> None:
    """Writes the file where C4's first training file is looked for."""
    path = data_dir / HUB_SETS["c4"].repo / HUB_SETS["c4"].files["train"]
    path.parent.mkdir(parents=True)
    reference, choose = "\n".join(topics.values()), random.Random(0)
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=1) as file:
        for _ in range(DOCUMENTS):
            start = choose.randrange(len(reference) - CHARACTERS)
            file.write(json.dumps({"text": reference[start : start + CHARACTERS]}) + "\n")


def timed(tokenizer: PreTrainedTokenizerBase, data_dir: Path, blocks: int | None) -> float:
    """Returns the seconds that blocks of the text take; None: of all of it."""
    begin = time.perf_counter()
    found = token_blocks(tokenizer, "c4", "train", BLOCK_SIZE, blocks, data_dir=data_dir)
    seconds = time.perf_counter() - begin
    print(f"{'all' if blocks is None else blocks} blocks: {len(found):,} tokenised, {seconds:.1f} s", flush=True)
    return seconds


def main() -> None:
    """Times both and prints their ratio."""
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mistral_saves_tva" / "mini_mistral", trust_remote_code=False)
    with tempfile.TemporaryDirectory() as name:
        os.environ["TVAPRUNE_CACHE"] = f"{name}/cache"
        write_text(Path(name))
        drawn, whole = (timed(tokenizer, Path(name), blocks) for blocks in (BLOCKS, None))
    print(f"ratio {whole / drawn:.0f} ({os.cpu_count()} cores)")


if __name__ == "__main__":
    main()
