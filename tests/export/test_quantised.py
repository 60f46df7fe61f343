"""A pruned miniature, quantised: what is written, what it costs in perplexity, and which widths fit."""

import importlib.util
import math

import numpy as np
import pytest
import torch
from support.families import sliced
from support.folders import read_config
from support.tiny import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.export.in_llama_cpp import opened
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.masks import load_masks
from tvaprune.plan.widths import WidthRules
from tvaprune.stages.export import export

gguf = pytest.importorskip("gguf")
MINI = ROOT / "mistral_saves_tva" / "mini_mistral"
MASK = ROOT / "mistral_saves_tva" / "mask_info_26.844462387911015.pkl"
WINDOW = 128  # its sliding window, and so the context of its GGUF file


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Returns the miniature pruned to multiples of 32, folded, on disk: blocks of 32 fit, those of 256 do not."""
    model = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    shape = shape_of(model.config)
    plan = plan_from_masks(load_masks(MASK, shape), shape, WidthRules(32))
    folder = tmp_path_factory.mktemp("quantised") / "pruned"
    return save_pruned(sliced(model, plan), plan, AutoTokenizer.from_pretrained(MINI), folder)


@pytest.fixture(scope="module")
def windows():
    """Windows of a text that the miniature was not trained on and that stays, shape (windows, tokens)."""
    ids = AutoTokenizer.from_pretrained(MINI)((ROOT / "LICENSE").read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[: 24 * WINDOW]).view(-1, WINDOW)


def perplexity_of(logits, windows):
    """Of logits of shape (windows, tokens, vocabulary)."""
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), windows[:, 1:].flatten())
    return math.exp(losses)


@torch.no_grad()
def perplexity(model, windows):
    return perplexity_of(model(windows).logits, windows)


def quantised(model, kind):
    """A copy whose matrices were packed as ``kind`` and unpacked again."""
    wanted, copy = getattr(gguf.GGMLQuantizationType, kind), load_pruned(model)
    with torch.no_grad():
        for weight in copy.parameters():
            if weight.dim() == 2:
                packed = gguf.quantize(weight.float().numpy(), wanted)
                weight.copy_(torch.tensor(np.array(gguf.dequantize(packed, wanted))))
    return copy


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.01), ("Q5_0", 0.05)])
def test_what_the_formats_that_fit_cost_a_pruned_miniature(kind, most, mini, windows):
    before, after = perplexity(load_pruned(mini), windows), perplexity(quantised(mini, kind), windows)
    print(f"{kind}: {before:.4f} -> {after:.4f}")
    assert after != before and abs(math.log(after / before)) < most
    broken = perplexity(quantised(mini, "Q4_0"), windows)  # control: a coarser format costs more
    assert abs(math.log(broken / before)) > abs(math.log(after / before))


def test_an_export_says_which_widths_do_not_fit_a_quantiser(mini, tmp_path, capsys):
    sizes = read_config(mini)
    export("gguf", mini, tmp_path / "model.gguf", "q8_0", verify=False)
    told = capsys.readouterr().out
    assert f"{sizes['hidden_size']}" in told and "no multiples of 256, where llama-quantize packs Q4_K as Q5_0" in told
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types == {"Q8_0", "F32"}  # every matrix fits blocks of 32


@pytest.mark.parametrize("multiple", [8, 128])
def test_a_stock_export_says_which_widths_groups_of_128_do_not_fit(multiple, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    shape = shape_of(model.config)
    plan = plan_from_masks(load_masks(MASK, shape), shape, WidthRules(multiple))
    export("vanilla", save_pruned(sliced(model, plan), plan, None, tmp_path / "p"), tmp_path / "v", verify=False)
    words = f"{max(plan.intermediate_size)}: no multiples of 128, as FP8 blocks and the groups of AWQ and GPTQ"
    assert (words in capsys.readouterr().out) == (multiple == 8)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpps_own_quantiser_and_its_perplexity(mini, windows, tmp_path):
    import ctypes

    import llama_cpp

    export("gguf", mini, tmp_path / "F32.gguf", "f32", verify=False)

    def perplexity_in_llama_cpp(path):
        llama = opened(path, 1, n_ctx=WINDOW, logits_all=True, type_k=0, type_v=0)
        found = []
        for window in windows.tolist():
            llama.reset()
            llama.eval(window)
            found.append(torch.tensor(llama.scores[:WINDOW]))
        return perplexity_of(torch.stack(found), windows)

    measured = {"F32": perplexity_in_llama_cpp(tmp_path / "F32.gguf")}
    for kind in ("Q8_0", "Q4_K_M"):
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        out = tmp_path / f"{kind}.gguf"
        assert not llama_cpp.llama_model_quantize(
            str(tmp_path / "F32.gguf").encode(), str(out).encode(), ctypes.byref(params)
        )
        measured[kind] = perplexity_in_llama_cpp(out)
        types = {tensor.tensor_type.name for tensor in gguf.GGUFReader(out).tensors}
        assert types <= {"F32", "Q8_0", "Q5_0"}  # no row is a multiple of 256: Q4_K as Q5_0, Q6_K as Q8_0
    print(measured)
    assert measured["F32"] == pytest.approx(perplexity(load_pruned(mini), windows), rel=1e-3)
    assert measured["Q8_0"] == pytest.approx(measured["F32"], rel=0.01)
    assert measured["Q4_K_M"] == pytest.approx(measured["F32"], rel=0.05)
    assert measured["Q4_K_M"] != measured["Q8_0"] != measured["F32"]  # control
