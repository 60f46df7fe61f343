"""The released command lines keep working: every flag of theirs that this version acts on."""

import os
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from support import tiny
from support.in_process import run

from tvaprune.cli import released, run_command, run_verb
from tvaprune.errors import InputError
from tvaprune.flags.arguments import STAGES, Arguments
from tvaprune.flags.verbs import MODES, VERBS, check_flags

RELEASED = (
    "model_name_or_path", "ctx_length", "dataset_name", "max_train_samples", "max_eval_samples", "block_size",
    "vib_learning_rate",
    "reg_learning_rate", "kl_factor", "target_sparsity", "emb_mult", "att_mul", "inter_mul",
    "lagrangian_warmup_epochs", "prune_method", "save_loc", "mask_loc", "distill", "distill_temp",
    "do_train", "do_eval",     "overwrite_output_dir", "output_dir", "lora_r", "lora_alpha_ratio", "lora_dropout",
    "distill_ce_loss_alpha", "epoch_f", "finetune", "do_zero_eval", "write_out",
)  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_flag_is_accepted(name):
    verbs = [verb for verb, row in VERBS.items() if name in row.flags]
    assert verbs or name in MODES


def test_a_flag_that_was_never_released_is_not():
    assert not [verb for verb, row in VERBS.items() if "no_such_flag" in row.flags]


