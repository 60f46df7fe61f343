"""What a run takes, from sizes alone: the peak of memory of each phase, and its floating-point operations.

Closed formulas of what the code holds at the moment that it holds most. ``benchmarks/simulate.py`` counts the same on
the real code, and ``tests/measure/test_cost.py`` holds one against the other. A CUDA context, workspaces of kernels and
fragmentation are not in the figures: `OVERHEAD` is what stays free for them. The letters are those of
`tvaprune.measure.work`; what the instant updates take, `tvaprune.measure.update_cost` says.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tvaprune.losses import chunk_tokens
from tvaprune.measure.perplexity import EVALUATED_TOKENS
from tvaprune.measure.update_cost import (
    RECONSTRUCT_SHARES,
    REFIT_SHARES,
    choice_flops,
    reconstruct,
    reconstruct_flops,
    reconstruct_host,
    refit,
    refit_flops,
    refit_host,
)
from tvaprune.measure.work import GIB, Work, copies, forward_flops, head_flops, layer_widths, pairs_kept, weights
from tvaprune.models.parameters import counted_parameters, model_parameters
from tvaprune.models.shape import ModelShape
from tvaprune.phases import (
    CUT,
    DENSE_PERPLEXITY,
    FINE_TUNING,
    GATE_TRAINING,
    PRUNED_PERPLEXITY,
    RECONSTRUCT,
    RECONSTRUCT_CHOICE,
    REFIT,
    REFIT_CHOICE,
    ROTATION,
    UNIT_SCORES,
)

OVERHEAD = 0.75 * GIB  # of a card, that no tensor of ours takes: the context, workspaces, the allocator's rounding
CARDS = {"24 GB": 23.6 * GIB, "40 GB": 39.4 * GIB, "80 GB": 79.2 * GIB}  # what a card of this name has
ROTATION_BLOCKS = 128  # that a rotation is learned of


@dataclass(frozen=True)
class Phase:
    """What a phase takes.

    Attributes:
        device: Bytes on the device at the peak.
        host: Beside them bytes of the host's memory, where the device is a card.
        flops: Floating-point operations of its matrix products; a multiply and an add are two.
        helps: What makes it need less, in the words of the flags.
        last: The name and operations of its last part, where that has one.
        times: How often a run does it: once for each target.
    """

    name: str
    device: float
    host: float
    flops: float
    helps: str
    last: tuple[str, float] = ("", 0.0)
    times: int = 1

    @property
    def parts(self) -> dict[str, float]:
        """The operations of its parts, by their names: one is called as it is."""
        name, flops = self.last
        return {self.name: self.flops - flops} | ({name: flops} if name else {})


def _idle(shape: ModelShape) -> int:
    """Returns the numbers of the experts that a token does not pass."""
    idle = sum(count - shape.experts_per_token for count in shape.experts if count)
    return idle * (2 + shape.gated_mlp) * shape.expert_size * shape.hidden_size


def evaluation(shape: ModelShape, work: Work, window: int) -> int:
    """Returns the bytes that a pass of `tvaprune.measure.perplexity` takes beside the weights.

    The widest layer's MLP (gate, its activation, up: 3 f; residual stream, normed stream, buffers: 4 h), or its
    attention's pairs of tokens (scores, softmax in float32 twice) where no kernel spares them, or the chunk of
    positions whose logits are there in the model's precision, in float32 and as log-probabilities.
    """
    b, tokens, h = work.weight_bytes, work.pass_tokens(window), shape.hidden_size
    layer = b * tokens * (3 * max(shape.channels_per_token) + 4 * h + copies(shape))
    if work.sliding_window is not None and window > work.sliding_window:
        layer += window**2  # the mask
    if work.eager:
        q = max(q for q, _, _ in layer_widths(shape))
        pairs = window * ((b + 8) * q // shape.head_dim + 2 * b)  # of all heads, and two masks
        layer = max(layer, tokens * (pairs + b * (3 * h + 4 * q)))
    return max(layer, (b + 8) * shape.vocab_size * min(EVALUATED_TOKENS, tokens) + b * tokens * h)


def _training(work: Work, shape: ModelShape, per_layer: Sequence[float], loss: float, gradients: float) -> float:
    """Returns what a training pass takes beside the weights and what is trained of them.

    Backward the loss's chunk goes first, while all layers' activations are there; checkpointing keeps a layer's input
    in their place and computes one layer's again. Gradients come as activations go.

    Args:
        per_layer: Bytes a token that each layer keeps for the backward pass.
        loss: Bytes of the loss's chunk at its peak.
        gradients: Bytes of those of what is trained.
    """
    tokens, b = work.tokens, work.weight_bytes
    per_layer = list(map(sum, zip(per_layer, pairs_kept(shape, work), strict=True)))
    kept = [b * shape.hidden_size] * len(per_layer) if work.checkpointing else per_layer
    again = max(per_layer) * tokens if work.checkpointing else 0.0
    stream = 3 * b * shape.hidden_size * tokens
    return max(sum(kept) * tokens + stream + max(loss, again), gradients)


def _backward_flops(shape: ModelShape, work: Work) -> float:
    """Returns the operations of a backward pass to the activations, without the head; attention's are 2.5 times."""
    extra = sum(6 * q * work.block for q, _, _ in layer_widths(shape)) * work.tokens
    again = work.checkpointing * forward_flops(shape, work.tokens, work.block, head=False)
    return forward_flops(shape, work.tokens, work.block, head=False) + extra + again


