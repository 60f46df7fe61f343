"""The basis that gates are trained in: one rotation of the residual stream, found before anything is chosen.

A hidden dim that goes, goes in every layer. In the basis of the checkpoint each dim carries something; turned to the
directions that matter, sorted by how much, the last of them carry nearly nothing.
"""

from dataclasses import replace

import torch
from tqdm.auto import tqdm
from transformers import PretrainedConfig

from tvaprune import ranks
from tvaprune.budget import rotation_batch
from tvaprune.choose.tie import BLOCKS, kept_tie
from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.measure.cost import ROTATION_BLOCKS
from tvaprune.models.families import family_of
from tvaprune.models.rotate import Rotation, norms_of, why_not
from tvaprune.models.shape import shape_of
from tvaprune.run import Run
from tvaprune.text.blocks import spread


def wants_rotation(args: Arguments, config: PretrainedConfig) -> bool:
    """Tells what ``--rotate`` means for this model: auto turns for gates, where the family's norms allow it.

    Raises:
        InputError: If it is asked for, and the family's norms do not allow it.
    """
    asked, shape = args.prune.rotate, shape_of(config)
    reason = why_not(family_of(config), shape)
    if asked == "on" and reason is not None:
        raise InputError(f"--rotate on: {reason} in this model; leave it out")
    if args.source.shard:  # a layer in shares cannot be turned
        if asked == "on":
            raise InputError("--rotate on: cannot turn a model beside --shard True; leave one out")
        return False
    if asked == "auto":
        return args.prune.prune_method == "vib" and reason is None
    return asked == "on"


def loses_rotation(args: Arguments, config: PretrainedConfig) -> bool:
    """Tells whether ``--shard`` alone keeps ``--rotate auto`` from turning this model."""
    if not args.source.shard or args.prune.rotate != "auto":
        return False
    return wants_rotation(replace(args, source=replace(args.source, shard=False)), config)


def learn_rotation(run: Run) -> Rotation | None:
    """Returns the eigenvectors of ``C^(1/2) G C^(1/2)``, largest first, float32; `moments_of` says what C and G are.

    A direction counts by what it carries and by what the readers make of it. ``--rotate auto`` keeps the tie of a tied
    model: the axes of `tvaprune.choose.tie` come first, and the others are turned among themselves; None: that costs
    too much.

    Raises:
        InputError: If a moment is no number.
    """
    return ranks.on_main(_rotation, run, *moments_of(run))


@torch.enable_grad()
def moments_of(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``C`` and ``G``, shapes ``(hidden_size, hidden_size)``, float64.

    ``C`` is the second moment of what the norms hand on, gains left out, over all norms; ``G`` that of the gradients of
    the predictions' log-likelihood there, of tokens drawn from the predictions (so it is Fisher's).
    """
    rows = rows_of(run, ROTATION_BLOCKS)
    # One number for each token to be drawn, whatever the batch is and wherever it is computed.
    draws = torch.rand(rows.shape, generator=torch.Generator().manual_seed(run.args.training.seed))
    moments = _Moments(run)
    try:
        batch = rotation_batch(run.args)
        for start in tqdm(ranks.share(range(0, len(rows), batch)), desc="rotation", leave=False, unit="batch"):
            moments.add(*(values[start : start + batch].to(run.model.device) for values in (rows, draws)))
    finally:
        moments.stop()
    ranks.add_up(moments.carried, moments.needed)
    return moments.carried.cpu(), moments.needed.cpu()


def _rotation(run: Run, carried: torch.Tensor, needed: torch.Tensor) -> Rotation | None:
    if not all(bool(moment.isfinite().all()) for moment in (carried, needed)):  # of which eigh finds no vectors
        raise InputError("--rotate: the streams' moments are no numbers; use --dtype float32, or --rotate off")
    if run.args.prune.rotate == "on" or not run.shape.tie_word_embeddings:
        return Rotation(_directions(carried, needed).float())
    kept = kept_tie(run.model, carried.diagonal(), rows_of(run, BLOCKS))
    if kept is None:
        return None
    stretch, axes = kept
    matrix, rest = torch.zeros_like(carried), (~axes).nonzero().squeeze(1)
    count = int(axes.sum())
    matrix[axes.nonzero().squeeze(1), torch.arange(count)] = 1.0
    inner = (carried * stretch * stretch.unsqueeze(1), needed / stretch / stretch.unsqueeze(1))
    matrix[rest, count:] = _directions(*(moment[rest][:, rest] for moment in inner))
    return Rotation(matrix.float(), stretch.float())


def rows_of(run: Run, count: int) -> torch.Tensor:
    """Returns tokens from all over the text that units are chosen by, shape ``(blocks, length)``."""
    rows: torch.Tensor = spread(run.train_blocks(ROTATION_BLOCKS), count)[:]["input_ids"]
    return rows


def _directions(carried: torch.Tensor, needed: torch.Tensor) -> torch.Tensor:
    root = _root(carried)
    vectors: torch.Tensor = torch.linalg.eigh(root @ needed @ root).eigenvectors
    return vectors.flip(1)


class _Moments:
    """Second moments of the normalised streams and of the gradients there, summed over norms and tokens, float64."""

    def __init__(self, run: Run) -> None:
        self.model, family, size = run.model, family_of(run.model.config), run.shape.hidden_size
        self.offset = family.norm_offset
        self.carried, self.needed = (
            torch.zeros(size, size, dtype=torch.float64, device=self.model.device) for _ in range(2)
        )
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        modules = [self.model.get_submodule(name) for name in norms_of(family, run.shape)]
        self.handles = [self.model.get_input_embeddings().register_forward_hook(_with_gradient)]
        self.handles += [module.register_forward_hook(self._note) for module in modules]

    def add(self, ids: torch.Tensor, draws: torch.Tensor) -> None:
        """Adds a batch of tokens; ``draws``, from 0 to 1, choose among the predictions: shapes ``(batch, length)``."""
        self.outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        log_likelihood = self.model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        cumulated = log_likelihood.detach().exp().cumsum(-1)
        drawn = torch.searchsorted(cumulated, draws.unsqueeze(-1) * cumulated[..., -1:])  # rounding ends it under 1
        gradients = torch.autograd.grad(log_likelihood.gather(-1, drawn).sum(), [output for output, _ in self.outputs])
        for (output, gain), gradient in zip(self.outputs, gradients, strict=True):
            safe = torch.where(gain == 0, 1.0, gain)
            stream, need = (output.detach() / safe).flatten(0, 1).double(), (gradient * gain).flatten(0, 1).double()
            self.carried += stream.T @ stream
            self.needed += need.T @ need
        self.outputs = []

    def stop(self) -> None:
        """Leaves the model as it was."""
        for handle in self.handles:
            handle.remove()
        for parameter in self.trained:
            parameter.requires_grad_(True)

    def _note(self, norm: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        weight = norm.weight
        assert isinstance(weight, torch.Tensor)
        self.outputs.append((output, weight.detach() + self.offset))


def _with_gradient(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_(True)


def _root(moment: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric square root of a moment."""
    values, vectors = torch.linalg.eigh(moment)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T
