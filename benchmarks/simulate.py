"""What a phase takes at any model's sizes, without a card and without weights: the real code on fake tensors.

A fake tensor has a size and no content. A `Card` counts the storages alive, those of the simulated card (torch's
meta device stands for it) apart from the host's, and the floating-point operations of what runs. A CUDA context,
workspaces of kernels and fragmentation are not counted. What depends on values (a loss that is finite, a factorisation
that did not fail) goes the usual way. Attention and dropout are called by the fused kernels that a card takes.
"""

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, Protocol
from unittest import mock

import torch
import torch._functorch.config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    masking_utils,
)

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.rotation import _Moments
from tvaprune.choose.settings import gate_settings
from tvaprune.cut import narrow, reconstruct
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.measure.perplexity import perplexity
from tvaprune.measure.work import Work
from tvaprune.models.pruned import config_of_widths
from tvaprune.models.shape import ModelShape
from tvaprune.models.units import PerUnit
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.widths import NO_RULES
from tvaprune.recover.lora import LoraSettings, add_lora, drop_replaced_head
from tvaprune.recover.teacher import LiveTeacher
from tvaprune.recover.trainer import FinetuneTrainer

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
        # Of fake tensors transformers thinks that they are compiled, and leaves no mask out.
        stack.enter_context(mock.patch.object(masking_utils, "is_tracing", lambda tensor=None: False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(card)
        yield card


class Blocks:
    """Windows of a text, without a text."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int | slice) -> dict[str, torch.Tensor]:
        rows = [self.length] if isinstance(place, int) else [len(range(*place.indices(self.count))), self.length]
        return {"input_ids": torch.zeros(rows, dtype=torch.int64)}


def plan_to(shape: ModelShape, pruned: ModelShape) -> KeepPlan:
    """Returns a plan that keeps as many units as a narrower model has, the first of each kind, with factors of 1."""
    kept = PerUnit(
        torch.arange(pruned.hidden_size),
        tuple(map(torch.arange, pruned.num_key_value_heads)),
        tuple(map(torch.arange, pruned.intermediate_size)),
    )
    return KeepPlan(kept, kept.map(lambda units: torch.ones(len(units))), shape, 1)


@dataclass
class Scene:
    """A model of random weights on the simulated card, or on a real one, and what its phases do."""

    card: Counter
    work: Work
    config: PretrainedConfig
    plan: KeepPlan
    device: torch.device = CARD
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        self.dense = self.model(self.config)
        self.windows = Blocks(self.work.pass_tokens(self.work.window) // self.work.window, self.work.window)

    def model(self, config: PretrainedConfig) -> PreTrainedModel:
        """Returns a frozen model on the card."""
        with self.device:
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, attn_implementation="sdpa", trust_remote_code=False
            )
        return built.requires_grad_(False).eval()

    def pruned(self) -> PreTrainedModel:
        """Returns the narrower model on the card, beside the dense one."""
        heads, channels = [*map(len, self.plan.padded.attn)], [*map(len, self.plan.padded.inter)]
        shape = self.plan.shape
        widths = self.plan.hidden_size, shape.head_dim, heads, channels, shape.group_size
        return self.model(config_of_widths(self.config, *widths))

    def perplexity(self, model: Any) -> Taken:
        """One pass of an evaluation."""
        self.card.restart()
        perplexity(model, self.windows, self.work.eval_batch)
        return self.card.taken

    def dense_perplexity(self) -> Taken:
        """The dense model's."""
        return self.perplexity(self.dense)

    def pruned_perplexity(self) -> Taken:
        """The narrower model's, the dense one beside it."""
        return self.perplexity(self.pruned())

    def timing(self) -> Taken:
        """A plain forward pass of the dense model, the narrower one beside it."""
        pruned, ids = self.pruned(), self.windows[:]["input_ids"].to(self.device)
        self.card.restart()
        with torch.inference_mode():
            self.dense(input_ids=ids, use_cache=False)
        del pruned
        return self.card.taken

    def gradient_pass(self) -> Taken:
        """A pass of what learns a rotation."""
        moments = _Moments(SimpleNamespace(model=self.dense, shape=self.work.dense))  # type: ignore[arg-type]
        ids = torch.zeros(self.work.rotation_batch, self.work.block, dtype=torch.int64, device=self.device)
        draws = torch.zeros(ids.shape, device=self.device)
        self.card.restart()
        moments.add(ids, draws)
        return self.card.taken

    def gate_step(self) -> Taken:
        """The second step of gate training: the optimiser's state is there."""
        work = self.work
        settings = gate_settings(PruneSettings(), DistillSettings(), 4500, 4500, 4500 * 512, 10.0, NO_RULES)
        objective = PruningObjective(GatedModel(self.dense), settings).train()
        del objective._buffers["settled"]  # whose value is asked
        objective.settled = False  # type: ignore[assignment]
        if work.checkpointing:
            objective.activation_checkpointing_enable()
        return self._steps(objective, lambda ids: objective(ids, 10.0, 0.3)["loss"])

    def _steps(self, model: Any, loss: Callable[[torch.Tensor], torch.Tensor]) -> Taken:
        optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad])
        for _ in range(2):
            self.card.restart()
            ids = torch.zeros(self.work.batch, self.work.block, dtype=torch.int64, device=self.device)
            loss(ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.card.taken

    def refit(self) -> Taken:
        """The cut, the fold and the refit, as `tvaprune.cut.narrow` does them."""
        return self._update("refit")

    def reconstruct(self) -> Taken:
        """The same with the reconstruction after it."""
        return self._update("reconstruct")

    def _update(self, update: Literal["refit", "reconstruct"]) -> Taken:
        self.card.restart()
        run: Any = SimpleNamespace(
            model=self.dense, refit_blocks=lambda: Blocks(self.work.refit_blocks, self.work.block),
            held_out_blocks=lambda: Blocks(self.work.held_blocks, self.work.block),
            args=SimpleNamespace(
                training=SimpleNamespace(per_device_eval_batch_size=self.work.eval_batch, device=self.device, seed=0),
                prune=PruneSettings(refit_offload=self.work.refit_offload, weight_update=update),
            ),
        )  # fmt: skip
        with mock.patch.object(reconstruct, "RATES", reconstruct.RATES[:1]):  # the first helps: here no error falls
            narrow._refitted(run, self.plan, True)
        return self.card.taken

    def finetuning_step(self) -> Taken:
        """The second step of fine-tuning."""
        work = self.work
        lora = LoraSettings(work.lora_r, 4.0, 0.05, work.train_lm_head)
        student: Any = self.pruned()
        student = add_lora(student, lora) if work.lora_r else student.requires_grad_(True)
        student.to(self.device).train()
        if work.lora_r and work.train_lm_head:
            drop_replaced_head(student)
        if work.checkpointing:
            student.activation_checkpointing_enable()
        teacher = LiveTeacher(self.dense, 1.0) if work.distill else None
        if not work.compare_dense:
            del self.dense  # without a teacher it leaves the memory
        trainer = FinetuneTrainer.__new__(FinetuneTrainer)  # its loss alone: no accelerator, no files
        trainer.teacher, trainer.weights, trainer._sums, trainer._count = teacher, {"ce": 1.0, "kl": 0.01}, {}, 0
        trainer.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
        return self._steps(student, lambda ids: trainer.compute_loss(student, {"input_ids": ids}))


PHASES = (
    "dense_perplexity", "pruned_perplexity", "gradient_pass", "gate_step", "refit", "reconstruct", "finetuning_step",
)  # fmt: skip


def simulate(config: PretrainedConfig, work: Work, phase: str, plan: KeepPlan | None = None) -> Taken:
    """Returns what one of `PHASES` takes.

    Args:
        plan: What is kept; None: the first units of each kind.
    """
    plan = plan or plan_to(work.dense, work.pruned)
    with simulated() as card:
        found: Taken = getattr(Scene(card, work, config, plan), phase)()
    gc.collect()
    return found


CONFIGS = {
    "Llama-2-7B": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=4096),
    "Mistral-7B": MistralConfig(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                                num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                                max_position_embeddings=32768, sliding_window=4096),
    "Llama-3-8B": LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                              num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192),
}  # fmt: skip
