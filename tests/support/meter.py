"""What tensors take while something runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """Peak bytes of a model's parameters and of what operations returned, while alive."""

    def __init__(self, model):
        super().__init__()
        self.peak = 0
        self.tensors = [weakref.ref(p) for p in model.parameters()]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.tensors.append(weakref.ref(output))
        self.tensors = [ref for ref in self.tensors if ref() is not None]
        alive = [t for t in (ref() for ref in self.tensors) if t is not None and t.device.type != "meta"]
        self.peak = max(self.peak, sum({t.data_ptr(): t.untyped_storage().nbytes() for t in alive}.values()))
        return output
