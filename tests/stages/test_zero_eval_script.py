"""`python lora_ft_vib.py --do_zero_eval` and nothing else, on a tiny model where the shipped one goes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from support.byte_tokenizer import byte_tokenizer

from tvaprune import shipped
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import save_masks


@pytest.fixture
def tree(tmp_path, make_model, make_masks, made_up_python_docs):
    """The script, a model, its mask, and a text set of made-up modules where the extracted one is kept."""
    tree = tmp_path / "checkout"
    model = make_model("mistral", hidden_size=32, head_dim=8, vocab_size=258, max_position_embeddings=256)
    model.save_pretrained(tree / shipped.MODEL)
    byte_tokenizer().save_pretrained(tree / shipped.MODEL)
    save_masks(make_masks(shape_of(model.config)), tree / "mistral_saves_tva" / "mask_info_39.25.pkl")
    shutil.copy(ROOT / "lora_ft_vib.py", tree)
    return tree


def test_the_shipped_model_is_pruned_and_scored_beside_the_dense_one(tree):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "lora_ft_vib.py", "--do_zero_eval", "--write_out", "True", "--zero_eval_limit", "4"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = tree / "out" / "zero_eval_mini_mistral"
    zero_shot = json.loads((results / "results.json").read_text())["zero_shot"]
    tasks = list(zero_shot["tasks"])
    assert tasks[:2] == ["tva_continuation", "tva_name"] and zero_shot["missing"] == {}
    assert all(set(scores) == {"dense", "pruned", "difference"} for scores in zero_shot["tasks"].values())
    written = {str(path.relative_to(results)) for path in results.rglob("*") if path.is_file()}
    examples = {f"zero_shot/{model}_{task}.jsonl" for model in ("dense", "pruned") for task in tasks}
    assert written == {"results.json", "plan.json", "recipe.yaml", "report.html", "widths.png"} | examples
    dense, pruned = ((results / f"zero_shot/{model}_tva_name.jsonl").read_text() for model in ("dense", "pruned"))
    assert dense.count("\n") == pruned.count("\n") == 4
    assert dense != pruned  # the pruned object was scored, not the model of the path
    assert "tva_name" in done.stdout and "average" in done.stdout
