"""What a figure was measured on: hardware, versions, the command."""

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from tvaprune import __version__
from tvaprune.errors import program

RECORDED_PACKAGES = ("tvaprune", "torch", "transformers", "datasets", "accelerate", "peft", "lm_eval")


def describe_device(device: torch.device) -> str:
    """Returns the hardware's name for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def computes_bfloat16() -> bool:
    """Tells whether the processor has instructions for products in bfloat16."""
    info = Path("/proc/cpuinfo")
    words = info.read_text(encoding="utf-8").split() if info.exists() else []
    return "avx512_bf16" in words or "amx_bf16" in words


def versions() -> dict[str, str]:
    """Returns the versions that a run is recorded with."""
    return {"python": platform.python_version()} | {name: _version(name) for name in RECORDED_PACKAGES}


def _version(name: str) -> str:
    return __version__ if name == "tvaprune" else version(name)  # ours may be run from a checkout


def command_line() -> str:
    """Returns the command as it was typed."""
    return shlex.join([*program(), *sys.argv[1:]])
