"""The mistakes of `python -m benchmarks.mutations` can be made: what they change stands in the code."""

import pytest
from support.tiny import ROOT

from benchmarks.mutations import MUTATIONS


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.says)
def test_what_a_mutation_changes_stands_in_its_file_once(mutation):
    assert (ROOT / mutation.path).read_text(encoding="utf-8").count(mutation.right) == 1
    assert mutation.wrong != mutation.right and (ROOT / mutation.tests).exists()