def gate_flops(work: Work) -> float:
    """Returns the operations of a step of gate training."""
    shape = work.dense
    forward = forward_flops(shape, work.tokens, work.block, head=False)
    heads = (2 + work.distill) * head_flops(shape, work.tokens)
    return (1 + work.distill) * forward + _backward_flops(shape, work) + heads


def finetuning_flops(work: Work) -> float:
    """Returns the operations of a pass of fine-tuning: both losses share what the student's head computes.

    Of several chunks it is called again, backward, where it is trained; else each loss goes backward through it.
    """
    shape, tokens, trains_head = work.pruned, work.tokens, work.train_lm_head or not work.lora_r
    is_parted = tokens > chunk_tokens(shape.vocab_size)
    again = trains_head and is_parted
    layers = (lora_parameters(work) if work.lora_r else counted_parameters(shape) - _idle(shape)) * tokens
    updates = 2 * layers + (4 + 2 * work.checkpointing) * layers * bool(work.lora_r)  # what trains, and LoRA's way
    student = forward_flops(shape, tokens, work.block, head=False) + _backward_flops(shape, work) + updates
    ways = 1 + (work.distill and is_parted and not trains_head)  # backward
    heads = (1 + again + ways + trains_head) * head_flops(shape, work.tokens)
    teacher = forward_flops(work.dense, tokens, work.block) + again * head_flops(work.dense, tokens)
    return student + heads + work.distill * teacher


def gate_step(work: Work) -> float:
    """Returns the bytes on the card while gates are trained.

    A layer keeps for the backward pass, besides what its attention reads and writes (2 q + 2 k; what norms there read
    and write): its two norms' inputs, two outputs that are gated (of norms past them what these read, and one output
    that is made as strong again), and of the MLP the gate, its activation, up and, where that is not computed again,
    the product; and the noise of all these, where it is not drawn again. Of a chunk's logits there are the student's,
    the teacher's, the log-probabilities of both and their gradients.
    """
    b, shape, h = work.weight_bytes, work.dense, work.dense.hidden_size
    noise = not work.redraws
    h_own = [(4 + 3 * work.post_norms * (norms > 2)) * h + copies(shape) for norms in shape.layer_norms]
    of_mlp, heads = 4 - (shape.gated_mlp and not work.checkpointing), 2 + 2 * shape.head_norm
    per_layer = [
        b * (own + heads * (q + k) + of_mlp * f + noise * (2 * h + f))
        for own, (q, k, f) in zip(h_own, layer_widths(shape), strict=True)
    ]
    chunk = min(chunk_tokens(shape.vocab_size), work.tokens)
    loss = (21 + 2 * b if work.distill else 12 + b) * shape.vocab_size * chunk
    units = h + sum(shape.num_key_value_heads) + sum(shape.intermediate_size)
    return weights(shape, work) + 32 * units + _training(work, shape, per_layer, loss, 8 * units)


