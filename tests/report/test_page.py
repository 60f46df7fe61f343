"""The results page: what it says of a run and of several, what it leaves out, and that it fetches and runs nothing."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import tiny
from support.byte_tokenizer import byte_tokenizer
from support.run_folder import COMMAND, GATES, results, write_run

import tvaprune
from tvaprune.cli import run_command, run_verb
from tvaprune.cut.reconstruct import Reconstruction
from tvaprune.errors import InputError
from tvaprune.measure.generations import PROMPTS, pieces
from tvaprune.outputs import PAGE_NAME
from tvaprune.report.charts import BARS
from tvaprune.report.folders import RunFolder, read_runs
from tvaprune.report.quality import answer
from tvaprune.report.results import ModelPerplexity, Perplexities
from tvaprune.report.steps import write_results
from tvaprune.stages.report import report

SECTIONS = ["Asked and reached", "Perplexity", "Zero-shot", "Training", "Kept widths", "What the weight update did",
            "Speed and memory", "What the models say", "To repeat it"]  # fmt: skip


class Reader(HTMLParser):
    """The page's headings, its rows as lists of cells, and whatever could fetch or run."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.rows, self.fetches, self.opened = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "path", "rect", "circle", "img"):
            self.opened.append(tag)
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.fetches.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "xlink:href", "action", "data") and not value.startswith("data:"):
                self.fetches.append(value)
            if name.startswith("on") or (name == "style" and "url(" in value):
                self.fetches.append(name)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag):
        if tag not in ("path", "rect", "circle"):
            assert self.opened.pop() == tag

    def handle_data(self, data):
        inside = self.opened[-1] if self.opened else ""
        if inside in ("th", "td"):
            self.rows[-1][-1] += data
        if inside in ("h1", "h2"):
            self.headings[-1] += data
        if inside == "style" and re.search(r"url\(|@import|@font-face", data):
            self.fetches.append("style")


def page(*folders, **options):
    path = report(folders, **options)
    return Reader(path.read_text(encoding="utf-8")), path.read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_a_run_of_every_part_has_every_section_with_its_figures(run):
    read, text = page(run)
    assert read.headings == ["mini, 51.0% of the decoder gone, fine-tuned", *SECTIONS]
    for row in (
        ["target sparsity", "0.5"],
        ["sparsity reached", "0.5100"],
        ["run", "20.00 ± 0.50", "25.00 ± 0.62", "0.223 ± 0.002", "22.00 ± 0.55", "0.095 ± 0.003"],
        ["a", "acc", "2", "0.250", "1.000 ± 0.100", "0.500 ± 0.100", "-0.500 ± 0.500"],
        ["1", "24 of 32", "2 of 4", "1 of 2", "32 of 64"],  # layer 1: two query heads for each KV head
        ["2", "24 of 32", "0 of 4", "0 of 2", "8 of 64"],
        ["average of the last run's (acc, acc_norm)", "", "", "", "1.000 ± 0.100", "0.500 ± 0.100", ""],
        ["forward pass, 4 batches of 8 × 16 tokens", "3.00 s", "2.00 s", "1.40×", "1.50×", "1.60×"],
        ["training step, 4 batches of 8 × 16 tokens", "3.00 s", "2.50 s", "1.20×", "1.30×", "1.60×"],
        ["weights, 2 bytes each", "3.05 MiB", "1.91 MiB", "1.60×", "", "1.60×"],
        # keys and values of 6 and of 3 heads, 4 numbers of 2 bytes each
        ["KV cache of a token, 2 bytes each", "96 B", "48 B", "2.00×", "", "1.60×"],
        ["torch", "2.13"],
        ["hardware", "a card"],
    ):
        assert row in read.rows
    assert "2 of 3 linears refused it and stayed folded: layer 1 o_proj, lm_head" in text
    assert "KL from 0.400 to 0.300 on 2 held-out blocks" in text and "verb: prune\nseed: 1" in text
    assert "Not scored, for want of data: b." in text
    assert "<mark> Lyon</mark>,</span>" in text and text.count("<mark>") == 1  # the tuned model says less, nothing else
    assert re.findall(r"<dt>(.*)</dt><dd>(.*)<small>(.*)</small>", text)[:5] == [
        ("perplexity", "20.00 → 25.00", "gap 0.223 ± 0.002"), ("fine-tuned", "22.00", "gap 0.095 ± 0.003"),
        ("decoder sparsity", "0.5100", "asked: 0.5"), ("parameters", "1M", "of 1.6M"),
        ("forward pass", "1.50×", "ideal 1.60×"),
    ]  # fmt: skip


