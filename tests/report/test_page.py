"""The results page: what it says of a run and of several, what it leaves out, and that it fetches and runs nothing."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from support import tiny
from support.results_page import Reader, page
from support.run_folder import COMMAND, GATES, results, write_run

import tvaprune
from tvaprune.cli import run_command, run_verb
from tvaprune.cut.reconstruct import Reconstruction
from tvaprune.errors import InputError
from tvaprune.measure.generations import PROMPTS
from tvaprune.outputs import PAGE_NAME
from tvaprune.report.folders import RunFolder
from tvaprune.report.quality import answer
from tvaprune.report.results import Perplexities
from tvaprune.report.steps import write_results
from tvaprune.stages.report import report

SECTIONS = ["Asked and reached", "Perplexity", "Zero-shot", "Training", "Kept widths", "What the weight update did",
            "Speed and memory", "What the models say", "To repeat it"]  # fmt: skip


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
