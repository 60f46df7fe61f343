"""What a run takes, from sizes alone: the peak of memory of each phase, and its floating-point operations.

Closed formulas of what the code holds at the moment that it holds most. ``benchmarks/simulate.py`` counts the same on
the real code, and ``tests/measure/test_cost.py`` holds one against the other. A CUDA context, workspaces of kernels and
fragmentation are not in the figures: `OVERHEAD` is what stays free for them.

Letters: h hidden size, q features of all query heads, k features of all KV heads, f MLP channels, v vocabulary; b bytes
of a number in the weights' precision. What trains, and moments, are float32 or float64, of 4 and 8 bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tvaprune.losses import CHUNK_TOKENS as LOSS_TOKENS
from tvaprune.measure.perplexity import CHUNK_TOKENS, windows_of_pass
from tvaprune.models.parameters import dense_layers, dense_parameters, layer_parameters
from tvaprune.models.shape import ModelShape

GIB = 2**30
OVERHEAD = 0.75 * GIB  # of a card, that no tensor of ours takes: the context, workspaces, the allocator's rounding
CARDS = {"24 GB": 23.6 * GIB, "40 GB": 39.4 * GIB, "80 GB": 79.2 * GIB}  # what a card of this name has
STRENGTHS, SHARES, ROWS = 5, 6, 8192  # of `tvaprune.cut`: finite strengths, shares, rows at a time
WINDOW_LAYERS, EPOCHS, NEW_SHARES = 2, 4, 3  # of `tvaprune.cut.reconstruct`
ROTATION_BLOCKS = 128  # that a rotation is learned of
# The phases by name, as `phases` has them.
DENSE_PERPLEXITY, PRUNED_PERPLEXITY = "dense perplexity", "pruned perplexity"
ROTATION, GATE_TRAINING, FINE_TUNING = "rotation", "gate training", "fine-tuning"
CUT, REFIT, RECONSTRUCT = "cut", "refit", "reconstruct"
NARROWING = (CUT, REFIT, RECONSTRUCT)


@dataclass(frozen=True)
class Work:
    """What a run is asked to do, as far as it costs memory or time.

    Attributes:
        dense: The model's sizes; ``pruned`` are the narrower model's.
        weight_bytes: Of a number of the weights, and of what is computed with them.
        sliding_window: Tokens that attention looks back; None: all.
        block: Tokens of a training block.
        batch: Blocks of a forward pass in training; ``steps`` passes are made.
        checkpointing: Whether the backward pass computes a layer's activations again.
        redraws: Whether the noise of the gates is drawn again backward, as on a GPU, or kept.
        distill: Whether the dense model teaches.
        window: Tokens of an evaluation window; ``windows`` are measured.
        eval_batch: Windows of a pass; 0: as `tvaprune.measure.perplexity.windows_of_pass` says.
        scorings: How often masks, or checkpoints, are compared in training, on ``choice_blocks`` blocks.
        refit_blocks: Blocks that the refit fits.
        held_blocks: Blocks on which it compares what it chooses among.
        refit_offload: Whether the dense model and the streams are on the host meanwhile.
        refits: Whether the kept weights are refitted, or only cut; ``reconstructs``: trained after that.
        keep_dense: Whether the dense model is on the card while the narrower one is measured; ``compare_dense``: while
            that is tuned, too.
        rotation_batch: Blocks of a pass of what learns a rotation; 0: nothing is turned.
        lora_r: Rank of LoRA; 0: all weights are trained.
    """

    dense: ModelShape
    pruned: ModelShape
    weight_bytes: int = 2
    sliding_window: int | None = None
    block: int = 512
    batch: int = 1
    steps: int = 4500
    checkpointing: bool = False
    redraws: bool = False
    distill: bool = True
    window: int = 4096
    windows: int = 256
    eval_batch: int = 0
    scorings: int = 60
    choice_blocks: int = 128
    held_blocks: int = 64
    refits: bool = True
    reconstructs: bool = False
    refit_blocks: int = 128
    refit_offload: bool = False
    keep_dense: bool = True
    compare_dense: bool = False
    rotation_batch: int = 0
    lora_r: int = 128
    train_lm_head: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of a training pass."""
        return self.batch * self.block

    def pass_tokens(self, window: int) -> int:
        """Returns the tokens of an evaluation's pass."""
        return window * windows_of_pass(window, self.eval_batch)