def test_every_curve_is_of_its_own_figure(run, monkeypatch):
    drawn = {}

    def draw(title, series, *labels, **options):
        drawn[title] = {one.name: list(one.points) for one in series}

    monkeypatch.setattr("tvaprune.report.making.line_chart", draw)
    page(run)
    assert drawn == {
        "Task loss": {"task loss": [(1, 0.31), (2, 0.27)]},
        "Sparsity": {"expected": [(1, 0.1), (2, 0.4)], "target": [(1, 0.2), (2, 0.5)], "scored masks": [(2, 0.49)]},
        "Multipliers of the constraint": {"λ1": [(1, -0.5), (2, 0.5)], "λ2": [(1, 1.5), (2, 2.5)]},
        "Perplexity of the masks": {"mask, folded": [(2, 26.5)]},
        "Cross-entropy": {"cross-entropy": [(1, 3.2), (2, 3.1)]},
        "Kullback-Leibler to the dense model": {"KL": [(1, 0.3), (2, 0.2)]},
        "Hidden states": {"1 − cosine": []},
        "Perplexity": {
            "fine-tuned, on the windows compared on": [(2, 22.5)],
            "dense, on those reported": [(0, 20.0), (2, 20.0)],
            "pruned, on those reported": [(0, 25.0), (2, 25.0)],
        },
        "Divergence": {"held-out KL": [(0.0, 0.4), (0.5, 0.3), (1.0, 0.35)], "taken": [(0.5, 0.3)]},
    }


def test_a_reconstruction_stands_after_its_refit(run):
    assert "Then reconstructed" not in page(run)[1]  # control
    errors = (0.2, 0.1), (0.3, 0.3), (0.5, 0.4)
    results(reconstruct=Reconstruction((0.0, 0.5, 1.0), (0.3, 0.2, 0.25), 0.5, errors)).write(run)
    said = "Then reconstructed, 2 of 3 windows of half layers nearer to the dense hidden states, and left at 0.5 of"
    assert f"{said} the way: KL from 0.300 to 0.200." in " ".join(page(run)[1].split())


def test_the_models_that_a_run_saved_are_asked(make_model, tmp_path):
    dense, narrow = make_model(), make_model(intermediate_size=16)
    model = tiny.save_checkpoint(dense, tmp_path / "dense")
    run = write_run(tmp_path / "run")
    results(model=str(model)).write(run)
    tiny.save_checkpoint(narrow, run / "pruned")
    with pytest.raises(
        InputError, match="its finetuned model is not where its recipe says; run it again, with --save_pruned"
    ):
        report([run], prompts=True)
    tiny.save_checkpoint(dense, run / "merged")
    _, before = page(run)
    assert "Water boils when" not in before  # control
    _, text = page(run, prompts=True)
    assert all(prompt in text for prompt in PROMPTS)
    assert 0 < text.count("<mark>") <= len(PROMPTS)  # of the narrow model alone
    told = tiny.read_json(run / "generations.json")["models"]
    assert list(told) == ["dense", "pruned", "finetuned"] and told["finetuned"] == told["dense"] != told["pruned"]
    assert "Water boils when" in page(run)[1]  # they stay
    (run / "recipe.yaml").write_text("- a list")
    with pytest.raises(InputError, match="recipe.yaml: is no recipe"):
        report([run], prompts=True)


def test_what_a_run_did_not_measure_is_left_out(tmp_path):
    parts = ("perplexity", "shape", "parameters", "refit", "speed_up", "training_speed_up", "finetune", "protocol")
    run = tmp_path / "bare"
    run.mkdir()
    results(**dict.fromkeys(parts), widths=None).write(run)
    read, _ = page(run)
    assert read.headings == ["mini", "Asked and reached", "To repeat it"]


def test_of_the_logs_only_those_of_the_run_itself_count(run):
    assert RunFolder.read(run, "run").gates[1] == GATES and RunFolder.read(run, "run").tuning is not None
    assert RunFolder.read(run, "run").generations is not None
    results(target_sparsity=None, finetune=None, command="other").write(
        run
    )  # a mask was applied to where gates trained
    read = RunFolder.read(run, "run")
    assert (read.gates, read.tuning, read.generations) == (None, None, None)


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


def test_nothing_is_fetched_or_run_and_what_users_wrote_is_text(run):
    read, text = page(run)
    assert read.fetches == [] and read.opened == [] and "http" not in text
    assert "--x &#39;&lt;script&gt;&#39;" in text and "The capital &lt;b&gt;" in text
    for fetching in ('<img src="http://x/y.png">', '<img src="y.png">', "<style>a{background:url(b)}</style>",
                     "<script></script>", '<p onclick="f()"></p>'):  # fmt: skip
        assert len(Reader(fetching).fetches) == 1  # controls


def test_a_page_of_the_same_files_is_the_same(run):
    first = page(run)[1]
    assert page(run)[1] == first
    results(seed=2).write(run)
    assert page(run)[1] != first  # control


def test_perplexities_without_errors_stand_alone(run):
    assert "the standard error over the windows" in page(run)[1]
    results(perplexity=Perplexities(20.0, 25.0)).write(run)  # of a single window, or of an older run
    read, text = page(run)
    assert ["run", "20.00", "25.00", "0.223"] in read.rows and "the standard error over the windows" not in text


