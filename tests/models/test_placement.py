"""A model that is spread over devices is measured, cut, folded and refitted as one that is not."""

from contextlib import contextmanager

import pytest
import torch
from support import tiny
from support.families import make_plan, sliced
from support.updates import CALIBRATION, HELD_OUT, reconstruct, refit
from torch.overrides import TorchFunctionMode

from tvaprune.errors import InputError
from tvaprune.models import layers, load
from tvaprune.models.placement import check_placed, place_of, put
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import save_masks

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb",
         "lm_head")  # fmt: skip
MAP = dict.fromkeys(PARTS, torch.device("cpu"))
RUN = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--dim_multiple", 4, "--use_cpu",
       "--do_eval", "--per_device_eval_batch_size", 4)  # fmt: skip


def hooked(model):
    return [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]


def test_a_model_is_put_over_devices_and_back(make_model, input_ids):
    model = make_model()
    expected = model(input_ids=input_ids).logits
    put(model, MAP)
    assert place_of(model) == MAP and set(PARTS) <= set(hooked(model))
    torch.testing.assert_close(model(input_ids=input_ids).logits, expected, rtol=0, atol=0)
    put(model, torch.device("cpu"))
    assert place_of(model) == torch.device("cpu") and hooked(model) == []


def test_what_the_gpus_have_no_room_for_is_refused(make_model, monkeypatch):
    model = make_model()
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "disk", "lm_head": "cpu"}
    check_placed(model, "--model_name_or_path DIR")  # control: a machine without a GPU has nothing else
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="DIR: does not fit the GPUs, cpu and disk would have to hold a part of it"):
        check_placed(model, "--model_name_or_path DIR")


@pytest.mark.parametrize("update", [("--weight_update", "fold"), ("--refit_samples", 8)])
def test_a_model_over_devices_is_measured_and_cut_as_one_that_is_not(
    update, make_model, make_masks, command, tmp_path, monkeypatch
):
    model = make_model()
    checkpoint = tiny.save_checkpoint(model, tmp_path / "model")
    save_masks(make_masks(shape_of(model.config)), tmp_path / "mask_info_1.0.pkl")
    flags = ("--model_name_or_path", checkpoint, "--mask_loc", tmp_path / "mask_info_1.0.pkl", *RUN, "--dataset_name",
             tiny.write_text(tmp_path / "text.txt"), *update)  # fmt: skip
    asked, whole = [], load.load_whole

    def spread(path, config, named, device_map=None, **options):
        found = whole(path, config, named, **options)
        asked.append(device_map)
        if device_map is not None:  # what accelerate makes of it where there are GPUs
            put(found, MAP)
        return found

    monkeypatch.setattr(load, "load_whole", spread)
    found = []
    for name, more in (("one", ("--speed_batches", 0)), ("several", ("--device_map", "auto"))):
        code, _, error = command(*flags, *more, "--save_loc", tmp_path / name, "--output_dir", tmp_path / name)
        assert code == 0, error
        found.append(tiny.read_json(tmp_path / name / "results.json"))
    assert asked == [None, "auto"]
    assert found[0]["perplexity"] == found[1]["perplexity"]
    assert abs(found[0]["perplexity"]["pruned"] - found[0]["perplexity"]["dense"]) > 1  # control: it was cut


class _Watch(TorchFunctionMode):
    """Notes with which weights a product is made that nothing holds on the device."""

    def __init__(self, *models):
        super().__init__()
        self.names = {id(p): name for model in models for name, p in model.named_parameters()}
        self.held, self.missed, self.used = [], set(), set()

    @contextmanager
    def moved(self, module, device):
        own = {id(p) for p in module.parameters()}
        self.held.append(own)
        yield
        self.held.remove(own)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in {"linear", "embedding", "mul", "add", "rms_norm", "layer_norm", "float"}:
            used = {id(value) for value in args if isinstance(value, torch.nn.Parameter)} & set(self.names)
            self.used |= {self.names[one] for one in used}
            self.missed |= {self.names[one] for one in used.difference(*self.held)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("model_type", "tied"), [("llama", False), ("llama", True), ("gemma2", True), ("cohere2", True), ("olmo2", False)]
)
@pytest.mark.parametrize("updates", [(refit,), (refit, reconstruct)], ids=["refit", "reconstruct"])
def test_what_an_update_computes_with_is_on_its_device(updates, model_type, tied, make_model, make_masks, monkeypatch):
    model = make_model(model_type, tie_word_embeddings=tied)
    plan = make_plan(model, make_masks, 1)
    narrow = sliced(model, plan)
    watch = _Watch(model, narrow)
    monkeypatch.setattr(layers, "_moved", watch.moved)
    with watch:
        for update in updates:
            update(model, narrow, plan, CALIBRATION, HELD_OUT)
    assert watch.missed == set()
    assert watch.used >= {"model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight"}
