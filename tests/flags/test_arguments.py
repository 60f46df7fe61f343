"""The released command lines keep working: every flag of method.md, section 7, that this version acts on."""

import sys

import pytest

from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments

RELEASED = (
    "model_name_or_path", "ctx_length", "dataset_name", "max_train_samples", "max_eval_samples", "block_size",
    "vib_learning_rate",
    "reg_learning_rate", "kl_factor", "target_sparsity", "emb_mult", "att_mul", "inter_mul",
    "lagrangian_warmup_epochs", "prune_method", "save_loc", "mask_loc", "distill", "distill_temp",
    "do_train", "do_eval",     "overwrite_output_dir", "output_dir", "lora_r", "lora_alpha_ratio", "lora_dropout",
    "distill_ce_loss_alpha", "epoch_f", "finetune", "do_zero_eval", "write_out",
)  # fmt: skip


@pytest.fixture(scope="module")
def help_text():
    from pytest import MonkeyPatch

    with MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["tva_prune.py", "--help"])
        lines = []
        patch.setattr(sys.stdout, "write", lines.append)
        Arguments.parse()
    return "".join(lines)


@pytest.mark.parametrize("flag", RELEASED)
def test_a_released_flag_is_there_with_its_help(flag, help_text):
    assert f"--{flag}" in help_text


def test_help_says_which_defaults_serve_which_run(help_text):
    words = " ".join(help_text.split())
    assert "default -5 in a short run, else the released -9" in words
    assert "default 0.1 in a short run (under 1000 steps)" in words


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask_info_1.0.pkl"
    path.touch()  # parsing looks no further than its name
    return path


@pytest.mark.parametrize("asked", [("--do_train",), ("--finetune",)])
def test_fine_tuning_has_the_released_defaults(asked, mask):
    args = Arguments.parse([*asked, "--mask_loc", str(mask)])
    finetune, training = args.finetune, args.training
    assert (finetune.lora_r, finetune.lora_alpha_ratio, finetune.lora_dropout) == (128, 4, 0.05)
    assert (finetune.distill_ce_loss_alpha, args.data.block_size) == (0.01, 512)
    assert (training.learning_rate, training.num_train_epochs) == (1e-4, 2)
    assert training.train_batch_size * training.gradient_accumulation_steps * training.world_size == 128


def test_gate_training_keeps_its_own_defaults():
    training = Arguments.parse(["--do_train"]).training
    assert (training.num_train_epochs, training.train_batch_size, training.gradient_accumulation_steps) == (1, 1, 1)
    assert (training.eval_steps, training.save_steps, training.load_best_model_at_end) == (50, 100, False)


def test_no_flag_of_fine_tuning_is_overwritten(mask):
    given = ("--learning_rate", 5e-5, "--num_train_epochs", 1, "--gradient_accumulation_steps", 3,
             "--per_device_train_batch_size", 2, "--eval_steps", 7, "--save_steps", 14)  # fmt: skip
    training = Arguments.parse(["--do_train", "--mask_loc", str(mask), *map(str, given)]).training
    assert (training.learning_rate, training.num_train_epochs) == (5e-5, 1)
    assert (training.gradient_accumulation_steps, training.train_batch_size) == (3, 2)
    assert (training.eval_steps, training.save_steps) == (7, 14)


def test_a_smaller_batch_is_accumulated_to_the_released_one(mask):
    training = Arguments.parse(["--do_train", "--mask_loc", str(mask), "--per_device_train_batch_size", "2"]).training
    assert training.gradient_accumulation_steps * training.world_size == 64


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora_r", 0), "--lora_r is 0: give a number above 0"),
        (("--lora_dropout", 1), "--lora_dropout is 1"),
        (("--distill_ce_loss_alpha", -1), "--distill_ce_loss_alpha is -1"),
        (("--early_stopping_patience", 0), "--early_stopping_patience is 0"),
        (("--teacher_cache", "c", "--distill_hidden_alpha", 1), "--teacher_cache holds no hidden states"),
    ],
)
def test_values_that_fine_tuning_cannot_use_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        Arguments.parse([str(flag) for flag in flags])