def test_numbers_that_are_none_leave_the_page_whole(run):
    results(perplexity=Perplexities(20.0, math.nan)).write(run)
    read, _ = page(run)
    assert ["run", "20.00", "nan", "nan"] in read.rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("results.json", None, "holds no results.json; give the folder of a run or of a comparison"),
        ("results.json", "{", "cannot be read as results of version 2"),
        ("results.json", {"version": 1}, r"cannot be read as results of version 2 \(version 1\); run it again"),
        ("training_log.json", "[", "cannot be read as JSON"),
        ("training_log.json", {"log": [{"loss": 1.0}]}, "is no log of a training"),
        (
            "generations.json",
            {"command": COMMAND, "prompts": ["a"], "models": {"dense": []}},
            "not every model was given all prompts",
        ),
        ("generations.json", {"command": COMMAND, "prompts": ["a"]}, "does not say what models added"),
        ("training_log.json", {"log": [{"step": 1, "task_loss": "low"}]}, "is no log of a training"),
        ("results.json", {"perplexity": {"dense": "x", "pruned": 2.0}}, "is not what a run measures"),
        ("results.json", {"perplexity": {"dense": 0.0, "pruned": 2.0}}, "is not what a run measures"),
    ],
)
def test_a_folder_without_a_run_of_this_version_is_refused_and_gets_no_page(name, content, said, run, capsys):
    if content is None:
        (run / name).unlink()
    else:
        if "perplexity" in content:
            content = tiny.read_json(run / name) | content
        (run / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=said):
        report([run])
    assert run_command(lambda: run_verb("report", [str(run)])) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (run / PAGE_NAME).exists()


def arguments(folder, **flags):
    training = SimpleNamespace(overwrite_output_dir=False)
    return SimpleNamespace(save_loc=folder, recipe={"verb": "prune", **flags}, training=training)


@pytest.mark.parametrize("content", [[1], {"command": COMMAND}, None])
def test_a_file_that_no_page_can_be_made_of_ends_no_run(content, run, capsys):
    report([run])
    older = (run / PAGE_NAME).read_bytes()
    if content is not None:
        (run / "generations.json").write_text(json.dumps(content))
    write_results(arguments(run, seed=2), results())
    assert "seed: 2" in (run / "recipe.yaml").read_text()
    assert ("note: no report.html is written: " in capsys.readouterr().out) == (content is not None)
    assert (run / PAGE_NAME).exists() == (content is None)
    assert content is not None or (run / PAGE_NAME).read_bytes() != older  # control


def test_the_rotation_of_results_that_are_replaced_goes(tmp_path):
    for digest in ("0" * 16, "1" * 16):
        (tmp_path / f"rotation_{digest}.safetensors").touch()
        found = results()
        found.rotation = digest
        write_results(arguments(tmp_path), found)
    assert [path.name for path in tmp_path.glob("rotation_*")] == [f"rotation_{'1' * 16}.safetensors"]


def test_the_verb_and_the_function_write_one_page(run, tmp_path, capsys):
    assert run_command(lambda: run_verb("report", [str(run)])) == 0
    assert capsys.readouterr().out == f"page: {run / PAGE_NAME}\n"
    path = tvaprune.report(run, output=tmp_path / "other" / "page.html")
    assert path.read_bytes() == (run / PAGE_NAME).read_bytes()
    report([run], path)  # its own is replaced
    before = (run / "results.json").read_bytes()
    with pytest.raises(InputError, match="is there, and no page of this tool; give a new file"):
        report([run], run / "results.json")
    assert (run / "results.json").read_bytes() == before
    for output, said in ((tmp_path, "is a folder"), (run / "results.json" / "page.html", "cannot be written")):
        with pytest.raises(InputError, match=said):
            report([run], output)


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


@pytest.mark.parametrize(
    ("first", "said", "parts"),
    [
        ("abc", "abd", ("ab", "d", "")),
        ("abc", "abc", ("abc", "", "")),
        ("abc", "ab", ("ab", "", "")),
        ("ab", "abc", ("ab", "c", "")),
        ("", "ab", ("", "a", "b")),
        ("a\n\nb", "a\n\n\n", ("a ⏎  ⏎ ", " ⏎ ", "")),
    ],
)
def test_the_first_difference_is_found(first, said, parts):
    told = answer("x", list(first), list(said))
    assert (told.same, told.first, told.rest) == parts


def test_what_a_model_says_is_parted_into_what_each_token_adds(tmp_path):
    tokenizer, text = byte_tokenizer(), "é, 10 € <b>"
    ids = tokenizer(text).input_ids
    parts = pieces(tokenizer, ids)
    assert "".join(parts) == text and len(parts) == len(ids) == len(text.encode()) > len(text)
    assert parts[:3] == ["", "é", ","]  # a letter of two tokens comes with its last
    assert "".join(pieces(tokenizer, ids[:-5])) == "é, 10 \ufffd"  # cut within one: as the model's text is


def test_the_page_is_a_part_of_the_package_and_its_engine_of_the_requirements():
    text = (tiny.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"tvaprune.report" = ["page.html"]' in text and '"Jinja2>=3.1"' in text
    pins = [
        line.split("#")[0].strip()
        for name in ("requirement.txt", "requirement-text.txt")
        for line in (tiny.ROOT / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("Jinja2")
    ]
    assert len(pins) == 2 and len(set(pins)) == 1  # the text pins it too: the two must not part
