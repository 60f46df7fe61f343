"""The design's tiers: a room imports only from the rooms above it in the table, whatever the module."""

import ast
from dataclasses import fields
from graphlib import TopologicalSorter

import pytest
from support.tiny import ROOT

from tvaprune.models.families import FAMILIES

PACKAGE = ROOT / "tvaprune"
ROOMS = [  # lowest first; rooms of one row do not know each other
    ["__init__"],
    ["errors", "garbage"],
    ["ranks"],
    ["endings", "locks"],
    ["files", "losses", "flags", "wheels", "phases"],
    ["outputs"],
    ["models"],
    ["identity"],
    ["checkpoints"],
    ["text"],
    ["measure"],
    ["plan"],
    ["given", "refusals"],
    ["run"],
    ["budget", "targets"],
    ["choose"],
    ["cut"],
    ["checkpoint"],
    ["recover", "export"],
    ["report"],
    ["estimates"],
    ["study"],
    ["stages"],
    ["shipped"],
    ["cli"],
    ["library", "describe", "__main__"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
# A command that prints one line for a mistake ends in cli; the exporters have an entry of their own.
ENTRIES = {"export.__main__"}


def modules():
    paths = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports_of(name, source, known):
    """The modules of the package that a source imports, at its top or within functions."""
    package = ["tvaprune", *name.split(".")][:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join(above + ([node.module] if node.module else []))
            found |= {f"{base}.{alias.name}" for alias in node.names} | {base}
    inner = {full.removeprefix("tvaprune").removeprefix(".") for full in found if full.split(".")[0] == "tvaprune"}
    return inner & known


def room_of(name):
    return name.split(".")[0]


MODULES = modules()
IMPORTS = {name: imports_of(name, path.read_text(encoding="utf-8"), set(MODULES)) for name, path in MODULES.items()}


def wrong_imports(name, imports):
    """The imports that do not point down: to a room above, or beside."""
    own = room_of(name)
    return [
        other for other in sorted(imports) if room_of(other) != own and not FLOOR.get(room_of(other), 99) < FLOOR[own]
    ]


@pytest.mark.parametrize("name", sorted(set(MODULES) - ENTRIES))
def test_every_module_has_a_room_and_imports_from_lower_ones_only(name):
    assert room_of(name) in FLOOR, f"tvaprune/{name} has no room: add it to the table, and to docs/developers.md"
    assert wrong_imports(name, IMPORTS[name]) == []


def test_an_import_that_points_up_or_beside_is_found():
    assert wrong_imports("plan.masks", {"models.units", "plan.widths"}) == []
    assert wrong_imports("plan.masks", {"choose.gates", "cut.fold"}) == ["choose.gates", "cut.fold"]
    assert wrong_imports("recover.job", {"report.tables"}) == ["report.tables"]


def test_no_stage_knows_another():
    stages = {name for name in MODULES if name.startswith("stages.")}
    assert [(name, other) for name in stages for other in IMPORTS[name] & stages] == []


def test_there_is_no_import_cycle():
    TopologicalSorter(IMPORTS).prepare()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tvaprune.plan.masks", {"plan.masks"}),
        ("from tvaprune.choose import gates, trainer", {"choose", "choose.gates", "choose.trainer"}),
        ("from tvaprune.measure.speed import speed_up", {"measure.speed"}),
        ("from tvaprune.measure import speed", {"measure", "measure.speed"}),
        ("def f():\n    from tvaprune.cut.slice import apply_plan", {"cut.slice"}),
        ("from .sources import load_documents", {"text.sources"}),
        ("from . import sources", {"text", "text.sources"}),
        ("import torch\nfrom torch import plan", set()),
        ("from tvaprune import __version__", set()),
    ],
)
def test_imports_are_seen_however_they_are_written(source, found):
    assert imports_of("text.blocks", source, set(MODULES)) == found


@pytest.mark.parametrize("heavy", ["torch", "transformers", "datasets"])
@pytest.mark.parametrize("name", ["flags.settings", "errors", "__init__"])
def test_flags_and_errors_need_no_heavy_library(name, heavy):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in top if isinstance(node, ast.ImportFrom)}
    assert heavy not in {imported.split(".")[0] for imported in names}


def names_inside_models():
    """The words by which families name a model's parts, of all rows: ``q_proj``, ``input_layernorm`` and so on."""
    values = [getattr(row, field.name) for row in FAMILIES.values() for field in fields(row)]
    words = {word for value in values if isinstance(value, str) for word in value.split(".")}
    own = {"model", "layers", "norm", "mlp", "mlp_bias", "lm_head", "variance_epsilon", "eps", "eager", "sdpa", "gate"}
    own |= {"experts", "intermediate_size"}
    return words - own  # the field's own words


def spelled(source, names):
    """The names that a source spells, as attributes or in strings that are no docstrings."""
    tree = ast.parse(source)
    docstrings = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    strings = {
        word
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings
        for word in node.value.replace(".", " ").split()
    }
    return (attributes | strings) & names


def test_names_inside_a_model_are_spelled_where_models_are_known():
    names = names_inside_models()
    assert {"q_proj", "input_layernorm", "down_proj", "embed_tokens"} <= names
    found = {name for name, path in MODULES.items() if spelled(path.read_text(encoding="utf-8"), names)}
    assert found <= {name for name in MODULES if room_of(name) in ("models", "checkpoint")} | {"export.gguf_tensors"}
    assert spelled("layer.self_attn.q_proj", names) == {"self_attn", "q_proj"}  # control