@dataclass(frozen=True)
class Phase:
    """What a phase takes.

    Attributes:
        device: Bytes on the device at the peak.
        host: Beside them bytes of the host's memory, where the device is a card.
        flops: Floating-point operations of its matrix products; a multiply and an add are two.
        helps: What makes it need less, in the words of the flags.
    """

    name: str
    device: float
    host: float
    flops: float
    helps: str


def _layers(shape: ModelShape) -> Iterator[tuple[int, int, int]]:
    """Yields q, k and f of every layer; of experts f counts those that a token passes."""
    for heads, channels in zip(shape.num_key_value_heads, shape.channels_per_token, strict=True):
        yield heads * shape.group_size * shape.head_dim, heads * shape.head_dim, channels


def _layer_sizes(shape: ModelShape) -> list[int]:
    """Returns the numbers of every layer's linears and of all its experts."""
    sizes = zip(shape.num_key_value_heads, shape.intermediate_size, shape.per_dim, shape.layer_norms, strict=True)
    return [layer_parameters(shape.hidden_size, k, f, shape, per_dim - norms) for k, f, per_dim, norms in sizes]


def _copies(shape: ModelShape) -> int:
    """Returns the numbers of a token's copies, of which each expert that it passes reads one and writes one."""
    return 2 * shape.experts_per_token * shape.hidden_size


def _idle(shape: ModelShape) -> int:
    """Returns the numbers of the experts that a token does not pass."""
    idle = sum(count - shape.experts_per_token for count in shape.experts if count)
    return idle * (2 + shape.gated_mlp) * shape.expert_size * shape.hidden_size


def narrower(shape: ModelShape, sparsity: float) -> ModelShape:
    """Returns a shape of as many hidden dims whose layers all lost the same share of heads and channels.

    Of a mixture of experts the hidden dims go: nothing else is cut of experts.
    """
    if any(shape.experts):
        return replace(shape, hidden_size=round(shape.hidden_size * (1 - sparsity)))
    heads, channels = (
        tuple(round(size * (1 - sparsity)) for size in sizes)
        for sizes in (shape.num_key_value_heads, shape.intermediate_size)
    )
    return replace(shape, num_key_value_heads=heads, intermediate_size=channels)


def weights(shape: ModelShape, work: Work) -> int:
    """Returns the bytes of a model's weights."""
    return dense_parameters(shape) * work.weight_bytes


def forward_flops(shape: ModelShape, tokens: int, window: int, head: bool = True) -> float:
    """Returns the operations of a forward pass; of attention all pairs of a window count, as for fused kernels."""
    h, projections = shape.hidden_size, 2 + shape.gated_mlp
    linear = sum(h * (2 * q + 2 * k + projections * f) for q, k, f in _layers(shape)) + head * h * shape.vocab_size
    linear += h * sum(shape.experts)  # routers
    return tokens * (2 * linear + sum(4 * q * window for q, _, _ in _layers(shape)))


def evaluation(shape: ModelShape, work: Work, window: int) -> int:
    """Returns the bytes that a pass of `tvaprune.measure.perplexity` takes beside the weights.

    The widest layer's MLP (gate, its activation, up: 3 f; residual stream, normed stream, buffers: 4 h), or the chunk
    of positions whose logits are there in the model's precision, in float32 and as log-probabilities.
    """
    b, tokens, h = work.weight_bytes, work.pass_tokens(window), shape.hidden_size
    layer = b * tokens * (3 * max(shape.channels_per_token) + 4 * h + _copies(shape))
    if work.sliding_window is not None and window > work.sliding_window:
        layer += window**2  # the mask
    return max(layer, (b + 8) * shape.vocab_size * min(CHUNK_TOKENS, tokens) + b * tokens * h)


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
    kept = [b * shape.hidden_size] * len(per_layer) if work.checkpointing else per_layer
    again = max(per_layer) * tokens if work.checkpointing else 0.0
    stream = 3 * b * shape.hidden_size * tokens
    return max(sum(kept) * tokens + stream + max(loss, again), gradients)


def _backward_flops(shape: ModelShape, work: Work) -> float:
    """Returns the operations of a backward pass to the activations, without the head; attention's are 2.5 times."""
    extra = sum(6 * q * work.block for q, _, _ in _layers(shape)) * work.tokens
    again = work.checkpointing * forward_flops(shape, work.tokens, work.block, head=False)
    return forward_flops(shape, work.tokens, work.block, head=False) + extra + again


