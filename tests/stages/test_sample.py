"""`tvaprune sample`: a model's own text as a file that every other command reads; what is interrupted goes on."""

import json
from pathlib import Path

import pytest
from support import tiny
from support.in_process import half_written, run

import tvaprune
from tvaprune.stages import sample as stage
from tvaprune.text.sources import SPLITS, load_documents

FLAGS = ("--use_cpu", "--tokens", 300, "--page", 20, "--batch_size", 4, "--temperature", 1)
BATCHES = 4  # of 4 pages of 20 tokens, for 300 tokens


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory):
    return tiny.save_checkpoint(make_model(), tmp_path_factory.mktemp("source") / "model")


@pytest.fixture
def written(monkeypatch):
    """Counts the batches that are written; ``written.stop`` interrupts before one."""
    pages = stage.pages

    def counted(*given):
        if len(counted.seen) == counted.stop:
            raise KeyboardInterrupt
        counted.seen.append(given)
        return pages(*given)

    counted.seen, counted.stop = [], None
    monkeypatch.setattr(stage, "pages", counted)
    return counted


def sampled(source, folder, *flags):
    return run("sample", "--model_name_or_path", source, "--output_dir", folder, *FLAGS, *flags)


def refused(ended, *words):
    assert ended.code == 2 and ended.fault == "" and all(word in ended.err for word in words), ended


def test_the_text_is_a_data_set_of_every_other_command(source, written, tmp_path):
    batches = 40
    ended = sampled(source, tmp_path / "own", "--tokens", batches * 4 * 20)
    file = tmp_path / "own" / "text.jsonl"
    assert ended.code == 0 and f"--dataset_name {file}" in ended.out and half_written(tmp_path) == []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 4 * batches and {row["kind"] for row in rows} == {"document"} and len(written.seen) == batches
    assert [load_documents(str(file), split) for split in SPLITS].count([]) == 0
    learned = run("prune", "--model_name_or_path", source, "--dataset_name", file, "--output_dir", tmp_path / "out",
                  "--use_cpu", "True", "--block_size", 16, "--ctx_length", 16, "--max_train_samples", 4, "--eval_steps",
                  2, "--max_eval_samples", 4, "--speed_batches", 0, "--target_sparsity", 0.3, "--prompt_tokens", 0,
                  "--dim_multiple", 4)  # fmt: skip
    assert learned.code == 0, learned.err + learned.trace