def gradient_pass(work: Work) -> float:
    """Returns the bytes of a pass of `tvaprune.choose.rotation`: as gates keep, the moments, and of all tokens logits.

    These as log-probabilities, cumulated, and two gradients, in float32.
    """
    work = _plain(work, work.rotation_batch)
    b, shape, h = work.weight_bytes, work.dense, work.dense.hidden_size
    per_layer = [b * (4 * h + copies(shape) + 2 * q + 2 * k + 4 * f) for q, k, f in layer_widths(shape)]
    taken = _training(work, shape, per_layer, 16 * shape.vocab_size * work.tokens, 0)
    return weights(shape, work) + 2 * 8 * h * h + taken


def gradient_flops(work: Work) -> float:
    """Returns the operations of such a pass: forward, backward, and the two moments at every norm."""
    work = _plain(work, work.rotation_batch)
    shape, tokens = work.dense, work.tokens
    moments = (2 * shape.num_hidden_layers + 1) * 4 * shape.hidden_size**2 * tokens
    forward = forward_flops(shape, tokens, work.block)
    return forward + _backward_flops(shape, work) + head_flops(shape, tokens) + moments


def _plain(work: Work, batch: int) -> Work:
    """Returns the work of a pass of so many blocks that keeps all activations."""
    return replace(work, batch=batch, checkpointing=False)


def scoring_pass(work: Work) -> float:
    """Returns the bytes of a pass of Taylor's scores: all projections have gradients, those of earlier passes too."""
    work = _plain(work, work.scored_batch)
    b, shape = work.weight_bytes, work.dense
    loss = (12 + b) * shape.vocab_size * min(chunk_tokens(shape.vocab_size), work.tokens)
    gradients = b * counted_parameters(shape)
    return weights(shape, work) + gradients + _training(work, shape, _all_kept(shape, b), loss, 0)


def scoring_flops(work: Work) -> float:
    """Returns the operations of such a pass: forward, backward, and the gradients of the projections."""
    work = _plain(work, work.scored_batch)
    shape, tokens = work.dense, work.tokens
    passes = forward_flops(shape, tokens, work.block, head=False) + _backward_flops(shape, work)
    return passes + 2 * (counted_parameters(shape) - _idle(shape)) * tokens + 2 * head_flops(shape, tokens)


def _all_kept(shape: ModelShape, b: int) -> list[int]:
    """Returns the bytes a token that each layer of a stock model keeps where all its projections have gradients.

    What the norms, the rotation, the attention and the activation keep, and what each projection reads: the norms'
    outputs, the attention's, the product.
    """
    h = shape.hidden_size
    return [8 * h + b * (2 * h + 3 * q + 2 * k + 4 * f + copies(shape)) for q, k, f in layer_widths(shape)]


def lora_parameters(work: Work) -> int:
    """Returns the numbers that LoRA trains, the lm_head not counted; of a mixture of experts the attention's alone."""
    h, r = work.pruned.hidden_size, work.lora_r
    of_mlp = 0 if any(work.pruned.experts) else 2 + work.pruned.gated_mlp
    return sum(r * (2 * (h + q) + 2 * (h + k) + of_mlp * (h + f)) for q, k, f in layer_widths(work.pruned))


