"""script/smollm2.sh and what it calls, with a tiny model in SmolLM2's place."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
from models.test_from_gguf import DIGITS, SIZES, byte_level
from support import tiny
from support.folders import LLAMA3_ROPE
from transformers import AutoModelForCausalLM

from benchmarks import speed
from benchmarks.generations import cell
from benchmarks.speed import quartiles, touched, touched_in
from tvaprune.measure.generations import PROMPTS
from tvaprune.stages.export import export

pytest.importorskip("gguf")
SMALL = ["--block_size", "16", "--ctx_length", "16", "--max_train_samples", "8", "--max_eval_samples", "4",
         "--refit_samples", "4", "--speed_batches", "0", "--use_cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def place(make_model, tmp_path_factory):
    """A folder with a model, a text, and an interpreter that the script takes whatever is installed."""
    place = tmp_path_factory.mktemp("place")
    make_model("llama", **SIZES, tie_word_embeddings=True).save_pretrained(place / "model")
    byte_level(*DIGITS).save_pretrained(place / "model")
    tiny.write_text(place / "text.txt", 3000)
    (place / "bin").mkdir()
    program = place / "bin" / "python"
    program.write_text(f'#!/bin/sh\n[ "$1" = - ] || exec "{sys.executable}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return place


def call(place):
    speed = "--dtypes bfloat16 --prefill 1x8 --decode 3 --repeats 2 --outtypes f16"
    environment = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "MODEL": "model", "SPEED": speed, "TUNE": "--lora_r 2",
        "PRUNE": "--dim_multiple 4", "OUTTYPES": "f16",
    }  # fmt: skip
    return subprocess.run(
        ["bash", tiny.ROOT / "script" / "smollm2.sh", "out", "--dataset_name", "text.txt", *SMALL],
        cwd=place, env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow  # each of its commands imports torch
def test_the_script_goes_from_a_model_to_its_table_and_does_nothing_twice(place):
    ended = call(place)
    assert ended.returncode == 0, ended.stderr[-3000:]
    out = place / "out"
    left = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert left == {"prune", "pruned", "tuned", "tuned-f16.gguf", "speed", "generations.md"}
    page = (out / "speed" / "speed.md").read_text()
    assert "transformers bfloat16, prefill 1 x 8 | out/pruned" in page and "decoding 1 x 3 | out/tuned/merged" in page
    told = tiny.read_json(out / "speed" / "speed.json")["timings"]
    dense, pruned = (AutoModelForCausalLM.from_pretrained(place / name) for name in ("model", "out/pruned"))
    assert touched(dense) == sum(p.numel() for p in dense.parameters())  # tied: the head is the embedding
    assert told[0]["ideal"] == pytest.approx(touched(dense) / touched(pruned)) and told[0]["ideal"] > 1.05
    assert told[0]["ratio"][0] <= told[0]["ratio"][1] <= told[0]["ratio"][2]
    generations = (out / "generations.md").read_text()
    assert all(f"**{prompt}**" in generations for prompt in PROMPTS)
    assert (out / "generations.md").stat().st_mtime_ns < (out / "tuned-f16.gguf").stat().st_mtime_ns
    files = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = call(place)
    assert again.returncode == 0 and again.stdout.count("done, see") == 4 and generations in again.stdout
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == files


@pytest.mark.parametrize(("crash", "code", "left"), [("q8_0", 139, True), ("speed", 2, True), ("f16", 130, False)])
def test_what_no_other_step_needs_may_fail_and_is_told(crash, code, left, tmp_path):
    """With an interpreter that does nothing, and dies of one step."""
    program, calls = tmp_path / "bin" / "python", tmp_path / "calls"
    program.parent.mkdir()
    (tmp_path / "out").mkdir()
    dies = f'*"--outtype {crash}" | *"benchmarks.{crash} "*) exit {code};;'
    program.write_text(f'#!/bin/sh\necho "$* " >> "{calls}"\ncase "$*" in {dies} esac\n', encoding="utf-8")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "MODEL": "model"}
    command = ["bash", tiny.ROOT / "script" / "smollm2.sh"]
    ended = subprocess.run([*command, "out"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    steps = ("--outtype f16 ", "--outtype q8_0 ", "benchmarks.speed ")
    begun = [words for words in steps if words in calls.read_text()]
    assert begun == list(steps if left else steps[:1])
    name = "time" if crash == "speed" else f"export {crash}"
    told = [f"script/smollm2.sh: {name} failed (exit code {code}): what is left is done without it",
            f"script/smollm2.sh: failed: {name}; the same command tries that again"]  # fmt: skip
    assert ended.stderr.splitlines()[-2:] == told if left else "failed" not in ended.stderr
    assert ended.returncode == (1 if left else code)


def test_checkpoints_of_one_name_are_timed_by_files_of_their_own(make_model, tmp_path):
    def gguf_of(name):
        (file,) = speed.gguf_files(str(tmp_path / name / "pruned"), tmp_path / "speed", ["f16"]).values()
        return file

    (tmp_path / "speed").mkdir()
    for name, channels in (("one", 32), ("two", 64)):
        folder = tmp_path / name / "pruned"
        make_model("llama", **SIZES | {"intermediate_size": channels}).save_pretrained(folder)
        byte_level(*DIGITS).save_pretrained(folder)
    first, second = gguf_of("one"), gguf_of("two")
    assert touched_in(first) < touched_in(second)
    assert gguf_of("one") == first  # control: once
    make_model("llama", **SIZES | {"intermediate_size": 96}).save_pretrained(tmp_path / "one" / "pruned")
    assert touched_in(gguf_of("one")) > touched_in(second)  # cut anew


def test_without_gguf_nothing_begins(tmp_path):
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    text = f'#!/bin/sh\necho "$*" >> "{tmp_path}/calls"\ncase "$*" in *gguf*) exit 1; esac\n'
    program.write_text(text, encoding="utf-8")
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    command = ["bash", tiny.ROOT / "script" / "smollm2.sh"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"script/smollm2.sh: writes GGUF files, and {program} has no gguf: {program} -m pip install gguf\n"
    )
    assert "prune" not in (tmp_path / "calls").read_text() and not (tmp_path / "out").exists()


def test_a_flag_of_one_step_alone_is_told_before_the_other_begins(tmp_path):
    """For 20% a user writes --target_sparsity 0.2: finetune would have refused it after hours of pruning."""
    command = ["bash", tiny.ROOT / "script" / "smollm2.sh", "out", "--target_sparsity", "0.2"]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, list(tmp_path.iterdir())) == (2, "", []), ended.stderr
    assert ended.stderr.splitlines()[-1] == (
        "script/smollm2.sh: --target_sparsity acts in prune, not in finetune: leave it out; "
        'PRUNE="--FLAG VALUE" before the command goes to prune alone, TUNE to finetune'
    )


def test_an_untied_embedding_is_looked_up_and_not_passed_through(make_model):
    model = make_model("llama")
    embedding = model.get_input_embeddings().weight.numel()
    assert touched(model) == sum(p.numel() for p in model.parameters()) - embedding


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_s_tokens_pass_through_as_many_parameters_as_the_model_s(tied, make_model, tmp_path):
    model = make_model("llama", tie_word_embeddings=tied, rope_parameters=LLAMA3_ROPE)
    model.save_pretrained(tmp_path / "model")
    export("gguf", tmp_path / "model", tmp_path / "model.gguf", verify=False)
    assert touched_in(tmp_path / "model.gguf") == touched(model)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_alone_is_timed_and_files_are_weighed(make_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, layers in (("dense", 6), ("cut", 2)):
        make_model("llama", num_hidden_layers=layers, hidden_size=64, intermediate_size=512).save_pretrained(name)
    given = "dense cut --dtypes --prefill 1x32 --decode 8 --repeats 3 --output out"
    monkeypatch.setattr(sys, "argv", ["speed", *given.split()])
    speed.main()
    told = tiny.read_json(tmp_path / "out" / "speed.json")["timings"]
    names = ["f16, prompt of 32", "f16, generation of 8", "q8_0, prompt of 32", "q8_0, generation of 8"]
    assert [row["what"] for row in told] == [f"llama.cpp {name}" for name in names]
    assert all(row["dense"] > 0 and row["ratio"][0] <= row["ratio"][1] and row["ideal"] > 2 for row in told)
    assert "| MiB | safetensors | f16 | q8_0 |" in capsys.readouterr().out


def test_what_was_timed_before_llama_cpp_crashes_is_written(tmp_path, monkeypatch):
    timing = speed.Timing("prefill", "cut", 2.0, 3.0, (1.4, 1.5, 1.6), 1.7)
    monkeypatch.setattr(speed, "hugging_face", lambda *args: [timing])
    monkeypatch.setattr(speed, "llama_cpp", lambda *args: sys.exit(139))  # stands for the signal
    monkeypatch.setattr(speed, "gguf_files", lambda *args: {"f16": tmp_path})
    monkeypatch.setattr(speed, "sizes", lambda *args: "")
    monkeypatch.setattr(speed, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=bool)))
    monkeypatch.setattr(sys, "argv", ["speed", "dense", "cut", "--outtypes", "f16", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        speed.main()
    (told,) = tiny.read_json(tmp_path / "speed.json")["timings"]
    assert told == asdict(timing) | {"ratio": [1.4, 1.5, 1.6]}
    assert timing.row() in (tmp_path / "speed.md").read_text()


def test_quartiles_are_those_of_the_values():
    assert quartiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (2.0, 3.0, 4.0)  # of 1 2 3 4 5
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)


def test_a_cell_of_a_table_stays_one():
    assert cell("\na | b\n<s>c") == "a \\| b ⏎ &lt;s>c"
