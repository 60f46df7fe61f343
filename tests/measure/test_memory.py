import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tvaprune.measure.memory import PeakMemory

MEGABYTE = 2**20
ROOT = Path(__file__).parents[2]


def work(device, megabytes, memory):
    """Holds memory for longer than a sample takes, and gives it back; a busy machine lets a sample wait."""
    values = torch.ones(megabytes * MEGABYTE // 4, device=device)
    end = time.monotonic() + 10
    while memory.peak - memory.before < megabytes * MEGABYTE / 2 and device.type == "cpu" and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(0.1)
    return float(values[0])


def check(device):
    with PeakMemory(device) as nothing:
        time.sleep(0.1)
    with PeakMemory(device) as memory:
        work(device, 200, memory)
    assert 190 * MEGABYTE < memory.peak - memory.before < 260 * MEGABYTE
    assert nothing.peak - nothing.before < 20 * MEGABYTE  # control: an earlier or later peak does not count
    with PeakMemory(device) as again:
        time.sleep(0.1)
    assert again.peak < memory.peak - 150 * MEGABYTE


def test_an_allocation_is_seen_and_only_while_it_is_watched():
    # In a process of its own: this one may fill 200 MB from what earlier tests gave back and the allocator kept.
    ended = subprocess.run(
        [sys.executable, __file__], env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    assert ended.returncode == 0, ended.stderr.decode()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_allocation_on_a_gpu_is_seen():
    check(torch.device("cuda"))


def test_an_error_ends_the_watch():
    memory = PeakMemory(torch.device("cpu"))
    with pytest.raises(ValueError, match="within"), memory:
        raise ValueError("within")
    assert memory.peak >= memory.before > 0
    assert not memory._thread.is_alive()


if __name__ == "__main__":
    check(torch.device("cpu"))
