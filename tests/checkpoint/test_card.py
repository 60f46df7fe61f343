"""The card of a pruned checkpoint: what it tells and promises, the hub's metadata above it, and that it goes along."""

import re
import shutil

import huggingface_hub
import pytest
import torch
import transformers.utils.hub as hub_of_transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.repocard import metadata_load
from support.families import ROWS, make_plan, sliced
from support.folders import no_heads_in_layer_0, tokenizer, uneven, uniform
from transformers import AutoModelForCausalLM

from tvaprune.checkpoint import card_metadata
from tvaprune.checkpoint.card import adapter_card, model_card
from tvaprune.checkpoint.card_metadata import source_metadata
from tvaprune.checkpoint.folder import load_pruned, save_pruned
from tvaprune.errors import InputError
from tvaprune.models.published import folder_of
from tvaprune.stages.export import export

RECORD = {
    "protocol": {"dataset_name": "wikitext2", "split": "test", "window": 2048},
    "perplexity": {"dense": 9.25, "pruned": 12.5},
}
RESULTS = ".eval_results/Salesforce--wikitext.yaml"
EMPTY = "This model card has been automatically generated"


@pytest.fixture(scope="session")
def narrow(make_model, make_masks):
    """Returns a function: case, the dense model's folder -> a narrower Llama in memory and its plan."""

    def make(case, source=""):
        model_type, values = ROWS["llama GQA"]
        model = make_model(model_type, **values)
        model.config._name_or_path = str(source)
        plan = case(make_plan(model, make_masks))
        return sliced(model, plan), plan

    return make


@pytest.fixture
def pushed(monkeypatch):
    """The files of every commit that would have gone to the hub, by name; the repository there has no card."""
    commits = []

    class Api:
        def create_repo(self, repo_id, **_):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/somebody/{repo_id}")

        def create_commit(self, repo_id, operations, **_):
            commits.append({each.path_in_repo: content(each) for each in operations})

    def content(operation):
        with operation.as_file() as file:
            return file.read()

    def load(repo_id, **_):
        raise EntryNotFoundError("no README.md")

    monkeypatch.setattr(hub_of_transformers, "hf_api", Api)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", Api)
    monkeypatch.setattr(ModelCard, "load", load)
    return commits


def test_what_a_loaded_pruned_model_pushes_has_our_card_and_results(narrow, pushed, tmp_path):
    folder = save_pruned(*narrow(no_heads_in_layer_0), tokenizer(), tmp_path / "pruned", record=RECORD)
    ours, kept = ((folder / name).read_bytes() for name in ("README.md", RESULTS))
    for model in (load_pruned(folder), AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
        model.push_to_hub("pruned")
        assert pushed[-1]["README.md"] == ours and b"tvaprune" in ours
        assert {"config.json", "model.safetensors", "modeling_pruned.py"} <= set(pushed[-1])
        assert pushed[-1][RESULTS] == kept and b"12.5" in kept
        model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="again")
        assert pushed[-1]["README.md"] == ours and pushed[-1][RESULTS] == kept
        shutil.rmtree(tmp_path / "again")
    load_pruned(folder).save_pretrained(folder, push_to_hub=True, repo_id="pruned")  # into its own folder
    assert pushed[-1]["README.md"] == ours == (folder / "README.md").read_bytes()
    assert pushed[-1][RESULTS] == kept == (folder / RESULTS).read_bytes()


def test_a_model_that_was_changed_is_not_pushed_with_the_figures_of_the_one_it_was(narrow, pushed, tmp_path):
    folder = save_pruned(*narrow(no_heads_in_layer_0), tokenizer(), tmp_path / "pruned", record=RECORD)
    model = load_pruned(folder, dtype=torch.float32)
    model.push_to_hub("same")
    assert RESULTS in pushed[-1]  # control
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight[0, 0] += 1
    model.push_to_hub("changed")
    assert RESULTS not in pushed[-1] and EMPTY.encode() in pushed[-1]["README.md"]


