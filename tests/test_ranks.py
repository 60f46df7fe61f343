"""Several processes: two on a CPU do what one does, with other noise; one writes, all end alike."""

import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support import shared_work, tiny

from tvaprune import cli, ranks
from tvaprune.errors import InputError
from tvaprune.flags.arguments import RunArguments
from tvaprune.run import _tell_idle_devices


def torchrun(script, *flags, processes=2, **environment):
    """Runs a script as ``torchrun`` does, on two processes of one thread."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, str(script), *map(str, flags)]
    path = f"{tiny.ROOT}:{tiny.ROOT / 'tests'}"
    env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(command, cwd=tiny.ROOT, env=env, capture_output=True, text=True, timeout=300)


def exit_codes(result):
    return [int(code) for code in re.findall(r"exitcode  : (-?\d+)", result.stderr)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes found, and how they ended."""
    folder = tmp_path_factory.mktemp("shared")
    result = torchrun(tiny.ROOT / "tests" / "support" / "shared_work.py", folder)
    assert (folder / "found.pt").is_file(), result.stderr
    return torch.load(folder / "found.pt"), result


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return shared_work.work(tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("name", ["gates", "gates, sharded", "tuned", "tuned, sharded"])
def test_two_processes_train_what_one_does_at_the_same_global_batch(name, shared, alone):
    torch.testing.assert_close(shared[0][name], alone[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [*shared_work.METHODS, "refitted", "refitted gains", "perplexity"])
def test_two_processes_measure_what_one_does(name, shared, alone):
    torch.testing.assert_close(shared[0][name], alone[name], rtol=1e-4, atol=1e-5)


def test_two_processes_reconstruct_what_one_does(shared, alone):
    """Adam makes steps of one size of gradients that are rounding: few weights differ, and by little."""
    torch.testing.assert_close(shared[0]["reconstructed"], alone["reconstructed"], rtol=0, atol=1e-3)
    moved = alone["reconstructed"][:-4] - alone["refitted"][:-7]  # the weights: shares and divergences end each
    assert moved.abs().max() > 0.02  # control: how far it went


def test_half_of_the_batch_is_another_training(alone, monkeypatch, tmp_path):
    monkeypatch.setattr(shared_work, "BATCH", shared_work.BATCH // 2)  # control: what one process alone would learn
    assert (shared_work.gates(tmp_path) - alone["gates"]).abs().max() > 1e-3


def test_each_process_draws_noise_of_its_own(shared):
    first, second = shared[0]["noise"]
    assert first.shape == second.shape == (2, 12, 36)
    assert (first - second).abs().min() > 0


def test_gradients_are_not_kept_twice(shared):
    """As DDP does by default: an estimate counts them once, whatever the number of processes."""
    assert shared[0]["gradients kept twice"] is False


def test_each_process_holds_its_share_of_the_layers_alone(shared):
    first, second = shared[0]["held"]
    whole = sum(parameter.numel() for parameter in shared_work.model().get_decoder().layers.parameters())
    assert first + second == whole and abs(first - second) < 0.1 * whole


def test_two_processes_go_on_bit_for_bit(shared):
    whole, resumed = shared[0]["resumed"]
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    assert len(whole.unique()) > 100  # control: gates moved apart


def test_all_processes_are_told_where_one_differs_or_main_refuses(shared):
    wanted = ["--seed is 1 in process 1 and 0 in process 0: start all with one command, on the same files"]
    assert shared[0]["refusals"] == [[*wanted, "main says no"]] * 2


def test_where_one_process_cannot_go_on_all_end_alike_and_one_tells(shared):
    result = shared[1]
    assert exit_codes(result) == [2, 2]
    assert [line for line in result.stderr.splitlines() if shared_work.WAITED_FOR in line] == [
        f"shared_work.py: {shared_work.WAITED_FOR}"
    ]


RUN = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--speed_batches", 2, "--max_train_samples", 32,
       "--per_device_train_batch_size", 2, "--dim_multiple", 4, "--refit_samples", 8)  # fmt: skip


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    checkpoint = tiny.save_checkpoint(make_model("llama"), folder / "model")
    return ("--model_name_or_path", checkpoint, "--dataset_name", tiny.write_text(folder / "text.txt"))


@pytest.fixture(scope="module")
def pruned(source, tmp_path_factory):
    """The output of one gate training by two processes, without --use_cpu, on a machine without a GPU."""
    output = tmp_path_factory.mktemp("run") / "out"
    result = torchrun("tva_prune.py", *source, *RUN, "--output_dir", output, "--save_steps", 4)
    assert result.returncode == 0, result.stderr
    return output, result


def test_one_of_two_processes_writes_and_prints(pruned):
    output, result = pruned
    assert result.stdout.count("dense ->") == 1
    names = sorted(path.name for path in output.iterdir() if not path.name.startswith("rotation_"))
    assert names == ["best", "checkpoint-4", "checkpoint-8", "generations.json", "plan.json", "recipe.yaml",
                     "report.html", "results.json", "training.png", "training_log.json", "widths.png"]  # fmt: skip
    assert len(list((output / "best").glob("*.pkl"))) == 1
    for name in ("rng_state_0.pth", "rng_state_1.pth", "identity.json"):
        assert (output / "checkpoint-8" / name).is_file()
    assert tiny.read_json(output / "results.json")["perplexity"]["pruned"] > 1


def test_a_run_of_two_processes_does_not_go_on_in_one(pruned, source, command):
    output, _ = pruned
    code, _, error = command(
        "--do_train", *source, *RUN, "--use_cpu", "--output_dir", output, "--resume_from_checkpoint", "True"
    )
    assert "is of a run of 2 processes, this one has 1" in tiny.refusal(code, error)


def test_accelerates_fsdp_shards_a_fine_tuning(pruned, source, tmp_path):
    output, _ = pruned
    (mask,) = (output / "best").glob("*.pkl")
    flags = ("--do_train", "--mask_loc", mask, "--lora_r", 2, "--max_steps", 2, "--gradient_accumulation_steps", 1)
    run = [*RUN[:6], *RUN[8:]]  # a time of layers that are apart is refused
    result = torchrun(
        "lora_ft_vib.py", *source, *run, *flags, "--output_dir", tmp_path / "out", ACCELERATE_USE_FSDP="true"
    )
    assert result.returncode == 0, result.stderr
    results = tiny.read_json(tmp_path / "out" / "results.json")
    assert results["finetune"]["steps"] == 2 and "speed_up" not in results
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert tiny.read_json(tmp_path / "out" / "merged" / "config.json")["intermediate_size"] < 52
    assert "shard: true" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_plain_command_uses_one_gpu_of_several_and_says_how_to_use_all(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    args = RunArguments(output_dir=str(tmp_path), per_device_train_batch_size=3)
    assert (args.n_gpu, args.train_batch_size) == (1, 3)  # of 4 GPUs transformers would take a batch of 12
    _tell_idle_devices(SimpleNamespace(training=SimpleNamespace(device=torch.device("cuda", 0))))
    told = "note: one of 4 GPUs is used; torchrun --nproc_per_node 4 in place of python uses all\n"
    assert capsys.readouterr().out == told
    _tell_idle_devices(SimpleNamespace(training=SimpleNamespace(device=torch.device("cpu"))))
    assert capsys.readouterr().out == ""


def test_more_processes_than_gpus_and_processes_that_nobody_numbers_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="WORLD_SIZE is 3 and no launcher numbers this process"):
        RunArguments(output_dir=str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--nproc_per_node 3: the machine has 2 GPUs"):
        RunArguments(output_dir=str(tmp_path))


@pytest.mark.parametrize("verb", ["prune", "describe"])
@pytest.mark.parametrize(
    ("name", "value"), [("WORLD_SIZE", "abc"), ("RANK", "2.0"), ("LOCAL_RANK", "x\ny"), ("LOCAL_WORLD_SIZE", "two")]
)
def test_a_number_of_the_launcher_that_is_none_is_refused_in_one_line(verb, name, value, monkeypatch, capsys):
    numbers = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", name: value}
    for each, number in numbers.items():
        monkeypatch.setenv(each, number)
    monkeypatch.setattr(sys, "argv", ["tvaprune", verb, "--model_name_or_path", "model"])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert cli.main() == 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    told = f"{name} is {value!r} in the environment, and torchrun or accelerate launch would say a whole number"
    assert capsys.readouterr().err == f"tvaprune: {told}: start the command by one of them, or unset it\n"


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", ""), ("RANK", "-1"), ("LOCAL_RANK", "-1")])
def test_what_means_no_launcher_is_none(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    ranks.check_numbers()
    assert (ranks.launched(), ranks.launched_here(), ranks.index()) == (1, 1, 0)


def test_of_processes_that_do_not_know_each_other_one_of_each_machine_tells(monkeypatch):
    monkeypatch.setattr(ranks, "_distributed", lambda: None)
    for rank, local, tells in ((0, 0, True), (1, 1, False), (2, 0, True)):
        for name, number in (("WORLD_SIZE", 4), ("RANK", rank), ("LOCAL_RANK", local)):
            monkeypatch.setenv(name, str(number))
        assert ranks.ends_first() is tells


def test_a_verb_of_one_process_refuses_several(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["tvaprune", "describe", "mask.pkl"])
    assert cli.main() == 2
    assert "describe runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "index", "share"), [(1, 0, [1, 2, 3, 4, 5]), (2, 0, [1, 3, 5]), (2, 1, [2, 4])])
def test_shares_are_apart_and_rounds_are_as_many_everywhere(count, index, share, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: count)
    monkeypatch.setattr(ranks, "index", lambda: index)
    assert list(ranks.share([1, 2, 3, 4, 5])) == share
    rounds = list(ranks.rounds([1, 2, 3, 4, 5]))
    assert [item for item, counts in rounds if counts] == share
    assert len(rounds) == -(-5 // count)
