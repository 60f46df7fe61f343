"""A protocol of the field in whole commands: what is measured, what is told, what is refused before any work."""

import gzip
import json
from dataclasses import replace

import pytest
from datasets import Dataset
from support import tiny
from support.folders import hub_results
from support.tiny import refusal

from tvaprune.text import protocols

FILE = "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"
RUN = ("--prune_method", "magnitude", "--weight_update", "fold", "--block_size", 16, "--max_train_samples", 8,
       "--speed_batches", 0, "--use_cpu", "--dim_multiple", 4, "--do_train")  # fmt: skip


@pytest.fixture
def source(make_model, tmp_path, monkeypatch):
    """A tiny checkpoint of 64 positions, a text of its own, WikiText-2's test rows; windows of 32 tokens, PTB's 64."""
    folder, text = tiny.save_checkpoint(make_model("llama"), tmp_path / "model"), tiny.write_text(tmp_path / "text.txt")
    (tmp_path / FILE).parent.mkdir(parents=True)
    Dataset.from_dict({"text": ["", *[" ".join(tiny.WORDS)] * 8]}).to_parquet(tmp_path / FILE)
    short = {
        name: replace(p, window=32 * (2 if "ptb" in name else 1) if p.window == 2048 else 96)
        for name, p in protocols.PROTOCOLS.items()
    }
    for module in ("tvaprune.text.protocols", "tvaprune.refusals", "tvaprune.run"):
        monkeypatch.setattr(f"{module}.PROTOCOLS", short)
    return ("--model_name_or_path", folder, "--dataset_name", text, "--data_dir", tmp_path, "--output_dir",
            tmp_path / "out", *RUN)  # fmt: skip


def test_a_run_reports_on_the_protocols_text_and_says_so(source, tmp_path, command):
    saved = tmp_path / "pruned"
    code, out, error = command(*source, "--protocol", "wikitext2-2048", "--save_pruned", saved)
    assert code == 0, error
    results = tiny.read_json(tmp_path / "out" / "results.json")
    # 8 rows of 17 words: 136 tokens, 4 windows of 32; the tokenizer adds no BOS
    told = {"name": "wikitext2-2048", "dataset_name": "wikitext2", "split": "test", "join": "\n\n", "end": None,
            "bos": False, "every_bos": False, "window": 32, "num_windows": 4}  # fmt: skip
    assert results["protocol"] == told
    assert results["dataset_name"].endswith("text.txt")  # the text that units were chosen on
    assert "perplexity (wikitext2 test, windows of 32)" in out
    assert r"wikitext2-2048: rows joined by '\n\n', no BOS, 4 windows" in out
    ((dataset, value),) = [(entry.dataset_id, entry.value) for entry in hub_results(saved)]
    assert (dataset, value) == ("Salesforce/wikitext", round(results["perplexity"]["pruned"], 4))
    assert value != round(results["perplexity"]["dense"], 4)


def test_our_own_is_told_too(source, tmp_path, command):
    code, out, error = command(*source, "--ctx_length", 16, "--max_eval_samples", 4, "--save_pruned", tmp_path / "own")
    assert code == 0, error
    assert hub_results(tmp_path / "own") == []  # control: the text is not on the hub
    protocol = tiny.read_json(tmp_path / "out" / "results.json")["protocol"]
    assert (protocol["name"], protocol["end"], protocol["num_windows"]) == ("own", "</s>", 4)
    assert "own: documents ended by </s>, no BOS, 4 windows" in out


def test_of_c4_256_windows_are_reported_on_unless_asked_otherwise(source, tmp_path, command):
    c4 = tmp_path / "allenai/c4/en/c4-validation.00000-of-00008.json.gz"
    c4.parent.mkdir(parents=True)
    for name in (c4.name, "c4-train.00000-of-01024.json.gz"):
        with gzip.open(c4.with_name(name), "wt") as file:
            file.writelines(json.dumps({"text": " ".join(tiny.WORDS)}) + "\n" for _ in range(1000))
    flags = (*source, "--dataset_name", "c4", "--ctx_length", 16, "--eval_split", "test")
    for asked, expected in (((), 256), (("--max_eval_samples", 300, "--overwrite_output_dir"), 300)):
        code, _, error = command(*flags, *asked)
        assert code == 0, error
        assert tiny.read_json(tmp_path / "out" / "results.json")["protocol"]["num_windows"] == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--protocol", "wikitext2-4096"), "windows of 96 tokens, the model is made for 64 at most"),
        (("--protocol", "wikitext2-2048", "--eval_split", "validation"), "--eval_split validation: --protocol wik"),
        (("--protocol", "wikitext2-2048", "--ctx_length", 16), "--ctx_length 16: --protocol wikitext2-2048 settles"),
        (("--protocol", "wikitext2-2048", "--max_eval_samples", 2), "settles text and windows; leave one out"),
        (("--protocol", "ptb-2048"), "--dataset_name ptb: cannot load"),
    ],
)
def test_what_does_not_fit_a_protocol_is_one_line(source, flags, words, tmp_path, command):
    code, _, error = command(*source, *flags)
    assert words in refusal(code, error)
    assert not (tmp_path / "out" / "best").exists()
