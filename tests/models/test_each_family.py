"""What every family can do beside the equalities of the contract, each family once."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from support import tiny
from support.families import CLOSE, MORE_ROWS, NAMED_ROWS, REFUSED_VANILLA, ROWS, logits, make_plan, sliced
from support.folders import with_hidden, with_units
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores import SCORES, score_masks
from tvaprune.errors import InputError
from tvaprune.export.onnx_graph import export_onnx
from tvaprune.export.vanilla import export_vanilla
from tvaprune.models.families import base_type, family_of
from tvaprune.models.shape import shape_of
from tvaprune.recover.lora import LoraSettings, add_lora, merge

EVERY = ROWS | MORE_ROWS | NAMED_ROWS
ONCE = {model_type: row for row, (model_type, _) in reversed((ROWS | MORE_ROWS).items())}  # the first row of each


@pytest.fixture(params=ONCE.values(), ids=ONCE)
def model(request, make_model):
    model_type, values = EVERY[request.param]
    return make_model(model_type, **values)


def layer_norm(x, selected, gain, epsilon):
    """Over the selected dims alone, 0 in the others."""
    there = x[..., selected]
    variance, mean = torch.var_mean(there, dim=-1, keepdim=True, correction=0)
    normed = torch.zeros_like(x)
    normed[..., selected] = (there - mean) / (variance + epsilon).sqrt()
    return normed * gain


def zeroed(dense, plan):
    """The narrower model by the equations alone, in float64: the dense one with zeros where units go.

    What a hidden dim of zeros changes is the norms' average: over n' of n dims, ``rms' = sqrt(n / n') rms``, so a gain
    times ``sqrt(n' / n)`` and an epsilon times ``n' / n`` average over the kept ones. Where norms go on dividing by the
    dense width, the gain of those of the stream stays. A norm that subtracts the mean becomes its equation over the
    kept ones. No name is read from the rows.
    """
    model, shape = copy.deepcopy(dense).double(), plan.shape
    full, kept, width = plan.full_scale(), plan.full_kept(), shape.head_dim * shape.group_size
    post = {
        "post_self_attn_layernorm": "o_proj",
        "post_mlp_layernorm": "down_proj",
        "post_feedforward_layernorm": "down_proj",
    }
    names = {name for name, _ in model.model.layers[0].named_children()}
    if "post_feedforward_layernorm" in names:
        post["post_attention_layernorm"] = "o_proj"
    offset = 1.0 if "gemma" in type(model).__name__.lower() else 0.0

    def average(norm, selected, factors=1.0):
        share = selected.double().mean()
        of_kept = share.sqrt() if not plan.keeps_norm_width or selected is not kept.hidden else 1.0
        gain = (norm.weight.data + offset) * of_kept * factors
        norm.weight.data = gain - offset
        if type(norm).__name__.endswith("LayerNorm"):
            norm.forward = lambda x: layer_norm(x, selected, norm.weight / share.sqrt(), norm.variance_epsilon / share)
        for name in ("variance_epsilon", "eps"):
            if hasattr(norm, name):
                setattr(norm, name, getattr(norm, name) * float(share))

    hidden = full.hidden.double()
    model.get_input_embeddings().weight.data *= hidden
    inverse = torch.where(kept.hidden, 1 / hidden, 0.0) if plan.shape.tie_word_embeddings else 1.0
    average(model.model.norm, kept.hidden, inverse)
    post = {norm: writer for norm, writer in post.items() if norm in names}
    for layer, attn, inter, heads in zip(model.model.layers, full.attn, full.inter, kept.attn, strict=True):
        # The norm past the attention divides its means' root mean square out.
        size = attn[heads].double().square().mean().sqrt() if heads.any() else 1.0
        if hasattr(layer.mlp, "experts"):  # which write what the router weighs
            model.set_experts_implementation("eager")  # the kernels know no float64
            layer.mlp.experts.down_proj.data *= hidden[:, None]
        for name, writer, units, each in (
            ("o_proj", layer.self_attn.o_proj, attn, width),
            ("down_proj", getattr(layer.mlp, "down_proj", None), inter, 1),
        ):
            if writer is None:
                continue
            rows = kept.hidden.double() if name in post.values() else hidden
            writer.weight.data *= rows[:, None] * units.double().repeat_interleave(each)
            if writer.bias is not None:
                writer.bias.data *= rows
        for name, module in layer.named_children():
            if "norm" in name:
                given_back = size if post.get(name) == "o_proj" else 1.0
                average(module, kept.hidden, hidden * given_back if name in post else 1.0)
        own = layer.self_attn
        if getattr(getattr(own, "q_norm", None), "weight", torch.empty(0)).numel() > shape.head_dim:
            for norm, linear, each in ((own.q_norm, own.q_proj, width), (own.k_norm, own.k_proj, shape.head_dim)):
                features = heads.repeat_interleave(each)
                if heads.any():
                    average(norm, features)
                linear.weight.data *= features[:, None]
                if linear.bias is not None:
                    linear.bias.data *= features
    return model


@pytest.mark.parametrize("norms", ["over the kept dims", "over the dense width"])
@pytest.mark.parametrize("row", EVERY)
def test_the_cut_is_the_dense_model_with_zeros_in_float64(row, norms, make_model, make_masks, input_ids):
    model_type, values = EVERY[row]
    model = make_model(model_type, **values)
    plan = with_units(make_plan(model, make_masks, empty_layer=1), "inter", 2, 0)
    plan = replace(plan, keeps_norm_width="dense" in norms)
    assert plan.num_key_value_heads[1] == plan.intermediate_size[2] == 0 < plan.num_key_value_heads[0]
    expected = logits(zeroed(model, plan), input_ids).float()
    torch.testing.assert_close(logits(sliced(model, plan), input_ids), expected, **CLOSE)
    other = make_plan(model, make_masks, empty_layer=0)  # control
    assert (logits(zeroed(model, other), input_ids) - expected).abs().max() > 0.05


@pytest.mark.parametrize("row", NAMED_ROWS)
def test_a_model_that_people_have_is_saved_and_reloaded(row, make_model, make_masks, input_ids, tmp_path):
    model_type, values = NAMED_ROWS[row]
    model = make_model(model_type, **values)
    plan = make_plan(model, make_masks, dim_multiple=8, empty_layer=1)
    narrow = sliced(model, plan)
    with GatedModel(model).applying(plan):
        torch.testing.assert_close(logits(model, input_ids), logits(narrow, input_ids), **CLOSE)
    assert torch.equal(logits(load_pruned(save_pruned(narrow, plan, None, tmp_path / "x")), input_ids),
                       logits(narrow, input_ids))  # fmt: skip
    assert sum(p.numel() for p in narrow.parameters()) == plan.num_parameters


def test_gates_train_in_bfloat16(model, input_ids):
    gated = GatedModel(model.bfloat16())
    gates = [gated.mu, gated.log_variance]
    optimizer = torch.optim.AdamW(gates, lr=0.05)
    loss = gated(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    assert loss.isfinite() and all(gate.grad.isfinite().all() for gate in gates)
    before = [gate.detach().clone() for gate in gates]
    optimizer.step()
    assert all(gate.isfinite().all() and not torch.equal(gate, old) for gate, old in zip(gates, before, strict=True))
    assert gated(input_ids=input_ids, labels=input_ids).loss.isfinite()


def test_lora_on_a_pruned_model_is_merged_to_the_same_logits(model, make_masks, input_ids):
    narrow = sliced(model, make_plan(model, make_masks, empty_layer=1))
    before = logits(narrow, input_ids)
    tuned = add_lora(narrow, LoraSettings(2, 1.0, 0.0, train_lm_head=False))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = logits(tuned, input_ids)
    merged = merge(tuned)
    torch.testing.assert_close(logits(merged, input_ids), expected, **CLOSE)
    assert (expected - before).abs().max() > 0.01


PARTIAL = "phi3, partial rope"


@pytest.mark.parametrize("row", [*ONCE.values(), PARTIAL])
def test_vanilla_is_a_stock_model_of_the_same_function_or_refused(row, make_model, make_masks, input_ids, tmp_path):
    model_type, values = EVERY[row]
    model = make_model(model_type, **values)
    plan = make_plan(model, make_masks, dim_multiple=4, empty_layer=1)
    queries, dense = max(plan.num_key_value_heads) * plan.shape.group_size, plan.shape.hidden_size
    plan = with_hidden(plan, (dense - 1) // queries * queries)  # some stock configs take no other
    assert 0 < plan.hidden_size < dense and len(set(plan.num_key_value_heads)) > 1
    assert len(set(plan.intermediate_size)) > 1 and max(plan.intermediate_size) > 0 or all(plan.shape.experts)
    narrow = sliced(model, plan)
    reason = None if row == PARTIAL else REFUSED_VANILLA.get(model_type)
    if reason is not None:
        with pytest.raises(InputError, match=reason):
            export_vanilla(narrow, None, tmp_path / "vanilla", overwrite=False, verify=True)
        return
    export_vanilla(narrow, None, tmp_path / "vanilla", overwrite=False, verify=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "vanilla").eval()
    assert not type(loaded).__name__.startswith("Pruned")
    torch.testing.assert_close(logits(loaded, input_ids), logits(narrow, input_ids), **CLOSE)


REFUSED_ONNX = {
    "phi3": "rotary frequencies follow the length of the text",
    "mixtral": "which experts a token passes is chosen as it comes",
    "qwen3_moe": "which experts a token passes is chosen as it comes",
}


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_logits(model, make_masks, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if not tiny.EVERY and base_type(model.config) not in REFUSED_ONNX:
        pytest.skip("TVAPRUNE_EVERY=1 exports all families; tests/export exports Llama")
    plan = make_plan(model, make_masks, empty_layer=1)
    folder = save_pruned(sliced(model, plan), plan, None, tmp_path / "pruned")
    if (reason := REFUSED_ONNX.get(base_type(model.config))) is not None:
        with pytest.raises(InputError, match=reason):
            export_onnx(load_pruned(folder), folder, None, tmp_path / "onnx", overwrite=False, verify=True)
        return
    export_onnx(load_pruned(folder), folder, None, tmp_path / "onnx", overwrite=False, verify=True)
    assert capsys.readouterr().out.count("verified") == 2


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        (
            "gpt2",
            "'gpt2', which has no row in tvaprune/models/families.py: supported are llama, mistral, ",
        ),
        ("glm", "'glm', which has no row in tvaprune/models/families.py: nearest is glm4, supported are llama, "),
        (
            "qwen2_moe",
            "'qwen2_moe', a mixture of experts of another kind than mixtral's and qwen3_moe's: nearest is qwen3_moe, ",
        ),
        (
            "deepseek_v3",
            "'deepseek_v3', a mixture of experts of another kind than mixtral's and qwen3_moe's: supported ",
        ),
        ("mamba", "'mamba', which mixes attention with layers that have no KV heads to prune (linear_attention): "),
        ("falcon_h1", "'falcon_h1', which mixes attention with layers that have no KV heads to prune (hybrid): "),
        (
            "qwen3_next",
            "'qwen3_next', which mixes attention with layers that have no KV heads to prune (",
        ),
        ("gemma3", "'gemma3', which reads more than text; its text part, 'gemma3_text', is supported: save that as a "),
        ("qwen2_vl", "'qwen2_vl', which reads more than text; its text part, 'qwen2_vl_text', is not supported"),
    ],
)
def test_a_family_without_a_row_is_refused_by_name_and_kind(model_type, said):
    with pytest.raises(InputError) as caught:
        family_of(AutoConfig.for_model(model_type))
    assert str(caught.value).startswith(f"the model's type is {said}")


BLOCKS = Dataset.from_dict({"input_ids": torch.arange(8 * 12).remainder(47).view(8, 12).tolist()}).with_format("torch")


@pytest.mark.parametrize("method", sorted(set(SCORES) - {"random", "bonsai"}))
def test_a_unit_that_writes_nothing_is_the_first_to_go(model, method):
    layer, shape = model.model.layers[1], shape_of(model.config)
    if any(shape.experts):
        with pytest.raises(InputError, match=f"--prune_method {method}: scores KV heads .*: use --prune_method vib"):
            score_masks(model, method, BLOCKS)
        return
    heads, width = shape.num_key_value_heads[1], shape.head_dim * shape.group_size
    before = score_masks(model, method, BLOCKS).log_alpha
    channel, head = int(before.inter[1].argmin()), int(before.attn[1].argmin())  # the last to go, of each kind
    with torch.no_grad():
        layer.mlp.down_proj.weight[:, channel] = 0.0
        layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0.0
    scores = score_masks(model, method, BLOCKS).log_alpha
    assert all(values.isfinite().all() for values in scores)
    for values, unit in ((scores.inter[1], channel), (scores.attn[1], head)):
        assert values[unit] == values.max()  # relu2 has channels that no token wakes
        assert values.min() < values.max() or (heads == 1 and values is scores.attn[1])
    assert before.inter[1][channel] < before.inter[1].max()  # control


def test_the_command_prunes_a_gemma_and_begins_each_window_with_bos(make_model, tmp_path, command):
    model = make_model("gemma3_text", **(MORE_ROWS["gemma3_text tied"][1] | {"max_position_embeddings": 64}))
    source, text = tiny.save_checkpoint(model, tmp_path / "model"), tiny.write_text(tmp_path / "text.txt")
    tokenizer = AutoTokenizer.from_pretrained(source, bos_token="</s>")
    tokenizer.save_pretrained(source)
    code, said, error = command(
        "--do_train", "--prune_method", "vib", "--model_name_or_path", source, "--dataset_name", text,
        "--output_dir", tmp_path / "out", "--save_pruned", tmp_path / "pruned", "--target_sparsity", "0.3",
        "--block_size", "16", "--ctx_length", "16", "--max_train_samples", "24", "--max_eval_samples", "8",
        "--refit_samples", "8", "--speed_batches", "0", "--dim_multiple", "1", "--use_cpu",
    )  # fmt: skip
    assert code == 0, error
    results = tiny.read_json(tmp_path / "out" / "results.json")
    assert results["protocol"]["every_bos"] and "a BOS before each window" in said
    loaded = load_pruned(tmp_path / "pruned")
    assert loaded.config.model_type.removeprefix("pruned_") == "gemma3_text"
    assert loaded.num_parameters() < model.num_parameters()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