def trained_parameters(work: Work) -> int:
    """Returns the numbers that fine-tuning trains."""
    if not work.lora_r:
        return model_parameters(work.pruned)
    return lora_parameters(work) + work.train_lm_head * work.pruned.vocab_size * work.pruned.hidden_size


def _tuned(work: Work) -> int:
    """Returns the bytes of a model that is tuned, throughout: weights, what is trained beside them, two moments."""
    shape = work.pruned
    if not work.lora_r:
        return weights(shape, work) + 2 * work.weight_bytes * trained_parameters(work)
    return weights(shape, work) + 12 * trained_parameters(work) - _replaced(work)


def _replaced(work: Work) -> int:
    """Returns the bytes of the head that makes room for the one that is trained."""
    shape, replaced = work.pruned, work.lora_r and work.train_lm_head and not work.pruned.tie_word_embeddings
    return work.weight_bytes * shape.hidden_size * shape.vocab_size if replaced else 0


def finetuning_step(work: Work) -> float:
    """Returns the bytes on the card in fine-tuning.

    LoRA and a head beside it are trained in float32, all weights in their own precision; what is trained and its two
    moments are there throughout, its gradients at the end, or from the first of several passes on. A linear with LoRA
    keeps its input after dropout in float32 and the dropout's mask.
    """
    b, shape, h, r = work.weight_bytes, work.pruned, work.pruned.hidden_size, work.lora_r
    per_layer = _all_kept(shape, b)
    if r:
        own = [8 * h + b * (2 * q + 2 * k + 3 * f + copies(shape)) for q, k, f in layer_widths(shape)]
        more = [5 * (5 * h + q + f) + 7 * 4 * r for q, _, f in layer_widths(shape)]
        per_layer = list(map(sum, zip(own, more, strict=True)))
    number = 4 if r else b  # of what is trained
    head = number * (work.train_lm_head or not r) * h * shape.vocab_size  # its gradient of this pass
    chunk, logits = chunk_tokens(shape.vocab_size), shape.vocab_size * work.tokens
    if work.tokens <= chunk:  # both losses' graphs, or one's and the head's gradient of the other
        loss = max((33 if work.distill else 12) * logits, 12 * logits + head)
    else:
        loss = (27 if work.distill else 12) * shape.vocab_size * chunk + head
    gradients = number * trained_parameters(work)
    step = _training(work, shape, per_layer, loss, gradients) + work.accumulates * gradients  # those of earlier passes
    return _tuned(work) + (work.distill or work.compare_dense) * weights(work.dense, work) + step


def timing(work: Work) -> float:
    """Returns the bytes of timing both models beside each other: an evaluation's, or all logits of a plain pass."""
    b, shape, tokens = work.weight_bytes, work.dense, work.pass_tokens(work.window)
    logits = b * tokens * (shape.vocab_size + 2 * shape.hidden_size)
    return weights(shape, work) + weights(work.pruned, work) + max(evaluation(shape, work, work.window), logits)


def training_timing(work: Work) -> float:
    """Returns the bytes of timing training steps of both models, each trained in the same way, without a teacher.

    The dense model's head stays beside the one that would be trained: it is put back.
    """
    beside = replace(work, pruned=work.dense, distill=False, compare_dense=False, accumulates=False)
    return _tuned(work) + finetuning_step(beside) + _replaced(beside)