def test_what_was_interrupted_goes_on_and_ends_as_if_it_never_was(source, written, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert sampled(source, whole).code == 0
    written.seen.clear()
    written.stop = 2
    ended = sampled(source, cut)
    assert ended.code == 130 and "interrupted; the same command goes on where it was" in ended.err
    part = cut / "text.jsonl.part"
    assert not (cut / "text.jsonl").exists() and len(part.read_text(encoding="utf-8").splitlines()) == 8
    short = '{"text": "of a batch cut short", "kind": "document"}\n{"text": "torn'
    part.write_text(part.read_text(encoding="utf-8") + short, encoding="utf-8")
    written.seen.clear()
    written.stop = None
    assert sampled(source, cut).code == 0 and len(written.seen) == BATCHES - 2
    assert (cut / "text.jsonl").read_bytes() == (whole / "text.jsonl").read_bytes() and not part.exists()


def test_a_kill_while_it_begins_again_loses_no_page(source, written, tmp_path, monkeypatch):
    written.stop = 3
    assert sampled(source, tmp_path).code == 130
    part = tmp_path / "text.jsonl.part"
    pages = part.read_bytes()
    assert pages.count(b"\n") == 3 * 4
    opened = Path.open

    def killed(path, *given, **named):
        file = opened(path, *given, **named)
        if path == part and given[:1] in (("w",), ("a",)):
            file.close()
            raise KeyboardInterrupt
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", killed)
        assert sampled(source, tmp_path).code == 130 and part.read_bytes() == pages
    written.stop = None
    assert sampled(source, tmp_path).code == 0 and len(written.seen) == BATCHES


def test_the_same_command_writes_nothing_twice_and_another_is_refused(source, written, tmp_path):
    assert sampled(source, tmp_path).code == 0
    before = (tmp_path / "text.jsonl").read_bytes()
    written.seen.clear()
    assert sampled(source, tmp_path).code == 0 and written.seen == []
    refused(sampled(source, tmp_path, "--seed", 7), "is the text of a run with --seed 42, not 7")
    assert (tmp_path / "text.jsonl").read_bytes() == before and written.seen == []
    assert sampled(source, tmp_path, "--seed", 7, "--overwrite_output_dir").code == 0
    assert (tmp_path / "text.jsonl").read_bytes() != before


def test_an_old_text_stays_until_the_new_one_is_whole(source, written, tmp_path):
    new = tmp_path / "new"
    assert sampled(source, new, "--seed", 7).code == 0
    assert sampled(source, tmp_path / "old").code == 0
    before = (tmp_path / "old" / "text.jsonl").read_bytes()
    flags = ("--seed", 7, "--overwrite_output_dir")
    written.seen.clear()
    written.stop = 2
    ended = sampled(source, tmp_path / "old", *flags)
    assert ended.code == 130 and "the same command goes on where it was" in ended.err
    assert (tmp_path / "old" / "text.jsonl").read_bytes() == before
    written.seen.clear()
    written.stop = None
    assert sampled(source, tmp_path / "old").code == 0 and written.seen == []  # the old one is whole, and itself
    written.stop = 1
    assert sampled(source, tmp_path / "old", *flags).code == 130
    written.stop = None
    assert sampled(source, tmp_path / "old", *flags).code == 0
    assert (tmp_path / "old" / "text.jsonl").read_bytes() == (new / "text.jsonl").read_bytes() != before
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == sorted(path.name for path in new.iterdir())


def test_logits_that_are_no_numbers_write_nothing(source, written, make_model, tmp_path):
    other = make_model()
    other.model.norm.weight.data.fill_(1e38)  # finite, and what it makes is not
    other.lm_head.weight.data *= 1e10
    tiny.save_checkpoint(other, tmp_path / "other")
    words = "the model's logits are no finite numbers: its weights are damaged, float16 overflows"
    refused(sampled(tmp_path / "other", tmp_path / "own"), words)
    refused(sampled(source, tmp_path / "cold", "--temperature", 1e-42), words)
    assert not list(tmp_path.rglob("text.jsonl"))


def test_more_tokens_go_on_from_what_is_there_and_fewer_leave_it(source, written, tmp_path):
    whole, grown = tmp_path / "whole", tmp_path / "grown"
    assert sampled(source, whole).code == 0
    assert sampled(source, grown, "--tokens", 100).code == 0
    short = (grown / "text.jsonl").read_bytes()
    written.seen.clear()
    written.stop = 1
    assert sampled(source, grown).code == 130 and (grown / "text.jsonl").read_bytes() == short
    written.seen.clear()
    written.stop = None
    assert sampled(source, grown).code == 0 and len(written.seen) == BATCHES - 3
    assert (grown / "text.jsonl").read_bytes() == (whole / "text.jsonl").read_bytes()
    written.seen.clear()
    assert sampled(source, grown, "--tokens", 100).code == 0 and written.seen == []
    assert (grown / "text.jsonl").read_bytes() == (whole / "text.jsonl").read_bytes()


def test_another_models_text_and_a_strangers_are_left_alone(source, make_model, written, tmp_path):
    other = make_model()
    other.lm_head.weight.data *= 2
    tiny.save_checkpoint(other, tmp_path / "other")
    assert sampled(source, tmp_path / "own").code == 0
    refused(sampled(tmp_path / "other", tmp_path / "own"), "is the text of a run with --model_name_or_path")
    (tmp_path / "his").mkdir()
    (tmp_path / "his" / "text.jsonl").write_text("{}", encoding="utf-8")
    for flags in ((), ("--overwrite_output_dir",)):
        refused(sampled(source, tmp_path / "his", *flags), "holds 'text.jsonl', no text of this command; give a new")
        refused(sampled(source, source, *flags), "no text of this command; give a new folder")
    assert (tmp_path / "his" / "text.jsonl").read_text(encoding="utf-8") == "{}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tokens", 0), "--tokens is 0: give a number above 0, a whole one"),
        (("--tokens", "many"), "argument --tokens: invalid int value: 'many'; see --help"),
        (("--page", 1), "--page 1: a document opens with 1 tokens; give 2 or more"),
        (("--page", 65), "--page 65: the model was trained on 64 tokens at a time; give 64 or less"),
        (("--batch_size", -1), "--batch_size is -1"),
        (("--seed", -1), "--seed is -1"),
        (("--temperature", 0), "--temperature is 0.0: give a number above 0"),
        (("--pages", 3), "--pages"),
        (("--temperature", "nan"), "--temperature is nan"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_and_nothing_is_written(source, written, flags, words, tmp_path):
    refused(sampled(source, tmp_path / "own", *flags), words)
    assert not list(tmp_path.rglob("*.jsonl*"))


def test_a_page_too_small_for_a_conversation_is_told_before_the_first_document(make_model, written, tmp_path):
    asked = tiny.save_checkpoint(make_model(), tmp_path / "asked")
    (asked / "chat_template.jinja").write_text("the system says: {{ messages[0]['content'] }}", encoding="utf-8")
    line = "--page 4: a conversation opens with 4 tokens; give 5 or more"
    refused(sampled(asked, tmp_path / "own", "--page", 4), line)
    assert written.seen == [] and not list(tmp_path.rglob("text.jsonl*"))
    assert sampled(asked, tmp_path / "own").code == 0 and len(written.seen) == BATCHES


def test_what_cannot_be_written_is_told_before_the_model_is_loaded(source, monkeypatch, tmp_path):
    loaded, load = [], stage.load_model
    monkeypatch.setattr(stage, "load_model", lambda *given: loaded.append(given) or load(*given))
    (tmp_path / "file").write_text("mine")
    refused(sampled(source, tmp_path / "own", "--page", 65), "give 64 or less")
    refused(sampled(source, tmp_path / "file" / "own"), "cannot be written")
    assert not loaded
    assert sampled(source, tmp_path / "own").code == 0 and loaded  # control


def test_the_verb_as_a_function_writes_what_the_command_line_writes(source, tmp_path):
    settings = tvaprune.SampleSettings(
        str(source), str(tmp_path / "function"), tokens=300, page=20, batch_size=4, temperature=1, use_cpu=True
    )
    file = tvaprune.sample(settings)
    assert sampled(source, tmp_path / "line").code == 0
    assert file.read_bytes() == (tmp_path / "line" / "text.jsonl").read_bytes()


def test_memory_that_runs_out_says_what_would_fit_and_keeps_the_pages(source, monkeypatch, tmp_path):
    pages, asked = stage.pages, []

    def run_out(*given):
        asked.append(given)
        if len(asked) == 2:
            raise MemoryError
        return pages(*given)

    monkeypatch.setattr(stage, "pages", run_out)
    refused(sampled(source, tmp_path), "out of memory in writing text", "--batch_size or --page would fit")
    assert len((tmp_path / "text.jsonl.part").read_text(encoding="utf-8").splitlines()) == 4
