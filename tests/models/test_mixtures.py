"""Mixtures of experts: what is counted, what is kept whole, what is said of the rest."""

import copy
import re

import pytest
import torch
from safetensors import safe_open
from support import tiny
from support.families import CLOSE, MORE_ROWS, logits, make_plan, sliced
from support.folders import stock, with_hidden, with_units
from support.updates import CALIBRATION, HELD_OUT, refit
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.choose.controller import expected_spread
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores.calibration import both_blocks
from tvaprune.measure.cost import lora_parameters
from tvaprune.measure.work import Work, forward_flops, narrower
from tvaprune.models import from_gguf, modeling_pruned
from tvaprune.models.formats import check_graph
from tvaprune.models.load import load_model, open_model
from tvaprune.models.parameters import counted_parameters, decoder_sparsity, model_parameters
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.models.vetting import check_config
from tvaprune.plan.masks import load_masks, save_masks
from tvaprune.plan.multiples import fastest_multiple
from tvaprune.plan.widths import WidthRules, Widths
from tvaprune.recover.lora import LoraSettings, add_lora

ROWS = {row: values for row, values in MORE_ROWS.items() if values[0] in ("mixtral", "qwen3_moe")}
MIXED = "qwen3_moe, layer 1 without experts"
CPU = torch.device("cpu")


@pytest.fixture(params=ROWS.values(), ids=ROWS)
def model(request, make_model):
    model_type, values = request.param
    return make_model(model_type, **values)


@pytest.fixture
def mixed(make_model):
    return make_model(ROWS[MIXED][0], **ROWS[MIXED][1])


@pytest.mark.parametrize(
    ("config", "total", "passed"),
    [
        (MixtralConfig(), 46_702_792_704, 12.7e9),  # mistralai/Mixtral-8x7B-v0.1
        (Qwen3MoeConfig(num_hidden_layers=48, head_dim=128), 30_532_122_624, 3.0e9),  # Qwen/Qwen3-30B-A3B
    ],
)
def test_all_experts_are_counted_and_a_token_passes_some(config, total, passed):
    """What their makers say: 46.7 billion of which 12.9 are active, 30.5 and 3.3; embeddings among these."""
    shape = shape_of(config)
    assert model_parameters(shape) == total
    assert forward_flops(shape, 1, 1) / 2 == pytest.approx(passed, rel=0.02)


def test_sizes_are_those_of_the_tensors(model):
    shape = shape_of(model.config)
    assert model_parameters(shape) == sum(weight.numel() for weight in model.parameters())
    counted = [
        weight.numel()
        for name, weight in model.model.layers.named_parameters()
        if "q_norm" not in name and "k_norm" not in name and "bias" not in name
    ]
    assert counted_parameters(shape) == sum(counted)
    half = shape.hidden_size // 2, shape.num_key_value_heads, shape.intermediate_size
    assert decoder_sparsity(*half, shape) == 0.5  # hidden dims go from experts and routers too
    assert model_parameters(narrower(shape, 0.5)) == pytest.approx(model_parameters(shape) / 2, rel=0.01)


def test_a_layer_of_experts_has_no_channels_and_the_others_theirs(mixed, make_masks, tmp_path):
    shape = shape_of(mixed.config)
    assert shape.intermediate_size == (0, 52, 0) and shape.experts == (4, 0, 4)
    assert shape.channels_per_token == (32, 52, 32)
    save_masks(make_masks(shape), tmp_path / "mask.pkl")
    masks = load_masks(tmp_path / "mask.pkl", shape)
    assert masks.mu.fits(shape) and list(map(len, masks.mu.inter)) == [0, 52, 0]
    assert all(torch.equal(a, b) for a, b in zip(masks.mu, make_masks(shape).mu, strict=True))
    assert not masks.mu.fits(shape_of(MixtralConfig(num_hidden_layers=3)))


def test_equal_widths_are_those_of_the_layers_that_have_such_units(mixed):
    shape, rules = shape_of(mixed.config), WidthRules(uniform=True)
    assert Widths(shape, rules).channels([0, 30, 0]) == [0, 30, 0]
    scores = PerUnit.full(shape, -1.0)
    assert expected_spread(scores, 1.0, shape) == 0  # one layer's MLP is as wide as itself
    lopsided = PerUnit(scores.hidden, (scores.attn[0] + 9, *scores.attn[1:]), scores.inter)
    assert expected_spread(lopsided, 1.0, shape) > 0.001  # control


