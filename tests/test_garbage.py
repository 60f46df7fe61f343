"""Work without the search for garbage."""

import gc

import pytest

from tvaprune.garbage import uncollected


def test_nothing_is_searched_meanwhile_and_afterwards_all_is_as_it_was():
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="lost"), uncollected():
        raise ValueError("lost")
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()  # who switched it off keeps it off
    finally:
        gc.enable()
