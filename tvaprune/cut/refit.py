"""The closed-form instant update: a ridge least-squares refit of the kept weights, centred on the folded ones.

For a linear layer whose dense input is ``x`` and whose input in the pruned model is ``xhat`` (method: section 5):

    W' = (W C + lam W_fold) (H + lam I)^-1,   C = sum x xhat^T,   H = sum xhat xhat^T

``lam`` infinite is folding, so folding is the fallback. The layers are walked in order with two residual streams: the
dense model's gives the targets, the pruned model's, whose earlier layers are refitted already, the inputs. What writes
to the residual stream aims at the dense one minus the pruned one, which repairs what earlier layers got wrong; before a
norm after the block it aims at what the dense block writes.
Sources: least squares on the kept channels after GRAIL and OSSCAR, statistics of the pruned prefix after
Tyr-the-Pruner (arXiv 2503.09657); the centre and the residual target are this project's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tvaprune.cut.ridge import Moments, Outputs, Ridge, fit_linear, nearest, with_one
from tvaprune.losses import distillation_loss
from tvaprune.models.families import family_of
from tvaprune.models.layout import Block, Layout, layout_of
from tvaprune.plan.edits import edits_of
from tvaprune.plan.keep_plan import KeepPlan

STRENGTHS = (math.inf, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)  # lam relative to the mean diagonal of H; infinite: the fold
# How far to go from the fold to the refit. Every linear's optimum is that of the residual stream, not of the model's
# predictions, and going all the way overshoots: on the miniature models the best share is near 0.6.
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class RefitReport:
    """What a refit did.

    Attributes:
        shares: Shares of the way from the fold to the refit that were tried.
        divergences: KL from the dense model's next-token distributions on the held-out windows, at each share.
        share: The share that the model was left at: that of the smallest divergence.
        strengths: The relative ``lam`` of every linear; None: it stays folded.
    """

    shares: tuple[float, ...]
    divergences: tuple[float, ...]
    share: float
    strengths: dict[str, float | None]


@torch.no_grad()
def refit(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    plan: KeepPlan,
    calibration: Dataset,
    held_out: Dataset,
    batch_size: int = 8,
    strengths: Sequence[float] = STRENGTHS,
    shares: Sequence[float] = SHARES,
) -> RefitReport:
    """Refits a model that was sliced by ``plan`` and folded, in place.

    Every linear takes the ``lam`` of least held-out error, infinity among them: what reads a norm is refitted only
    where that helps. The model then goes from the fold towards the refit as far as brings its
    held-out predictions nearest to the dense model's. Adds no parameters: biases are refitted where there are some.

    Args:
        dense: The unpruned model. On another device than ``pruned`` (the CPU), its layers are fetched one at a time and
            the residual streams stay with it.
        calibration: Windows whose statistics are fitted, all of one length.
        held_out: Windows of the same length that choose among fits.
        batch_size: Windows of a forward pass.
    """
    dense.eval(), pruned.eval()
    folded = _copied(pruned)
    walk = _Walk(dense, pruned, plan, strengths)
    for blocks in (calibration, held_out):
        walk.read(blocks, batch_size, held_out=blocks is held_out)
    walk.layers(_attention_options(dense, walk.layout, len(held_out[0]["input_ids"]), walk.device))
    if not plan.shape.tie_word_embeddings:  # a tied head is the embedding, whose output is exact
        walk.head()
    refitted, divergences = _copied(pruned), []
    for share in shares:
        _mix(pruned, folded, refitted, share)
        divergences.append(walk.divergence())
    best = shares[nearest(divergences)]
    _mix(pruned, folded, refitted, best)
    chosen = {name: strength if math.isfinite(strength) else None for name, strength in walk.chosen.items()}
    return RefitReport(tuple(shares), tuple(divergences), best, chosen)


def _mix(model: nn.Module, folded: dict[str, torch.Tensor], refitted: dict[str, torch.Tensor], share: float) -> None:
    """Sets a model's weights to a point between two others."""
    for name, weight in model.state_dict().items():
        before, after = folded[name], refitted[name]
        weight.copy_(torch.lerp(before.float(), after.float(), share) if share else before)


@dataclass
class _Batch:
    """One batch of windows and its residual streams: shapes ``(batch, length)`` and ``(batch, length, hidden)``."""

    input_ids: torch.Tensor
    dense: torch.Tensor
    pruned: torch.Tensor
    held_out: bool


