"""A GGUF file of every family: it holds what llama.cpp's loader asks for, and is computed the same, or is refused."""

import importlib.util
import weakref

import numpy as np
import pytest
import torch
from support.families import LONG_ROPE, WINDOWS, make_plan, sliced
from support.folders import LLAMA3_ROPE, uneven, uniform, with_hidden

from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.errors import InputError
from tvaprune.export import gguf_tensors
from tvaprune.export.in_llama_cpp import logits_in_llama_cpp
from tvaprune.export.verify import fixed_prompt, reference_logits
from tvaprune.files import read_json, write_json
from tvaprune.models.families import FAMILIES
from tvaprune.models.formats import ARCHITECTURES, gguf_architecture
from tvaprune.stages.export import export

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
TIED = {"tie_word_embeddings": True}
BIASES = {"attention_bias": True, "mlp_bias": True}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 0.6}
CAPS = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
ALPHA_ROPE = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 1.0, "alpha": 100.0}
TWO_ROPES = {"full_attention": LINEAR_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}}
SQUARE = {"hidden_size": 32}  # as wide as four heads of 8


def square(plan):
    """Layers alike, query heads as wide together as the residual stream."""
    return with_hidden(uniform(plan), plan.shape.group_size * plan.shape.head_dim)


def whole(plan):
    return plan  # not cut


ROWS = {  # row: family, values, what of it is written, llama.cpp's architecture
    "llama": ("llama", BIASES, uniform, "llama"),
    "llama, by layer": ("llama", TIED | BIASES | {"rope_parameters": LLAMA3_ROPE}, uneven, "deci"),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}, uneven, "deci"),
    "mistral": ("mistral", {"sliding_window": 5}, uneven, "deci"),
    "internlm3": ("internlm3", {"qkv_bias": True, "bias": True}, uneven, "deci"),
    "ministral": ("ministral", WINDOWS, uneven, "deci"),
    "cwm": ("cwm", WINDOWS | {"bos_token_id": 1, "eos_token_id": 46}, uneven, "deci"),
    "granite": ("granite", TIED | SCALED | BIASES, uniform, "llama"),
    "granite, by layer": ("granite", SCALED | {"attention_bias": True, "mlp_bias": True}, uneven, "deci"),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}, uneven, "deci"),
    "phi3": ("phi3", {}, uneven, "deci"),
    "qwen2": ("qwen2", SQUARE, square, "qwen2"),
    "qwen2, other heads": ("qwen2", TIED, uniform, "llama"),
    "qwen2, by layer": ("qwen2", TIED, uneven, "deci"),
    "qwen3": ("qwen3", {}, uniform, "qwen3"),
    "qwen3, by layer": ("qwen3", TIED, uneven, "openelm"),
    "smollm3": ("smollm3", TIED | {"num_hidden_layers": 5}, uniform, "smollm3"),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"rope_parameters": ALPHA_ROPE}, uniform, "hunyuan-dense"),
    "arcee": ("arcee", {"rope_parameters": LLAMA3_ROPE}, uniform, "arcee"),
    "gemma": ("gemma", TIED, uniform, "gemma"),
    "gemma2": ("gemma2", TIED | WINDOWS | CAPS | {"query_pre_attn_scalar": 9}, uniform, "gemma2"),
    "gemma2, the largest": ("gemma2", TIED | CAPS | {"num_hidden_layers": 46}, uniform, "gemma2"),
    "gemma3_text": ("gemma3_text", WINDOWS | {"query_pre_attn_scalar": 9}, uniform, "gemma3"),
    "gemma3_text, linear rope": ("gemma3_text", WINDOWS | {"rope_parameters": TWO_ROPES}, uniform, "gemma3"),
    "olmo2": ("olmo2", SQUARE, square, "olmo2"),
    "olmo3": ("olmo3", SQUARE | WINDOWS, square, "olmo2"),
    "glm4": ("glm4", {"attention_bias": True}, uniform, "glm4"),
    "exaone4": ("exaone4", SQUARE | {"sliding_window": None, "layer_types": ["full_attention"] * 3}, square, "exaone4"),
    "exaone4, the largest": ("exaone4", SQUARE | {"sliding_window": 4, "num_hidden_layers": 64}, square, "exaone4"),
    "cohere2": ("cohere2", TIED | SQUARE | WINDOWS | {"logit_scale": 0.7}, square, "cohere2"),
}

