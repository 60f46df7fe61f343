"""A mask's pickle read as data: the few opcodes that a dict of tensors is written with, and nothing that can be called.

Python's own unpickler is no reader of strangers' files even where it may call nothing: a number in the file sizes its
memo, and whatever stands as a key is hashed. torch grows a storage that is too short for its tensor, or reads past it.
"""

import io
import math
import pickletools
from typing import Any

import torch

from tvaprune.errors import InputError, quoted

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES",
           "BINBYTES", "BINBYTES8")  # fmt: skip
_PUT, _GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_NOTHING = ("PROTO", "FRAME", "BINPERSID")  # a storage's description stays the tuple that it is

_ORDERED_DICT, _TENSOR = "collections.OrderedDict", "torch._utils._rebuild_tensor_v2"
_STORAGE = "torch.storage._load_from_bytes"
_DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}
_TORCH_MAGIC, _TORCH_VERSION = 0x1950A86A20F9469CFC6C, 1001  # how torch's format before zip files begins
_COUNT_BYTES = 8
_MOST_STEPS = 500_000  # opcodes: a mask spends some 50 on a tensor


class _Name(str):
    """A function or class that the file names: ``module.name``."""


def read_tensors(content: bytes) -> dict[str, torch.Tensor]:
    """Reads a pickled dict of tensors of floating-point numbers.

    Raises:
        InputError: If it names anything but tensors to rebuild, or holds other numbers.
        ValueError: If it is damaged: truncated, or a tensor is not wholly within its storage.
    """
    file = io.BytesIO(content)
    loaded = _load(file, (_ORDERED_DICT, _TENSOR, _STORAGE))
    if file.read(1):
        raise ValueError("bytes behind the end")
    if not isinstance(loaded, dict):
        return {}
    tensors = [value for value in loaded.values() if isinstance(value, torch.Tensor)]
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) > len(content):
        raise ValueError("its tensors claim more than the file holds")
    return loaded


def _load(file: io.BytesIO, names: tuple[str, ...]) -> Any:
    """Reads one pickle from a file; only ``names`` may be named in it.

    The length of its last frame is all by which a lost byte among the numbers shows: every number behind it moves.
    """
    machine, frame_end = _Machine(names), 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name == "STOP":
            if frame_end not in (0, file.tell()):
                raise ValueError("bytes are lost or too many")
            break
        if opcode.name == "FRAME":
            frame_end = file.tell() + int(argument or 0)
        if count > _MOST_STEPS:
            raise ValueError("more steps than a mask takes")
        machine.step(opcode.name, argument)
    (value,) = machine.stack
    return value


class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names, self.stack, self.marks = names, list[Any](), list[int]()
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Does what one opcode says."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name == "MEMOIZE" or name in _PUT:
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = self.stack[-1]
        elif name in _GET:
            self.stack.append(self.memo[argument])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            module, own = self._pop(2) if name == "STACK_GLOBAL" else argument.split(" ")
            self.stack.append(self._name(f"{module}.{own}"))
        elif name == "REDUCE":
            self.stack.append(_rebuilt(*self._pop(2)))
        elif name not in _NOTHING:
            self._build(name)

    def _build(self, name: str) -> None:
        """Does what the opcodes say that make tuples, lists and dicts."""
        if name == "MARK":
            self.marks.append(len(self.stack))
        elif name in _TUPLES or name == "TUPLE":
            self.stack.append(tuple(self._pop(_TUPLES.get(name) or len(self.stack) - self.marks.pop())))
        elif name in ("APPEND", "APPENDS"):
            values = self._pop(1 if name == "APPEND" else len(self.stack) - self.marks.pop())
            self.stack[-1].extend(values)
        elif name in ("SETITEM", "SETITEMS"):
            self._set(self._pop(2 if name == "SETITEM" else len(self.stack) - self.marks.pop()))
        else:
            raise ValueError(f"{name} is not among what tensors are written with")

    def _pop(self, count: int) -> list[object]:
        if not 0 <= count <= len(self.stack):
            raise ValueError("a damaged pickle")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _set(self, items: list[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("a damaged pickle")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):  # a tuple of tuples takes as long to hash as its maker wants
                raise ValueError("a key that is no text")
            target[key] = value

    def _name(self, name: str) -> _Name:
        if name in self.names:
            return _Name(name)
        if name.startswith("torch.") and name.endswith("Storage"):
            raise InputError(f"the mask file holds a {quoted(name)}: a mask's numbers are floating-point; get another")
        raise InputError(
            f"the mask file asks to run {quoted(name)}: a mask holds tensors only; do not trust it, get another"
        )


def _rebuilt(name: object, arguments: object) -> object:
    """Returns what one of the known names makes of its arguments."""
    if not isinstance(name, _Name) or not isinstance(arguments, tuple):
        raise ValueError("a damaged pickle")
    if name == _ORDERED_DICT and not arguments:
        return {}
    if name == _STORAGE and len(arguments) == 1 and isinstance(arguments[0], bytes):
        return _storage(arguments[0])
    if name == _TENSOR and len(arguments) >= 4:
        return _tensor(*arguments[:4])
    raise ValueError(f"{name} with other arguments than torch writes")


def _storage(content: bytes) -> torch.Tensor:
    """Reads a storage in torch's older format: five small pickles, the number of elements, the elements."""
    file = io.BytesIO(content)
    magic, version, system, described, keys = (_load(file, tuple(_DTYPES)) for _ in range(5))
    if magic != _TORCH_MAGIC or version != _TORCH_VERSION or not system["little_endian"]:
        raise ValueError("a storage of a format unknown here")
    kind, name, key, _, count, _ = described
    if kind != "storage" or not isinstance(name, _Name) or not isinstance(key, str) or type(count) is not int:
        raise ValueError("a storage without a type or a size")
    dtype = _DTYPES[name]
    counted, data = int.from_bytes(file.read(_COUNT_BYTES), "little"), content[file.tell() :]
    if keys != [key] or counted != count or len(data) != count * dtype.itemsize:
        raise ValueError(f"a storage of {count} elements holds {len(data)} bytes")
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def _tensor(storage: object, offset: object, size: Any, stride: Any) -> torch.Tensor:
    """Returns a tensor of a storage that holds all of it; rows lie one behind the other."""
    sizes = (offset, *size, *stride)
    if not isinstance(storage, torch.Tensor) or any(type(value) is not int or value < 0 for value in sizes):
        raise ValueError("a tensor without a storage or a size")
    count = math.prod(size)
    if offset + count > len(storage):
        raise ValueError(f"a tensor of {count} elements from {offset} on, in a storage of {len(storage)}")
    if count > 1 and stride != tuple(math.prod(size[place + 1 :]) for place in range(len(size))):
        raise ValueError(f"a tensor of size {size} with strides {stride}")
    return storage[offset : offset + count].view(size)
