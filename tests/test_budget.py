"""What ``--memory`` sets, at the sizes of the models that it is for; nothing but their configs is loaded."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from benchmarks.simulate import CONFIGS
from tvaprune.budget import GIB, fit, fitted, memory_of, rotation_batch, times, times_training, work_of
from tvaprune.errors import InputError
from tvaprune.flags.conditions import parse
from tvaprune.flags.ranges import RESERVED_MEMORY
from tvaprune.measure import cost, update_cost
from tvaprune.models.parameters import model_parameters
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan

MINI = LlamaConfig(vocab_size=4096, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Flags of a verb, for a model of a name, in half the bytes unless it is the miniature."""
    folder = tmp_path_factory.mktemp("configs")
    tied, half = (LlamaConfig(**MINI.to_dict() | own) for own in ({"tie_word_embeddings": True}, {"dtype": "float16"}))
    for name, config in {**CONFIGS, "mini": MINI, "tied": tied, "half": half}.items():
        config.save_pretrained(folder / name)

    def flags(verb, name, *given):
        dtype = "float32" if name == "mini" else "bfloat16"
        own = ["--mask_loc", __file__] if verb == "finetune" else []
        own += ["--model_name_or_path", folder / name, "--dtype", dtype, "--use_cpu", "True"]
        return parse(verb, [*map(str, (*own, *given))])

    return flags


@pytest.mark.parametrize("name", CONFIGS)
def test_mask_learning_and_applying_fit_24(name, arguments, capsys):
    args = arguments("prune", name, "--memory", 24)
    assert update_cost.refit(work_of(args)) > 22 * GIB  # control
    fit(args)
    assert capsys.readouterr().out == "note: to fit --memory 24: --refit_offload True\n"
    assert args.prune.refit_offload and not args.training.activation_checkpointing
    assert max(cost.gate_step(work_of(args)), update_cost.refit(work_of(args))) <= 22 * GIB
    assert times(args) is (name != "Llama-3-8B")
    fit(args)
    assert capsys.readouterr().out == ""  # it is set


@pytest.mark.parametrize("name", CONFIGS)
def test_the_defaults_fit_40(name, arguments, capsys):
    args = arguments("prune", name)
    fit(args)
    assert not args.prune.refit_offload and not args.training.activation_checkpointing
    assert capsys.readouterr().out == "" and times(args)
    tuned = arguments("finetune", name)
    fit(tuned)
    batch, checkpointing = {"Llama-2-7B": (2, False), "Mistral-7B": (2, False), "Llama-3-8B": (4, True)}[name]
    training = tuned.training
    assert (training.per_device_train_batch_size, training.activation_checkpointing) == (batch, checkpointing)
    assert training.gradient_accumulation_steps == 128 // batch  # as many blocks a step as by default
    told = "--activation_checkpointing True " * checkpointing + f"--per_device_train_batch_size {batch} "
    told += f"--gradient_accumulation_steps {128 // batch}"
    assert capsys.readouterr().out == f"note: to fit --memory 40: {told}\n"
    assert cost.finetuning_step(work_of(tuned)) <= 38 * GIB
    assert times_training(tuned) is False
    assert times_training(arguments("finetune", name, "--memory", 120)) is True
    assert rotation_batch(args) == {"Llama-2-7B": 8, "Mistral-7B": 8, "Llama-3-8B": 4}[name]
    assert rotation_batch(args, memory=120) == 8 and rotation_batch(args, memory=1) == 1


@pytest.mark.parametrize("verb", ["prune", "apply", "finetune"])
def test_a_small_model_runs_as_ever(verb, arguments, capsys):
    args = arguments(verb, "mini", *(["--mask_loc", __file__] if verb == "apply" else []))
    before = vars(args.training).copy(), vars(args.prune).copy()
    fit(args)
    assert (vars(args.training), vars(args.prune)) == before and capsys.readouterr().out == ""
    assert times(args) and times_training(args) and rotation_batch(args) == 8


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        (("--per_device_train_batch_size", 8), "per_device_train_batch_size", 8),
        (("--gradient_accumulation_steps", 2), "gradient_accumulation_steps", 2),
        (("--activation_checkpointing", False), "activation_checkpointing", False),
    ],
)
def test_what_the_user_gave_stays_and_what_it_needs_is_told(given, name, value, arguments, capsys):
    args = arguments("finetune", "Llama-3-8B", *given)
    fit(args)
    assert getattr(args.training, name) == value
    told = capsys.readouterr().out
    needed = f"GiB with {given[0]} {given[1]}, as you gave, and --memory 40 leaves 38; --teacher_cache DIR leaves the"
    assert "note: training needs about" in told and needed in told


