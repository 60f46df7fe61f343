"""Keep plan -> narrower model, its weights updated as asked: cut, fold, refit, reconstruct."""

import copy
import time
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from tvaprune import ranks
from tvaprune.choose.scores.flap import compensate_bias
from tvaprune.cut.fold import fold
from tvaprune.cut.reconstruct import Reconstruction, reconstruct_layers
from tvaprune.cut.refit import RefitReport, refit_layers
from tvaprune.cut.slice import Cut, apply_plan, lent
from tvaprune.errors import REFITTING, InputError, running_out_in
from tvaprune.measure.perplexity import windows_per_pass
from tvaprune.models.layers import Layers
from tvaprune.models.placement import place_of, put
from tvaprune.phases import REFIT
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.run import Run

_CPU = torch.device("cpu")


def narrow(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Slices the model by the plan and updates its weights as ``--weight_update`` says.

    Args:
        keep_dense: Whether ``run.model`` is needed again; else it may be cut itself (``none``, ``fold``), or leaves the
            memory (``refit``, ``reconstruct``). With ``--refit_offload`` it stays on the CPU, until `Run.dense_model`.

    Returns:
        The narrower model, and what the refit and the reconstruction did, for the results.
    """
    stored = run.stored_dtype  # before the dense model is used up
    model, update = _cut(run, plan, keep_dense)
    return as_stored(model, stored), update


def as_stored(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Rounds the weights to the precision that they are saved in: what is measured is what is saved.

    Raises:
        InputError: If that precision cannot hold a weight.
    """
    model.config.dtype = dtype
    for name, parameter in model.named_parameters() if dtype != model.dtype else ():
        parameter.data = rounded(name, parameter.data, dtype)
    return model


def rounded(name: str, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a weight rounded to what another precision can hold; with the error of `as_stored`."""
    found = weight.to(dtype)
    if not bool(found.isfinite().all()):
        kind = str(dtype).removeprefix("torch.")
        raise InputError(f"{name} has weights that {kind}, the checkpoint's own, cannot hold; give --dtype float32")
    return found.to(weight.dtype)


def _cut(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    if run.args.prune.refits:
        return _refitted(run, plan, keep_dense)
    folds = run.args.prune.weight_update == "fold"
    model = lent(run.model) if keep_dense else run.model
    if folds and run.args.prune.prune_method == "flap" and (run.shape.output_bias or run.shape.mlp_bias):
        model = copy.deepcopy(run.model) if keep_dense else model  # whose biases change
        blocks = run.refit_blocks()
        compensate_bias(model, plan, blocks, windows_per_pass(blocks, run.args.training.per_device_eval_batch_size))
    place = place_of(model)
    model = apply_plan(model, plan)
    put(model, place)
    return (fold(model, plan) if folds else model), {}


def _refitted(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns a narrower copy of the model, its kept weights refitted, perhaps reconstructed, and what that did."""
    training, place = run.args.training, place_of(run.model)
    calibration, held_out = refit_texts(run)
    begin = time.perf_counter()  # texts were read before
    texts = plan, calibration, held_out, windows_per_pass(calibration, training.per_device_eval_batch_size)
    with running_out_in(REFITTING):
        if isinstance(place, dict):  # half a layer of each at a time goes to one device
            put(run.model, _CPU)
            model = fold(apply_plan(lent(run.model), plan), plan)
            done, more = _fitted(run, model, training.device, keep_dense, texts)
            put(model, place)
            if keep_dense:
                put(run.model, place)
        else:
            put(run.model, _CPU if run.args.prune.refit_offload else training.device)
            model = fold(apply_plan(lent(run.model), plan, training.device), plan)
            done, more = _fitted(run, model, model.device, keep_dense, texts)
    if not keep_dense:
        put(run.model, torch.device("meta"))  # its sizes stay
    return model, told(done, more, calibration, held_out, begin)


def _fitted(
    run: Run,
    model: PreTrainedModel,
    device: torch.device,
    keep_dense: bool,
    texts: tuple[KeepPlan, Dataset, Dataset, int],
) -> tuple[RefitReport, Reconstruction | None]:
    """Refits a cut and folded model on a device, and reconstructs it where asked for."""
    run.model.eval(), model.eval()
    run.phases.start(REFIT)  # what was read and cut before is no operation
    dense = Layers(run.model, device, is_used_up=not keep_dense)
    plan, *_ = texts
    folded = Cut(dense, model, plan)  # once more, where a share of the way from there is asked for
    done = refit_layers(dense, Layers(model, device, before=folded), *texts, phases=run.phases)
    if not run.args.prune.reconstructs:
        return done, None
    seed = run.args.training.seed
    return done, reconstruct_layers(dense, Layers(model, device), *texts, seed=seed, phases=run.phases)


def refit_texts(run: Run) -> tuple[Dataset, Dataset]:
    """Returns the blocks that a refit fits and those that choose among fits.

    Raises:
        InputError: If there is no such text, or too little for every process to have some.
    """
    try:
        calibration, held_out = run.refit_blocks(), run.held_out_blocks()
    except InputError as error:
        raise InputError(f"{error}; --weight_update fold needs no text") from error
    if ranks.count() > max(1, min(len(calibration), len(held_out))):
        raise InputError(
            f"--weight_update {run.args.prune.weight_update}: {ranks.count()} processes share {len(calibration)} "
            f"calibration and {len(held_out)} held-out blocks: start fewer, or give more text"
        )
    return calibration, held_out


def told(
    done: RefitReport, more: Reconstruction | None, calibration: Dataset, held_out: Dataset, begin: float
) -> dict[str, Any]:
    """Returns what a refit did, and a reconstruction after it, for the results.

    Args:
        begin: When it began, by `time.perf_counter`.
    """
    blocks = {"calibration_blocks": len(calibration), "held_out_blocks": len(held_out)}
    found = {"refit": asdict(done) | blocks | {"seconds": time.perf_counter() - begin}}
    return found if more is None else found | {"reconstruct": asdict(more)}
