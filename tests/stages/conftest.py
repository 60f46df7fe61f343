"""What the tests of whole commands begin with."""

import pytest
from support import tiny


@pytest.fixture(scope="module")
def checkpoint(make_model, tmp_path_factory):
    return tiny.save_checkpoint(make_model("llama"), tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")
