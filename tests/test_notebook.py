"""docs/prune_your_model.ipynb does what it says, cell by cell, on the shipped miniature."""

import json
import os

import pytest
from support import tiny

from tvaprune import InputError

PAGE = tiny.ROOT / "docs" / "prune_your_model.ipynb"
CELLS = json.loads(PAGE.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_it_names_no_folder_of_the_machine_that_ran_it():
    assert not any(word in PAGE.read_text(encoding="utf-8") for word in (str(tiny.ROOT), '"/', "/home/", "/tmp/"))
    assert [cell["cell_type"] for cell in CELLS[:2]] == ["markdown", "code"] and len(CODE) == 5
    for number, code in enumerate(CODE):
        compile(code, f"cell {number}", "exec")


@pytest.mark.slow
@pytest.mark.skipif(not tiny.EVERY, reason="TVAPRUNE_EVERY=1 runs the notebook")
def test_its_cells_prune_describe_generate_and_export(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    monkeypatch.setenv("TVAPRUNE_CACHE", os.path.expanduser("~/.cache/tvaprune"))  # extracting the text takes minutes
    (tmp_path / "docs").mkdir()
    (tmp_path / "mistral_saves_tva").symlink_to(tiny.ROOT / "mistral_saves_tva")
    monkeypatch.chdir(tmp_path / "docs")  # where a notebook's kernel starts
    names = {}
    for code in CODE:
        exec(code, names)
    results, out = names["results"], capsys.readouterr().out
    assert results.widths.decoder_sparsity == pytest.approx(0.3, abs=0.01)
    assert results.perplexity.dense < results.perplexity.pruned < 3 * results.perplexity.dense
    assert "Return the number of" in out and "page: report.html" in out
    left = {path.name for path in (tmp_path / "out" / "notebook").iterdir()}
    assert {"model", "model.gguf", "plan.json", "report.html"} <= left
    with pytest.raises(InputError):  # control: what stands there is not replaced unasked
        exec(CODE[-1].replace("overwrite=True", "overwrite=False"), names)
