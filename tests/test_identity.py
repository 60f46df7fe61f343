"""What tells models, texts and runs apart, and what does not count."""

import copy
import json

import torch
from datasets import Dataset
from torch import nn

from tvaprune.identity import blocks_digest, content, differences, model_digest, weights_digest


def module(**weights):
    made = nn.Module()
    for name, values in weights.items():
        made.register_parameter(name, nn.Parameter(values))
    return made


def test_weights_are_told_apart_by_name_shape_and_number_whatever_their_precision():
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2)
    digest = weights_digest(module(a=a, b=b))
    assert digest == weights_digest(module(b=b, a=a)) == weights_digest(module(a=a.bfloat16(), b=b.half()))
    assert digest == weights_digest(module(a=a, b=b), lambda name: {"a": a, "b": b}[name].split(1))  # rows as they come
    others = [module(a=a.view(3, 2), b=b), module(a=a, c=b), module(a=a + 2**-20, b=b), module(a=a)]
    assert len({digest, *map(weights_digest, others)}) == 5


def test_a_config_counts_and_where_a_model_lies_does_not(make_model):
    model = copy.deepcopy(make_model())
    digest = model_digest(model)
    model.config._name_or_path, model.config.dtype = "elsewhere", torch.bfloat16
    assert model_digest(model) == digest
    model.config.rms_norm_eps *= 2
    assert model_digest(model) != digest


def test_texts_are_told_apart_by_their_blocks():
    texts = [[[1, 2, 3, 4]], [[1, 2], [3, 4]], [[1, 2]], [[3, 4]]]
    whole, halves, first, second = (Dataset.from_dict({"input_ids": rows}) for rows in texts)
    given = [(whole,), (halves,), (first, second), (second, first)]
    assert len({blocks_digest(*blocks) for blocks in given}) == 4
    assert blocks_digest(halves) == blocks_digest(halves.select(range(2)))


def test_flags_are_told_before_what_follows_from_them():
    wanted = {
        "flags": {"seed": 1, "betas": (0.9, 0.99)},
        "contents": {"model": content("a", "12345678ff")},
        "settings": {"batch": 8},
    }
    found = json.loads(json.dumps(wanted))  # as it stands in a file
    assert differences(found | {"contents": {"model": content("b", "12345678ff")}}, wanted) == ""  # a name is none
    other = {"contents": {"model": content("b", "abcdefab00")}, "settings": {"batch": 4}}
    assert differences(found | {"settings": {"batch": 4}}, wanted) == "--batch 4, not 8"
    assert differences(found | other, wanted) == "--model b [abcdefab], not a [12345678]"
    assert differences({"flags": {"seed": 2}} | other, wanted) == "--seed 2, not 1, --betas None, not 0.9 0.99"
