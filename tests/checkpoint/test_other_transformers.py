"""A pruned folder opens by its own files: in a process that has transformers alone, of whichever version.

``TVAPRUNE_OTHER_PYTHON`` names the interpreter of another version, in which every family's rows are opened.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from support.other_transformers import EVERY, NOT_IN_4, WITHIN, opened, write

OTHER = os.environ.get("TVAPRUNE_OTHER_PYTHON")
SOME = [("olmo3", "own"), ("phi3, long rope", "own"), ("gemma2 tied", "stock"), ("mixtral", "own"),
        ("qwen3_moe tied", "stock")]  # fmt: skip


def test_folders_open_where_there_is_transformers_alone(make_model, make_masks, tmp_path):
    folders = [write(*case, make_model, make_masks, tmp_path / str(i)) for i, case in enumerate(SOME)]
    damaged = shutil.copytree(folders[1], tmp_path / "damaged")  # control
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= 1.1
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    *intact, off = opened(sys.executable, [*folders, damaged])
    assert all(said["difference"] < WITHIN for said in intact), intact
    assert off["difference"] > 100 * WITHIN


@pytest.mark.skipif(OTHER is None, reason="TVAPRUNE_OTHER_PYTHON names no interpreter")
def test_every_row_opens_in_another_version(make_model, make_masks, tmp_path):
    asked = [OTHER, "-c", "import json, transformers; print(json.dumps(transformers.__version__))"]
    version = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    folders = [write(*case, make_model, make_masks, tmp_path / str(i)) for i, case in enumerate(EVERY)]
    answers = dict(zip(EVERY, opened(OTHER, folders), strict=True))
    unlike = NOT_IN_4 if version.startswith("4.") else {}
    far = {case for case, said in answers.items() if said.get("difference", 1.0) > WITHIN}
    assert far == set(unlike), {case: answers[case] for case in far ^ set(unlike)}
    for case, error in unlike.items():
        assert error is None or error.replace("4.57.6", version) in answers[case]["error"]