@pytest.mark.parametrize(
    ("verb", "given"),
    [
        ("finetune", ("--distill", False)),
        ("finetune", ("--do_zero_eval", True, "--compare_dense", True)),  # it is scored later
        ("prune", ()),
    ],
)
def test_a_teachers_cache_is_advised_only_where_it_leaves_the_dense_model_out(verb, given, arguments, capsys):
    fit(arguments(verb, "Llama-3-8B", "--memory", 8, *given))
    told = capsys.readouterr().out
    assert "note: training needs about" in told and "--teacher_cache" not in told


def test_scores_train_nothing(arguments, capsys):
    fit(arguments("prune", "Llama-3-8B", "--memory", 8, "--prune_method", "magnitude", "--weight_update", "fold"))
    assert capsys.readouterr().out == ""


def test_what_fits_in_no_way_runs_in_the_least(arguments):
    args = arguments("finetune", "Llama-3-8B", "--memory", 8)
    fit(args)
    assert (args.training.per_device_train_batch_size, args.training.activation_checkpointing) == (1, True)


def test_an_offload_that_was_refused_stays_refused(arguments, capsys):
    args = arguments("prune", "Llama-2-7B", "--memory", 24, "--refit_offload", "False")
    fit(args)
    assert not args.prune.refit_offload
    told = "note: the refit needs about 23 GiB, and --memory 24 leaves 22; --weight_update fold needs less"
    assert told in capsys.readouterr().out
    args = arguments(
        "prune", "Llama-2-7B", "--memory", 26, "--refit_offload", "False", "--weight_update", "reconstruct"
    )
    fit(args)
    told = capsys.readouterr().out
    assert "note: the reconstruct needs about" in told and "leaves 24; --weight_update refit needs less" in told
    folds = arguments("apply", "Llama-2-7B", "--mask_loc", __file__, "--memory", 24, "--weight_update", "fold")
    fit(folds)
    assert not folds.prune.refit_offload and capsys.readouterr().out == ""


def test_of_a_model_over_several_gpus_nothing_is_set_as_nobody_knows_what_each_holds(arguments, capsys):
    args = arguments("prune", "Llama-3-8B", "--memory", 24)
    args.source.device_map = "auto"
    fit(args)
    assert not args.prune.refit_offload and rotation_batch(args) == 8 and capsys.readouterr().out == ""
    args.source.device_map = "none"  # control: one GPU
    fit(args)
    assert args.prune.refit_offload and rotation_batch(args) == 1


def test_the_default_is_the_gpu_where_it_has_less(arguments, monkeypatch):
    args = arguments("prune", "mini")
    assert memory_of(args) == 40
    args.training = SimpleNamespace(device=torch.device("cuda"))
    for has, expected in ((24, 24), (80, 40)):
        card = SimpleNamespace(total_memory=has * GIB)
        monkeypatch.setattr("torch.cuda.get_device_properties", lambda device, card=card: card)
        assert memory_of(args) == expected
    args.source.memory = 80.0
    assert memory_of(args) == 80


def test_memory_is_more_than_what_stays_free(arguments):
    for wrong in (2, -1, math.nan, math.inf):
        with pytest.raises(InputError, match="--memory is .*: give a number of GiB above 2"):
            arguments("prune", "mini", "--memory", wrong)


def test_the_dense_model_stays_on_the_card_where_something_later_needs_it(arguments):
    def stays(verb, *given):
        args = arguments(verb, "mini", "--speed_batches", 0, *given)
        return fitted(args, work_of(args)).keep_dense

    assert not stays("prune", "--target_sparsity", 0.5)
    assert stays("prune", "--target_sparsity", 0.2, 0.5)  # it is cut once more
    assert stays("prune", "--do_zero_eval", True, "--compare_dense", True)
    assert stays("finetune") and not stays("finetune", "--distill", False)
    assert not stays("finetune", "--teacher_cache", "cache")


def test_the_dense_model_stays_on_the_card_where_both_are_timed(arguments):
    args = arguments("prune", "mini")
    assert fitted(args, work_of(args)).keep_dense


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_the_older_word_for_activation_checkpointing_counts_too(arguments):
    assert not work_of(arguments("finetune", "mini")).checkpointing  # control
    assert work_of(arguments("finetune", "mini", "--gradient_checkpointing", True)).checkpointing


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
def test_so_it_does_where_it_was_refused(arguments):
    args = arguments("finetune", "Llama-3-8B", "--gradient_checkpointing", False)
    fit(args)
    assert not args.training.activation_checkpointing


@pytest.mark.parametrize(("update", "size"), [("reconstruct", 4), ("refit", 2)])
def test_what_is_trained_on_a_card_without_bfloat16_is_counted_in_float32(update, size, arguments, monkeypatch):
    args = arguments("apply", "half", "--mask_loc", __file__, "--dtype", "auto", "--weight_update", update)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **options: False)
    assert work_of(args, on_card=True).weight_bytes == size


