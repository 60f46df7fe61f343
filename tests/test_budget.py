"""What ``--memory`` sets, at the sizes of the models that it is for; nothing is loaded."""

import math
from types import SimpleNamespace

import pytest
import torch

from tvaprune.budget import (
    GIB,
    Sizes,
    both_fit,
    both_train,
    fit_cut,
    fit_gates,
    fit_tuning,
    memory_of,
)
from tvaprune.errors import InputError
from tvaprune.flags.conditions import parse
from tvaprune.models.shape import ModelShape

SHAPES = {
    "Llama-2-7B": ModelShape.uniform(4096, 32, 32, 32, 128, 11008, 32000),
    "Mistral-7B": ModelShape.uniform(4096, 32, 32, 8, 128, 14336, 32000),
    "Llama-3-8B": ModelShape.uniform(4096, 32, 32, 8, 128, 14336, 128256),
}
MINI = ModelShape.uniform(128, 6, 4, 4, 32, 384, 4096)
# GiB at the peak, counted on fake tensors with the code itself; half of the layers' parameters gone. Gates: 1 x 512,
# plain and checkpointed; LoRA of rank 128 with a live teacher: 8 x 512 and 1 x 512 plain, 1 x 512 checkpointed.
COUNTED = {
    "Llama-2-7B": (17.32, 13.08, 52.09, 27.90, 25.26),
    "Mistral-7B": (18.78, 14.02, 55.07, 29.58, 26.78),
    "Llama-3-8B": (21.35, 16.59, 65.84, 40.35, 37.55),
}


def sizes(name, itemsize=2):
    return Sizes.at_sparsity(SHAPES.get(name, MINI), 0.5, itemsize)


def arguments(verb, *flags):
    return parse(verb, ["--use_cpu", "True", *map(str, flags)])


@pytest.mark.parametrize("name", SHAPES)
def test_the_bytes_of_a_step_are_those_counted(name):
    s = sizes(name)
    gates = [s.dense_bytes + s.activations(512, checkpointing) for checkpointing in (False, True)]
    static = s.dense_bytes + s.pruned_bytes + s.trained_bytes(128, True, s.share)
    passes = [(4096, False), (512, False), (512, True)]
    tuning = [static + s.activations(tokens, checkpointing, s.share) for tokens, checkpointing in passes]
    assert [value / GIB for value in (*gates, *tuning)] == pytest.approx(COUNTED[name], rel=0.06)
    assert s.share == pytest.approx(0.5)


@pytest.mark.parametrize("name", SHAPES)
def test_mask_learning_and_applying_fit_24(name, capsys):
    args = arguments("prune", "--memory", 24)
    fit_gates(args, sizes(name))
    step = sizes(name).dense_bytes + sizes(name).activations(512, args.training.activation_checkpointing)
    assert step <= 22 * GIB
    assert args.prune.refit_offload and sizes(name).refit_bytes(True, 256 * 512) <= 22 * GIB
    assert sizes(name).refit_bytes(False, 256 * 512) > 22 * GIB  # control
    assert "note: to fit --memory 24: " in (told := capsys.readouterr().out) and "--refit_offload True" in told
    assert both_fit(args, sizes(name)) is (name != "Llama-3-8B")
    assert args.training.per_device_train_batch_size * args.training.gradient_accumulation_steps == 1


@pytest.mark.parametrize("name", SHAPES)
def test_the_defaults_fit_40(name, capsys):
    args = arguments("prune")
    fit_gates(args, sizes(name))
    assert not args.prune.refit_offload and not args.training.activation_checkpointing
    assert capsys.readouterr().out == "" and both_fit(args, sizes(name))
    tuned = arguments("finetune", "--mask_loc", __file__)
    fit_tuning(tuned, sizes(name), 128, True)
    batch, accumulation = tuned.training.per_device_train_batch_size, tuned.training.gradient_accumulation_steps
    assert batch < 8 and batch * accumulation == 128  # as many blocks a step as by default
    assert tuned.training.activation_checkpointing is (name == "Llama-3-8B")
    told = capsys.readouterr().out
    assert f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation}" in told
    assert both_train(tuned, sizes(name), 128, True) is False


def test_a_small_model_runs_as_ever(capsys):
    for verb, fit in (("prune", fit_gates), ("prune", fit_cut)):
        args = arguments(verb)
        before = vars(args.training).copy(), vars(args.prune).copy()
        fit(args, sizes("mini", 4))
        assert (vars(args.training), vars(args.prune)) == before
    args = arguments("finetune", "--mask_loc", __file__)
    fit_tuning(args, sizes("mini", 4), 128, True)
    assert (args.training.per_device_train_batch_size, args.training.activation_checkpointing) == (8, False)
    assert both_train(args, sizes("mini", 4), 128, True) and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--per_device_train_batch_size", 8), "per_device_train_batch_size", 8),
        (("--gradient_accumulation_steps", 2), "gradient_accumulation_steps", 2),
        (("--activation_checkpointing", False), "activation_checkpointing", False),
    ],
)
def test_what_the_user_gave_stays_and_what_it_needs_is_told(given, name, value, capsys):
    args = arguments("finetune", "--mask_loc", __file__, *given)
    fit_tuning(args, sizes("Llama-3-8B"), 128, True)
    assert getattr(args.training, name) == value
    told = capsys.readouterr().out
    needed = f"GiB with {given[0]} {given[1]}, as you gave, and --memory 40 leaves 38; --teacher_cache DIR leaves the"
    assert "note: training needs about" in told and needed in told


def test_an_offload_that_was_refused_stays_refused(capsys):
    args = arguments("prune", "--memory", 24, "--refit_offload", "False")
    fit_gates(args, sizes("Llama-2-7B"))
    assert not args.prune.refit_offload
    assert "note: the refit needs about 27 GiB, and --memory 24 leaves 22" in capsys.readouterr().out
    folds = arguments("prune", "--memory", 24, "--weight_update", "fold")
    fit_cut(folds, sizes("Llama-2-7B"))
    assert not folds.prune.refit_offload and capsys.readouterr().out == ""


def test_the_default_is_the_gpu_where_it_has_less(monkeypatch):
    args = arguments("prune")
    assert memory_of(args) == 40
    args.training = SimpleNamespace(device=torch.device("cuda"))
    for has, expected in ((24, 24), (80, 40)):
        card = SimpleNamespace(total_memory=has * GIB)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, card=card: card)
        assert memory_of(args) == expected
    args.source.memory = 80.0
    assert memory_of(args) == 80


def test_memory_is_a_number_above_0():
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="--memory is .*: give a number above 0"):
            arguments("prune", "--memory", wrong)