QKV, MLP = {"attn_q", "attn_k", "attn_v"}, {"ffn_gate", "ffn_up", "ffn_down"}
HEAD_NORMS, POST_NORMS = {"attn_q_norm", "attn_k_norm"}, {"post_attention_norm", "post_ffw_norm"}
LLAMA = QKV | MLP | {"attn_output", "attn_norm", "ffn_norm"}
NO_PRE_NORMS = LLAMA - {"attn_norm", "ffn_norm"} | HEAD_NORMS | POST_NORMS
TENSORS = {  # of each layer, as the loaders of src/models/*.cpp name them; the others those of Llama
    "qwen3": LLAMA | HEAD_NORMS,
    "openelm": LLAMA - QKV | HEAD_NORMS | {"attn_qkv"},
    "hunyuan-dense": LLAMA | HEAD_NORMS,
    "arcee": LLAMA - {"ffn_gate"},
    "gemma2": LLAMA | POST_NORMS,
    "gemma3": LLAMA | POST_NORMS | HEAD_NORMS,
    "olmo2": NO_PRE_NORMS,
    "exaone4": NO_PRE_NORMS,
    "glm4": LLAMA - {"ffn_gate"} | POST_NORMS,
    "cohere2": LLAMA - {"ffn_norm"},
}


@pytest.fixture
def make_folder(make_model, make_masks, tmp_path):
    """Returns a function: family, config values and case -> the checkpoint of the narrower model."""

    def make(model_type, values, case):
        model = make_model(model_type, **({"head_dim": 8} | values))
        plan = case(make_plan(model, make_masks))
        return save_pruned(sliced(model, plan), plan, None, tmp_path / "pruned")

    return make


def read(path):
    """Returns the fields, without their architecture, and the tensors in torch's layout."""
    reader = gguf.GGUFReader(path)
    fields = {name.partition(".")[2]: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}


def shapes_of_layer(architecture, hidden, keys, channels):
    """The shapes that the loader gives a layer's weights; the group is two query heads of 8."""
    heads = {name: (keys * 2 if name == "attn_q_norm" else keys,) for name in HEAD_NORMS}
    shapes = {
        "attn_q": (keys * 2, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_qkv": (keys * 4, hidden),
        "attn_output": (hidden, keys * 2),
        "ffn_gate": (channels, hidden),
        "ffn_up": (channels * (1 + (architecture == "glm4")), hidden),
        "ffn_down": (hidden, channels),
    } | (heads if architecture == "olmo2" else dict.fromkeys(HEAD_NORMS, (8,)))
    return {name: shapes.get(name, (hidden,)) for name in TENSORS.get(architecture, LLAMA)}


@pytest.mark.parametrize("family", ["phi3", "granite"])
def test_a_config_that_does_not_name_the_width_of_a_head(family, make_model, tmp_path):
    folder = tmp_path / "stock"
    make_model(family, head_dim=8, **SQUARE).save_pretrained(folder)
    export("gguf", folder, tmp_path / "named.gguf", "f32", verify=False)
    config = folder / "config.json"
    named = read_json(config)
    assert named.pop("head_dim") == 8
    write_json(named, config)
    assert not hasattr(load_pruned(folder).config, "head_dim")  # control
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()


def test_every_family_has_a_row():
    mixtures = {name for name, family in FAMILIES.items() if family.experts is not None}  # refused
    assert {row[0] for row in ROWS.values()} == set(ARCHITECTURES) == set(FAMILIES) - mixtures


@pytest.mark.parametrize("row", ROWS)
def test_a_file_holds_what_the_loader_of_its_architecture_asks_for(row, make_folder, tmp_path):
    model_type, values, case, architecture = ROWS[row]
    folder = make_folder(model_type, values, case)
    export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    (fields, tensors), model = read(tmp_path / "model.gguf"), load_pruned(folder)
    assert fields["architecture"] == architecture
    heads, channels = fields["attention.head_count_kv"], fields["feed_forward_length"]
    by_layer = architecture in ("deci", "openelm")
    assert isinstance(heads, list) == isinstance(channels, list) == by_layer
    for index in range(fields["block_count"]):
        start = f"blk.{index}."
        found = {n.split(".")[2]: tuple(t.shape) for n, t in tensors.items() if n.startswith(start) and n[-1] == "t"}
        sizes = (heads[index], channels[index]) if by_layer else (heads, channels)
        assert found == shapes_of_layer(architecture, fields["embedding_length"], sizes[0] * 8, sizes[1])
    factors = tensors.pop("rope_freqs.weight", None)
    assert (factors is not None) == (row in ("llama, by layer", "llama, linear rope", "cwm", "arcee"))
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in model.parameters())


