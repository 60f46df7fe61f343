"""A model that does not fit: in memory it ends in one line, out of core it is cut and refitted."""

import os
import subprocess
import sys

import pytest
import torch
from support.tiny import EVERY, ROOT, save_checkpoint, write_text
from transformers import AutoModelForCausalLM, LlamaConfig

from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
# Everything is imported first: what libraries take of the address space is not what is measured.
LIMITED = """
import resource, sys
from pathlib import Path
import matplotlib.pyplot, transformers.models.llama.modeling_llama
import tvaprune.stages.apply
from tvaprune import cli
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The folder of a model of 290 MB in float32, which computes so, and a plan that halves its channels."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(**SIZES)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.fill_(1.0) if weight.dim() == 1 else weight.data.normal_(0, 0.03, generator=generator)
    save_checkpoint(model, folder / "dense", max_shard_size="40MB")
    shape = shape_of(config)
    kept = PerUnit.full(shape, 1.0).map(lambda units: torch.arange(0, len(units), 2))
    KeepPlan(kept, kept.map(lambda units: torch.full((len(units),), 1.1)), shape, 1).save(folder / "plan.json")
    write_text(folder / "text.txt")
    return folder


def weights_of(folder):
    return 4 * sum(weight.numel() for weight in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters())


def limited(large, output, size, *flags):
    """Runs apply in a process that may take no more than ``size`` bytes beyond its libraries."""
    command = [
        sys.executable, "-c", LIMITED, str(size), "apply", "--model_name_or_path", large / "dense",
        "--plan", large / "plan.json", "--save_pruned", output / "pruned", "--do_eval", "False", "--use_cpu",
        "--dataset_name", large / "text.txt", "--block_size", 16, *flags,
    ]  # fmt: skip
    # What is freed goes back: else the address space holds the allocator's holes.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "100000", "MALLOC_TRIM_THRESHOLD_": "100000"}
    environment = os.environ | allocator | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("update", [("--weight_update", "fold"), ("--refit_samples", 8)][not EVERY :])
def test_out_of_core_a_model_is_cut_in_half_the_memory_that_it_takes(update, large, tmp_path):
    half = weights_of(large / "dense") // 2
    assert half > 140e6
    ended = limited(large, tmp_path, half, "--stream", "True", *update)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "pruned" / "model.safetensors").stat().st_size > 30e6
    ended = limited(large, tmp_path / "control", half, *update)
    assert ended.returncode != 0 and "memory" in ended.stderr, ended.stderr[-3000:]
    assert not (tmp_path / "control" / "pruned").exists()
