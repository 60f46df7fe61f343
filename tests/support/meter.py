"""What is alive in memory while something runs."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(TorchDispatchMode):
    """Peak bytes of a model's parameters and of what operations returned, while alive: of storages, not of views."""

    def __init__(self, model):
        super().__init__()
        self.peak = 0
        self.storages = {}
        for parameter in model.parameters():
            self._note(parameter)

    def _note(self, tensor):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self._note(output)
        self.storages = {key: ref for key, ref in self.storages.items() if ref() is not None}
        self.peak = max(self.peak, sum(ref().nbytes() for ref in self.storages.values()))
        return output