@pytest.fixture
def written(make_folder, tmp_path):
    """Returns a function: row -> the fields and tensors of its file, the weights of layer 0 and those of the model."""

    def write(row):
        folder = make_folder(*ROWS[row][:3])
        export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
        weights = load_pruned(folder).state_dict()
        start = "model.layers.0."
        layer = {n.removeprefix(start).removesuffix(".weight"): w for n, w in weights.items() if n.startswith(start)}
        return *read(tmp_path / "model.gguf"), layer, weights

    return write


def test_fused_projections_are_cut_and_single_ones_joined_where_the_graph_wants_it(written):
    fields, tensors, layer, _ = written("phi3")
    gate, up = layer["mlp.gate_up_proj"].chunk(2)
    assert torch.equal(tensors["blk.0.ffn_gate.weight"], gate) and torch.equal(tensors["blk.0.ffn_up.weight"], up)
    keys = fields["attention.head_count_kv"][0] * 8
    assert torch.equal(tensors["blk.0.attn_v.weight"], layer["self_attn.qkv_proj"][-keys:])
    assert not torch.equal(gate, up)  # control


def test_a_matrix_of_q_k_and_v_stacks_them(written):
    _, tensors, layer, _ = written("qwen3, by layer")
    stacked = torch.cat([layer[f"self_attn.{kind}_proj"] for kind in "qkv"])
    assert torch.equal(tensors["blk.0.attn_qkv.weight"], stacked)


