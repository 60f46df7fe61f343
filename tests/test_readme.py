"""What README and docs/ say is so: links and files are there, commands parse and run, the tree is the tree."""

import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest
from support import tiny
from support.pages import NOT_RUN, PAGES, code, commands

from tvaprune import _VERBS, shipped
from tvaprune.cli import released, run_verb
from tvaprune.flags.arguments import Arguments, parse_comparison, parse_sampling
from tvaprune.flags.verbs import MODES, check_flags
from tvaprune.stages.estimate import parser as estimate_parser
from tvaprune.stages.fetch import NAMES
from tvaprune.stages.report import parser as report_parser

SHIPPED_TEXT = {"TVAPRUNE_CACHE": os.path.expanduser("~/.cache/tvaprune")}  # extracting it takes over a minute
RUN_BY = {  # every command of the pages that is not marked, and the test that runs it, some on a smaller model
    "bash script/tva_prune.sh": "tests/test_readme.py::test_the_main_job_runs_as_a_new_user_runs_it",
    "bash script/tva_fine.sh": "tests/test_readme.py::test_fine_tuning_recovers_the_shipped_model",
    "bash script/tva_fine.sh --resume_from_checkpoint True": "tests/test_readme.py::test_a_driver_passes_flags_on",
    "bash script/smollm2.sh": "tests/test_smollm2_script.py::test_the_script_goes_from_a_model_to_its_table",
    "--output_dir out/flap": "tests/test_readme.py::test_three_commands_and_the_page_of_both_runs",
    "--do_zero_eval": "tests/stages/test_zero_eval_script.py::test_the_shipped_model_is_pruned_and_scored",
    "--do_eval": "tests/test_readme.py::test_the_evaluation_command_prints_a_pruned_model_that_works",
    "--save_pruned out/pruned_mistral": "tests/test_readme.py::test_a_saved_model_generates_by_transformers_alone",
    "out/as_it_is": "tests/stages/test_prune_and_apply.py::test_a_model_is_measured_as_it_is",
    "python -m tvaprune.export": "tests/test_readme.py::test_a_saved_model_generates_by_transformers_alone",
    "python -m tvaprune.describe": "tests/test_readme.py::test_the_describe_command_runs",
    "python -m benchmarks.scale": "tests/measure/test_scale.py::test_the_page_of_a_small_shape_has_every_measure",
    "tvaprune estimate": "tests/test_readme.py::test_the_estimate_command_runs",
    "tvaprune fetch english_prose": "tests/text/test_english_prose.py::test_fetching_makes_the_text_once",
    "tvaprune sample": "tests/stages/test_sample.py::test_the_text_is_a_data_set_of_every_other_command",
    "tvaprune fetch": "tests/stages/test_fetch.py::test_the_real_model_is_fetched",
    "out/mine": "tests/test_readme.py::test_three_commands_and_the_page_of_both_runs",
}
PATH = re.compile(r"`((?:tests|tvaprune|script|benchmarks|docs|lm-evaluation-harness)/[\w./-]*)`")
ROOMS = "choose|cut|plan|models|report|measure|text|flags|export|checkpoint|recover|study|stages"
MODULE = re.compile(rf"`((?:{ROOMS})/\w+\.py)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text):
    """Returns the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page, text):
    found = []
    for target in LINK.findall(text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (tiny.ROOT / page).parent / name if name else tiny.ROOT / page
        there = path.is_file() and (not anchor or anchor in anchors(path.read_text(encoding="utf-8")))
        found += [] if there else [target]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_files_are_there(page):
    text = PAGES[page]
    assert broken_links(page, text) == []
    named = [*PATH.findall(text), *(f"tvaprune/{name}" for name in MODULE.findall(text))]
    assert [name for name in named if not (tiny.ROOT / name).exists()] == []


def test_a_broken_link_is_seen():
    wrong = "[a](docs/none.md) [b](README.md#nowhere) [c](#limits) [d](docs/method.md#2-training)"
    assert broken_links("README.md", wrong) == ["docs/none.md", "README.md#nowhere"]
    assert PATH.findall("`tests/none.py` `script/tva_prune.sh`") == ["tests/none.py", "script/tva_prune.sh"]


def test_the_readme_is_short_and_names_every_page():
    readme = PAGES["README.md"]
    assert len(readme.splitlines()) <= 200
    assert [page for page in PAGES if page != "README.md" and f"({page}" not in readme] == []


def test_every_command_is_run_by_a_test_or_says_that_it_is_not():
    for line in commands(""):
        exact = RUN_BY.get(line)
        tests = [exact] if exact else [test for words, test in RUN_BY.items() if words in line]
        assert NOT_RUN in line or tests, f"no test runs {line}"
        for test in tests:
            name, _, function = test.partition("::")
            assert f"def {function}" in (tiny.ROOT / name).read_text(encoding="utf-8"), test


def test_every_function_of_the_library_is_named():
    told = PAGES["docs/usage.md"].split("## From Python")[1]
    assert [name for name in _VERBS if f"`{name}`" not in told] == []


def test_the_table_of_memory_is_that_of_benchmarks_scale():
    page = (tiny.ROOT / "benchmarks" / "scale.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\S+) \| .* \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", PAGES["README.md"],
                      flags=re.MULTILINE)  # fmt: skip
    assert len(rows) == 3
    for model, whole, small, step, minutes in rows:
        part = page.split(f"## {model}\n")[1].split("\n## ")[0]
        assert f"at most: {whole} GiB at --memory 40" in part and f", {small} GiB at --memory 24" in part
        assert (
            re.search(rf"^\| finetuning step, [^|]*\| {step} \|", part, re.MULTILINE)
            and f"{minutes} min at 150 TFLOP/s" in part
        )


@pytest.mark.parametrize("line", commands("bash script/"))
def test_a_script_that_the_readme_names_is_there_and_is_valid(line):
    script = tiny.ROOT / shlex.split(line, comments=True)[1]
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("line", commands("script/compare.sh"))
def test_a_comparison_of_the_pages_parses(line, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    words = shlex.split(line, comments=True)[2:]
    given = list(takewhile(lambda word: not word.startswith("--"), words))
    settings = parse_comparison(words[len(given) :])
    assert not given or (Path(given[0], "config.json").is_file() and len(given) == 2)
    assert given or (settings.max_eval_samples == 128 and settings.flags == ["--rotate", "off"])


@pytest.mark.parametrize(
    "line", commands("python tva_prune.py") + commands("python lora_ft_vib.py") + commands("tvaprune ")
)
def test_a_command_of_the_pages_names_flags_and_files_that_are_there(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tiny.ROOT)
    (tmp_path / "plan.json").touch()  # what the command before it leaves
    line = line.replace("out/mine/plan.json", str(tmp_path / "plan.json"))
    _, script, *flags = ["python", *shlex.split(line)] if line.startswith("tvaprune") else shlex.split(line)
    if script == "lora_ft_vib.py":
        verb, flags = released(shipped.complete(flags, tiny.ROOT))
    else:
        verb = "prune" if script == "tva_prune.py" else flags.pop(0)
    if verb == "fetch":
        assert set(flags) <= set(NAMES) and len(flags) == 1
        return
    if verb == "export":  # its own test
        return
    if verb == "sample":
        assert Path(parse_sampling(flags).model_name_or_path, "config.json").is_file()
        return
    if verb == "report":
        assert report_parser().parse_args(flags).folders
        return
    if verb == "estimate":
        own, flags = estimate_parser().parse_known_args(flags)
        verb = own.verb
    check_flags(verb, flags, MODES)
    args = Arguments.parse(flags, verb)
    assert Path(args.source.model_name_or_path, "config.json").is_file()


def test_the_tree_names_every_module():
    tree = PAGES["docs/developers.md"].split("```\ntva_prune.py")[1].split("```")[0]
    modules = [path.name for path in (tiny.ROOT / "tvaprune").glob("*.py") if path.name != "__init__.py"]
    folders = [path.name for path in (tiny.ROOT / "tvaprune").iterdir() if (path / "__init__.py").is_file()]
    assert [name for name in modules + folders if f"  {name}" not in tree] == []
    named = re.findall(r"^  (\w+\.py)", tree, flags=re.MULTILINE)
    assert sorted(named) == sorted(modules)
    short = PAGES["README.md"].split("```\ntva_prune.py")[1].split("```")[0]
    assert [name for name in folders if f"{name}/" not in short] == []


def module(line, monkeypatch):
    """Runs what a line of ``python -m`` runs, but for the seconds of importing; returns its exit code."""
    python, m, name, *flags = shlex.split(line)
    assert (python, m) == ("python", "-m")
    monkeypatch.setattr(sys, "argv", [name, *flags])
    monkeypatch.delitem(sys.modules, "tvaprune.describe", raising=False)  # which runpy would warn of
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(name, run_name="__main__")
    return ended.value.code


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("tvaprune estimate"))
def test_the_estimate_command_runs(line, monkeypatch, capsys):
    monkeypatch.chdir(tiny.ROOT)
    assert module(f"python -m {line}", monkeypatch) == 0
    said = capsys.readouterr().out
    assert "fine-tuning" in said and "80 GB" in said


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("python -m tvaprune.describe"))
def test_the_describe_command_runs(line, monkeypatch, capsys):
    monkeypatch.chdir(tiny.ROOT)
    assert module(line, monkeypatch) == 0
    assert "decoder_sparsity" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("line", commands("--do_eval"))
def test_the_evaluation_command_prints_a_pruned_model_that_works(line, tmp_path):
    folders = ("--save_loc", tmp_path, "--output_dir", tmp_path)
    short = ("--max_eval_samples", 64, "--speed_batches", 2, "--refit_samples", 32)
    result = tiny.run(" ".join(shlex.split(line)[1:]), *folders, *short, **SHIPPED_TEXT)
    assert result.returncode == 0, result.stderr
    results = tiny.read_json(tmp_path / "results.json")
    assert results["widths"]["decoder_sparsity"] == pytest.approx(0.5, abs=0.005)
    assert results["perplexity"]["pruned"] < 2 * results["perplexity"]["dense"]


@pytest.mark.slow
def test_a_saved_model_generates_by_transformers_alone_and_is_exported(tmp_path, monkeypatch):
    (save,) = commands("--save_pruned out/pruned_mistral")
    save = f"{save} --refit_samples 32".replace(" out/", f" {tmp_path}/")
    result = tiny.run(" ".join(shlex.split(save)[1:]), **SHIPPED_TEXT)
    assert result.returncode == 0, result.stderr
    for line in commands("tvaprune.export"):
        assert module(line.replace(" out/", f" {tmp_path}/"), monkeypatch) == 0
    opens = code("from transformers import AutoModelForCausalLM, AutoTokenizer").replace('"out/', f'"{tmp_path}/')
    alone = subprocess.run(
        [sys.executable, "-c", opens], cwd=tmp_path, capture_output=True, text=True,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    _, continued = alone.stdout.split("Return the number of", 1)
    assert len(continued.split()) > 5  # the model, and not the prompt alone
    exported = {path.name for path in tmp_path.iterdir()}
    assert {"pruned_mistral.gguf", "pruned_mistral_onnx", "pruned_mistral_vanilla"} <= exported


@pytest.mark.slow
def test_three_commands_and_the_page_of_both_runs(tmp_path, monkeypatch):
    """With few blocks: what each takes of the one before is what counts."""
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setenv("TVAPRUNE_CACHE", SHIPPED_TEXT["TVAPRUNE_CACHE"])
    short = ["--max_eval_samples=8", "--block_size=64", "--ctx_length=64", "--speed_batches=0", "--use_cpu=True"]
    short += ["--max_train_samples=16", "--refit_samples=8"]
    for line in [*commands("out/mine"), *commands("out/flap")]:
        line = line.replace("python tva_prune.py", "tvaprune prune").replace(" out/", f" {tmp_path}/")
        _, verb, *flags = shlex.split(line)
        run_verb(verb, flags if verb in ("export", "report") else [*flags, *short])
    assert {"model", "plan.json", "results.json"} <= {path.name for path in (tmp_path / "mine").iterdir()}
    assert (tmp_path / "mine_tuned" / "merged" / "model.safetensors").is_file()
    assert list((tmp_path / "flap" / "best").glob("mask_info_*.pkl"))
    assert (tmp_path / "mine.gguf").is_file() and (tmp_path / "both.html").is_file()


@pytest.mark.slow
def test_the_main_job_runs_as_a_new_user_runs_it(tmp_path):
    """With fewer blocks, for CI's sake."""
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=tiny.ROOT, capture_output=True, text=True
    )
    for name in files.stdout.splitlines():
        if (tiny.ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny.ROOT / name, tmp_path / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    short = ["--max_train_samples", "240", "--refit_samples", "32", "--max_eval_samples", "64", "--speed_batches", "8"]
    result = subprocess.run(
        ["bash", "script/tva_prune.sh", *short], cwd=tmp_path, env=env | SHIPPED_TEXT | {"PATH": path},
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    results = tiny.read_json(tmp_path / "out" / "mini_mistral" / "results.json")
    assert results["widths"]["decoder_sparsity"] == pytest.approx(0.5, abs=0.005)
    assert results["perplexity"]["dense"] < results["perplexity"]["pruned"] < 1.5 * results["perplexity"]["dense"]
    assert results["speed_up"]["whole_set"] > 1.0
    for words in ("dense ->", "(target 0.5)", "speed-up", "mask_info_"):
        assert words in result.stdout


@pytest.mark.parametrize(
    ("script", "needs"),
    [("tva_prune.sh", "7: MODEL MASK_SAVE VIB_LR"), ("tva_fine.sh", "3: MODEL SAVE_MODEL PATH_MASK")],
)
def test_a_driver_says_what_its_arguments_are(script, needs):
    result = subprocess.run(
        ["bash", f"script/{script}", "one"], cwd=tiny.ROOT, capture_output=True, text=True,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}: got 1 arguments, needs none or {needs}")


@pytest.mark.parametrize(("script", "count"), [("tva_prune.sh", 7), ("tva_fine.sh", 3)])
def test_a_driver_passes_flags_on(script, count, tmp_path):
    """The interpreter is one that has everything and prints what it is called with."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = - ] || printf "%s\\n" "$@"\n', encoding="utf-8")
    python.chmod(0o755)

    def called(*arguments):
        result = subprocess.run(
            ["bash", f"script/{script}", *arguments], cwd=tiny.ROOT, capture_output=True, text=True,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    flags, given = ["--resume_from_checkpoint", "True", "--save_loc", "a b"], [f"value {i}" for i in range(count)]
    for arguments in ([], given):
        assert called(*arguments, *flags) == called(*arguments) + flags
    assert str(tiny.ROOT / "mistral_saves_tva/mini_mistral") in called() and set(given) <= set(called(*given))


@pytest.mark.slow
def test_fine_tuning_recovers_the_shipped_model_and_leaves_what_loads(tmp_path):
    for name in ("script", "tvaprune", "mistral_saves_tva", "lm-evaluation-harness"):
        shutil.copytree(tiny.ROOT / name, tmp_path / name)
    for name in ("lora_ft_vib.py", "pyproject.toml", *(path.name for path in tiny.ROOT.glob("requirement*.txt"))):
        shutil.copy(tiny.ROOT / name, tmp_path / name)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= SHIPPED_TEXT | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    short = ["--max_train_samples", "320", "--refit_samples", "32", "--max_eval_samples", "64", "--speed_batches", "4"]
    result = subprocess.run(
        ["bash", "script/tva_fine.sh", *short], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    output = tmp_path / "out" / "mini_mistral_tuned"
    results = tiny.read_json(output / "results.json")
    ppl, told = results["perplexity"], results["finetune"]
    # Fewer blocks than the script's own, for CI's sake: less of the gap is closed.
    assert math.log(ppl["finetuned"] / ppl["dense"]) < 0.85 * math.log(ppl["pruned"] / ppl["dense"])
    assert told["adapter_merged_difference"] < 0.2  # bfloat16's rounding; tests/stages/test_finetune.py has float32
    assert results["training_speed_up"]["whole_set"] > 1.0
    assert (output / "adapter" / "adapter_config.json").is_file()
    assert (output / "merged" / "modeling_pruned.py").is_file()
