"""The comparison's figures and report against cells written by hand."""

import math
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from support import tiny

from tvaprune.errors import InputError
from tvaprune.measure.zeroshot import Score
from tvaprune.study.cells import Measurement
from tvaprune.study.contents import Cells, spread
from tvaprune.study.page import _charts, _tables, comparison_page
from tvaprune.study.picture import _panel, _tick
from tvaprune.study.report import orders_of, ratios, worst_change, write_report

FIRST, SECOND = "first", "second"


def test_the_zero_shot_average_by_hand():
    class Tasks:
        missing = {}

        def run(self, models, tokenizer, on_score):
            assert list(models.values()) == ["model"] and tokenizer == "tokenizer"
            for task, value, examples in (("one", 0.5, 20), ("two", 0.8, 10)):
                on_score(task, *models, Score("acc", value, None, {}, 0.25, {"num_examples": examples}, [], []))
            return self.missing

    measurement = object.__new__(Measurement)
    measurement.tasks, measurement.base = Tasks(), SimpleNamespace(tokenizer="tokenizer")
    measurement.args = SimpleNamespace(block_size=16)
    found = measurement._zero_shot("model")
    assert found["average"] == pytest.approx(0.65)
    assert found["num_examples"] == 30 and found["tasks"] == {"one": 0.5, "two": 0.8}
    Tasks.missing = {"three": "its/data"}
    with pytest.raises(InputError, match="--zero_eval_tasks: three could not run .* averages all that it names"):
        measurement._zero_shot("model")


def cell(method, update, gaps, model="m/one", sparsity=0.5, seed=0, **values):
    """A cell whose log perplexity on each text is the dense 0 plus a gap."""
    return {
        "model": model, "method": method, "weight_update": update, "target_sparsity": sparsity, "seed": seed,
        "perplexity": {t: {"dense": 1.0, "pruned": math.exp(g)} for t, g in zip((FIRST, SECOND), gaps, strict=True)},
        "windows": {FIRST: 4, SECOND: 5}, "zero_shot": None, "block_size": 16, "split": "test", "train_samples": 1,
        "calibration_samples": 2, "dataset": FIRST, "command": "compare", "hardware": "none",
        "seconds": {"choosing": 1.5, "update": 0.5 if update == "fold" else 2.5, "perplexity": 1.0},
        "peak_memory": {"choosing": 2**20, "update": 2**21},
    } | values  # fmt: skip


HAND_MADE = [
    # medians of three seeds: vib 0.4 folded, 0.3 refitted; flap 2.0 and 1.0; taylor 1.5 and 1.2
    *(cell("vib", "fold", (gap, 0.8), seed=seed) for seed, gap in enumerate((0.9, 0.4, 0.3))),
    *(cell("vib", "refit", (gap, 0.6), seed=seed) for seed, gap in enumerate((0.1, 0.3, 0.5))),
    *(cell("flap", "fold", (2.0, 1.0), seed=seed) for seed in range(3)),
    *(cell("flap", "refit", (1.0, 1.2), seed=seed) for seed in range(3)),
    *(cell("taylor", "fold", (1.5, 3.0), seed=seed) for seed in range(3)),
    *(cell("taylor", "refit", (1.2, 0.4), seed=seed) for seed in range(3)),
]


