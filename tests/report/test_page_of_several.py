"""Several runs on one page, and a comparison on its own."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.results_page import page
from support.run_folder import GATES, results, write_run

from tvaprune.errors import InputError
from tvaprune.report.charts import BARS
from tvaprune.report.folders import read_runs
from tvaprune.report.results import ModelPerplexity, Perplexities
from tvaprune.stages.report import report


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_several_runs_stand_side_by_side(tmp_path):
    first, second = write_run(tmp_path / "one"), write_run(tmp_path / "two", seed=9)
    widths = results().widths.__class__(28, [2, 2, 2], [60, 60, 60], 0.2, 9, 8)
    results(seed=9, widths=widths, finetune=None).write(second)
    read, text = page(first, second, output=tmp_path / "both.html")
    assert read.headings[:4] == ["2 runs side by side", "Asked and reached", "Perplexity", "Gap over sparsity"]
    assert ["seed", "1", "9"] in read.rows and ["sparsity reached", "0.5100", "0.2000"] in read.rows
    assert ["fine-tuning", "lora, 6 steps of 4 blocks, 2 s", "–"] in read.rows
    for place in ("0.51", "0.2"):
        assert f"mini, vib, fold: 0.2231 ± 0.002 at {place}" in text  # the dots
    assert f"mini, vib, fold, fine-tuned: {math.log(1.1):.4g} ± 0.003 at 0.51" in text
    assert text.count('class="error') == 4 and BARS in text  # pruned and fine-tuned of both
    for folder in (first, second):
        results(seed=9, widths=widths, finetune=None, perplexity=Perplexities(20.0, 25.0)).write(folder)
    results(perplexity=Perplexities(20.0, 25.0)).write(first)
    _, text = page(first, second, output=tmp_path / "both.html")  # control: of a single window, or of an older run
    assert "mini, vib, fold: 0.2231 at 0.51" in text and 'class="error' not in text and BARS not in text


def test_perplexities_of_different_texts_are_told_apart(tmp_path):
    one, two = write_run(tmp_path / "one", finetune=None), write_run(tmp_path / "two", finetune=None)
    widths = replace(results().widths, decoder_sparsity=0.2)
    results(widths=widths).write(two)
    assert "windows of 8<" not in page(one, two, output=tmp_path / "both.html")[1]  # control: the same text
    results(widths=widths, protocol=replace(results().protocol, window=16)).write(two)
    read, text = page(one, two, output=tmp_path / "both.html")
    rows = {row[0]: row[1] for row in read.rows if len(row) > 4}
    assert rows["one"] == "prose test, own, 3 windows of 8" and rows["two"] == "prose test, own, 3 windows of 16"
    assert "On prose test, windows of 8, own: documents" in text and "prose test, windows of 16, own" in text
    for place, window in (("0.51", 8), ("0.2", 16)):  # no line joins them
        assert f"mini, vib, fold, prose test, own, 3 windows of {window}: 0.2231 ± 0.002 at {place}" in text


def test_the_perplexity_of_a_model_as_it_is_stands_with_its_text_beside_others(run, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    parts = dict.fromkeys(("perplexity", "refit", "speed_up", "training_speed_up", "finetune", "widths"))
    results(**parts, model_perplexity=ModelPerplexity(30.0, 0.25)).write(alone)
    read, text = page(alone)
    assert ["alone", "30.00 ± 0.25"] in read.rows and "On prose test" in text and "±: the standard error" in text
    read, _ = page(run, alone, output=tmp_path / "both.html")
    assert ["alone", "30.00 ± 0.25", "–", "–", "–", "–", "–"] in read.rows


def test_targets_of_one_training_count_as_runs_and_its_curves_stand_once(run, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    for target in ("0.35", "0.5"):
        write_run(whole / f"sparsity_{target}", target_sparsity=float(target), finetune=None)
        (whole / f"sparsity_{target}" / "training_log.json").rename(whole / "training_log.json")
    found = read_runs([whole])
    assert [one.name for one in found] == ["sparsity_0.35", "sparsity_0.5"]
    assert [one.gates[1] for one in found] == [GATES, GATES]
    assert (
        page(whole)[1].count("Task loss</b>") == 1
        and page(run, whole, output=tmp_path / "x")[1].count("Task loss</b>") == 2
    )
    monkeypatch.chdir(whole / "sparsity_0.5")
    assert page(Path())[1].count("Task loss</b>") == 1


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [write_run(tmp_path / name / "out") for name in ("a", "b")]
    assert [one.name for one in read_runs(folders)] == [str(folder) for folder in folders]


def test_a_comparison_stands_alone(run, tmp_path):
    cell = {"model": "models/mini", "windows": {"prose": 3}, "block_size": 8, "split": "test", "command": "c",
            "hardware": "a card", "versions": {"torch": "2.13"}, "seconds": {"choosing": 1.25},
            "zero_shot": None}  # fmt: skip
    cells = [
        cell | {"method": method, "weight_update": "refit", "target_sparsity": sparsity, "seed": seed,
                "perplexity": {"prose": {"dense": 20.0, "pruned": 20.0 * math.exp(base + sparsity + 0.01 * seed)}}}
        for method, base in (("vib", 0.0), ("flap", 1.0)) for sparsity in (0.25, 0.5) for seed in (0, 1, 2)
    ]  # fmt: skip
    cells[0]["zero_shot"] = {"pruned": {"average": 0.625}}  # of vib at 0.25
    for content in cells[:6]:  # of vib
        content["perplexity"]["prose"]["stderr"] = {"dense": 0.1, "pruned": 0.2, "gap": 0.03}
    (tmp_path / "compare.json").write_text(json.dumps({"cells": cells}))
    read, text = page(tmp_path)
    assert read.headings == ["Methods side by side", "mini", "To repeat it"] and read.fetches == []
    assert ["flap", "1.510 (1.500 to 1.520)", "1.2 s"] in read.rows
    assert ["vib", "0.260 ± 0.030 (0.250 to 0.270)", "0.625", "1.2 s"] in read.rows
    assert "vib: 0.26 ± 0.03 at 0.25" in text and "flap: 1.51 at 0.5" in text
    assert text.count('class="error s0"') == 2 and text.count('class="error') == 2 and BARS in text  # none of flap
    with pytest.raises(InputError, match="which has a page of its own; give it alone"):
        report([run, tmp_path])
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(InputError, match=r"compare.json: cannot be read as a comparison \(KeyError\)"):
        report([tmp_path])