@dataclass
class _Half:
    """Half of a layer of one model, which adds ``post_norm(module(norm(h)))`` to the residual stream ``h``.

    Attributes:
        readers: The linears that read the norm's output, by their dotted name.
        writer: The linear that writes the half's output; None: what reads ends here, as in the lm_head.
        options: What the module is called with beside the hidden states.
    """

    norm: Any
    module: Any
    readers: dict[str, Any]
    post_norm: Any = nn.Identity()
    writer: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PreTrainedModel, block: Block, options: dict[str, Any]) -> "_Half":
        """Finds the parts of a block in a model."""
        norm, post_norm = (
            nn.Identity() if name is None else model.get_submodule(name) for name in (block.norm, block.post_norm)
        )
        readers = {path: model.get_submodule(path) for path in block.reading_linears}
        module, writer = model.get_submodule(block.module), model.get_submodule(block.writer)
        return cls(norm, module, readers, post_norm, writer, options)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        output = self.module(self.norm(hidden), **self.options)
        return hidden + self.post_norm(output[0] if isinstance(output, tuple) else output)


class _Walk:
    """One walk over the layers, which refits ``pruned`` in place.

    Args:
        dense: The unpruned model.
        pruned: The same model, sliced by ``plan`` and folded.
    """

    def __init__(
        self, dense: PreTrainedModel, pruned: PreTrainedModel, plan: KeepPlan, strengths: Sequence[float]
    ) -> None:
        self.dense, self.pruned, self.plan, self.strengths = dense, pruned, plan, strengths
        self.family = family_of(dense.config)
        self.layout = layout_of(self.family, plan.shape)
        self.device, self.store = pruned.device, dense.device
        self.edits = edits_of(plan, self.family, self.device)
        self.chosen: dict[str, float] = {}
        self.batches: list[_Batch] = []

    def read(self, blocks: Dataset, batch_size: int, held_out: bool) -> None:
        """Starts the streams of these windows: the embeddings."""
        embeddings: list[Any] = [model.get_input_embeddings() for model in (self.dense, self.pruned)]
        for start in range(0, len(blocks), batch_size):
            ids = blocks[start : start + batch_size]["input_ids"]
            dense, pruned = (embed(ids.to(embed.weight.device)).to(self.store) for embed in embeddings)
            self.batches.append(_Batch(ids, dense, pruned, held_out))

    def layers(self, options: list[dict[str, Any]]) -> None:
        """Walks all layers: attention, then MLP."""
        layers: Any = self.dense.get_submodule(self.family.layers)
        for index, layer in enumerate(tqdm(layers, desc="refitting", unit="layer", leave=False)):
            with _moved(layer, self.device):
                for block, given in ((self.layout.attention[index], options[index]), (self.layout.mlp[index], {})):
                    if block is not None:
                        self._half(index, block, given)

    def head(self) -> None:
        """Refits the lm_head."""
        dense, pruned = (self._ending(model) for model in (self.dense, self.pruned))
        with _moved(dense.norm, self.device), _moved(dense.module, self.device):
            self._fit_readers("", dense, pruned)

    def divergence(self) -> float:
        """Returns the KL from the dense predictions to the pruned model's, the mean over the held-out tokens.

        The dense stream must have passed all layers.
        """
        ending, held_out = self._ending(self.dense), [batch for batch in self.batches if batch.held_out]
        total = 0.0
        with _moved(ending.norm, self.device), _moved(ending.module, self.device):
            for batch in held_out:
                student = self.pruned(input_ids=batch.input_ids.to(self.device), use_cache=False).logits
                for window, hidden in zip(student.split(1), batch.dense.split(1), strict=True):  # logits are large
                    teacher = ending.module(ending.norm(hidden.to(self.device)))
                    total += float(distillation_loss(window, teacher))
        return total / sum(len(batch.input_ids) for batch in held_out)

    def _ending(self, model: PreTrainedModel) -> _Half:
        head = model.get_submodule(self.family.head)
        return _Half(model.get_submodule(self.family.final_norm), head, {self.family.head: head})

    def _half(self, index: int, block: Block, options: dict[str, Any]) -> None:
        """Refits half a layer and moves both streams past it."""
        prefix = f"layer {index} "
        dense, pruned = (_Half.of(model, block, options) for model in (self.dense, self.pruned))
        name = prefix + _last(block.writer)
        lost = not self.edits[f"{block.writer}.weight"].constant
        if not lost:
            self._fit_readers(prefix, dense, pruned)
        if not lost and block.post_norm is not None:
            self._fit_writer(name, pruned, lambda batch: self._written(dense, batch))
        for batch in self.batches:
            batch.dense = dense(batch.dense.to(self.device)).to(self.store)
        if not lost and block.post_norm is None:
            self._fit_writer(name, pruned, self._lacking)
        for batch in self.batches:
            batch.pruned = pruned(batch.pruned.to(self.device)).to(self.store)

    def _lacking(self, batch: _Batch) -> torch.Tensor:
        """Returns what the pruned stream, before a half, lacks of the dense one past it."""
        kept, scale = (values.hidden.to(self.device) for values in (self.plan.kept, self.plan.scale))
        return batch.dense.to(self.device).index_select(-1, kept).float() * scale - batch.pruned.to(self.device).float()

    def _written(self, dense: _Half, batch: _Batch) -> torch.Tensor:
        """Returns what the dense half writes on the kept dims: the norm after it divides any factor out."""
        with _captured(dense.writer) as inputs:
            dense(batch.dense.to(self.device))
        return dense.writer(inputs[0]).index_select(-1, self.plan.kept.hidden.to(self.device))

    def _fit_writer(self, name: str, pruned: _Half, target: Callable[[_Batch], torch.Tensor]) -> None:
        """Refits the linear that writes a half's output."""

        def tokens(batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
            with _captured(pruned.writer) as inputs:
                pruned(batch.pruned.to(self.device))
            return with_one(inputs[0], pruned.writer), target(batch)

        fit, held = self._moments(tokens)
        self.chosen[name] = fit_linear(pruned.writer, self._ridges(fit), fit, held)

    def _fit_readers(self, prefix: str, dense: _Half, pruned: _Half) -> None:
        """Refits the linears that read a norm to the outputs of the dense ones."""
        like = next(iter(pruned.readers.values()))

        def tokens(batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
            inputs, targets = pruned.norm(batch.pruned.to(self.device)), dense.norm(batch.dense.to(self.device))
            return with_one(inputs, like), with_one(targets, like)

        fit, held = self._moments(tokens)
        ridges = self._ridges(fit)
        for path, linear in pruned.readers.items():
            outputs = Outputs(dense.readers[path], self.edits[f"{path}.weight"].rows)
            self.chosen[prefix + _last(path)] = fit_linear(linear, ridges, fit, held, outputs)

    def _ridges(self, fit: Moments) -> list[Ridge]:
        return [Ridge(fit.inputs, strength) for strength in self.strengths]

    def _moments(self, tokens: Callable[[_Batch], tuple[torch.Tensor, torch.Tensor]]) -> tuple[Moments, Moments]:
        """Returns the moments of the calibration windows and of the held-out ones."""
        sums: dict[bool, Moments] = {}
        for batch in self.batches:
            inputs, targets = tokens(batch)
            if batch.held_out not in sums:
                sums[batch.held_out] = Moments.zeros(inputs.shape[-1], targets.shape[-1], self.device)
            sums[batch.held_out].add(inputs, targets)
        return sums[False], sums[True]


@contextmanager
def _captured(linear: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list that the linear's inputs are added to."""
    inputs: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    try:
        yield inputs
    finally:
        handle.remove()


@contextmanager
def _moved(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Holds a module on a device for a while."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


def _attention_options(
    dense: PreTrainedModel, layout: Layout, length: int, device: torch.device
) -> list[dict[str, Any]]:
    """Returns what each layer's attention is called with, for one window: masks and rotary embeddings."""
    found: list[dict[str, Any]] = [{} for _ in layout.attention]

    def keep(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, options: dict[str, Any]) -> None:
            found[index] = {k: _to(v, device) for k, v in options.items() if k != "hidden_states"}

        return hook

    blocks = [(index, block) for index, block in enumerate(layout.attention) if block is not None]
    handles = [
        dense.get_submodule(block.module).register_forward_pre_hook(keep(index), with_kwargs=True)
        for index, block in blocks
    ]
    try:
        dense(input_ids=torch.zeros(1, length, dtype=torch.int64, device=dense.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns a model's weights on the CPU, which has room for more than one."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