def test_the_figures_by_hand():
    first, second = ratios(Cells(HAND_MADE), "m/one")
    assert (first["text"], first["method"], first["target_sparsity"]) == (FIRST, "vib", 0.5)
    # first text: 0.3 / 1.0 (flap is the best refitted), 0.3 / 1.5 (taylor the best folded), (0.4 - 0.3) / 0.4 closed
    assert (first["best_refitted"], first["best_folded"]) == ("flap, refit", "taylor, fold")
    assert [first[name] for name in ("to_refitted", "to_folded", "closed")] == pytest.approx([0.3, 0.2, 0.25])
    assert (first["to_best"], first["best"]) == (pytest.approx(0.3), "flap, refit")
    # second text: 0.6 / 0.4, 0.6 / 1.0, (0.8 - 0.6) / 0.8; with their best updates 0.6 / 0.4
    assert (second["best_refitted"], second["best_folded"]) == ("taylor, refit", "flap, fold")
    assert [second[name] for name in ("to_refitted", "to_folded", "closed")] == pytest.approx([1.5, 0.6, 0.25])
    assert (second["to_best"], second["best"]) == (pytest.approx(1.5), "taylor, refit")
    # another update alone: of the best update of each something is known, of refit and fold nothing
    trained = [row | {"weight_update": "reconstruct"} for row in HAND_MADE if row["weight_update"] == "refit"]
    first, second = ratios(Cells(trained), "m/one")
    assert (first["to_best"], first["best"]) == (pytest.approx(0.3), "flap, reconstruct")
    assert (first["to_refitted"], first["closed"], second["best_folded"]) == (None, None, "-")
    folded = [row for row in HAND_MADE if row["weight_update"] == "fold"]
    first, second = ratios(Cells(folded + trained), "m/one")  # each with its best: taylor has none better folded
    assert (second["to_best"], second["best"]) == (pytest.approx(1.5), "taylor, reconstruct")
    assert [row["best"] for row in ratios(Cells(folded), "m/one")] == ["taylor, fold", "flap, fold"]  # control


def test_the_error_of_a_median_is_that_of_the_seed_in_the_middle():
    def found(*errors):
        cells = [cell("vib", "fold", (gap, gap)) for gap, _ in zip((0.9, 0.4, 0.2), errors, strict=False)]
        for content, error in zip(cells, errors, strict=True):
            content["perplexity"][FIRST]["stderr"] = error and {"dense": 0.01, "pruned": 0.02, "gap": error}
        return spread(cells, FIRST)

    assert found(0.5, 0.1, 0.3) == "0.400 ± 0.100 (0.200 to 0.900)"
    assert found(0.5, 0.1) == "0.650 ± 0.300 (0.400 to 0.900)"  # both are in the middle
    assert found(0.5) == "0.900 ± 0.500"
    assert found(0.5, None, 0.3) == "0.400 (0.200 to 0.900)"  # controls: that of another seed is none of it
    assert spread([cell("vib", "fold", (0.9, 0.4))], SECOND) == "0.400"


def test_a_text_goes_by_its_files_name_where_that_tells_it_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("tvaprune.study.report.plot", lambda cells, path: None)

    def headings(*texts):
        places = dict(zip((FIRST, SECOND), texts, strict=True))
        renamed = [
            row | {p: {places[text]: value for text, value in row[p].items()} for p in ("perplexity", "windows")}
            for row in HAND_MADE
        ]
        write_report(renamed, tmp_path)
        (line,) = (line for line in (tmp_path / "compare.md").read_text().splitlines() if "| method |" in line)
        return line.split(" | ")[2:6]

    assert headings("/a/b/one.txt", "c4") == ["one.txt, fold", "one.txt, refit", "c4, fold", "c4, refit"]
    assert headings("/a/one.txt", "/b/one.txt")[1:3] == ["/a/one.txt, refit", "/b/one.txt, fold"]  # control


def test_the_worst_change_by_hand():
    # first text: only vib's seed 2 gets worse, from 0.3 to 0.5; second: flap's every seed, from 1.0 to 1.2
    cells = Cells(HAND_MADE)
    first, second = (worst_change(cells, text) for text in (FIRST, SECOND))
    assert first["change"] == pytest.approx(math.exp(0.2) - 1)
    assert (first["method"], first["seed"]) == ("vib", 2)
    assert second["change"] == pytest.approx(math.exp(0.2) - 1)
    assert second["method"] == "flap"
    assert worst_change(Cells([row for row in HAND_MADE if row["weight_update"] == "fold"]), FIRST) is None


def test_the_order_of_the_methods_by_hand():
    rows = orders_of(Cells(HAND_MADE), "m/one")
    assert {row["weight_update"]: row["orders"] for row in rows} == {
        "fold": {FIRST: ["vib", "taylor", "flap"], SECOND: ["vib", "flap", "taylor"]},
        "refit": {FIRST: ["vib", "flap", "taylor"], SECOND: ["taylor", "vib", "flap"]},
    }


