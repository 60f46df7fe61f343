"""`tvaprune estimate`, and the line that a run begins with."""

import copy
import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from support import tiny
from support.folders import edit_config

from tvaprune import (
    DataSettings,
    DistillSettings,
    EvalSettings,
    FinetuneSettings,
    ModelSettings,
    PruneSettings,
    estimate,
    estimates,
)
from tvaprune.cli import run_command, run_verb
from tvaprune.flags.conditions import parse
from tvaprune.measure.work import forward_flops, narrower, weights
from tvaprune.models.shape import shape_of
from tvaprune.phases import (
    DENSE_PERPLEXITY,
    FINE_TUNING,
    NARROWING,
    PRUNED_PERPLEXITY,
    RECONSTRUCT_CHOICE,
    REFIT,
    REFIT_CHOICE,
    UNIT_SCORES,
)
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import save_masks
from tvaprune.plan.widths import WidthRules

GIB = 2**30


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The config of a model of Llama-2-7B's sizes: no weights, no tokenizer."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         max_position_embeddings=4096, dtype=torch.bfloat16)  # fmt: skip
    config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(make_model, make_masks, tmp_path_factory):
    """The flags of a tiny model and its text, and a mask."""
    folder = tmp_path_factory.mktemp("small")
    model = make_model("llama")
    tiny.save_checkpoint(model, folder / "model")
    save_masks(make_masks(shape_of(model.config)), folder / "mask_info_1.0.pkl")
    text = tiny.write_text(folder / "text.txt")
    flags = ["--model_name_or_path", str(folder / "model"), "--dataset_name", str(text), "--block_size", "16",
             "--ctx_length", "16", "--max_eval_samples", "4", "--speed_batches", "0", "--use_cpu"]  # fmt: skip
    return flags, folder / "mask_info_1.0.pkl"


def phases(found):
    return {phase.name: phase for phase in found.phases}


def weights_of(found):
    """The bytes of the dense model."""
    return weights(found.work.dense, found.work)


def test_an_estimate_needs_the_config_alone_and_follows_the_flags(large):
    found = phases(estimate(large, "prune"))
    assert list(found) == ["dense perplexity", "rotation", "gate training", "refit", "pruned perplexity"]
    weights = 6_738_415_616 * 2
    assert all(phase.device > weights for phase in found.values())
    assert 9e16 < found["gate training"].flops < 2.2e17  # 4,500 steps of some 21 TFLOP, and the scorings
    longer = phases(estimate(large, "prune", per_device_train_batch_size=4))["gate training"]
    less = phases(estimate(large, "prune", per_device_train_batch_size=4, activation_checkpointing=True))
    assert less["gate training"].device < longer.device and less["gate training"].flops > longer.flops
    there, away = (
        phases(estimate(large, "apply", PruneSettings(refit_offload=offload)))["refit"] for offload in (False, True)
    )
    assert away.device < there.device - weights and away.host > there.host + weights
    folded = phases(estimate(large, "apply", PruneSettings(weight_update="fold")))
    assert list(folded) == ["dense perplexity", "cut", "pruned perplexity"]


def test_masks_are_scored_as_often_as_a_run_scores_them(large):
    found = estimate(large, "prune")
    assert (found.work.steps, found.work.scorings) == (4500, 26)  # every 174 steps, a quarter of the training's work
    often = estimate(large, "prune", eval_steps=50)
    assert often.work.scorings == 90
    scored = [phases(each)["gate training"].flops for each in (found, often)]
    one = forward_flops(found.work.dense, 128 * 512, 512)
    assert scored[1] - scored[0] == pytest.approx(64 * one)
    assert estimate(large, "prune", eval_strategy="no").work.scorings == 0
    assert "gate training" not in phases(estimate(large, "prune", PruneSettings(prune_method="flap")))
    assert estimate(large, "finetune").work.scorings == 9  # 72 steps, --eval_steps 0.1 of them is every 8


def test_as_many_blocks_and_epochs_are_counted_as_are_asked_for(large):
    def steps(verb, *settings, blocks=900):
        return estimate(large, verb, DataSettings(max_train_samples=blocks), *settings).work.steps

    assert (steps("prune", blocks=300), steps("prune")) == (300, 900)
    once, thrice = (steps("finetune", FinetuneSettings(epoch_f=epochs)) for epochs in (1.0, 3.0))
    assert thrice == 3 * once > 0
    taylor = PruneSettings(prune_method="taylor")
    few, default = (estimate(large, "prune", DataSettings(max_train_samples=count), taylor) for count in (8, None))
    assert default.counted[UNIT_SCORES] == 16 * few.counted[UNIT_SCORES]  # of 128


