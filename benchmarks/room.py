"""What a refit out of core needs of a 70B in bfloat16, half of whose KV heads and channels go: by arithmetic.

python -m benchmarks.room
"""

import torch

from tvaprune.cut.room import disk_needed, memory_needed
from tvaprune.measure.work import GIB
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan

SHAPE = ModelShape.uniform(8192, 80, 64, 8, 128, 28672, 128256)  # Llama-3-70B's
BYTES = 2  # of a weight
WINDOWS, WINDOW, BATCH = 128, 512, 8  # calibration windows, and as many held out; tokens of one; windows of a pass


def half_plan(channels: int = 14336) -> KeepPlan:
    """Returns the plan that keeps all hidden dims, half of the KV heads and so many channels of every layer."""
    layers = SHAPE.num_hidden_layers
    kept = PerUnit(torch.arange(8192), (torch.arange(4),) * layers, (torch.arange(channels),) * layers)
    return KeepPlan(kept, kept.map(torch.Tensor.float), SHAPE, 128)


def line(reconstructs: bool = False) -> str:
    """Returns what is needed, in words."""
    tokens, plan = WINDOWS * WINDOW, half_plan()
    memory = memory_needed(plan, BYTES, BATCH * WINDOW, reconstructs)
    disk = disk_needed(plan, BYTES, tokens, tokens, reconstructs)
    return f"{memory / GIB:.0f} GiB of memory and {disk / GIB:.0f} GiB of disk"


if __name__ == "__main__":
    print(f"refit: {line()}; reconstruct: {line(True)}")