def test_what_a_graph_does_not_multiply_by_is_in_the_weights(written):
    fields, tensors, layer, weights = written("granite")
    torch.testing.assert_close(tensors["blk.0.ffn_down.weight"], layer["mlp.down_proj"] * (0.5 / 3.0))
    torch.testing.assert_close(tensors["blk.0.attn_output.bias"], layer["self_attn.o_proj.bias"] * (0.5 / 3.0))
    bias = layer["self_attn.q_proj.bias"].unflatten(0, (-1, 2, 4)).mT.flatten() * (0.3 * 8**0.5)  # neighbouring pairs
    torch.testing.assert_close(tensors["blk.0.attn_q.bias"], bias)
    torch.testing.assert_close(tensors["output_norm.weight"], weights["model.norm.weight"] / 0.6)
    assert torch.equal(tensors["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert "output.weight" not in tensors  # the tie stays
    assert fields["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6 / 9)


def test_gains_windows_and_caps_are_as_gemma_has_them(written):
    fields, tensors, layer, _ = written("gemma2")
    assert torch.equal(tensors["blk.0.post_ffw_norm.weight"], layer["post_feedforward_layernorm"] + 1)
    assert torch.equal(tensors["blk.0.attn_norm.weight"], layer["input_layernorm"] + 1)
    torch.testing.assert_close(tensors["blk.0.attn_q.weight"], layer["self_attn.q_proj"] * (8 / 9) ** 0.5)
    assert fields["attention.sliding_window_pattern"] == [True, False, True]
    assert (fields["attention.sliding_window"], fields["context_length"]) == (4, 64)
    assert (fields["attn_logit_softcapping"], fields["final_logit_softcapping"]) == (1.5, 2.0)


def test_two_ropes_are_two_bases_and_one_scaling(written):
    fields, *_ = written("gemma3_text, linear rope")
    assert (fields["rope.freq_base"], fields["rope.freq_base_swa"]) == (5000.0, 100.0)
    assert (fields["rope.scaling.type"], fields["rope.scaling.factor"]) == ("linear", 4.0)


ONE_WIDTH = "has one width for all layers; export --format vanilla and that folder to gguf, or learn the mask with --un"
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
SCALED_WINDOWS = {"full_attention": LINEAR_ROPE, "sliding_attention": LINEAR_ROPE}
REFUSED = {  # row: family, values, case, what is said
    "qwen3 untied": ("qwen3", {}, uneven, "'qwen3' has one width for all layers, 'openelm' has no head but the emb"),
    "smollm3": ("smollm3", {}, uneven, f"'smollm3' {ONE_WIDTH}"),
    "gemma3": ("gemma3_text", {}, uneven, f"'gemma3' {ONE_WIDTH}"),
    "olmo2": ("olmo2", {}, whole, "wants query heads as wide together as the hidden dims, here .*; use the checkpoint"),
    "arcee": ("arcee", {"mlp_bias": True}, uniform, "'arcee' has no biases of the output projection and the MLP; use"),
    "gemma untied": ("gemma", {}, uniform, "'gemma' has no head but the embedding"),
    "gemma2 without caps": ("gemma2", TIED | {"final_logit_softcapping": None}, uniform, "always caps the logits"),
    "other layers without rope": ("smollm3", {"no_rope_layers": [1, 0, 1]}, uniform, "every fourth layer and no other"),
    "yarn": ("llama", {"rope_parameters": YARN}, uniform, "has no rotary scaling 'yarn'"),
    "dynamic": ("hunyuan_v1_dense", {"rope_parameters": ALPHA_ROPE | {"alpha": None}}, uniform, "follows the length"),
    "scaled windows": ("gemma3_text", WINDOWS | {"rope_parameters": SCALED_WINDOWS}, uniform, "no rope of sliding"),
    "phi3, long rope": ("phi3", {"head_dim": 6, "hidden_size": 24, "rope_parameters": LONG_ROPE,
                                 "original_max_position_embeddings": 2}, whole, "no rotary scaling 'longrope'"),
    "phi3, partial rope": ("phi3", {"partial_rotary_factor": 0.5}, uniform, "turns whole heads"),
    "other activation": ("llama", {"hidden_act": "gelu"}, uniform, "has the activation silu, not gelu"),
    "windows of few layers": ("exaone4", SQUARE | WINDOWS, square, "sliding windows in models of 64 layers, and in no"),
}  # fmt: skip


@pytest.mark.parametrize("row", REFUSED)
def test_what_no_architecture_computes_is_refused(row, make_folder, tmp_path):
    *given, words = REFUSED[row]
    folder = make_folder(*given)
    with pytest.raises(InputError, match=words):
        export("gguf", folder, tmp_path / "model.gguf", "f32", verify=False)
    assert not (tmp_path / "model.gguf").exists()


@pytest.mark.parametrize("model_type", ["fused", "mixtral"])
def test_a_family_without_a_row_is_refused(model_type, make_model, other_families):
    with pytest.raises(InputError, match=f"models of type '{model_type}' are not written, only llama, mistral, "):
        gguf_architecture(make_model(model_type).config)


class HalfGelu(torch.nn.Module):
    """GELU as llama.cpp's CPU kernel has it: from a table of half precision (``ggml_vec_gelu_f32``)."""

    def forward(self, x):
        read = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, read))


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("row", ROWS)
def test_llama_cpp_computes_the_same(row, make_folder, tmp_path, capsys):
    folder = make_folder(*ROWS[row][:3])
    export("gguf", folder, tmp_path / "model.gguf", "f32")
    assert capsys.readouterr().out.count("in llama.cpp: largest difference") == 2  # prefill and decoding, as users see
    model = load_pruned(folder)
    for layer in model.model.layers:
        if ROWS[row][0].startswith("gemma"):
            layer.mlp.act_fn = HalfGelu()
    ids = fixed_prompt(model.config.vocab_size)[:, : read(tmp_path / "model.gguf")[0]["context_length"]]
    expected = reference_logits(model, ids)[0]
    found = logits_in_llama_cpp(tmp_path / "model.gguf", ids[0].tolist(), 1)["prefill"]
    difference = (torch.tensor(found) - expected).abs().max()
    print(f"{row}: {difference:.1e} of {expected.abs().max():.1f}")
    tolerance = 1e-3 if ROWS[row][0].startswith("gemma") else 1e-4  # a table's entry to the left or the right
    assert difference < tolerance * expected.abs().max()


@pytest.mark.slow
@needs_llama_cpp
@pytest.mark.parametrize("row", ["llama", "qwen2, by layer", "granite", "gemma2", "gemma3_text", "arcee"])
def test_a_file_without_the_changes_of_the_weights_is_seen(row, make_folder, tmp_path, monkeypatch):
    folder = make_folder(*ROWS[row][:3])
    monkeypatch.setattr(gguf_tensors, "_changed", lambda module, kind, values, *others: values)
    with pytest.raises(InputError, match="the written model's logits are off by"):
        export("gguf", folder, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()


def test_tensors_are_made_one_after_another(make_folder, tmp_path, monkeypatch):
    made, before, quantize = [], [], gguf.quantize

    def noted(values, kind):
        before.append(sum(ref() is not None for ref in made))
        found = quantize(values, kind)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(gguf, "quantize", noted)
    export("gguf", make_folder("phi3", {}, uneven), tmp_path / "model.gguf", "f16", verify=False)
    assert len(before) > 10 and set(before) == {0}  # none of those before, whatever the model's size


FAKE = """
import os, signal
import numpy as np

class Llama:
    def __init__(self, *args, **options):
        if os.environ["FAKE_LLAMA"] == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if os.environ["FAKE_LLAMA"] == "raise":
            raise ValueError("Failed to load model")
        self.scores = np.load(os.environ["FAKE_LLAMA"])

    def reset(self):
        pass

    def eval(self, tokens):
        pass
"""


@pytest.mark.parametrize(("fault", "told"), [("crash", "signal 11"), ("raise", "ValueError: Failed to load model")])
def test_what_crashes_in_llama_cpp_takes_nobody_along(fault, told, make_folder, tmp_path, monkeypatch, capsys):
    folder, packages = make_folder("llama", BIASES, uniform), tmp_path / "packages"
    packages.mkdir()
    (packages / "llama_cpp.py").write_text(FAKE)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("FAKE_LLAMA", fault)
    with pytest.raises(InputError, match=f"as it is installed here, fails on the file \\({told}\\), .* --no_verify"):
        export("gguf", folder, tmp_path / "model.gguf", "f32")
    assert not (tmp_path / "model.gguf").exists()
    model = load_pruned(folder)
    right = reference_logits(model, fixed_prompt(model.config.vocab_size))[0]
    np.save(tmp_path / "logits.npy", right.numpy())
    monkeypatch.setenv("FAKE_LLAMA", str(tmp_path / "logits.npy"))
    export("gguf", folder, tmp_path / "model.gguf", "f32")  # control
    assert capsys.readouterr().out.count("in llama.cpp: largest difference") == 2