def test_a_card_that_is_on_the_hub_already_stays(narrow, pushed, tmp_path, monkeypatch):
    folder = save_pruned(*narrow(no_heads_in_layer_0), None, tmp_path / "pruned", record=RECORD)
    assert (folder / RESULTS).is_file()
    monkeypatch.setattr(ModelCard, "load", lambda repo_id, **_: ModelCard("---\nlicense: mit\n---\nmine"))
    load_pruned(folder).push_to_hub("pruned")
    assert b"mine" in pushed[-1]["README.md"] and RESULTS not in pushed[-1]


def test_what_has_no_card_of_ours_pushes_what_transformers_makes(narrow, pushed, tmp_path, monkeypatch):
    """Negative controls: without the hook the card is an empty one, and nobody else's card is taken for ours."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("of the folder that the command was called in")
    in_memory, _ = narrow(no_heads_in_layer_0, tmp_path)  # the card of the dense model is another's
    in_memory.push_to_hub("in-memory")
    assert EMPTY.encode() in pushed[-1]["README.md"]
    stock = save_pruned(*narrow(uniform), None, tmp_path / "stock")
    load_pruned(stock).push_to_hub("stock")  # a stock class: `hf upload` pushes the folder with its card
    assert EMPTY.encode() in pushed[-1]["README.md"]


def test_a_folder_goes_up_with_its_card(narrow, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "_validate_yaml", lambda self, content, **_: checked.append(content))
    folder = save_pruned(*narrow(uniform), tokenizer(), tmp_path / "pruned", record=RECORD)
    found = huggingface_hub.HfApi()._prepare_upload_folder_additions(folder, "", repo_type="model")
    assert {"README.md", RESULTS, "config.json", "model.safetensors", "tokenizer.json"} <= {
        each.path_in_repo for each in found
    }
    assert [text.strip() for text in checked] == [(folder / "README.md").read_text().strip()]  # the hub's own check


def card(path, metadata):
    path.mkdir()
    (path / "README.md").write_text(f"---\n{metadata}\n---\n# A model\n", encoding="utf-8")
    return str(path)


def test_licence_and_language_are_those_of_the_source(tmp_path):
    stock = card(tmp_path / "stock", "license: other\nlicense_name: acme\nlicense_link: LICENSE\nlanguage: [en, de]\n"
                 "base_model: somebody/instruct-of-this\ntags: [chat]")  # fmt: skip
    # Its own base is not what it is; a link into a folder leads nowhere.
    assert source_metadata(stock) == {"license": "other", "license_name": "acme", "language": ["en", "de"]}
    ours = card(tmp_path / "ours", "license: mit\nlanguage: en\nbase_model: meta/llama\ntags: [pruned, tvaprune]")
    assert source_metadata(ours) == {"license": "mit", "language": "en", "base_model": "meta/llama"}
    assert source_metadata("smollm2") == {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert source_metadata(None) == source_metadata(str(tmp_path)) == {}


def test_of_a_hub_id_the_card_is_asked_for(tmp_path, monkeypatch):
    found = card(tmp_path / "cache", "license: other\nlicense_link: LICENSE.md\nlanguage: en\ntags: [pruned, tvaprune]")
    monkeypatch.setattr(card_metadata, "hf_hub_download", lambda repo, name: f"{found}/{name}")
    assert source_metadata("acme/licensed") == {
        "base_model": "acme/licensed", "license": "other", "language": "en",
        "license_link": "https://huggingface.co/acme/licensed/blob/main/LICENSE.md",
    }  # fmt: skip
    monkeypatch.undo()
    assert source_metadata("acme/not-there") == {"base_model": "acme/not-there"}  # offline


@pytest.mark.parametrize(
    "metadata",
    ["license: [1, 2]", "license: {a: b}", "- a", "license: &a [*a]", "license: !!python/object/apply:os.getcwd []",
     f"license: {'x' * 5000}", 'license: "a\\nb: c"', "license: 3\nlanguage: [no, 4]", "\x00"],
)  # fmt: skip
def test_a_strangers_card_is_read_as_data(metadata, tmp_path):
    assert "license" not in source_metadata(card(tmp_path / "stranger", metadata))


def test_the_metadata_is_what_the_hub_reads(narrow, tmp_path):
    model, plan = narrow(no_heads_in_layer_0)
    source = card(tmp_path / "source", 'license: "yes: # no"\nlanguage: no')  # what YAML would read as something else
    text = {"dataset_name": "c4", "split": "test", "window": 2048}
    record = {"model": source, "protocol": text, "perplexity": {"dense": 9.25, "pruned": 12.5, "finetuned": 10.12345}}
    path = tmp_path / "README.md"
    path.write_text(model_card(model.config, plan, record, "pruned"))
    data = ModelCard(path.read_text()).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["pruned", "tvaprune"]
    assert data.license == "yes: # no" and "base_model" not in metadata_load(path)
    (found,) = data.eval_results
    assert data.model_name == "pruned" and found.metric_value == 10.1235 and found.metric_type == "perplexity"
    # C4 has no test split on the hub: ours is its validation file.
    assert (found.dataset_type, found.dataset_config, found.dataset_split) == ("allenai/c4", "en", "validation")
    text |= {"dataset_name": "/home/me/secret/own.txt", "split": "validation"}
    path.write_text(model_card(model.config, plan, record | {"protocol": text}, "pruned"))
    (found,) = ModelCard(path.read_text()).data.eval_results
    assert (found.dataset_type, found.dataset_split, found.dataset_config) == ("own", "validation", None)
    assert "±" not in path.read_text()  # control: of what has no error none is told
    assert "| gap in log perplexity to the dense model | | 0.090 |" in path.read_text()  # log(10.12345 / 9.25)
    record["perplexity"]["stderr"] = {
        "dense": 0.25,
        "pruned": 0.5,
        "gap": 0.02,
        "finetuned": 0.3,
        "finetuned_gap": 0.01,
    }
    path.write_text(model_card(model.config, plan, record, "pruned"))
    assert "| 9.25 ± 0.25 | 10.12 ± 0.30, before fine-tuning 12.50 ± 0.50 |" in path.read_text()
    assert "| 0.090 ± 0.010 |\n\n±: the standard error over the windows" in path.read_text()
    told = {each.metric_type: each.metric_value for each in ModelCard(path.read_text()).data.eval_results}
    assert told == {"perplexity": 10.1235, "perplexity_stderr": 0.3}
    del record["perplexity"]["finetuned"]
    path.write_text(model_card(model.config, plan, record, "pruned"))
    assert "| 9.25 ± 0.25 | 12.50 ± 0.50 |" in path.read_text() and "| 0.301 ± 0.020 |" in path.read_text()
    record["perplexity"] = {"dense": 9.25, "pruned": None}  # of weights that overflow
    path.write_text(model_card(model.config, plan, record, "pruned"))
    assert "| 9.25 | not a number |" in path.read_text() and "model-index" not in metadata_load(path)
    path.write_text(model_card(model.config, plan, {"model": "acme/not-there"}, "pruned"))  # nothing was measured
    assert "model-index" not in metadata_load(path) and metadata_load(path)["base_model_relation"] == "finetune"


def test_an_adapter_is_not_said_to_be_of_the_dense_model(narrow):
    _, plan = narrow(no_heads_in_layer_0)
    data = ModelCard(adapter_card(plan, {"model": "smollm2"}, "adapter", "out/pruned")).data.to_dict()
    assert data["library_name"] == "peft" and data["license"] == "apache-2.0" and "lora" in data["tags"]
    assert "base_model" not in data


def test_the_model_card_tells_what_it_is_and_how_to_load_it(make_pruned, tmp_path):
    narrow, plan = make_pruned("llama GQA", no_heads_in_layer_0)
    record = {
        "model": "meta-llama/Llama-3.2-1B",
        "mask": "best/mask_info_12.5.pkl",
        "weight_update": "fold",
        "dataset_name": "wikitext2",
        "protocol": {"dataset_name": "wikitext2", "split": "validation", "window": 64},
        "perplexity": {"dense": 9.25, "pruned": 12.5},
        "command": "python lora_ft_vib.py",
        "versions": {"torch": "2.13.0"},
    }
    card = (save_pruned(narrow, plan, None, tmp_path / "pruned", record=record) / "README.md").read_text()
    heads, channels = (" ".join(map(str, widths)) for widths in (plan.num_key_value_heads, plan.intermediate_size))
    for text in (
        "base_model: meta-llama/Llama-3.2-1B\n",
        f"| hidden dims | 36 | {plan.hidden_size} |",
        f"| KV heads per layer | 3 | {heads} |",
        f"| MLP channels per layer | 52 | {channels} |",
        "| query heads per KV head, head dim | 2, 6 | the same |",
        f"| sparsity of the decoder layers | 0 | {plan.sparsity:.4f} |",
        "| perplexity (wikitext2 validation, windows of 64) | 9.25 | 12.50 |",
        "- mask: best/mask_info_12.5.pkl",
        "- weights updated by: fold",
        f"- widths are multiples of: {plan.dim_multiple}",
        'from_pretrained("pruned", trust_remote_code=True)',
        "tvaprune.export --format gguf pruned",
    ):
        assert text in card
    stock, plan = make_pruned("mistral GQA, window shorter than the input", uniform)
    tuned = {"finetune": {"method": "full", "steps": 3, "lora_r": None}, "dataset_name": "c4"}
    card = (save_pruned(stock, plan, None, tmp_path / "stock", record=tuned) / "README.md").read_text()
    assert "trust_remote_code" not in card and "was not measured" in card
    assert "and fine-tuned (full fine-tuning)" in card and "- fine-tuned by: method full, steps 3\n" in card
    assert "- trained on: c4\n" in card


@pytest.mark.parametrize(
    ("row", "case", "version", "formats"),
    [
        ("llama GQA", uneven, "4.57", ["gguf x", "onnx x", "vanilla x"]),
        ("qwen3 tied", uniform, "4.57", ["gguf x", "onnx x", "vanilla x"]),
        ("qwen3 tied", uneven, "4.57", ["gguf x", "onnx x", "vanilla x"]),
        ("qwen3 untied", uneven, "4.57", ["gguf x-vanilla", "onnx x", "vanilla x"]),
        ("internlm3", uneven, "5.23", ["gguf x", "onnx x"]),
        ("exaone4", uneven, "4.57", ["onnx x", "vanilla x"]),
        ("olmo2", uneven, "4.57", ["onnx x"]),
        ("olmo2", uniform, "4.57", ["onnx x", "vanilla x"]),
        ("phi3, long rope", uneven, "4.57", []),
    ],
)
def test_the_card_promises_a_family_what_it_has(row, case, version, formats, make_pruned, tmp_path):
    narrow, plan = make_pruned(row, case)
    folder = save_pruned(narrow, plan, None, tmp_path / "x")
    card = (folder / "README.md").read_text()
    assert f"transformers ({version} or later" in card
    assert re.findall(r"--format (\w+ [\w-]+) x[\w.-]+`", card) == formats
    for kind in ("gguf", "onnx", "vanilla"):
        if f"{kind} x" not in formats:
            with pytest.raises(InputError):
                export(kind, folder, tmp_path / kind)
    if "vanilla x" in formats:  # the other promises are held in tests/export and test_each_family.py
        export("vanilla", folder, tmp_path / "x-vanilla")


def test_what_is_made_of_a_fetched_model_is_under_its_licence(make_pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    narrow, plan = make_pruned("gemma3_text tied")

    def card(name, source="gemma3-270m"):
        record = {"model": str(source)}
        return (save_pruned(narrow, plan, None, tmp_path / name, record=record) / "README.md").read_text()

    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    folder_of("gemma3-270m").mkdir(parents=True)
    sources = {"fetched": "gemma3-270m", "by_folder": folder_of("gemma3-270m"), "again": tmp_path / "fetched"}
    for name, source in sources.items():
        told = card(name, source)
        assert "base_model: google/gemma-3-270m\n" in told and "license: gemma\n" in told
        assert "Gemma Terms of Use, see `GEMMA_TERMS.html`" in told and "`tvaprune fetch gemma3-270m`" in told
    (tmp_path / "gemma3-270m").mkdir()  # control: a folder of that name is another model
    assert "license" not in card("own").lower()