@pytest.mark.parametrize(
    ("verb", "words", "told"),
    [
        ("prune", ["my", "model", "--seed", "1"], "'my' belongs to no flag: give --FLAG VALUE"),
        ("sample", ["my_model"], "'my_model' belongs to no flag: give --FLAG VALUE"),
        ("describe", ["mask.pkl"], "the following arguments are required: --model_name_or_path"),
        ("estimate", ["--tflops", "fast"], "argument --tflops: invalid float value: 'fast'"),
        ("export", ["--format", "gguf", "model"], "the following arguments are required: out"),
        ("fetch", ["one", "another"], "unrecognized arguments: another"),
        ("report", [], "the following arguments are required: DIR"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_one_line(verb, words, told, capsys):
    assert run_command(lambda: run_verb(verb, words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line and line.endswith("; see --help")


@pytest.mark.parametrize("verb", ["prune", "apply", "finetune"])
def test_the_help_of_a_verb_fits_two_screens_and_says_all_that_acts(verb, capsys):
    with pytest.raises(SystemExit) as end:
        Arguments.parse(["--help"], verb)
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert len(shown.splitlines()) <= 110 and max(map(len, shown.splitlines())) <= 120
    assert [name for name in VERBS[verb].first if f"--{name}" not in shown] == []
    assert ("--lora_r" in shown) == (verb == "finetune")
    assert "--output_dir (out): " in shown and "--save_loc: " in shown  # which has no default


def test_help_says_all_of_a_flag_that_is_named_beside_it(capsys):
    def shown(*words):
        with pytest.raises(SystemExit):
            Arguments.parse([*words, "--help"], "prune")
        return capsys.readouterr().out

    whole, end = " ".join(shown("--rotate", "auto").split()), "tied embeddings are untied, exactly."
    assert whole.endswith(end) and "--memory: " not in whole
    assert end not in " ".join(shown().split()) and "--memory: " in shown()  # control


@pytest.mark.parametrize("verb", ["prune", "apply", "finetune"])
def test_help_as_it_is_typed_says_all_flags_and_only_those_named_where_some_are(verb):
    whole, one = run(verb, "--help"), run(verb, "--help", "--weight_update")
    assert whole.code == one.code == 0 and "--model_name_or_path" in whole.out and "say all of a flag" in whole.out
    assert "--weight_update {none," in one.out and "--model_name_or_path" not in one.out + one.err


def test_every_flag_of_ours_acts_in_a_verb():
    ours = {entry.name for cls in STAGES for entry in fields(cls)} - {"finetune"}
    assert ours - {name for row in VERBS.values() for name in row.flags} == set()


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("prune", ["--learning_rate", "1"], "gates are trained at --vib_learning_rate"),
        ("prune", ["--mask_loc", "k"], "--mask_loc acts in apply and finetune, not in prune"),
        ("prune", ["--lora-r=4"], "--lora_r acts in finetune, not in prune"),
        ("apply", ["--max_train_samples", "4"], "--max_train_samples acts in prune and finetune, not in apply"),
        ("apply", ["--num_train_epochs", "4"], "--num_train_epochs acts in prune and finetune"),
        ("finetune", ["--target_sparsity", "0.5"], "--target_sparsity acts in prune, not in finetune"),
        ("prune", ["--dim_multipel", "8"], "--dim_multipel is no flag of prune: perhaps --dim_multiple"),
        ("prune", ["--hub_token", "x"], "--hub_token is no flag of prune: see prune --help"),
        ("prune", ["--model", "x"], "--model is no flag of prune: perhaps --model_name_or_path; see prune --help"),
    ],
)
def test_a_flag_that_does_not_act_in_a_verb_is_refused_by_name(verb, flags, words):
    with pytest.raises(InputError, match=words):
        check_flags(verb, flags)
    check_flags(verb, ["--dim-multiple", "8", "--output_dir=o", "--seed", "-1"])  # control


def test_the_modes_of_the_released_scripts_are_accepted_from_them_alone():
    check_flags("apply", ["--do_train", "True"], MODES)
    with pytest.raises(InputError, match="--do_train is no flag of apply"):
        check_flags("apply", ["--do_train", "True"])


@pytest.mark.parametrize(
    ("given", "verb", "flags"),
    [
        (["--do_train", "--vib_learning_rate", "0.1"], "prune", ["--vib_learning_rate", "0.1"]),
        (["--mask_loc", "k", "--do_eval"], "apply", ["--mask_loc", "k", "--do_eval"]),
        (["--mask_loc", "k", "--do_train", "True", "--lora_r", "2"], "finetune", ["--mask_loc", "k", "--lora_r", "2"]),
        (["--mask_loc=k", "--finetune", "--do_eval", "True"], "finetune", ["--mask_loc=k"]),
        (["--do_zero_eval", "True"], "apply", ["--do_zero_eval", "True"]),
        (["--mask_loc", "k", "--do_train", "False", "--do_eval"], "apply", ["--mask_loc", "k", "--do_eval"]),
        (["--mask_loc", "k", "--do_train", "0", "--do_eval", "yes"], "apply", ["--mask_loc", "k", "--do_eval", "yes"]),
        (["--do_train", "yes", "--do_eval", "no", "--seed", "1"], "prune", ["--seed", "1"]),
        (["--mask-loc", "a-k", "--do-train", "--lora-r=2"], "finetune", ["--mask_loc", "a-k", "--lora_r=2"]),
    ],
)
def test_the_released_command_lines_are_translated(given, verb, flags):
    assert released(given) == (verb, flags)


@pytest.mark.parametrize(("given", "words"), [([], "nothing to do"), (["--finetune"], "--finetune needs --mask_loc")])
def test_a_released_command_line_that_asks_for_nothing_is_refused(given, words):
    with pytest.raises(InputError, match=words):
        released(given)


def test_a_gpu_without_float64_is_left_alone(monkeypatch, capsys):
    given = ["--model_name_or_path", "m", "--output_dir", "o"]
    assert not Arguments.parse(given, "prune").training.use_cpu  # control
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert Arguments.parse(given, "prune").training.use_cpu == (not torch.cuda.is_available())
    assert ("no float64" in capsys.readouterr().out) == (not torch.cuda.is_available())


@pytest.mark.parametrize(("own", "level"), [(None, "error"), ("debug", "debug")])
def test_the_hubs_library_tells_of_its_tries_only_where_it_is_asked_to(own, level, monkeypatch):
    monkeypatch.delenv("HF_HUB_VERBOSITY", raising=False)
    if own is not None:
        monkeypatch.setenv("HF_HUB_VERBOSITY", own)
    seen = []
    assert run_command(lambda: seen.append(os.environ["HF_HUB_VERBOSITY"])) == 0 and seen == [level]


def test_help_of_the_tool_needs_nothing_heavy():
    code = (
        "import sys; from tvaprune.cli import main; main(); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tiny.ROOT)
    assert shown.stdout.startswith("usage: tvaprune VERB") and shown.stdout.endswith("[]\n"), shown.stderr


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask_info_1.0.pkl"
    path.touch()  # parsing looks no further than its name
    return path


@pytest.mark.parametrize("asked", [("--do_train",), ("--finetune",)])
def test_fine_tuning_has_the_released_defaults(asked, mask):
    args = Arguments.parse(released([*asked, "--mask_loc", str(mask)])[1], "finetune")
    finetune, training = args.finetune, args.training
    assert (finetune.lora_r, finetune.lora_alpha_ratio, finetune.lora_dropout) == (128, 4, 0.05)
    assert (finetune.distill_ce_loss_alpha, args.data.block_size) == (0.01, 512)
    assert (training.learning_rate, training.num_train_epochs) == (1e-4, 2)
    assert training.train_batch_size * training.gradient_accumulation_steps * training.world_size == 128


def test_gate_training_keeps_its_own_defaults():
    training = Arguments.parse([], "prune").training
    assert (training.num_train_epochs, training.train_batch_size, training.gradient_accumulation_steps) == (1, 1, 1)
    assert (training.eval_steps, training.save_steps, training.load_best_model_at_end) == (50, 100, False)
    assert not training.eval_steps_given and Arguments.parse(["--eval_steps", "50"], "prune").training.eval_steps_given


def test_no_flag_of_fine_tuning_is_overwritten(mask):
    given = ("--learning_rate", 5e-5, "--num_train_epochs", 1, "--gradient_accumulation_steps", 3,
             "--per_device_train_batch_size", 2, "--eval_steps", 7, "--save_steps", 14)  # fmt: skip
    training = Arguments.parse(["--mask_loc", str(mask), *map(str, given)], "finetune").training
    assert (training.learning_rate, training.num_train_epochs) == (5e-5, 1)
    assert (training.gradient_accumulation_steps, training.train_batch_size) == (3, 2)
    assert (training.eval_steps, training.save_steps) == (7, 14)


def test_a_smaller_batch_is_accumulated_to_the_released_one(mask):
    training = Arguments.parse(["--mask_loc", str(mask), "--per_device_train_batch_size", "2"], "finetune").training
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
        Arguments.parse([str(flag) for flag in flags], "finetune")
