"""A run that is killed at a file operation goes on to the same result, bit for bit; what stood there stays whole.

TVAPRUNE_ALL_KILLS=1 tries every file operation in place of fourteen.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_killed_at_file_operations_runs_go_on_to_the_same_result():
    script = Path(__file__).with_name("kills.py")
    every = ["--all"] if os.environ.get("TVAPRUNE_ALL_KILLS") else []
    done = subprocess.run([sys.executable, script, *every], capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0 and "kills, 0 wrong" in done.stdout, done.stdout + done.stderr
