"""What all tests share: no network, no files left behind, and tiny models with nothing trivially zero or one."""
# ruff: noqa: E402

import gc
import os
import sys
import tempfile
from pathlib import Path

# Before torch, datasets and transformers are imported: they read these once.
_SESSION_FOLDER = tempfile.TemporaryDirectory(prefix="tvaprune-tests-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = f"{_SESSION_FOLDER.name}/huggingface"
os.environ["TVAPRUNE_CACHE"] = f"{_SESSION_FOLDER.name}/tvaprune"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from support import tiny
from support.documents import document
from support.families import MORE_ROWS, ROWS, make_plan, sliced
from support.folders import no_heads_in_layer_0, tokenizer, uneven
from support.other_families import register
from transformers import AutoConfig, AutoModelForCausalLM

from tvaprune.checkpoint.folder import save_pruned
from tvaprune.cli import run_command
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks
from tvaprune.text import python_docs
from tvaprune.text.python_docs import Document
from tvaprune.text.sources import load_documents

ROOT = Path(__file__).resolve().parent.parent
CACHES = {".git", "__pycache__", ".pytest_cache", ".mypy_cache", ".ruff_cache"}
TINY = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 47,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

torch.set_num_threads(1)


def pytest_collection_finish():
    gc.freeze()  # else each collection looks through all that is imported: half a second, twice in a command


def pytest_unconfigure():
    _SESSION_FOLDER.cleanup()


def files_of_repository():
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in CACHES]
        found |= {str(Path(folder, name).relative_to(ROOT)) for name in files}
    return found


@pytest.fixture(scope="session", autouse=True)
def no_file_is_left_in_the_repository():
    before = files_of_repository()
    yield
    assert sorted(files_of_repository() - before) == []


def perturb(model, seed):
    """Random weights large enough to matter; norms and biases away from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else parameter + 0.3 * noise)
    return model


@pytest.fixture(scope="session")
def make_model():
    """Returns a function: model type and config values -> a tiny model in evaluation mode, the same at each call."""

    def make(model_type="llama", seed=0, **values):
        config = AutoConfig.for_model(model_type, **(TINY | values))
        return perturb(AutoModelForCausalLM.from_config(config), seed).eval()

    return make


@pytest.fixture
def other_families(monkeypatch):
    """Makes the families of `support.other_families` known."""
    register(monkeypatch)


@pytest.fixture(scope="session")
def make_masks():
    """Returns a function: sizes -> random masks that keep about 60% of each kind of unit."""

    def make(shape, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def around(centre, spread):
            return PerUnit.full(shape, centre).map(lambda v: v + spread * torch.randn(v.shape, generator=generator))

        mu = around(1.0, 0.2)
        log_alpha = around(-0.5, 2.0)
        return Masks(mu=mu, log_variance=log_alpha.map(lambda score, m: score + m.square().log(), mu))

    return make


@pytest.fixture(scope="session")
def full_plan():
    """Returns a function: model -> a plan that keeps every unit, each with factor one."""

    def make(model):
        shape = shape_of(model.config)
        ones = PerUnit.full(shape, 1.0)
        return KeepPlan(kept=ones.map(lambda v: torch.arange(len(v))), scale=ones, shape=shape, dim_multiple=1)

    return make


@pytest.fixture
def input_ids():
    return torch.randint(0, TINY["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def command(monkeypatch, capsys):
    """Returns a function that runs lora_ft_vib.py's main in this process: flags -> (exit code, stdout, stderr)."""
    import lora_ft_vib

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["lora_ft_vib.py", *map(str, flags)])
        code = run_command(lora_ft_vib.main)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def make_pruned(make_model, make_masks):
    """Returns a function: row, case -> the narrower model in memory and its plan."""

    def make(row, case=uneven, **values):
        model_type, own = (ROWS | MORE_ROWS)[row]
        model = make_model(model_type, **(own | values))
        plan = case(make_plan(model, make_masks))
        return sliced(model, plan), plan

    return make


@pytest.fixture
def uneven_folder(make_pruned, tmp_path):
    """A checkpoint whose layers differ in width, the first without attention."""
    narrow, plan = make_pruned("mistral GQA, window shorter than the input", no_heads_in_layer_0)
    return save_pruned(narrow, plan, tokenizer(), tmp_path / "pruned")


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    """The folder of a tiny model."""
    return tiny.save_checkpoint(make_model("llama"), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The file of a text for it."""
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture
def made_up_python_docs(tmp_path_factory, monkeypatch):
    """Puts made-up modules where the extracted text of python_docs is kept: extracting it takes a minute."""
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    made = [Document(f"one.m{index}", f"m{index}", document("one", index)) for index in range(200)]
    monkeypatch.setattr(python_docs, "collect", lambda: made)
    assert len(load_documents("python_docs", "test")) > 4