def phases(verb: str, work: Work, on_card: bool = True) -> list[Phase]:
    """Returns what a run of ``prune``, ``apply`` or ``finetune`` does, in order.

    Args:
        on_card: Else the host's memory is the device's, and what is loaded is not copied there.
    """
    found = [_evaluated(DENSE_PERPLEXITY, work, work.dense, 0)] if work.measures else []
    if verb == "prune":
        if work.rotation_batch:
            found.append(_rotation(work))
        scored = work.scorings * forward_flops(work.dense, work.selection_blocks * work.block, work.block)
        flops = work.steps * gate_flops(work) + scored
        if work.steps:
            found.append(Phase(GATE_TRAINING, gate_step(work), 0, flops, ", ".join(_smaller_step(work))))
        if work.scored_batch:
            passes = -(-work.scored_blocks // work.scored_batch)
            helps = "a smaller --per_device_eval_batch_size or --block_size"
            found.append(Phase(UNIT_SCORES, scoring_pass(work), 0, passes * scoring_flops(work), helps))
    beside = weights(work.dense, work) if work.keep_dense else 0
    frees = ["--teacher_cache DIR"] if verb == "finetune" and beside and work.distill else []
    measured = [_evaluated(PRUNED_PERPLEXITY, work, work.pruned, beside, frees)] if work.measures else []
    found += [replace(phase, times=work.targets) for phase in (*_cut(work), *measured)]
    if verb == "finetune":
        scored = work.scorings * forward_flops(work.pruned, work.selection_blocks * work.block, work.block)
        scored += forward_flops(work.pruned, work.windows * work.window, work.window)  # of what was tuned
        flops = work.steps * finetuning_flops(work) + scored
        smaller = _smaller_step(work) + ["a smaller --lora_r" if work.lora_r else "LoRA in place of --full_ft"]
        smaller += ["--teacher_cache DIR"] if work.distill else []
        found.append(Phase(FINE_TUNING, finetuning_step(work), 0, flops, ", ".join(smaller)))
    if not on_card:
        return [replace(phase, device=phase.device + phase.host, host=0) for phase in found]
    found[0] = replace(found[0], host=max(found[0].host, weights(work.dense, work)))  # what is loaded passes the host
    return found


def _smaller_step(work: Work) -> list[str]:
    """Returns what makes a training step need less that is not done already."""
    found = [] if work.checkpointing else ["--activation_checkpointing True"]
    return [*found, *(["a smaller --per_device_train_batch_size"] if work.batch > 1 else []), "a smaller --block_size"]


def _evaluated(name: str, work: Work, shape: ModelShape, beside: int, frees: Sequence[str] = ()) -> Phase:
    """Returns the measuring of a model; ``frees`` takes from the card what is ``beside`` it."""
    device = weights(shape, work) + beside + evaluation(shape, work, work.window)
    flops = forward_flops(shape, work.windows * work.window, work.window)
    batch = ["a smaller --per_device_eval_batch_size"] if work.pass_tokens(work.window) > work.window else []
    return Phase(name, device, 0, flops, ", ".join([*frees, *batch, "a smaller --ctx_length"]))


def _rotation(work: Work) -> Phase:
    """What a rotation is learned of; on the host both moments, and what their eigenvectors take, in float64."""
    flops = ROTATION_BLOCKS / work.rotation_batch * gradient_flops(work)
    host, helps = 6 * 8 * work.dense.hidden_size**2, "--rotate off, a smaller --block_size"
    return Phase(ROTATION, gradient_pass(work), host, flops, helps)


def _cut(work: Work) -> Iterator[Phase]:
    """The fits, or the cut alone, weight by weight."""
    dense, pruned = weights(work.dense, work), weights(work.pruned, work)
    if not work.refits:
        yield Phase(CUT, dense + work.keep_dense * pruned, 0, 0.0, "--dtype bfloat16")
        return
    offload = "" if work.refit_offload else "--refit_offload True, "
    last = REFIT_CHOICE, choice_flops(work, len(REFIT_SHARES))
    yield Phase(REFIT, refit(work), refit_host(work), refit_flops(work), f"{offload}--weight_update fold", last)
    if work.reconstructs:
        helps = f"{offload}a smaller --per_device_eval_batch_size, --weight_update refit"
        last = RECONSTRUCT_CHOICE, choice_flops(work, len(RECONSTRUCT_SHARES))
        host = reconstruct_host(work)
        yield Phase(RECONSTRUCT, reconstruct(work), host, reconstruct_flops(work), helps, last)
