"""A model worked through half a layer at a time, its weights in memory or only there while they are held.

What walks over layers asks a `Layers` for their weights and for room for hidden states, and is the same for a model in
memory and for one of which no more than half a layer ever is (`Streamed`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from tvaprune.files import reserve
from tvaprune.models.families import embedding_factor, family_of, residual_factor
from tvaprune.models.layout import Block, layout_of
from tvaprune.models.logits import head_of
from tvaprune.models.pruned import set_parameter
from tvaprune.models.shape import shape_of

ROWS = 8192  # of a weight that are computed in float32 or float64 at a time: a head has 128,000


class Layers:
    """A model in memory.

    Attributes:
        model: Its modules; their weights may be used while they are held.
        device: Where they are then.
        is_used_up: Whether weights leave the memory once they are `done`.
        before: Returns a weight of that name as it was before it changed; None: copies of these wait on the CPU.
        passes: How many versions of a model should go through a layer while it is held: many, where fetching is dear.
    """

    passes = 1

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device | None = None,
        is_used_up: bool = False,
        before: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.device, self.is_used_up = model, device or model.device, is_used_up
        self.before = before
        self.family = family_of(model.config)
        self.layout = layout_of(self.family, shape_of(model.config))
        self._copies: dict[str, torch.Tensor] = {}
        self._after: dict[str, torch.Tensor] = {}

    @property
    def ends(self) -> tuple[str, str]:
        """The final norm and the head."""
        return self.family.final_norm, self.family.head

    def blocks(self) -> Iterator[tuple[int, Block, bool]]:
        """Yields the halves of the layers in order: the layer's index, its half, whether that is the attention."""
        for index, pair in enumerate(zip(self.layout.attention, self.layout.mlp, strict=True)):
            for block in pair:
                if block is not None:
                    yield index, block, block is pair[0]

    def weights(self, *paths: str) -> dict[str, nn.Parameter]:
        """Returns the parameters of some modules, by their full names."""
        named = ((path, self.model.get_submodule(path).named_parameters()) for path in paths)
        return {f"{path}.{name}": weight for path, weights in named for name, weight in weights}

    def weight(self, name: str) -> torch.Tensor:
        """Returns a weight as it is, where it is."""
        return self.model.get_parameter(name).detach()

    @contextmanager
    def holding(self, *paths: str) -> Iterator[None]:
        """Holds some modules on the device for a while."""
        with ExitStack() as stack:
            for path in paths:
                stack.enter_context(_moved(self.model.get_submodule(path), self.device))
            yield

    def done(self, *paths: str) -> None:
        """Says that some modules are needed no more."""
        for path in paths if self.is_used_up else ():
            self.model.get_submodule(path).to("meta")

    @contextmanager
    def changing(self, *paths: str) -> Iterator[None]:
        """Holds modules whose weights are changed meanwhile; `at` knows the way to what they became."""
        with self.holding(*paths):
            if self.before is None:
                self._copies |= _copied(self.weights(*paths))
            yield
        self._after |= {name: weight.data for name, weight in self.weights(*paths).items()}

    def at(self, shares: Sequence[float], *paths: str) -> Iterator[float]:
        """Holds some modules and yields each share of that way, their weights being those there meanwhile."""
        changed = {name: weight for name, weight in self.weights(*paths).items() if name in self._after}
        with self.holding(*paths):
            try:
                for share in shares:
                    for name, weight in changed.items():
                        weight.data = self._at(name, share)
                    yield share
            finally:
                for name, weight in changed.items():
                    weight.data = self._after[name]

    def settle(self, share: float) -> None:
        """Leaves all weights at a share of the way, which is gone after that."""
        for name in list(self._after):
            self.model.get_parameter(name).copy_(self._at(name, share))
            del self._after[name]
        self._copies.clear()

    def _at(self, name: str, share: float) -> torch.Tensor:
        before = self._copies[name] if self.before is None else self.before(name)
        return between(before.to(self.device), self._after[name].to(self.device), share)

    def room_of(self, ids: torch.Tensor, width: int) -> torch.Tensor:
        """Returns room for the states of a batch of tokens, in as many lanes as a `Half` of the family passes on."""
        return self.room((1 + self.family.is_parallel, *ids.shape, width))

    def room(self, shape: Sequence[int]) -> torch.Tensor:
        """Returns room for hidden states of some shape, where they wait for the next layer."""
        return torch.empty(*shape, dtype=self.model.dtype, device=self.model.device)


