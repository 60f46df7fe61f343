"""What the texts of this machine share: nothing that is held out is trained on."""

import os

import numpy as np
import pytest

from tvaprune.text import package_readmes
from tvaprune.text.package_readmes import prose
from tvaprune.text.python_docs import overlap, shingles
from tvaprune.text.sources import load_documents

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def texts():
    """python_docs by split, from the user's own cache: the extraction takes a minute."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TVAPRUNE_CACHE", os.path.expanduser("~/.cache/tvaprune"))
        return {split: load_documents("python_docs", split) for split in SPLITS}


@pytest.fixture(scope="module")
def parts(texts):
    return {split: shingles(*documents) for split, documents in texts.items()}


@pytest.mark.slow
def test_held_out_text_is_not_in_the_training_text(texts, parts):
    assert overlap(parts["validation"], parts["train"]) < 0.02
    assert overlap(parts["test"], np.unique(np.concatenate([parts["train"], parts["validation"]]))) < 0.02
    assert overlap(shingles(*texts["train"][:100]), parts["train"]) == 1.0  # control
    sizes = [sum(map(len, texts[split])) for split in SPLITS]
    assert sizes[0] > 10_000_000 and min(sizes[1:]) > 200_000


@pytest.mark.slow
def test_package_readmes_is_not_in_it_either(parts):
    splits = package_readmes.read_splits()
    for held_out in (splits["test"], splits["train"] + splits["validation"]):
        assert overlap(shingles(*held_out), parts["train"]) < 0.01
    left_out = prose(package_readmes.distribution("multiprocess").metadata.json["description"])
    assert overlap(shingles(left_out), parts["train"]) > 0.5  # control