def _head_flops(shape: ModelShape, tokens: int) -> int:
    return 2 * tokens * shape.hidden_size * shape.vocab_size


def gate_flops(work: Work) -> float:
    """Returns the operations of a step of gate training; a loss in several chunks calls the heads again, backward."""
    again, shape = work.tokens > LOSS_TOKENS, work.dense
    forward = forward_flops(shape, work.tokens, work.block, head=False)
    heads = (2 + again + work.distill * (1 + again)) * _head_flops(shape, work.tokens)
    return (1 + work.distill) * forward + _backward_flops(shape, work) + heads


def finetuning_flops(work: Work) -> float:
    """Returns the operations of a pass of fine-tuning: both losses call the student's head."""
    again, shape, tokens = work.tokens > LOSS_TOKENS, work.pruned, work.tokens
    layers = (lora_parameters(work) if work.lora_r else dense_layers(shape) - _idle(shape)) * tokens
    updates = 2 * layers + (4 + 2 * work.checkpointing) * layers * bool(work.lora_r)  # what trains, and LoRA's way
    student = forward_flops(shape, tokens, work.block, head=False) + _backward_flops(shape, work) + updates
    losses = 1 + work.distill
    heads = losses * (2 + again + (work.train_lm_head or not work.lora_r)) * _head_flops(shape, work.tokens)
    teacher = forward_flops(work.dense, tokens, work.block) + again * _head_flops(work.dense, tokens)
    return student + heads + work.distill * teacher


def gate_step(work: Work) -> float:
    """Returns the bytes on the card while gates are trained.

    A layer keeps for the backward pass, besides what its attention reads and writes (2 q + 2 k): its two norms' inputs,
    two outputs that are gated, and of the MLP the gate, its activation, up and the product; and the noise of all these,
    where it is not drawn again. Of a chunk's logits there are the student's, the teacher's, the log-probabilities of
    both and their gradients.
    """
    b, shape, h = work.weight_bytes, work.dense, work.dense.hidden_size
    noise = not work.redraws
    h_own = 4 * h + _copies(shape)
    per_layer = [b * (h_own + 2 * q + 2 * k + 4 * f + noise * (2 * h + f)) for q, k, f in _layers(shape)]
    chunk = min(LOSS_TOKENS, work.tokens)
    loss = (21 + 2 * b if work.distill else 12 + b) * shape.vocab_size * chunk
    units = h + sum(shape.num_key_value_heads) + sum(shape.intermediate_size)
    return weights(shape, work) + 32 * units + _training(work, shape, per_layer, loss, 8 * units)


def gradient_pass(work: Work) -> float:
    """Returns the bytes of a pass of `tvaprune.choose.rotation`: as gates keep, the moments, and of all tokens logits.

    These as log-probabilities, cumulated, and two gradients, in float32.
    """
    work = _rotating(work)
    b, shape, h = work.weight_bytes, work.dense, work.dense.hidden_size
    per_layer = [b * (4 * h + _copies(shape) + 2 * q + 2 * k + 4 * f) for q, k, f in _layers(shape)]
    taken = _training(work, shape, per_layer, 16 * shape.vocab_size * work.tokens, 0)
    return weights(shape, work) + 2 * 8 * h * h + taken


def gradient_flops(work: Work) -> float:
    """Returns the operations of such a pass: forward, backward, and the two moments at every norm."""
    work = _rotating(work)
    shape, tokens = work.dense, work.tokens
    moments = (2 * shape.num_hidden_layers + 1) * 4 * shape.hidden_size**2 * tokens
    forward = forward_flops(shape, tokens, work.block)
    return forward + _backward_flops(shape, work) + _head_flops(shape, tokens) + moments


def _rotating(work: Work) -> Work:
    return replace(work, batch=work.rotation_batch, checkpointing=False)


def lora_parameters(work: Work) -> int:
    """Returns the numbers that LoRA trains, the lm_head not counted; of a mixture of experts the attention's alone."""
    h, r = work.pruned.hidden_size, work.lora_r
    of_mlp = 0 if any(work.pruned.experts) else 2 + work.pruned.gated_mlp
    return sum(r * (2 * (h + q) + 2 * (h + k) + of_mlp * (h + f)) for q, k, f in _layers(work.pruned))


