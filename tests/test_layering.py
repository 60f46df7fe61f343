"""The design's tiers: a module imports only from lower ones."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "tvaprune"
TIERS = {
    "modeling_pruned": -3,  # goes into checkpoints, so it imports nothing of ours
    "auto_classes": -2,
    "": -1,  # tvaprune/__init__.py
    "errors": -1,
    "config": 0,
    "memory": 0,
    "runtime": 1,
    "families": 0,
    "python_docs": 0,
    "package_readmes": 0,
    "units": 1,
    "gates": 1,
    "param_count": 1,
    "widths": 1,
    "data": 1,
    "distill": 1,
    "ridge": 1,
    "masks": 2,
    "lagrangian": 2,
    "evaluation": 2,
    "evaluation.perplexity": 2,
    "evaluation.speed": 2,
    "evaluation.zeroshot": 2,
    "teacher": 2,
    "finetune": 3,
    "attach": 3,
    "plan": 3,
    "trainer": 4,
    "update": 4,
    "refit": 5,
    "apply": 4,
    "baselines": 6,
    "baselines.activations": 5,
    "baselines.bonsai": 5,
    "baselines.calibration": 3,
    "baselines.flap": 5,
    "baselines.ranking": 4,
    "baselines.taylor": 5,
    "model_card": 4,
    "checkpoint": 5,
    "export": 6,
    "export.__main__": 7,
    "export.gguf_file": 6,
    "export.gguf_tokenizer": 5,
    "export.onnx_graph": 6,
    "export.vanilla": 6,
    "export.verify": 5,
    "report": 5,
    "describe": 6,
    "run": 5,
    "shipped": 5,
    "zero_report": 6,
    "choose": 7,
    "finetune_job": 8,
    "pipeline": 8,
    "recover": 9,
}


def modules():
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix("__init__").removesuffix("."): path for name, path in paths.items()}


def imports_of(name, source, known):
    """The modules of the package that a source imports, at its top or within functions."""
    package = ["tvaprune", *name.split(".")][:-1] if name else ["tvaprune"]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    inner = {full.removeprefix("tvaprune").removeprefix(".") for full in found if full.split(".")[0] == "tvaprune"}
    return (inner & known) - {""}


MODULES = modules()
IMPORTS = {name: imports_of(name, path.read_text(encoding="utf-8"), set(MODULES)) for name, path in MODULES.items()}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_every_module_has_a_tier_and_imports_from_lower_ones_only(name):
    assert name in TIERS, f"tvaprune/{name} has no tier: add it to the table, and to the README's tree"
    assert [other for other in sorted(IMPORTS[name]) if TIERS.get(other, 99) >= TIERS[name]] == []


def test_there_is_no_import_cycle():
    TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tvaprune.plan", {"plan"}),
        ("from tvaprune import gates, masks", {"gates", "masks"}),
        ("from tvaprune.evaluation.speed import speed_up", {"evaluation.speed"}),
        ("from tvaprune.evaluation import speed", {"evaluation", "evaluation.speed"}),
        ("def f():\n    from tvaprune.apply import apply_plan", {"apply"}),
        ("from .plan import KeepPlan", {"plan"}),
        ("from . import plan", {"plan"}),
        ("import torch\nfrom torch import plan", set()),
        ("from tvaprune import __version__", set()),
    ],
)
def test_imports_are_seen_however_they_are_written(source, found):
    assert imports_of("data", source, set(MODULES)) == found


@pytest.mark.parametrize("heavy", ["torch", "transformers", "datasets"])
@pytest.mark.parametrize("name", ["config", "errors"])
def test_flags_and_errors_need_no_heavy_library(name, heavy):
    if name not in MODULES:
        pytest.skip(f"{name} is not written yet")
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert heavy not in {imported.split(".")[0] for imported in names}
