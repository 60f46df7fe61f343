"""Opens pruned folders of every family's rows in another transformers, and tells how far its logits are.

    PYTHONPATH=.:tests python tests/support/other_transformers.py PYTHON

``PYTHON`` is an interpreter that has that transformers, torch and safetensors. It opens two folders of each row: one of
layers that differ, by the modeling file within, and one that is a stock checkpoint where the family's config lets it.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from support import opened_folders
from support.families import MORE_ROWS, NAMED_ROWS, ROWS, logits, make_plan, sliced
from support.folders import no_heads_in_layer_0, stock, with_more_tokens
from tvaprune.checkpoint.folder import save_pruned

CASES = {"own": no_heads_in_layer_0, "stock": stock}
EVERY = [(row, case) for row in ROWS | MORE_ROWS | NAMED_ROWS for case in CASES]
WITHIN = 1e-5
TEXT_IDS = [5, 3, 6]  # of `opened_folders.TEXT`
NOT_IN_4 = {  # what transformers 4.57 does not open as 5.23 does, and what it says
    ("internlm3", "own"): "transformers 4.57.6 has no 'internlm3' models",
    ("internlm3", "stock"): "does not recognize this architecture",
    ("cwm", "own"): "transformers 4.57.6 has no 'cwm' models",
    ("cwm", "stock"): "does not recognize this architecture",
    **{
        (row, "own"): "transformers 4.57.6 does not read fused experts"
        for row, (model_type, _) in MORE_ROWS.items()
        if model_type in ("mixtral", "qwen3_moe")
    },
    ("gemma2 tied", "stock"): None,  # runs, but by sdpa, without the cap on the attention's logits
}


def write(row, case, make_model, make_masks, folder):
    """Writes a pruned folder with what its model answers."""
    model_type, values = (ROWS | MORE_ROWS | NAMED_ROWS)[row]
    model = make_model(model_type, **values)
    plan = CASES[case](make_plan(model, make_masks))
    narrow = sliced(model, plan)
    save_pruned(narrow, plan, with_more_tokens(), folder)
    ids = torch.randint(0, 47, (2, 11), generator=torch.Generator().manual_seed(1))
    expected = {"input_ids": ids, "logits": logits(narrow, ids), "of_text": torch.tensor(TEXT_IDS)}
    save_file(expected, folder / opened_folders.EXPECTED)
    return folder


def opened(python, folders):
    """What an interpreter says of each folder, in order."""
    command = [str(python), opened_folders.__file__, *map(str, folders)]
    with tempfile.TemporaryDirectory() as caches:  # transformers copies the modeling files there
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": caches}
        environment.pop("HF_MODULES_CACHE", None)
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def main():
    import conftest

    makers = [fixture.__wrapped__() for fixture in (conftest.make_model, conftest.make_masks)]
    with tempfile.TemporaryDirectory() as parent:
        folders = [write(*case, *makers, Path(parent, str(index))) for index, case in enumerate(EVERY)]
        for (row, case), said in zip(EVERY, opened(sys.argv[1], folders), strict=True):
            print(f"| {row} | {case} | {said.get('error') or format(said['difference'], '.1e')} |")


if __name__ == "__main__":
    main()