def test_the_report_prints_the_numbers_beside_what_is_sought(tmp_path):
    other = [row | {"model": "m/two"} for row in HAND_MADE if row["seed"] == 0 and row["method"] != "vib"]
    scores = {"dense": {"average": 0.6, "tasks": {"a_task": 0.6}}, "pruned": {"average": 0.55}}
    scored = cell("vib", "fold", (0.9, 0.8), zero_shot=scores)
    write_report([scored, *HAND_MADE[1:], *other], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare.json", "compare.md", "compare.png"]
    text = (tmp_path / "compare.md").read_text()
    assert "| 0.5 | vib | 0.400 (0.300 to 0.900) | 0.300 (0.100 to 0.500) | 0.800 (0.800 to 0.800) |" in text
    assert "| 0.550 | - | 1.5 s | 2.5 s | 1 MiB |" in text
    assert "| one | 0.5 | first | vib | 0.300 (flap, refit) | 0.200 (taylor, fold) | 0.250 | 0.300 (flap, r" in text
    assert "No fine-tuning. Zero-shot: average accuracy of a_task, 1 seed. Choosing: " in text
    assert "at most 0.30" in text and "at most 0.15" in text and "at least 0.33" in text
    assert "first: +22.14% (one, vib, 0.5, seed 2); sought: at most +1%" in text
    assert "Order at 0.5, one, refit: first: vib, flap, taylor; second: taylor, vib, flap." in text
    assert "Order at 0.5, two, fold: first: taylor, flap; second: flap, taylor." in text
    assert "| 0.5 | flap | 2.000 |" in text.split("## two")[1]  # one seed: no spread
    assert "| 0.5 | vib |" not in text.split("## two")[1]  # which was not measured
    report = tiny.read_json(tmp_path / "compare.json")
    assert [row["to_refitted"] for row in report["figures"]] == pytest.approx([0.3, 1.5])
    assert len(report["cells"]) == 22


def test_rows_are_of_one_sparsity_medians_of_seeds_and_baselines_not_learned(tmp_path, monkeypatch):
    monkeypatch.setattr("tvaprune.study.report.plot", lambda cells, path: None)

    def seeds():
        for seed, (average, seconds) in enumerate(((0.5, 1.0), (0.55, 2.0), (0.75, 9.0))):
            scores = {"dense": {"average": 0.9, "tasks": {"a_task": 0.9}}, "pruned": {"average": average}}
            costs = {"choosing": seconds, "update": 1.0, "perplexity": 1.0}
            yield cell("vib", "refit", (0.3, 0.3), seed=seed, zero_shot=scores, seconds=costs, split="all")

    others = [cell(method, "refit", (gap, gap)) for method, gap in (("vib_once", 0.2), ("flap", 0.6))]
    lower = [cell(method, "refit", (0.1, 0.4), sparsity=0.3) for method in ("vib", "flap")]
    write_report([*seeds(), *others, *lower], tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "on the all splits of first (4 windows of 16 tokens), second (5 " in text and "of seeds 0 1 2 (least" in text
    assert text.index("| 0.3 | vib |") < text.index("| 0.5 | vib |")
    assert "(0.300 to 0.300) | 0.550 | 2.0 s |" in text
    assert text.count("Order at ") == text.count("Order at 0.5, one, refit: first: vib_once, vib, flap") == 1
    assert ratios(Cells([*seeds(), *others]), "m/one")[0]["best_refitted"] == "flap, refit"
    others[1]["perplexity"][FIRST]["pruned"] = None  # beside what fell to no number there is no ratio
    assert ratios(Cells([*seeds(), *others]), "m/one")[0]["to_refitted"] is None


def test_the_picture_has_a_bar_where_an_error_is_known():
    def bars(error):
        cells = [cell("vib", "fold", (0.4, 0.8)), cell("flap", "fold", (0.9, 0.8))]
        cells[0]["perplexity"][FIRST]["stderr"] = error
        axes = Figure().subplots()
        _panel(axes, Cells(cells), "m/one", FIRST, {"vib": "C0", "flap": "C1"})
        return [segment.tolist() for bar in axes.containers for part in bar[2] for segment in part.get_segments()]

    ((low, high),) = bars({"dense": 0.01, "pruned": 0.125, "gap": 0.5})
    assert low == pytest.approx([0.5, math.exp(0.4) - 0.125]) and high == pytest.approx([0.5, math.exp(0.4) + 0.125])
    assert bars(None) == []  # control


def test_a_panel_is_of_one_model_medians_between_the_least_and_the_largest():
    gaps = (0.1, 0.2, 0.9)
    cells = Cells([*(cell("vib", "fold", (gap, 0.0), seed=seed) for seed, gap in enumerate(gaps)),
                   cell("vib", "fold", (5.0, 0.0), model="m/two")])  # fmt: skip

    def drawn(model):
        axes = Figure().subplots()
        _panel(axes, cells, model, FIRST, {"vib": "C0"})
        (dense, line), (band,) = axes.lines, axes.collections
        assert axes.get_yscale() == "log" and list(dense.get_ydata()) == [1.0, 1.0]
        places = band.get_paths()[0].vertices[:, 1]
        return [*line.get_ydata(), min(places), max(places)], axes.yaxis.get_major_formatter()(3.0)

    assert drawn("m/one") == (pytest.approx([math.exp(gap) for gap in (0.2, 0.1, 0.9)]), "3")
    assert drawn("m/two") == (pytest.approx([math.exp(5.0)] * 3), "")  # from 1 to 148 they would crowd


def test_a_section_of_the_page_is_of_one_model_a_column_for_each_update_of_a_text():
    cells = Cells([
        cell("flap", update, (gap + more, gap), model=model, sparsity=sparsity, seconds={"choosing": gap})
        for sparsity in (0.3, 0.5) for update, more in (("fold", 0.1), ("refit", 0.0))
        for model, gap in (("m/one", 2.0), ("m/two", 0.75))
    ])  # fmt: skip
    chart, *others = _charts(cells, "m/two")
    assert len(others) == 3 and "flap: 0.85 at 0.3" in chart.svg and "2.1" not in chart.svg
    table, _ = _tables(cells, "m/two")
    assert table.rows == [["flap", "0.850", "0.750", "0.750", "0.750", "0.8 s"]]
    assert table.head[1:5] == ["first, fold", "first, refit", "second, fold", "second, refit"]
    assert list(_charts(Cells(HAND_MADE), "m/one")) == []  # of one sparsity there is no line


def test_a_model_that_fell_to_no_number_is_the_worst_and_ends_nothing(tmp_path):
    fallen = {"perplexity": {FIRST: {"dense": 1.0, "pruned": None}, SECOND: {"dense": 1.0, "pruned": 2.0}}}
    lost = [row | {"versions": {}} for row in HAND_MADE]
    lost = [row | fallen if (row["method"], row["weight_update"]) == ("flap", "fold") else row for row in lost]
    write_report(lost, tmp_path)
    cells = Cells(tiny.read_json(tmp_path / "compare.json")["cells"])
    assert orders_of(cells, "m/one")[0]["orders"][FIRST] == ["vib", "taylor", "flap"]
    assert worst_change(cells, FIRST)["method"] == "vib"
    assert "| 0.5 | flap | inf (inf to inf) | 1.000 " in (tmp_path / "compare.md").read_text()
    comparison_page(tmp_path).write(tmp_path / "report.html")
    assert "<td>inf (inf to inf)</td>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("digits", "labels"), [("125", ["20", "", "50", ""]), ("123456789", ["20", "30", "50", ""])])
def test_a_perplexity_is_labelled_by_its_first_digit(digits, labels):
    assert [_tick(value, digits) for value in (20.0, 30.0, 50.0, 0.5)] == labels
