"""Pruned models, in memory and saved."""

import pytest
from support.families import MORE_ROWS, ROWS, make_plan, sliced
from support.folders import no_heads_in_layer_0, tokenizer, uneven

from tvaprune.checkpoint.folder import save_pruned


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
def folder(make_pruned, tmp_path):
    """A checkpoint whose layers differ in width, the first without attention."""
    narrow, plan = make_pruned("mistral GQA, window shorter than the input", no_heads_in_layer_0)
    return save_pruned(narrow, plan, tokenizer(), tmp_path / "pruned")
