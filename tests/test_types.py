"""The types hold."""

import subprocess
import sys

import pytest
from support.tiny import ROOT

pytest.importorskip("mypy")


@pytest.mark.slow
def test_mypy_finds_nothing():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
