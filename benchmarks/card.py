"""A card that is simulated: every tensor is fake, of a size and without content, and what is alive is counted.

A `Card` counts the storages alive, those of the simulated card (torch's meta device stands for it) apart from the
host's, and the floating-point operations of what runs. A CUDA context, workspaces of kernels and fragmentation are not
counted. What depends on values (a loss that is finite, a factorisation that did not fail) goes the usual way. Attention
and dropout are called by the fused kernels that a card takes.
"""

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
import torch._functorch.config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils

CARD = torch.device("meta")  # stands for the card: a torch without CUDA has no guard for fake tensors of it
_aten = torch.ops.aten


@dataclass(frozen=True)
class Taken:
    """What a stretch of work took.

    Attributes:
        card: Bytes alive on the card at the peak.
        host: Likewise in the host's memory.
        flops: Floating-point operations of matrix products and attention; a multiply and an add are two.
    """

    card: float
    host: float
    flops: float


class Counter(Protocol):
    """What a phase is measured by."""

    def restart(self) -> None:
        """Begins a new stretch."""

    @property
    def taken(self) -> Taken:
        """What was taken since."""


class RealCard:
    """A GPU, measured by torch's allocator: its peak alone."""

    def restart(self) -> None:
        """Begins a new stretch: its peak is at least what is allocated."""
        torch.cuda.reset_peak_memory_stats()

    @property
    def taken(self) -> Taken:
        """What was allocated at the peak since the last start."""
        return Taken(torch.cuda.max_memory_allocated(), 0, 0)


def _attention_flops(products: int) -> Callable[..., int]:
    """Counts a fused kernel's products of (length, head_dim, length): torch's own count knows no grouped heads."""

    def counted(*args: Any, **options: Any) -> int:
        query, key = args[:2]
        return products * 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]

    return counted


_FLOPS: dict[Any, Callable[..., int]] = flop_registry | {
    _aten._scaled_dot_product_flash_attention: _attention_flops(2),
    _aten._scaled_dot_product_efficient_attention: _attention_flops(2),
    _aten._scaled_dot_product_flash_attention_backward: lambda grad, *args, **options: _attention_flops(5)(*args),
    _aten._scaled_dot_product_efficient_attention_backward: lambda grad, *args, **options: _attention_flops(5)(*args),
    _aten.addmm_: flop_registry[_aten.addmm],
    _aten.linalg_cholesky_ex: lambda matrix, *args, **options: matrix.shape[-1] ** 3 // 3,
    _aten.cholesky_solve: lambda right, *args, **options: 2 * right.shape[-2] ** 2 * right.shape[-1],
}


class Card(TorchDispatchMode):
    """Counts the storages that are alive, and what is computed.

    Attributes:
        alive: Bytes by the type of device.
        peak: The largest of each since `restart`.
        flops: Floating-point operations since then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = {"meta": 0, "cpu": 0}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch: its peak is at least what is alive."""
        self.peak, self.flops = dict(self.alive), 0

    @property
    def taken(self) -> Taken:
        """What was taken since the last start."""
        return Taken(self.peak["meta"], self.peak["cpu"], self.flops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.equal.default:
            return True
        if func in (_aten._local_scalar_dense.default, _aten.item.default):  # a value: true, finite, no failure
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if func._overloadpacket not in _FLOPS and func is not torch.ops.prim.device.default:
            with self:  # in inference mode an operation comes whole: its parts are counted
                if (found := func.decompose(*args, **(kwargs or {}))) is not NotImplemented:
                    return found
        if func._overloadpacket is _aten.cholesky_solve:  # works on a copy of the factor, on a CPU and on a card
            copied = args[1].clone()
            self._note(copied.untyped_storage(), copied.device.type)
        found = func(*args, **(kwargs or {}))
        if (counted := _FLOPS.get(func._overloadpacket)) is not None:
            self.flops += counted(*args, **(kwargs or {}), out_val=found)
        for value in tree_leaves(found):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage(), value.device.type)
        return found

    def _note(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if key in self._known and self._known[key]() is not None:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            self.alive[kind] -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.alive[kind] += size
        self.peak[kind] = max(self.peak[kind], self.alive[kind])


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The fused kernels that a card takes: flash without a mask, else the memory-efficient one."""
    if attn_mask is None and query.dtype != torch.float32:
        found: Any = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return found[0]
    if enable_gqa:
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:2], -1, -1)
    with_gradient = torch.is_grad_enabled() and query.requires_grad
    found = _aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, with_gradient, dropout_p, is_causal, scale=scale
    )
    return found[0]


def _dropout(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(values, p, True)[0] if training and p else values


def _apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """`torch.nn.Module._apply` with new parameters: fake ones cannot be changed in place."""
    done: dict[int, torch.Tensor] = {}  # a tied weight stays one
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in done:
                    moved = function(tensor.detach())
                    is_weight = isinstance(tensor, nn.Parameter)
                    done[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if is_weight else moved
                if tensor is not None:
                    table[name] = done[id(tensor)]
    return module


@contextlib.contextmanager
def simulated() -> Iterator[Card]:
    """Within, every tensor is fake, and the card yielded counts."""
    card = Card()
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)  # a module's copy
        stack.enter_context(mock.patch.object(torch._functorch.config, "fake_tensor_allow_meta", True))
        stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention))
        stack.enter_context(mock.patch.object(nn.functional, "dropout", _dropout))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", _apply))
        # The card has the fused optimizer, which holds nothing beside its moments.
        stack.enter_context(mock.patch("torch.optim.adam._device_dtype_check_for_fused", lambda *options: None))
        # Of fake tensors transformers thinks that they are compiled, and leaves no mask out.
        stack.enter_context(mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(card)
        yield card
