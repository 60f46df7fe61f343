import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from tvaprune.measure.speed import WARM_UP_BATCHES, speed_up, training_speed_up

BLOCKS = Dataset.from_dict({"input_ids": [[i, 1, 2] for i in range(5)]}).with_format("torch")


class Sleeper(nn.Module):
    def __init__(self, seconds, log, name):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seconds, self.log, self.name = seconds, log, name

    def forward(self, input_ids, use_cache):
        assert not self.training and not use_cache and not torch.is_grad_enabled()
        self.log.append((self.name, input_ids[:, 0].tolist()))
        time.sleep(self.seconds)
        return SimpleNamespace(logits=None)


@pytest.mark.parametrize(("slow", "fast", "ratio"), [(0.02, 0.01, 2.0), (0.01, 0.03, 1 / 3), (0.01, 0.01, 1.0)])
def test_speed_up_is_the_ratio_of_the_times(slow, fast, ratio):
    measured = speed_up(Sleeper(slow, [], "dense"), Sleeper(fast, [], "pruned"), BLOCKS, max_batches=8)
    assert measured.per_batch == pytest.approx(ratio, rel=0.3)
    assert measured.whole_set == pytest.approx(ratio, rel=0.5)
    assert measured.whole_set == pytest.approx(measured.reference_seconds / measured.seconds)
    assert measured.reference_seconds >= 8 * slow and measured.seconds >= 8 * fast


def test_both_models_see_the_same_batches_and_take_turns_to_go_first():
    log = []
    dense, pruned = Sleeper(0.0, log, "dense").train(), Sleeper(0.0, log, "pruned")
    measured = speed_up(dense, pruned, BLOCKS, batch_size=2, max_batches=4)
    assert asdict(measured) | {"num_batches": 4, "batch_size": 2, "window": 3} == asdict(measured)
    timed = log[2 * WARM_UP_BATCHES :]
    assert [name for name, _ in timed] == ["dense", "pruned", "pruned", "dense"] * 2
    # Whole batches only, repeated where there are fewer: (0, 1), (2, 3), (0, 1), (2, 3)
    assert [first for name, first in timed if name == "dense"] == [[0, 1], [2, 3]] * 2
    assert [first for name, first in timed if name == "pruned"] == [[0, 1], [2, 3]] * 2
    assert dense.training and pruned.training


def test_fewer_blocks_than_a_batch_make_one_smaller_batch():
    measured = speed_up(Sleeper(0.0, [], ""), Sleeper(0.0, [], ""), BLOCKS, batch_size=8, max_batches=2)
    assert (measured.batch_size, measured.num_batches) == (5, 2)


def of_training(folder, **values):
    return TrainingArguments(output_dir=str(folder), use_cpu=True, per_device_train_batch_size=2, **values)


def test_a_training_step_goes_forward_and_back_and_leaves_the_weights(make_model, tmp_path):
    dense, pruned = make_model(), make_model(num_hidden_layers=1)
    before = [parameter.clone() for parameter in (*dense.parameters(), *pruned.parameters())]
    backward = []
    pruned.lm_head.weight.register_hook(lambda gradient: backward.append(float(gradient.abs().sum())))
    measured = training_speed_up(dense, pruned, BLOCKS, of_training(tmp_path), max_batches=3)
    assert len(backward) == WARM_UP_BATCHES + 3 and min(backward) > 0
    assert all(torch.equal(a, b) for a, b in zip(before, (*dense.parameters(), *pruned.parameters()), strict=True))
    assert all(parameter.grad is None for parameter in (*dense.parameters(), *pruned.parameters()))
    assert not dense.training and not pruned.training
    assert measured.whole_set == pytest.approx(measured.reference_seconds / measured.seconds)


@pytest.mark.parametrize("asked", [True, False])
def test_both_sides_train_in_the_runs_precision_and_with_its_checkpointing(asked, make_model, tmp_path):
    models = dense, pruned = make_model(), make_model(num_hidden_layers=1)
    forwards, precisions = [0, 0], set()

    def count(index):
        return lambda module, inputs: forwards.__setitem__(index, forwards[index] + 1)

    for index, model in enumerate(models):
        model.model.layers[0].self_attn.register_forward_pre_hook(count(index))
        model.lm_head.register_forward_hook(lambda module, inputs, output: precisions.add(output.dtype))
    args = of_training(tmp_path, bf16=asked, activation_checkpointing=asked)
    training_speed_up(dense, pruned, BLOCKS, args, max_batches=3)
    assert forwards == [(WARM_UP_BATCHES + 3) * (2 if asked else 1)] * 2  # a checkpointed layer runs once more
    assert precisions == {torch.bfloat16 if asked else torch.float32}
    assert not dense.is_activation_checkpointing and not pruned.is_activation_checkpointing


def test_a_step_that_runs_out_of_memory_leaves_no_gradient(make_model, tmp_path):
    dense, pruned = make_model(), make_model()

    def fail(gradient):
        raise torch.cuda.OutOfMemoryError("too large")

    pruned.model.embed_tokens.weight.register_hook(fail)  # the last of the backward pass
    with pytest.raises(torch.cuda.OutOfMemoryError):
        training_speed_up(dense, pruned, BLOCKS, of_training(tmp_path), max_batches=3)
    assert all(parameter.grad is None for parameter in (*dense.parameters(), *pruned.parameters()))
    assert not dense.training and not pruned.training