class Streamed(Layers):
    """A model on the meta device, whose weights are fetched each time they are held.

    Args:
        fetch: Returns the weight of a name, on the CPU.
        device: Where the work is done.
        scratch: Folder for hidden states and changed weights.
    """

    passes = 8

    def __init__(
        self, model: PreTrainedModel, fetch: Callable[[str], torch.Tensor], device: torch.device, scratch: Path
    ) -> None:
        super().__init__(model, device)
        self.fetch, self.scratch = fetch, scratch
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._changed: dict[str, Path] = {}
        self._share = 0.0

    def weight(self, name: str) -> torch.Tensor:
        """Returns a weight as it is at the share that the model is settled at, on the CPU."""
        before = self.fetch(name)
        return before if name not in self._changed else between(before, self._later(name), self._share)

    @contextmanager
    def holding(self, *paths: str) -> Iterator[None]:
        """Fetches the weights of some modules and lets go of them at the end."""
        try:
            for name in self.weights(*paths):
                self._put(name, self.weight(name))
            yield
        finally:
            self._let_go(*paths)

    @contextmanager
    def changing(self, *paths: str) -> Iterator[None]:
        """Holds modules whose weights are changed meanwhile, and keeps these on disk."""
        with self.holding(*paths):
            yield
            changed = {name: weight.detach().cpu() for name, weight in self.weights(*paths).items()}
            file = self.scratch / f"{paths[-1]}.safetensors"  # two blocks may share a norm, none a module
            save_file(changed, file)
            self._changed |= dict.fromkeys(changed, file)

    def at(self, shares: Sequence[float], *paths: str) -> Iterator[float]:
        """Holds some modules and yields each share, their weights being those there; they are fetched once."""
        before = {name: self.fetch(name) for name in self.weights(*paths)}
        after = {name: self._later(name) for name in before if name in self._changed}
        try:
            for share in shares:
                for name, weight in before.items():
                    self._put(name, between(weight, after[name], share) if name in after else weight)
                yield share
        finally:
            self._let_go(*paths)

    def settle(self, share: float) -> None:
        """Leaves all weights at a share of the way."""
        self._share = share

    def room(self, shape: Sequence[int]) -> torch.Tensor:
        """Returns a memory map of a file without a name: it is gone when the tensor is."""
        count = torch.Size(shape).numel()
        path = self.scratch / "states"
        path.write_bytes(b"")
        reserve(path, max(1, count) * self.model.dtype.itemsize)
        states = torch.from_file(str(path), shared=True, size=count, dtype=self.model.dtype).view(*shape)
        path.unlink()
        return states

    def _later(self, name: str) -> torch.Tensor:
        with safe_open(self._changed[name], framework="pt") as file:
            found: torch.Tensor = file.get_tensor(name)
        return found

    def _put(self, name: str, weight: torch.Tensor) -> None:
        set_parameter(self.model, name, nn.Parameter(weight.to(self.device), requires_grad=False))

    def _let_go(self, *paths: str) -> None:
        for name in self.weights(*paths):
            set_parameter(self.model, name, self._empty[name])  # what is tied is so again


def between(before: torch.Tensor, after: torch.Tensor, share: float) -> torch.Tensor:
    """Returns what lies at a share of the way between two weights, in their precision."""
    if not share:
        return before
    found = torch.empty_like(before)
    for into, *ends in zip(*(values.split(ROWS) for values in (found, before, after)), strict=True):
        into.copy_(torch.lerp(ends[0].float(), ends[1].float(), share))
    return found