def test_the_refit_leaves_experts_folded_and_fits_the_attention(model, make_masks):
    plan = make_plan(model, make_masks)
    folded = sliced(model, plan)
    fitted = copy.deepcopy(folded)
    report = refit(model, fitted, plan, CALIBRATION, HELD_OUT)
    changed = {name for name, value in fitted.state_dict().items() if not torch.equal(value, folded.state_dict()[name])}
    assert any("o_proj" in name for name in changed)
    assert not any(".experts." in name or ".mlp.gate." in name for name in changed)
    assert min(report.divergences) < report.divergences[0]


def test_widths_that_no_kernel_takes_are_computed_by_torch_alone(make_model, make_masks, input_ids, tmp_path):
    model = make_model("mixtral", **ROWS["mixtral"][1])
    plan = stock(make_plan(model, make_masks))
    narrow = sliced(model, with_hidden(plan, 30))
    assert type(narrow).__name__ == "MixtralForCausalLM"
    save_pruned(narrow, with_hidden(plan, 30), None, tmp_path / "odd")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "odd").eval()
    torch.testing.assert_close(logits(loaded, input_ids), logits(narrow, input_ids), **CLOSE)
    loaded.set_experts_implementation("grouped_mm")  # control
    with pytest.raises(RuntimeError, match="16 bytes"):
        logits(loaded, input_ids)
    even = sliced(model, with_hidden(plan, 24))
    assert even.config._experts_implementation == "grouped_mm" != narrow.config._experts_implementation
    torch.testing.assert_close(
        logits(load_pruned(save_pruned(even, plan, None, tmp_path / "even")), input_ids), logits(even, input_ids),
        **CLOSE,
    )  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_files_hold_experts_one_by_one_where_transformers_has_it_so(row, make_model, make_masks, input_ids, tmp_path):
    """A stock checkpoint is as those that people have, what is read of it is fused, and so is a pruned folder."""
    model = make_model(ROWS[row][0], **ROWS[row][1])
    tiny.save_checkpoint(model, tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        single = [name for name in file.keys() if re.search(r"experts\.3\.\w+\.weight", name)]
    assert len(single) == 3 * sum(count > 0 for count in shape_of(model.config).experts)
    loaded, _ = load_model(str(tmp_path / "model"), "auto", CPU)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    plan = with_units(make_plan(model, make_masks, empty_layer=1), "attn", 0, 2)
    save_pruned(sliced(model, plan), plan, None, tmp_path / "pruned")
    with safe_open(tmp_path / "pruned" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.mlp.experts.gate_up_proj" in file.keys()
    told = tiny.read_json(tmp_path / "pruned" / "config.json")["num_experts"]
    assert told == model.config.num_local_experts  # in transformers 4's word for Qwen 3's
    with GatedModel(loaded).applying(plan):
        masked = logits(loaded, input_ids)
    torch.testing.assert_close(logits(load_pruned(tmp_path / "pruned"), input_ids), masked, **CLOSE)


def test_a_pruned_model_tells_its_routers_logits(model, make_masks, input_ids):
    narrow = sliced(model, make_plan(model, make_masks, empty_layer=0))
    assert type(narrow).__name__.startswith("Pruned")
    with torch.no_grad():
        output = narrow(input_ids=input_ids, labels=input_ids, output_router_logits=True)
    assert len(output.router_logits) == sum(count > 0 for count in shape_of(narrow.config).experts)
    assert output.aux_loss > 0


def test_set_experts_implementation_reaches_every_layer(make_model, make_masks, input_ids):
    model = make_model("mixtral", **ROWS["mixtral"][1])
    narrow = sliced(model, with_hidden(make_plan(model, make_masks, empty_layer=0), 24))
    before = logits(narrow, input_ids)
    narrow.set_experts_implementation("batched_mm")
    assert {layer.mlp.experts.config._experts_implementation for layer in narrow.model.layers} == {"batched_mm"}
    torch.testing.assert_close(logits(narrow, input_ids), before, **CLOSE)


@pytest.mark.parametrize("is_pruned", [False, True])
def test_lora_is_on_the_attention_alone_whether_pruned_or_stock(is_pruned, model, make_masks):
    model = sliced(model, make_plan(model, make_masks, empty_layer=0)) if is_pruned else model
    shape = shape_of(model.config)
    tuned = add_lora(model, LoraSettings(2, 1.0, 0.0, train_lm_head=False))
    trained = {name: weight for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert sum(weight.numel() for weight in trained.values()) == lora_parameters(Work(shape, shape, lora_r=2))


def test_the_multiple_is_measured_on_what_is_cut(model):
    number, line = fastest_multiple(shape_of(model.config), 0.3, CPU, torch.float32)
    assert number >= 1 and "time by parameter" in line


def test_what_a_mixture_cannot_do_is_said_in_one_line(model, tmp_path, monkeypatch):
    tiny.save_checkpoint(model, tmp_path / "model")
    with tiny.refused("--stream True reads no mixture of experts"):
        open_model(str(tmp_path / "model"), "auto", CPU)
    with tiny.refused("--format onnx: which experts a token passes is chosen as it comes"):
        check_graph(model.config)
    values = {"model_type": model.config.model_type}
    monkeypatch.setattr(from_gguf.PretrainedConfig, "get_config_dict", lambda *args, **kwargs: (values, {}))
    with tiny.refused("a mixture of experts is not read from GGUF"):
        from_gguf._config.__wrapped__(tmp_path / "x.gguf", "--model_name_or_path x.gguf", (0, 0))
    with tiny.refused("[23] layers of the model have no attention or no MLP, or have experts, and the one-shot"):
        both_blocks(model)
    written = tiny.read_json(tmp_path / "model" / "config.json")
    for key in ("num_experts_per_tok", "num_local_experts"):
        with tiny.refused(f"x: {key} in config.json is 0: a whole number from 1 "):
            check_config(written | {key: 0}, "x")
        check_config(written | {key: 0, "model_type": "llama"}, "x")  # which has no use for it
    model.config.num_experts_per_tok = 5
    with tiny.refused("num_experts_per_tok is 5, of 4 experts: mend config"):
        shape_of(model.config)


def test_transformers_4_is_told_that_it_does_not_read_them(monkeypatch):
    """There, experts are modules, and fused ones would be drawn at random with a warning."""
    monkeypatch.delitem(vars(modeling_pruned), "PrunedMixtralConfig", raising=False)  # as if none were made yet
    # As the module sees it: what `transformers` names while it is being imported is another object than afterwards.
    monkeypatch.setattr(modeling_pruned.transformers, "__version__", "4.57.6")
    with pytest.raises(ImportError, match="transformers 4.57.6 does not read fused experts: take 5 or later"):
        modeling_pruned.classes_of("mixtral")


def test_the_command_prunes_a_mixture(make_model, tmp_path, command):
    source = tiny.save_checkpoint(make_model(ROWS[MIXED][0], **ROWS[MIXED][1]), tmp_path / "model")
    text = tiny.write_text(tmp_path / "text.txt")
    flags = (
        "--model_name_or_path", source, "--dataset_name", text, "--block_size", "16", "--ctx_length", "16",
        "--max_train_samples", "24", "--max_eval_samples", "8", "--refit_samples", "8", "--speed_batches", "0",
        "--use_cpu",
    )  # fmt: skip
    code, _, error = command(
        "--do_train", "--prune_method", "magnitude", "--output_dir", tmp_path / "no", *flags
    )  # fmt: skip
    assert "--prune_method magnitude: scores KV heads and MLP channels, keeps all hidden dims" in tiny.refusal(
        code, error
    )
    assert not (tmp_path / "no").exists()  # before any work
    code, said, error = command(
        "--do_train", "--prune_method", "vib", "--output_dir", tmp_path / "out", "--save_pruned", tmp_path / "pruned",
        "--target_sparsity", "0.3", "--dim_multiple", "1", *flags,
    )  # fmt: skip
    assert code == 0, error
    assert "experts per layer" in said and "4 0 4, with all their channels" in said
    results, loaded = tiny.read_json(tmp_path / "out" / "results.json"), load_pruned(tmp_path / "pruned")
    assert loaded.num_parameters() == results["parameters"]["pruned"]
    assert abs(results["widths"]["decoder_sparsity"] - 0.3) < 0.02
    assert (
        "| experts per layer, with all their channels | 4 0 4 | the same |"
        in (tmp_path / "pruned/README.md").read_text()
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "all, of experts" in page
