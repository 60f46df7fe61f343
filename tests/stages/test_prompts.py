"""Every run lets its models continue the same prompts: its page shows where they part, and nothing else changes."""

import pytest
import torch
from support import tiny
from support.in_process import run
from transformers import AutoTokenizer

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.errors import InputError
from tvaprune.flags.conditions import parse
from tvaprune.measure.generations import PROMPTS, answers
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import load_masks, save_masks
from tvaprune.report import steps

RUN = ("--use_cpu", "True", "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 4, "--dim_multiple", 4,
       "--speed_batches", 0, "--weight_update", "fold")  # fmt: skip


@pytest.fixture(scope="module")
def source(make_model, make_masks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    model = make_model()
    tiny.save_checkpoint(model, folder / "model")
    save_masks(make_masks(shape_of(model.config)), folder / "mask_info_1.0.pkl")
    return ("--model_name_or_path", folder / "model", "--dataset_name", tiny.write_text(folder / "text.txt"))


@pytest.fixture(scope="module")
def mask(source):
    return ("--mask_loc", source[1].parent / "mask_info_1.0.pkl")


def said(folder):
    return tiny.read_json(folder / "generations.json")["models"]


def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def failing(monkeypatch, at):
    """Lets the ``at``-th model that is asked fail, as a stranger's tokenizer may."""
    asked = []

    def fail(*given):
        asked.append(given)
        if len(asked) == at:
            raise RuntimeError("no such\ntoken")
        return answers(*given)

    monkeypatch.setattr(steps, "answers", fail)


def test_an_applied_mask_shows_what_both_models_say_and_no_other_figure_changes(source, mask, tmp_path):
    asked, silent = tmp_path / "asked", tmp_path / "silent"
    flags = ("--prompt_tokens", 6, "--save_pruned", tmp_path / "p", "--save_loc", asked)
    ended = run("apply", *source, *mask, *RUN, *flags)
    assert ended.code == 0 and "generations.json" in ended.out, ended.err + ended.trace
    assert list(said(asked)) == ["dense", "pruned"] and said(asked)["dense"] != said(asked)["pruned"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "p")
    assert said(asked)["pruned"] == answers(load_pruned(tmp_path / "p"), tokenizer, 6)
    assert all(prompt in page(asked) for prompt in PROMPTS) and "<mark>" in page(asked)
    assert run("apply", *source, *mask, *RUN, "--prompt_tokens", 0, "--save_loc", silent).code == 0
    assert not (silent / "generations.json").exists() and PROMPTS[0] not in page(silent)  # control
    one, other = (tiny.read_json(folder / "results.json") for folder in (asked, silent))
    assert one.pop("command") != other.pop("command") and one == other


def test_trained_gates_are_the_same_whether_prompts_are_continued(source, tmp_path):
    train = ("--max_train_samples", 8, "--per_device_train_batch_size", 4, "--save_strategy", "no")
    masks = []
    for words in (("--prompt_tokens", 0), (), ("--seed", 7)):
        output = tmp_path / str(len(masks))
        ended = run("prune", *source, *RUN, *train, *words, "--output_dir", output)
        assert ended.code == 0, ended.err + ended.trace
        masks.append(load_masks(next((output / "best").glob("mask_info_*.pkl"))).log_alpha)
    silent, asked, other = (torch.cat(list(scores)) for scores in masks)
    assert torch.equal(silent, asked) and not torch.equal(asked, other)  # control: another seed
    assert set(said(tmp_path / "1")) == {"dense", "pruned"} and not (tmp_path / "0" / "generations.json").exists()


def test_each_target_has_its_own_models_words(source, tmp_path, monkeypatch):
    flags = ("--prune_method", "magnitude", "--max_train_samples", 4, "--target_sparsity", 0.2, 0.6)
    assert run("prune", *source, *RUN, *flags, "--output_dir", tmp_path / "out").code == 0
    low, high = (said(tmp_path / "out" / f"sparsity_{target}") for target in (0.2, 0.6))
    assert low["dense"] == high["dense"] and low["pruned"] != high["pruned"]
    failing(monkeypatch, at=3)  # the second target's
    ended = run("prune", *source, *RUN, *flags, "--output_dir", tmp_path / "out", "--overwrite_output_dir")
    assert ended.code == 0 and ended.out.count("does not continue the prompts") == 1
    low, high = (said(tmp_path / "out" / f"sparsity_{target}") for target in (0.2, 0.6))
    assert set(low) == {"dense", "pruned"} and set(high) == {"dense"}  # not the first target's words


@pytest.mark.parametrize("at", [1, 2])
def test_a_model_that_cannot_be_asked_ends_no_run(at, source, mask, tmp_path, monkeypatch):
    failing(monkeypatch, at)
    ended = run("apply", *source, *mask, *RUN, "--save_loc", tmp_path / "out")
    name = ("dense", "pruned")[at - 1]
    assert ended.code == 0, ended.err + ended.trace
    assert f"note: the {name} model does not continue the prompts (no such token); the page is without" in ended.out
    assert tiny.read_json(tmp_path / "out" / "results.json")["perplexity"]["pruned"] > 1
    assert (PROMPTS[0] in page(tmp_path / "out")) == (at == 2)  # the dense model's words alone


def test_a_streamed_model_is_not_asked_and_says_so(source, mask, tmp_path):
    flags = ("--stream", "True", "--save_loc", tmp_path / "out")
    ended = run("apply", *source, *mask, *RUN[:-4], "--weight_update", "fold", *flags)
    assert ended.code == 0, ended.err + ended.trace
    assert "note: --shard and --stream keep no whole model" in ended.out
    assert not (tmp_path / "out" / "generations.json").exists()


@pytest.mark.parametrize(
    ("verb", "flags", "acts"),
    [
        ("apply", ("--stream", "True", "--do_eval", "True", "--mask_loc", "m"), False),
        ("apply", ("--mask_loc", "m", "--save_pruned", "p"), False),
        ("apply", ("--mask_loc", "m", "--do_eval", "True"), True),
        ("prune", (), True),
        ("finetune", ("--plan", "m"), True),
    ],
)
def test_asked_for_where_nobody_is_asked_it_is_refused(verb, flags, acts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").write_text("")
    words = [*flags, "--use_cpu", "True", "--prompt_tokens", "8"]
    if acts:
        assert parse(verb, words).evaluation.prompt_tokens == 8
    else:
        with pytest.raises(InputError, match="--prompt_tokens would do nothing"):
            parse(verb, words)
