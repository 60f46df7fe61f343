"""A pruned checkpoint in the tools that open it: generation, pipeline, LoRA, lm-eval, the hub, a process of its own."""

import argparse
import os
import subprocess
import sys

import pytest
import torch
from support.families import CLOSE, generate, logits
from support.folders import no_heads_in_layer_0, read_config
from transformers import AutoModel, AutoTokenizer, pipeline

from tvaprune.checkpoint.folder import load_pruned, save_pruned


@pytest.mark.parametrize("row", ["llama MHA", "mistral GQA, window shorter than the input", "qwen2 tied", "qwen3 tied"])
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_with_any_cache_equals_generation_without(row, implementation, make_pruned, input_ids, tmp_path):
    narrow, plan = make_pruned(row, no_heads_in_layer_0)
    loaded = load_pruned(save_pruned(narrow, plan, None, tmp_path / "pruned"))
    mask = torch.ones_like(input_ids)
    mask[0, :8] = 0  # left padding
    tokens, scores = generate(loaded, input_ids, mask, use_cache=False)
    loaded.generation_config.cache_implementation = None if implementation == "dynamic" else implementation
    cached_tokens, cached_scores = generate(loaded, input_ids, mask, use_cache=True)
    assert torch.equal(tokens, cached_tokens)
    torch.testing.assert_close(scores, cached_scores, **CLOSE)
    alone_tokens, alone_scores = generate(loaded, input_ids[:1, 8:], mask[:1, 8:], use_cache=True)
    assert torch.equal(alone_tokens, tokens[:1])
    torch.testing.assert_close(alone_scores, scores[:1], **CLOSE)


def test_set_attn_implementation_reaches_every_layer(uneven_folder, input_ids):
    loaded = load_pruned(uneven_folder)
    expected = logits(loaded, input_ids)
    loaded.set_attn_implementation("eager")
    assert {layer.self_attn.config._attn_implementation for layer in loaded.model.layers} == {"eager"}
    torch.testing.assert_close(logits(loaded, input_ids), expected, **CLOSE)
    with torch.no_grad():
        output = loaded(input_ids=input_ids, output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 3 and len(output.hidden_states) == 4


def test_the_decoder_alone_loads_as_auto_model(uneven_folder, input_ids):
    decoder = AutoModel.from_pretrained(uneven_folder).eval()
    assert type(decoder).__name__ == "PrunedMistralModel"
    for model in (decoder, load_pruned(uneven_folder)):  # a device map splits no layer
        assert "PrunedMistralDecoderLayer" in model._no_split_modules
    with torch.no_grad():
        hidden = decoder(input_ids=input_ids).last_hidden_state
        assert torch.equal(load_pruned(uneven_folder).lm_head(hidden), logits(load_pruned(uneven_folder), input_ids))


def test_pipeline_generates(uneven_folder):
    generator = pipeline(
        "text-generation", model=load_pruned(uneven_folder), tokenizer=AutoTokenizer.from_pretrained(uneven_folder)
    )
    (answer,) = generator("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert answer["generated_text"].startswith("w5 w6 w7")


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_lora_trains_saves_reloads_and_merges(targets, uneven_folder, input_ids, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    base = load_pruned(uneven_folder)
    stock = logits(base, input_ids)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):  # LoRA's B starts at zero: the first step moves it, the second A
        tuned(input_ids=input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    trained = logits(tuned.eval(), input_ids)
    assert not torch.allclose(trained, stock, atol=1e-3)
    tuned.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(load_pruned(uneven_folder), tmp_path / "lora").eval()
    assert torch.equal(logits(again, input_ids), trained)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(load_pruned(tmp_path / "merged"), input_ids), trained, **CLOSE)


def test_lm_eval_scores_it_by_its_path(uneven_folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(uneven_folder), trust_remote_code=True, device="cpu", batch_size=1, dtype="float32")
    request = Instance("loglikelihood", {}, ("w5 w6", " w7 w8"), 0)
    ((found, greedy),) = harness.loglikelihood([request], disable_tqdm=True)
    scores = logits(load_pruned(uneven_folder), torch.tensor([[5, 6, 7, 8]]))[0].log_softmax(-1)
    assert found == pytest.approx(float(scores[1, 7] + scores[2, 8]), abs=1e-4)
    assert isinstance(greedy, bool)


def test_push_to_hub_uploads_what_loads(uneven_folder, input_ids, tmp_path, monkeypatch):
    from huggingface_hub import ModelCard
    from transformers.utils import hub

    def upload(self, source, repo_id, *args, **kwargs):
        os.rename(source, tmp_path / "uploaded")
        os.mkdir(source)

    class NoHub:
        def create_repo(self, repo_id, **options):
            return argparse.Namespace(repo_id=repo_id)

    monkeypatch.setattr(hub, "hf_api", NoHub)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: ModelCard("# pruned"))
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    loaded = load_pruned(uneven_folder)
    loaded.push_to_hub("someone/pruned")
    again, saved = read_config(tmp_path / "uploaded"), read_config(uneven_folder)
    for key in ("auto_map", "per_layer_config", "rope_theta", "rope_scaling", "rope_parameters", "model_type"):
        assert again[key] == saved[key]
    assert (tmp_path / "uploaded" / "modeling_pruned.py").read_text() == (
        uneven_folder / "modeling_pruned.py"
    ).read_text()
    assert torch.equal(logits(load_pruned(tmp_path / "uploaded"), input_ids), logits(loaded, input_ids))


WITHOUT_TVAPRUNE = """
import importlib.util, sys, torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
assert importlib.util.find_spec("tvaprune") is None
folder, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    logits = model(torch.load(inputs), use_cache=False).logits
torch.save(logits, outputs)
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(again(torch.load(inputs), use_cache=False).logits, logits)
assert len(AutoModel.from_pretrained(folder, trust_remote_code=True).layers) == 3
tokenizer = AutoTokenizer.from_pretrained(folder)
assert pipeline("text-generation", model=model, tokenizer=tokenizer)("w5 w6", max_new_tokens=3)
"""


def test_a_process_without_tvaprune_loads_it_by_its_remote_code(uneven_folder, input_ids, tmp_path):
    torch.save(input_ids, tmp_path / "inputs.pt")
    script = tmp_path / "script.py"
    script.write_text(WITHOUT_TVAPRUNE)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", script, uneven_folder, tmp_path / "inputs.pt", tmp_path / "logits.pt"]
    result = subprocess.run([*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    if "find_spec" in result.stderr:
        pytest.skip("tvaprune is installed in this environment, not run from a checkout")
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(load_pruned(uneven_folder), input_ids))
    again = read_config(tmp_path / "pruned-again")
    assert again["rope_theta"] == 10000.0 and len(again["auto_map"]) == 3
