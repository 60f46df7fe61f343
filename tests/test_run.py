"""Which text is fitted, selected on and reported: a test of every choice."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

import tvaprune.cut.narrow as narrowing
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.settings import REPORTED_TOKENS, PruneSettings
from tvaprune.phases import Phases
from tvaprune.run import SELECTION_SAMPLES, Run


@pytest.fixture
def asked(make_model, monkeypatch):
    """Returns a function: flags, what is asked of the run -> the split, size, number and seed of the blocks."""

    def ask(flags, what):
        seen = []

        def blocks(tokenizer, name, split, size, count, seed, folder, bos, flag):
            assert bos is None  # a Llama needs none
            seen.append((split, size, count, seed))
            return Dataset.from_dict({"input_ids": [[0]]})

        monkeypatch.setattr("tvaprune.run.token_blocks", blocks)
        common = ["--model_name_or_path", "x", "--block_size", "16", "--ctx_length", "32"]
        what(Run(Arguments.parse([*common, *flags], "prune"), make_model(), None))
        (one,) = seen
        return one

    return ask


def test_gates_are_trained_and_units_scored_on_the_training_split_by_the_seed(asked):
    assert asked(["--seed", "5"], lambda run: run.train_blocks(64)) == ("train", 16, 64, 5)
    assert asked(["--max_train_samples", "7"], lambda run: run.train_blocks(64)) == ("train", 16, 7, 42)


def test_a_text_with_fewer_blocks_than_were_asked_for_is_told_of(asked, capsys):
    asked(["--max_train_samples", "1"], lambda run: run.train_blocks(64, tells=True))
    asked([], lambda run: run.train_blocks(64))
    assert capsys.readouterr().out == ""  # controls
    asked([], lambda run: run.train_blocks(64, tells=True))
    assert "has 1 blocks of 16 tokens to train on, not 64: so many fewer steps" in capsys.readouterr().out


def test_the_refit_fits_the_training_split(asked, capsys):
    asked(["--refit_samples", "1"], Run.refit_blocks)
    assert capsys.readouterr().out == ""  # control
    assert asked(["--refit_samples", "9"], Run.refit_blocks) == ("train", 16, 9, 42)
    assert "has 1 blocks of 16 tokens to fit, not the 9 of --refit_samples" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["validation", "test"])
def test_choices_are_made_on_validation_whatever_is_reported(split, asked):
    flags = ["--eval_split", split, "--max_eval_samples", "3", "--seed", "5"]
    assert asked(flags, Run.selection_blocks) == ("validation", 16, SELECTION_SAMPLES, 0)
    for fitted, held_out in ((1, 1), (9, 4), (128, 64), (256, SELECTION_SAMPLES), (1024, SELECTION_SAMPLES)):
        more = [*flags, "--refit_samples", str(fitted)]
        assert asked(more, Run.held_out_blocks) == ("validation", 16, held_out, 0)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_split_that_is_asked_for_is_reported_the_same_windows_whatever_the_seed(split, asked):
    flags = ["--eval_split", split, "--max_eval_samples", "3"]
    assert asked(flags, Run.windows) == (split, 32, 3, 0)
    assert asked([*flags, "--seed", "5"], Run.windows) == (split, 32, 3, 0)


def test_a_large_text_is_not_evaluated_whole_unless_asked(asked):
    tokens = ["--dataset_name", "mine.jsonl", "--ctx_length"]
    assert asked([*tokens, "64"], Run.windows) == ("validation", 64, REPORTED_TOKENS // 64, 0)
    assert asked([*tokens, str(2 * REPORTED_TOKENS)], Run.windows)[2] == 1
    assert asked([*tokens, "64", "--max_eval_samples", "9000"], Run.windows)[2] == 9000 > REPORTED_TOKENS // 64
    assert asked(["--ctx_length", "64"], Run.windows)[2] == 256  # C4, which is larger
    assert asked(["--ctx_length", "8192"], Run.windows)[2] == 64


CPU = torch.device("cpu")


@pytest.mark.parametrize(("offload", "moves"), [(True, [CPU]), (False, ["the device"])])
def test_refit_offload_leaves_the_dense_model_on_the_cpu(offload, moves, make_model, full_plan, monkeypatch):
    model, seen, cut_to = make_model(), [], []
    plan = full_plan(model)

    def move(module, device):
        if module is model:
            seen.append(device)
        return module

    class Stopped(Exception):
        pass

    def stop(*args, **options):
        raise Stopped

    def text():
        return [{"input_ids": [0]}]

    monkeypatch.setattr("torch.nn.Module.to", move)
    monkeypatch.setattr(narrowing, "apply_plan", lambda copied, plan, device: cut_to.append(device) or copied)
    monkeypatch.setattr(narrowing, "fold", lambda copied, plan: copied)
    monkeypatch.setattr(narrowing, "Layers", lambda model, device, **options: model)
    monkeypatch.setattr(narrowing, "Cut", lambda dense, narrow, plan: None)
    monkeypatch.setattr(narrowing, "refit_layers", stop)
    flags = SimpleNamespace(
        prune=PruneSettings(refit_offload=offload),
        training=SimpleNamespace(per_device_eval_batch_size=1, device="the device"),
    )
    texts = {"refit_blocks": text, "held_out_blocks": text}
    run = SimpleNamespace(args=flags, model=model, stored_dtype=None, phases=Phases(), **texts)
    with pytest.raises(Stopped):
        narrowing.narrow(run, plan, keep_dense=False)
    assert seen == moves and cut_to == ["the device"]


def test_a_reconstruction_takes_its_steps_in_the_order_of_the_runs_seed(make_model, full_plan, monkeypatch):
    model, given = make_model(), []
    monkeypatch.setattr(narrowing, "refit_layers", lambda *args, **options: None)
    monkeypatch.setattr(narrowing, "reconstruct_layers", lambda *args, seed, **options: given.append(seed))
    for update, seed in (("reconstruct", 5), ("reconstruct", 6), ("refit", 7)):  # the last one takes none
        flags = SimpleNamespace(prune=PruneSettings(weight_update=update), training=SimpleNamespace(seed=seed))
        run = SimpleNamespace(model=model, phases=Phases(), args=flags)
        narrowing._fitted(run, make_model(), CPU, True, (full_plan(model), None, None, 1))
    assert given == [5, 6]
