"""Where the parts of a model are: each layer's attention and MLP, the projections that read and the one that writes.

A projection is a linear module and a range of its rows, so that fused ones are data; a norm may stand before a block,
after it, or both.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tvaprune.models.families import ModelFamily
from tvaprune.models.shape import ModelShape


@dataclass(frozen=True)
class Projection:
    """A linear map of a layer.

    Attributes:
        path: Dotted name of its linear module, as `torch.nn.Module.get_submodule` of the whole model takes it.
        start: The first of its rows in there.
        stop: The row past its last.
    """

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Mixture:
    """The weights of a layer's experts by their full names; all read the norm's output, ``down`` writes.

    Attributes:
        router: Shape ``(experts, hidden)``.
        up: Shape ``(experts, 2 * channels, hidden)``.
        down: Shape ``(experts, hidden, channels)``.
    """

    router: str
    up: str
    down: str


@dataclass(frozen=True)
class Block:
    """Half a layer, which adds ``post_norm(module(norm(h)))`` to the residual stream.

    That is ``h``, except of an MLP that reads the stream together with its attention: then ``h`` is the layer's input.

    Attributes:
        module: Dotted name of the attention or the MLP.
        norm: Of the norm that it reads; None: it reads the residual stream.
        post_norm: Of the norm that its output passes; None: it is added as it is.
        readers: The projections that read the norm's output, by their field of `ModelFamily`.
        writer: Dotted name of the linear that writes the output; of experts, of the module.
        lane: Where ``h`` stands in the states that pass a layer (`tvaprune.models.layers.Half`).
        head_norms: Of the attention's norms over all heads at once, which are as wide as the heads: those of its
            readers, by their field.
        mixture: The experts that an MLP is made of, in place of readers and a writer; None: it has these.
    """

    module: str
    norm: str | None
    post_norm: str | None
    readers: Mapping[str, Projection]
    writer: str
    lane: int = 0
    head_norms: Mapping[str, str] = field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def norms(self) -> list[str]:
        """The norms that are as wide as the residual stream."""
        return [norm for norm in (self.norm, self.post_norm) if norm is not None]

    @property
    def reading_linears(self) -> list[str]:
        """Dotted names of the linear modules that read, each once."""
        return list(dict.fromkeys(reader.path for reader in self.readers.values()))


@dataclass(frozen=True)
class Layout:
    """The parts of a model.

    Attributes:
        attention: Per layer; None: the layer has none.
        mlp: Likewise.
    """

    attention: tuple[Block | None, ...]
    mlp: tuple[Block | None, ...]


def layout_of(family: ModelFamily, shape: ModelShape) -> Layout:
    """Returns the parts of a family's model of these sizes."""
    layers = range(shape.num_hidden_layers)
    return Layout(
        attention=tuple(_attention(family, shape, i) if shape.num_key_value_heads[i] else None for i in layers),
        mlp=tuple(_mlp(family, shape, i) if shape.channels_per_token[i] else None for i in layers),
    )


def _attention(family: ModelFamily, shape: ModelShape, index: int) -> Block:
    keys = shape.num_key_value_heads[index] * shape.head_dim
    rows = {"query": keys * shape.group_size, "key": keys, "value": keys}
    return _block(family, index, "attention", rows, family.output)


def _mlp(family: ModelFamily, shape: ModelShape, index: int) -> Block:
    if shape.experts[index]:
        return _block(family, index, "mlp", {}, None)
    channels = shape.intermediate_size[index]
    rows = {"gate": channels, "up": channels} if family.gate is not None else {"up": channels}
    return _block(family, index, "mlp", rows, family.down)


def _block(family: ModelFamily, index: int, kind: str, rows: Mapping[str, int], writer: str | None) -> Block:
    layer = f"{family.layers}.{index}."
    readers: dict[str, Projection] = {}
    ends: dict[str, int] = {}
    for role, count in rows.items():
        path = layer + getattr(family, role)
        start = ends.get(path, 0)
        ends[path] = start + count
        readers[role] = Projection(path, start, ends[path])

    def named(name: str | None) -> str | None:
        return None if name is None else layer + name

    norm, post_norm = (named(getattr(family, f"{kind}_{place}")) for place in ("norm", "post_norm"))
    head_norms: dict[str, str] = {}
    if kind == "attention" and family.norms_all_heads:
        head_norms = {"query": f"{layer}{family.query_norm}", "key": f"{layer}{family.key_norm}"}
    lane = int(family.is_parallel and kind == "mlp")
    mixture, module = None, layer + getattr(family, kind)
    if writer is None:
        experts = f"{layer}{family.experts}"
        mixture = Mixture(f"{layer}{family.router}.weight", f"{experts}.gate_up_proj", f"{experts}.down_proj")
    return Block(module, norm, post_norm, readers, named(writer) or module, lane, head_norms, mixture)