def trained_parameters(work: Work) -> int:
    """Returns the numbers that fine-tuning trains."""
    if not work.lora_r:
        return dense_parameters(work.pruned)
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
    moments are there throughout, its gradients at the end. A linear with LoRA keeps its input after dropout in float32
    and the dropout's mask.
    """
    b, shape, h, r = work.weight_bytes, work.pruned, work.pruned.hidden_size, work.lora_r
    own = [8 * h + b * (2 * q + 2 * k + 3 * f + _copies(shape)) for q, k, f in _layers(shape)]
    if r:
        each = [5 * (5 * h + q + f) + 7 * 4 * r for q, _, f in _layers(shape)]
    else:
        each = [b * (2 * h + q + f) for q, _, f in _layers(shape)]  # what a linear reads: norms', attention's, product
    per_layer = [mine + more for mine, more in zip(own, each, strict=True)]
    held = 33 * work.tokens if work.tokens <= LOSS_TOKENS else 18 * LOSS_TOKENS  # both losses' graphs, or one's
    number = 4 if r else b  # of what is trained
    head = 2 * number * (work.train_lm_head or not r) * h * shape.vocab_size  # its gradient, twice
    step = _training(work, shape, per_layer, held * shape.vocab_size + head, number * trained_parameters(work))
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
    beside = replace(work, pruned=work.dense, distill=False, compare_dense=False)
    return _tuned(work) + finetuning_step(beside) + _replaced(beside)


@dataclass(frozen=True)
class Fit:
    """One least-squares fit of the refit: ``linears`` of n features each, whose moments with m targets are summed.

    Attributes:
        outputs: Rows of every linear; `tvaprune.cut.ridge.ROWS` are solved at a time.
        reads: Whether the targets are a dense linear's inputs, and the rows' cross moments are to be computed.
    """

    features: int
    targets: int
    outputs: tuple[int, ...]
    reads: bool

    @property
    def bytes(self) -> int:
        """What it holds at the peak: both splits' moments, and of some rows the errors or the solution; float64.

        `torch.cholesky_solve` works on copies of the factor and of the right side.
        """
        n, rows = self.features, min(ROWS, max(self.outputs))
        errors, solution = (7 if self.reads else 5) * rows * n, 2 * n * n + (5 if self.reads else 3) * rows * n
        return 8 * (2 * n * (n + self.targets) + max(errors, solution))

    def flops(self, tokens: int) -> float:
        """The operations of the moments, and of every strength's factor, solution and error."""
        n, solutions = self.features, STRENGTHS + 1
        moments = 2 * tokens * n * (n + self.targets)
        each = solutions * 2 * n * n + (STRENGTHS + 1) * 2 * n * n + self.reads * 3 * 2 * self.targets * n
        factors = sum(-(-rows // ROWS) for rows in self.outputs) * solutions * n**3 / 3
        return moments + each * sum(self.outputs) + factors


def _fits(work: Work) -> Iterator[Fit]:
    h, hidden = work.dense.hidden_size, work.pruned.hidden_size
    for (q, k, _), f in zip(_layers(work.pruned), work.pruned.intermediate_size, strict=True):
        yield Fit(hidden, h, (q, k, k), True)
        yield Fit(q, hidden, (hidden,), False)
        if not f:  # experts stay folded
            continue
        yield Fit(hidden, h, (f,) * (1 + work.pruned.gated_mlp), True)
        yield Fit(f, hidden, (hidden,), False)
    if not work.dense.tie_word_embeddings:
        yield Fit(hidden, h, (work.dense.vocab_size,), True)


def _refit_tokens(work: Work) -> int:
    return (work.refit_blocks + work.held_blocks) * work.block


def _streams(work: Work) -> int:
    """Returns the bytes of both residual streams of the refit; of a parallel model a layer's input waits too."""
    width = (1 + work.dense.is_parallel) * (work.dense.hidden_size + work.pruned.hidden_size)
    return work.weight_bytes * width * _refit_tokens(work)


def head_share(dense: ModelShape, hidden: int, itemsize: int) -> int:
    """Returns the bytes of a head at a share of the way: before, after, itself, and of some rows these in float32.

    Args:
        hidden: Hidden dims of the narrower model, whose head it is; one that is tied is not refitted.
        itemsize: Bytes of a weight.
    """
    v = dense.vocab_size
    return 0 if dense.tie_word_embeddings else 3 * hidden * (itemsize * v + 4 * min(ROWS, v))


def refit(work: Work) -> float:
    """Returns the bytes on the card in the refit: both models, both streams, and the widest fit, or the head's share.

    With ``--refit_offload`` the dense model and the streams are on the host, and a layer or the head comes over.
    """
    there = weights(work.dense, work) + _streams(work)
    if work.refit_offload:
        there = work.weight_bytes * max(work.dense.hidden_size * work.dense.vocab_size, *_layer_sizes(work.dense))
    share = head_share(work.dense, work.pruned.hidden_size, work.weight_bytes)
    return there + weights(work.pruned, work) + max(share, *(fit.bytes for fit in _fits(work)))


def refit_flops(work: Work) -> float:
    """Returns the operations of the refit: a pass of the dense stream, two of the pruned one, fits, the shares."""
    tokens, held = _refit_tokens(work), work.held_blocks * work.block
    passes = (
        forward_flops(work.dense, tokens, work.block, head=False)
        + 2 * forward_flops(work.pruned, tokens, work.block, head=False)
        + SHARES
        * (forward_flops(work.pruned, held, work.block) + 2 * held * work.dense.hidden_size * work.dense.vocab_size)
    )
    return passes + sum(fit.flops(tokens) for fit in _fits(work))


def reconstruct(work: Work) -> float:
    """Returns the bytes on the card in the reconstruction: both models, both streams, and a window in training.

    Of what is trained there are a float32 copy where it is in half precision, the best so far, two moments, and at the
    end of a step its gradients in both precisions; before that the activations, the norms' inputs in float32, and past
    the last window a chunk of the predictions.
    """
    there: float = weights(work.dense, work) + _streams(work)
    if work.refit_offload:
        there = max(_held(work, work.dense))
    return there + weights(work.pruned, work) + max(_window_training(work))


def reconstruct_streamed(work: Work) -> float:
    """Returns the bytes of the largest window where nothing else is there: of both models, and its training."""
    held = zip(_held(work, work.dense), _held(work, work.pruned), _window_training(work), strict=True)
    return max(map(sum, held))


def _windows(work: Work) -> list[slice]:
    """Returns the layers that are trained together; the last ones are as many as can be."""
    count, layers = work.dense.num_hidden_layers, WINDOW_LAYERS
    stops = range(count % layers or layers, count + 1, layers)
    return [slice(max(0, stop - layers), stop) for stop in stops]


def _held(work: Work, shape: ModelShape) -> list[float]:
    """Returns the bytes of a model's weights in each window, the head beside the last."""
    sizes = [sum(_layer_sizes(shape)[window]) for window in _windows(work)]
    sizes[-1] += shape.hidden_size * shape.vocab_size
    return [work.weight_bytes * size for size in sizes]


def _window_training(work: Work) -> list[float]:
    """Returns the bytes that training each window takes beside the weights, as `reconstruct` says."""
    b, h, windows = work.weight_bytes, work.pruned.hidden_size, _windows(work)
    copy, tokens = 4 * (b < 4), work.pass_tokens(work.block)
    sizes = _layer_sizes(work.pruned)
    h_own = 4 * h + _copies(work.pruned)
    per_token = [b * (h_own + 2 * q + 2 * k + 4 * f) + 8 * h for q, k, f in _layers(work.pruned)]
    predictions = (21 + 2 * b) * work.dense.vocab_size * min(LOSS_TOKENS, tokens)
    losses = [12 * h * tokens] * (len(windows) - 1) + [predictions]
    return [
        (copy + b + 8) * sum(sizes[window])
        + max((copy + b) * sum(sizes[window]), tokens * sum(per_token[window]) + loss)
        for window, loss in zip(windows, losses, strict=True)
    ]


def reconstruct_flops(work: Work) -> float:
    """Returns the operations of the reconstruction: both streams, the training, held-out errors, shares."""
    fit, held = work.refit_blocks * work.block, work.held_blocks * work.block
    again = work.pass_tokens(work.block) > LOSS_TOKENS  # both heads, backward

    def passes(shape: ModelShape, tokens: int) -> float:
        return forward_flops(shape, tokens, work.block, head=False)

    streams = passes(work.dense, fit + held) + passes(work.pruned, fit + held)
    training = 3 * EPOCHS * passes(work.pruned, fit) + (EPOCHS + 1) * passes(work.pruned, held)
    heads = _head_flops(work.pruned, held) + _head_flops(work.dense, held)
    last = EPOCHS * ((2 + again) * _head_flops(work.pruned, fit) + (1 + again) * _head_flops(work.dense, fit))
    return streams + training + last + (EPOCHS + 1) * heads + NEW_SHARES * (passes(work.pruned, held) + heads)


def of_pass(phase: str, work: Work) -> tuple[float, float]:
    """Returns the bytes on the device and the operations of one pass: what ``benchmarks/simulate.py`` counts.

    Args:
        phase: ``dense_perplexity``, ``pruned_perplexity`` (both models there), ``gradient_pass``,
            ``gate_step``, ``refit``, ``reconstruct`` (after a refit) or ``finetuning_step``.
    """
    if phase == "gradient_pass":
        return gradient_pass(work), gradient_flops(work)
    if phase == "refit":
        return refit(work), refit_flops(work)
    if phase == "reconstruct":
        return max(refit(work), reconstruct(work)), refit_flops(work) + reconstruct_flops(work)
    if phase == "gate_step":
        return gate_step(work), gate_flops(work)
    if phase == "finetuning_step":
        return finetuning_step(work), finetuning_flops(work)
    shape = work.dense if phase == "dense_perplexity" else work.pruned
    beside = 0 if phase == "dense_perplexity" else weights(work.dense, work)
    flops = forward_flops(shape, work.pass_tokens(work.window), work.window)
    return weights(shape, work) + beside + evaluation(shape, work, work.window), flops


def phases(verb: str, work: Work, on_card: bool = True) -> list[Phase]:
    """Returns what a run of ``prune``, ``apply`` or ``finetune`` does, in order.

    Args:
        on_card: Else the host's memory is the device's, and what is loaded is not copied there.
    """
    found = [_evaluated(DENSE_PERPLEXITY, work, work.dense, 0)]
    if on_card:
        found[0] = replace(found[0], host=weights(work.dense, work))
    if verb == "prune":
        if work.rotation_batch:
            found.append(_rotation(work))
        scored = work.scorings * forward_flops(work.dense, work.choice_blocks * work.block, work.block)
        flops = work.steps * gate_flops(work) + scored
        if work.steps:
            found.append(Phase(GATE_TRAINING, gate_step(work), 0, flops, _SMALLER_STEP))
    found += _cut(work)
    beside = weights(work.dense, work) if work.keep_dense else 0
    found.append(_evaluated(PRUNED_PERPLEXITY, work, work.pruned, beside))
    if verb == "finetune":
        scored = work.scorings * forward_flops(work.pruned, work.choice_blocks * work.block, work.block)
        scored += forward_flops(work.pruned, work.windows * work.window, work.window)  # of what was tuned
        flops = work.steps * finetuning_flops(work) + scored
        helps = f"{_SMALLER_STEP}, --lora_r, --teacher_cache DIR"
        found.append(Phase(FINE_TUNING, finetuning_step(work), 0, flops, helps))
    if not on_card:
        return [replace(phase, device=phase.device + phase.host, host=0) for phase in found]
    return found


_SMALLER_STEP = "--activation_checkpointing True, a smaller --per_device_train_batch_size or --block_size"


def _evaluated(name: str, work: Work, shape: ModelShape, beside: int) -> Phase:
    device = weights(shape, work) + beside + evaluation(shape, work, work.window)
    flops = forward_flops(shape, work.windows * work.window, work.window)
    return Phase(name, device, 0, flops, "a smaller --per_device_eval_batch_size or --ctx_length")


def _rotation(work: Work) -> Phase:
    """What a rotation is learned of; on the host both moments, and what their eigenvectors take, in float64."""
    flops = ROTATION_BLOCKS / work.rotation_batch * gradient_flops(work)
    host, helps = 6 * 8 * work.dense.hidden_size**2, "--rotate off, a smaller --block_size"
    return Phase(ROTATION, gradient_pass(work), host, flops, helps)


def _cut(work: Work) -> Iterator[Phase]:
    """The fits, which hold the weights before and after on the host, or the cut alone, weight by weight."""
    dense, pruned = weights(work.dense, work), weights(work.pruned, work)
    if not work.refits:
        yield Phase(CUT, dense + work.keep_dense * pruned, 0, 0.0, "--dtype bfloat16")
        return
    host = 2 * pruned + work.refit_offload * (dense + _streams(work))
    yield Phase(REFIT, refit(work), host, refit_flops(work), "--refit_offload True, --weight_update fold")
    if work.reconstructs:
        helps = "--refit_offload True, a smaller --per_device_eval_batch_size, --weight_update refit"
        yield Phase(RECONSTRUCT, reconstruct(work), host, reconstruct_flops(work), helps)
