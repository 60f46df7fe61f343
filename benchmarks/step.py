"""A step of gate training beside the plain step of the same frozen model: time, kernels, what is kept for backward.

The plain step has the same teacher, loss and backward pass to the embedding's output, without gates: what any method
that learns what to cut on a frozen model does at least. Random weights. Both steps take turns, so that other work on
the machine falls on both; a ratio is the median over the turns, beside it the range from the first to the third
quartile. On a CPU processor time is told too, which other processes disturb less.

    python -m benchmarks.step            # on the GPU where there is one, in bfloat16; else on the CPU, in float32
    python -m benchmarks.step --device cpu --threads 1 --repeats 20
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.settings import gate_settings
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.measure import speed
from tvaprune.measure.hardware import describe_device
from tvaprune.plan.widths import WidthRules

Step = Callable[[], None]
SHAPES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {  # sizes; blocks and their tokens
    "miniature": (
        {"num_hidden_layers": 6, "hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4,
         "head_dim": 16, "intermediate_size": 384, "vocab_size": 2048},
        (4, 256),
    ),
    "SmolLM2-135M": (
        {"num_hidden_layers": 30, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3,
         "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True},
        (1, 512),
    ),
    "32 layers, narrow": (  # kernels are as many at any width
        {"num_hidden_layers": 32, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 16, "intermediate_size": 96, "vocab_size": 128},
        (1, 512),
    ),
}  # fmt: skip
_WITHOUT_KERNEL = {
    "empty.memory_format", "empty_like.default", "empty_strided.default", "new_empty.default", "detach.default",
    "alias.default", "_unsafe_view.default", "lift_fresh.default", "_local_scalar_dense.default",
}  # fmt: skip


class _Kernels(TorchDispatchMode):
    """Counts the operations that start a kernel: views and allocations do not."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func.__name__ not in _WITHOUT_KERNEL
        return func(*args, **(kwargs or {}))


def steps(sizes: dict[str, Any], size: tuple[int, int], device: str, dtype: torch.dtype) -> tuple[Step, Step]:
    """Returns the plain step and the gated one of a random Llama of these sizes, at a batch of this shape."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=2048))
    model.to(dtype)
    settings = gate_settings(PruneSettings(target_sparsity=[0.5]), DistillSettings(), 1000, 1000, 10.0, WidthRules(8))
    objective = PruningObjective(GatedModel(model.eval()), settings).to(device)
    input_ids = torch.randint(0, sizes["vocab_size"], size, device=device)

    @contextmanager
    def reached() -> Iterator[None]:
        """Lets gradients reach the embedding's output, as a gate there would."""
        embedding = model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())
        try:
            yield
        finally:
            handle.remove()

    def plain() -> None:
        with objective.gated.off(), reached():
            objective._task_loss(input_ids).backward()

    def gated() -> None:
        objective(input_ids, beta=10.0, target=0.25)["loss"].backward()

    return plain, gated


def kernels(step: Step) -> int:
    """Returns how many kernels a step starts."""
    with _Kernels() as counter:
        step()
    return counter.count


def saved_bytes(step: Step) -> int:
    """Returns the bytes that a step keeps for its backward pass, weights left out, each storage counted once."""
    step()  # gradients that are made once
    held: dict[int, torch.Tensor] = {}  # holding on to a tensor keeps its address from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            held.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def seconds(step: Step, device: str) -> tuple[float, float]:
    """Returns the time that a step takes on the clock and of the processor."""
    started = time.process_time()
    return speed.seconds(step, torch.device(device)), time.process_time() - started


def _ratio(pairs: list[tuple[float, float]]) -> str:
    low, middle, high = statistics.quantiles([gated / plain for plain, gated in pairs], n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def report(name: str, device: str, dtype: torch.dtype, repeats: int) -> None:
    """Measures a shape and prints a line of each measure."""
    plain, gated = steps(*SHAPES[name], device, dtype)
    counts, kept = [kernels(step) for step in (plain, gated)], [saved_bytes(step) for step in (plain, gated)]
    print(f"{name}, {'{} x {}'.format(*SHAPES[name][1])} tokens, {str(dtype).removeprefix('torch.')}, {device}")
    print(f"  kernels         {counts[0]:8,d} plain {counts[1]:8,d} gated  {counts[1] / counts[0]:.3f}")
    print(f"  kept, MiB       {kept[0] / 2**20:8,.1f} plain {kept[1] / 2**20:8,.1f} gated  {kept[1] / kept[0]:.3f}")
    if name.startswith("32") and device == "cpu":
        return  # so narrow a model says nothing about time
    turns = [(seconds(plain, device), seconds(gated, device)) for _ in range(repeats)]
    for place, what in enumerate(("clock", "processor") if device == "cpu" else ("clock",)):
        pairs = [(one[place], other[place]) for one, other in turns]
        middle = [1000 * statistics.median(values) for values in zip(*pairs, strict=True)]
        print(f"  {what + ', ms':15} {middle[0]:8,.1f} plain {middle[1]:8,.1f} gated  {_ratio(pairs)}", flush=True)


def main() -> None:
    """Measures every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20, help="turns, at least 2")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(f"{describe_device(torch.device(args.device))}, {args.repeats} turns")
    for name in args.shapes:
        report(name, args.device, torch.float32 if args.device == "cpu" else torch.bfloat16, args.repeats)


if __name__ == "__main__":
    main()
