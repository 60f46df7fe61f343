"""The released command lines keep working: every flag of method.md, section 7, that this version acts on."""

import sys

import pytest

from tvaprune.run import Arguments

RELEASED = (
    "model_name_or_path", "ctx_length", "dataset_name", "max_train_samples", "max_eval_samples", "block_size",
    "vib_learning_rate",
    "reg_learning_rate", "kl_factor", "target_sparsity", "emb_mult", "att_mul", "inter_mul",
    "lagrangian_warmup_epochs", "prune_method", "save_loc", "mask_loc", "distill", "distill_temp",
    "do_train", "do_eval",     "overwrite_output_dir", "output_dir",
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