def test_a_refit_is_counted_on_the_blocks_that_it_fits_and_chooses_on(arguments):
    work = work_of(arguments("prune", "mini", "--refit_samples", 9))
    assert (work.refit_blocks, work.held_blocks, work.selection_blocks) == (9, 4, 128)


@pytest.mark.parametrize(
    ("verb", "given", "field", "value"),
    [
        ("prune", ("--block_size", 64), "block", 64),
        ("prune", ("--ctx_length", 32), "window", 32),
        ("prune", ("--max_eval_samples", 7), "windows", 7),
        ("prune", ("--per_device_eval_batch_size", 3), "eval_batch", 3),
        ("prune", ("--gradient_accumulation_steps", 1), "accumulates", False),
        ("prune", ("--gradient_accumulation_steps", 2), "accumulates", True),
        ("prune", ("--refit_offload", True), "refit_offload", True),
        ("prune", ("--target_sparsity", 0.2, 0.5), "targets", 2),
        ("finetune", ("--lora_r", 4), "lora_r", 4),
        ("finetune", ("--full_ft", True), "lora_r", 0),
        ("finetune", (), "train_lm_head", True),
        ("finetune", ("--train_lm_head", False), "train_lm_head", False),
        ("apply", ("--mask_loc", __file__, "--do_eval", True), "measures", True),
        ("apply", ("--mask_loc", __file__, "--do_eval", False), "measures", False),
    ],
)
def test_what_a_flag_asks_for_is_counted(verb, given, field, value, arguments):
    assert getattr(work_of(arguments(verb, "mini", *given)), field) == value


def test_a_tied_head_is_counted_as_trained_only_where_that_was_asked_for(arguments):
    given = ((), ("--train_lm_head", True))
    assert [work_of(arguments("finetune", "tied", *more)).train_lm_head for more in given] == [False, True]


def test_of_several_targets_the_widest_model_is_counted(arguments):
    several, widest = (work_of(arguments("prune", "mini", "--target_sparsity", *kind)) for kind in ((0.5, 0.2), (0.2,)))
    assert several.pruned == widest.pruned


def test_the_noise_of_gates_is_kept_on_a_cpu_and_drawn_again_on_a_card(arguments, monkeypatch):
    args = arguments("prune", "mini")
    assert [work_of(args, on_card=kind).redraws for kind in (None, True)] == [False, True]
    monkeypatch.setattr(type(args.training), "device", torch.device("cuda"))
    assert work_of(args).redraws


def test_a_head_that_turning_unties_is_counted(arguments):
    turned, kept = (work_of(arguments("prune", "tied", "--rotate", kind)) for kind in ("on", "auto"))
    for side in ("dense", "pruned"):
        more = model_parameters(getattr(turned, side)) - model_parameters(getattr(kept, side))
        assert more == 4096 * getattr(kept, side).hidden_size
    assert update_cost.refit(turned) > update_cost.refit(kept)


def keeping_all(shape):
    kept = PerUnit(torch.arange(128), (torch.arange(4),) * 6, (torch.arange(384),) * 6)
    return KeepPlan(kept, kept.map(lambda units: torch.ones(len(units))), shape, 1)


@pytest.mark.parametrize(("fits", "needed"), [(times, cost.timing), (times_training, cost.training_timing)])
def test_what_a_plan_keeps_tells_whether_both_models_fit_to_be_timed(fits, needed, arguments):
    args = arguments("finetune", "mini")
    plan = keeping_all(work_of(args).dense)
    between = (needed(work_of(args)) + needed(work_of(args, plan))) / 2
    args.source.memory = RESERVED_MEMORY + between / GIB
    assert fits(args) and not fits(args, plan)


def test_what_a_plan_keeps_tells_how_it_is_trained(arguments, capsys):
    args = arguments("finetune", "mini")
    plan = keeping_all(work_of(args).dense)
    args.source.memory = RESERVED_MEMORY + cost.finetuning_step(work_of(args)) / GIB
    fit(args)
    assert capsys.readouterr().out == ""
    fit(args, plan)
    assert "note: to fit --memory" in capsys.readouterr().out


def test_no_training_is_timed_where_nothing_is(arguments):
    assert not times_training(arguments("finetune", "mini", "--speed_batches", 0))


def test_a_layer_that_loses_all_is_counted_as_it_is_stored(arguments):
    shape = work_of(arguments("prune", "mini")).dense
    none = torch.arange(0)
    kept = PerUnit(torch.arange(128), (none, *[torch.arange(4)] * 5), (none, *[torch.arange(384)] * 5))
    plan = KeepPlan(kept, kept.map(lambda units: torch.ones(len(units))), shape, 1)
    counted = work_of(arguments("prune", "mini"), plan).pruned
    assert min(counted.num_key_value_heads) > 0 and min(counted.intermediate_size) > 0
    assert model_parameters(counted) == plan.num_parameters
    assert min(plan.shape_after.num_key_value_heads) == 0  # control