@dataclass
class Half:
    """Half of a layer, which adds ``post_norm(module(norm(h)))`` to the residual stream.

    It takes and returns states of shape ``(lanes, batch, length, hidden)``: the stream, and where an MLP reads it
    together with its attention, what the layer began with.

    Attributes:
        readers: The linears that read the norm's output, by their dotted name.
        writer: What writes the half's output, a linear or experts; None: what reads ends here, as in the lm_head.
        options: What the module is called with beside the hidden states.
        factor: What the output is multiplied by before it joins the stream.
        lane: Of the states, that of ``h``.
    """

    norm: Any
    module: Any
    readers: dict[str, Any]
    post_norm: Any = nn.Identity()
    writer: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    lane: int = 0

    @classmethod
    def of(cls, layers: Layers, block: Block, options: dict[str, Any]) -> "Half":
        """Finds the parts of a block in a model."""
        find = layers.model.get_submodule
        norm, post_norm = (nn.Identity() if name is None else find(name) for name in (block.norm, block.post_norm))
        readers = {path: find(path) for path in block.reading_linears}
        factor = residual_factor(layers.model.config)
        return cls(norm, find(block.module), readers, post_norm, find(block.writer), options, factor, block.lane)

    @classmethod
    def ending(cls, layers: Layers) -> "Half":
        """Finds the final norm and the head."""
        norm, head = (layers.model.get_submodule(path) for path in layers.ends)
        return cls(norm, head_of(layers.model), {layers.family.head: head})

    def normed(self, states: torch.Tensor) -> torch.Tensor:
        """Returns what the readers read, shape ``(batch, length, hidden)``."""
        found: torch.Tensor = self.norm(states[self.lane])
        return found

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Returns the states past the half."""
        output = self.module(self.normed(states), **self.options)
        written = self.post_norm(output[0] if isinstance(output, tuple) else output)
        past: torch.Tensor = states[0] + written * self.factor
        return torch.stack((past, states[self.lane])) if len(states) > 1 else past.unsqueeze(0)


def paths_of(block: Block) -> list[str]:
    """Returns the modules of half a layer."""
    return [*block.norms, block.module]


def embed(layers: Layers, batches: Sequence[torch.Tensor], rooms: Sequence[torch.Tensor]) -> None:
    """Writes the embeddings of batches of tokens into the room for them."""
    with layers.holding(layers.family.embedding):
        embedding, factor = layers.model.get_submodule(layers.family.embedding), embedding_factor(layers.model.config)
        for ids, room in zip(batches, rooms, strict=True):
            room.copy_(embedding(ids.to(layers.device)) * factor)  # into each lane


class _Seen(Exception):
    """An attention was called: its layer need not go on."""


def attention_options(layers: Layers, length: int) -> list[dict[str, Any]]:
    """Returns what each layer's attention is called with, for one window: masks and rotary embeddings.

    The decoder runs, but every layer only as far as its attention.

    Args:
        length: Tokens of the window.
    """
    found: list[dict[str, Any]] = [{} for _ in layers.layout.attention]
    model: Any = layers.model
    norms = [norm for _, block, _ in layers.blocks() for norm in block.norms]
    with ExitStack() as stack:
        stack.enter_context(layers.holding(*norms, layers.family.final_norm))
        for index, layer in enumerate(model.get_submodule(layers.family.layers)):
            stack.callback(_restore, layer, layer.__dict__.get("forward"))
            block = layers.layout.attention[index]
            layer.forward = _until_attention(None if block is None else layer.forward)
            if block is not None:
                attention = model.get_submodule(block.module)
                keep = attention.register_forward_pre_hook(_keeping(found[index], layers.device), with_kwargs=True)
                stack.callback(keep.remove)
        width = model.config.hidden_size
        model.get_decoder()(
            inputs_embeds=torch.zeros(1, length, width, dtype=model.dtype, device=layers.device), use_cache=False
        )
    return found


def _restore(layer: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Gives a layer its forward pass back; None: its class's."""
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _until_attention(forward: Callable[..., Any] | None) -> Callable[..., torch.Tensor]:
    """Returns the forward pass of a layer that ends at its attention and changes nothing; None: it has none."""

    def stopped(hidden_states: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        try:
            if forward is not None:
                forward(hidden_states, *args, **options)
        except _Seen:
            pass
        return hidden_states

    return stopped


def _keeping(found: dict[str, Any], device: torch.device) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
        found.update((key, _to(value, device)) for key, value in options.items() if key != "hidden_states")
        raise _Seen

    return hook


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextmanager
def _moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Holds a module on a device for a while."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def _copied(weights: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Returns weights on the CPU, which has room for more than one version."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