@pytest.mark.parametrize("window", [512, 2048, 4096])
def test_evaluating_both_models_costs_less_than_a_quarter_of_the_training(window, large):
    found = estimate(large, "prune", DataSettings(ctx_length=window), eval_strategy="no")
    flops = {name: phase.flops for name, phase in phases(found).items()}
    evaluated = flops[DENSE_PERPLEXITY] + flops[PRUNED_PERPLEXITY]
    assert found.work.windows * window <= 2**19 and evaluated < flops["gate training"] / 4
    more = estimate(large, "prune", DataSettings(ctx_length=window, max_eval_samples=2**21 // window)).work
    assert more.windows * window == 2**21  # control: as asked


def test_what_chooses_a_share_is_a_part_of_its_own(large):
    found = estimate(large, "apply", weight_update="reconstruct")
    refit = phases(found)["refit"]
    assert set(found.counted) == {DENSE_PERPLEXITY, *NARROWING[1:], PRUNED_PERPLEXITY}
    assert sum(found.counted.values()) == pytest.approx(found.flops)
    assert 0 < found.counted[REFIT_CHOICE] < refit.flops
    assert found.counted[REFIT_CHOICE] + found.counted["refit"] == pytest.approx(refit.flops)
    assert found.counted[REFIT_CHOICE] == 2 * found.counted[RECONSTRUCT_CHOICE]  # six shares, and three
    folded = estimate(large, "apply", weight_update="fold").counted  # control
    assert folded["cut"] == 0 and folded.keys().isdisjoint(NARROWING[1:])


def test_what_a_phase_is_helped_by_is_not_done_already(large):
    """Of what a run of defaults has set for 24 GB nothing is named: checkpointing, a block a pass."""
    found = {memory: estimate(large, "finetune", ModelSettings(str(large), memory=memory)) for memory in (24.0, 200.0)}
    assert {memory: (one.work.checkpointing, one.work.batch) for memory, one in found.items()} == {
        24.0: (True, 1),
        200.0: (False, 8),
    }
    always = ["a smaller --block_size", "a smaller --lora_r", "--teacher_cache DIR"]
    more = ["--activation_checkpointing True", "a smaller --per_device_train_batch_size"]
    told = {memory: phases(one) for memory, one in found.items()}
    assert told[24.0][FINE_TUNING].helps.split(", ") == always
    assert told[200.0][FINE_TUNING].helps.split(", ") == more + always
    assert told[24.0][PRUNED_PERPLEXITY].helps.startswith("--teacher_cache DIR, ")
    assert "teacher" not in told[24.0][DENSE_PERPLEXITY].helps
    assert told[24.0][REFIT].helps == "--weight_update fold" and "offload" in told[200.0][REFIT].helps
    full = phases(estimate(large, "finetune", FinetuneSettings(full_ft=True), DistillSettings(distill=False)))
    assert full[FINE_TUNING].helps.endswith("a smaller --block_size, LoRA in place of --full_ft")


def test_a_rotation_is_counted_where_the_run_turns(large):
    """Of Llama-2-7B: 65 norms' moments and a forward and a backward pass of 128 blocks; 8 at a time fit the default."""
    found = estimate(large, "prune")
    rotation = phases(found)["rotation"]
    assert found.work.rotation_batch == 8 and rotation == found.largest and rotation.device < 38 * GIB
    assert rotation.host == 6 * 8 * 4096**2 and rotation.helps.startswith("--rotate off")
    tokens, linear = 128 * 512, 6_738_415_616 - 32000 * 4096
    assert rotation.flops == pytest.approx(tokens * (4 * linear + 65 * 4 * 4096**2), rel=0.05)
    less = estimate(large, "prune", ModelSettings(str(large), memory=24.0))
    assert less.work.rotation_batch < 8 and phases(less)["rotation"].device <= 22 * GIB
    on_another = estimates.estimate_of(parse("prune", ["--model_name_or_path", str(large)]), on_card=True, memory=24.0)
    assert on_another.work == less.work
    for off in (PruneSettings(rotate="off"), PruneSettings(prune_method="flap")):
        assert "rotation" not in phases(estimate(large, "prune", off))
    assert "rotation" in phases(estimate(large, "prune", PruneSettings(prune_method="flap", rotate="on")))
    assert "rotation" not in phases(estimate(large, "apply"))


def test_the_host_holds_little_more_than_the_weights(large):
    """Offloaded too: a refit folds again what it goes back to, a reconstruction takes the place of dense layers."""

    def held(memory, update, *settings):
        found = estimate(large, "prune", ModelSettings(str(large), memory=memory), *settings, weight_update=update)
        assert found.work.refit_offload == (memory == 24)
        return found.host / weights_of(found)

    alone = EvalSettings(speed_batches=0)
    for memory, update, *settings in [(24, "refit"), (40, "refit"), (40, "reconstruct"), (24, "reconstruct", alone)]:
        assert 1 <= held(memory, update, *settings) <= 1.3
    assert held(24, "reconstruct") > 1.3  # control: what is timed beside the narrower model stays


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_dtype_on_a_gpu_is_the_checkpoints_and_on_a_cpu_float32(stored, large, tmp_path):
    shutil.copy(large / "config.json", tmp_path)
    edit_config(tmp_path, dtype=stored)
    on_card, on_cpu = (estimate(tmp_path, "apply", use_cpu=cpu) for cpu in (False, True))
    assert on_card.work.weight_bytes == 2 and on_cpu.work.weight_bytes == 4
    assert on_card.host > 0 and on_cpu.host == 0
    assert [estimate(tmp_path, verb).work.weight_bytes for verb in ("prune", "finetune")] == [2, 2]


def test_on_a_cpu_nothing_is_there_twice(large):
    """A model is loaded where it computes, and a cut that is the last takes the dense one's place."""
    weights = 6_738_415_616 * 4
    found = phases(estimate(large, "apply", PruneSettings(weight_update="fold"), EvalSettings(speed_batches=0),
                            use_cpu=True))  # fmt: skip
    assert weights < found["dense perplexity"].device < 1.2 * weights and found["cut"].device == weights
    timed = phases(estimate(large, "apply", PruneSettings(weight_update="fold"), ModelSettings(str(large), memory=80.0),
                            use_cpu=True))  # fmt: skip
    assert timed["cut"].device > 1.4 * weights  # control: both stay, to be timed


def test_what_is_done_for_each_target_is_counted_for_each(large, capsys):
    one, three = (estimate(large, "prune", PruneSettings(target_sparsity=ts)) for ts in ([0.2], [0.2, 0.35, 0.5]))
    cut = sum(phases(one)[name].flops for name in ("refit", "pruned perplexity"))
    assert three.flops - one.flops == pytest.approx(2 * cut)
    assert three.counted == one.counted  # control: each target's own phases are as long as ever
    flags = ["--model_name_or_path", str(large), "--verb", "prune", "--target_sparsity", "0.2", "0.5", "--json"]
    run_verb("estimate", flags)
    told = {phase["name"]: phase["times"] for phase in json.loads(capsys.readouterr().out)["phases"]}
    assert told == {"dense perplexity": 1, "rotation": 1, "gate training": 1, "refit": 2, "pruned perplexity": 2}
    run_verb("estimate", flags[:-1])
    assert "refit, 2 times" in capsys.readouterr().out


def test_scores_that_go_backward_are_counted(large):
    flap, taylor, fewer = (
        phases(estimate(large, "prune", PruneSettings(prune_method=method), per_device_eval_batch_size=batch))
        for method, batch in (("flap", 8), ("taylor_global", 8), ("taylor_global", 1))
    )
    assert list(flap) == ["dense perplexity", "refit", "pruned perplexity"]  # control
    assert list(taylor) == ["dense perplexity", "scores", "refit", "pruned perplexity"]
    assert taylor["scores"].device > 2 * 6_400_000_000 * 2  # weights and gradients
    assert fewer["scores"].device < taylor["scores"].device
    assert fewer["scores"].flops == pytest.approx(taylor["scores"].flops)


def test_what_apply_does_not_measure_is_not_counted(large):
    flags = ["--model_name_or_path", str(large), "--verb", "apply", "--weight_update", "fold"]
    measured = run_verb("estimate", [*flags, "--prompt_tokens", "8"])  # by default, as apply does
    cut = run_verb("estimate", [*flags, "--do_eval", "False"])
    assert list(phases(measured)) == ["dense perplexity", "cut", "pruned perplexity"]
    assert list(phases(cut)) == ["cut"] and cut.largest.device < measured.largest.device
    assert cut.host == measured.host > 0  # the model is loaded all the same


def test_a_mask_gives_the_widths(small, make_masks):
    flags, mask = small
    found = run_verb("estimate", ["--verb", "apply", *flags, "--mask_loc", str(mask), "--dim_multiple", "4"])
    shape = found.work.dense
    plan = plan_from_masks(make_masks(shape), shape, WidthRules(4))
    assert found.work.pruned.intermediate_size == plan.intermediate_size
    assert narrower(shape, 0.5).intermediate_size != plan.intermediate_size  # control: what no mask would give


def test_table_and_json_say_the_same(large, capsys):
    flags = ["--model_name_or_path", str(large), "--verb", "finetune", "--tflops", "300"]
    found = run_verb("estimate", flags)
    told = capsys.readouterr().out
    run_verb("estimate", [*flags, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert content["minutes"] == pytest.approx(found.flops / 300e12 / 60)
    assert [phase["name"] for phase in content["phases"]] == [phase.name for phase in found.phases]
    assert all(phase.name in told for phase in found.phases) and "at 300 TFLOP/s" in told
    assert content["fits"]["80 GB"].startswith("fits, ") and content["fits"]["24 GB"].startswith("too small for ")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--verb", "compare"], "--verb compare: give one of prune, apply, finetune"),
        (["--tflops", "0"], "--tflops is 0.0: give a speed in TFLOP/s"),
        (["--lora_r", "8"], "--lora_r acts in finetune, not in prune"),
        (["--block_size", "1"], "--block_size is 1"),
        (
            ["--verb", "apply", "--stream", "True", "--mask_loc", __file__, "--do_eval", "True"],
            "--stream True: an estimate is of a model in memory",
        ),
    ],
)
def test_what_cannot_be_used_is_refused(large, flags, message, capsys):
    code = run_command(lambda: run_verb("estimate", ["--model_name_or_path", str(large), *flags]))
    assert code == 2 and message in capsys.readouterr().err


def test_a_run_begins_with_its_line_and_ends_there_if_it_cannot_fit(small, tmp_path, monkeypatch, capsys):
    flags, mask = small
    flags = ["--do_eval", "True", *flags, "--mask_loc", str(mask), "--weight_update", "fold"]
    run_verb("apply", [*flags, "--output_dir", str(tmp_path / "fits")])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("estimate: "))
    assert "MiB of memory" in line and "PFLOP" in line
    memory = copy.copy(psutil.virtual_memory())._replace(total=2**16)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert run_command(lambda: run_verb("apply", [*flags, "--output_dir", str(tmp_path / "not")])) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "needs" in error and "are this machine's memory: give a smaller --memory, " in error
    assert not any((tmp_path / "not").glob("*"))


def test_a_dense_model_that_is_measured_tells_its_need_too(small, tmp_path, monkeypatch, capsys):
    flags = [*small[0], "--output_dir", str(tmp_path / "out")]
    run_verb("apply", ["--do_eval", "True", *flags])
    told = capsys.readouterr().out
    (line,) = (line for line in told.splitlines() if line.startswith("estimate: "))
    assert line.split("(")[1].startswith("dense perplexity)") and "phase 1 of" not in told  # nothing is refitted
    memory = copy.copy(psutil.virtual_memory())._replace(total=2**14)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert run_command(lambda: run_verb("apply", ["--do_eval", "True", *flags, "--overwrite_output_dir"])) == 2
    assert "the dense perplexity needs" in capsys.readouterr().err.splitlines()[-1]


def test_on_a_gpu_what_is_free_counts(large, monkeypatch, capsys):
    args = parse("prune", ["--model_name_or_path", str(large)])
    monkeypatch.setattr(type(args.training), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 80 * GIB))
    with pytest.raises(estimates.InputError, match="the rotation needs 33.6 GiB, .* give a smaller --memory, --rotate"):
        estimates.announce(args)
    capsys.readouterr()
    args.source.memory = 28.0
    flops, told = estimates.announce(args).flops, capsys.readouterr().out
    assert "GiB on the GPU (" in told
    assert f", {flops / 1e15:.2g} PFLOP ({flops / 9e15:.0f} min at 150 TFLOP/s)\n" in told
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * GIB, 80 * GIB))
    with pytest.raises(estimates.InputError, match="needs .* GiB, and 14.0 GiB are free on the GPU: give a smaller"):
        estimates.announce(args)


@pytest.mark.parametrize(("verb", "flag", "value"), [("prune", "shard", True), ("apply", "device_map", "auto")])
def test_a_model_that_is_spread_is_held_against_no_single_gpu(verb, flag, value, large, monkeypatch, capsys):
    args = parse(verb, ["--model_name_or_path", str(large)])
    monkeypatch.setattr(type(args.training), "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    with pytest.raises(estimates.InputError, match="needs .*, and 2.0 GiB are free on the GPU"):  # control: one GPU
        estimates.announce(args)
    capsys.readouterr()
    setattr(args.source, flag, value)
    estimates.announce(args)
    assert " GiB on the GPUs, for the whole model (" in capsys.readouterr().out


def test_of_one_gpu_among_several_no_fit_is_told(large, capsys):
    found = run_verb("estimate", ["--model_name_or_path", str(large), "--verb", "apply", "--device_map", "auto"])
    told = capsys.readouterr().out
    assert found.is_spread and found.fits == {} and "GPUs" in told and "80 GB" not in told


def test_settings_of_another_verb_are_refused_from_python_too(large):
    with pytest.raises(estimates.InputError, match="lora_r|teacher_top_k|speed"):
        estimate(large, "prune", EvalSettings(), lora_r=8)
