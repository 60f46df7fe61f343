"""Keep plan -> narrower model, its weights updated as asked: cut, fold, refit."""

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
from tvaprune.cut.refit import RefitReport, refit, refit_layers
from tvaprune.cut.slice import apply_plan
from tvaprune.errors import InputError
from tvaprune.models.layers import Layers
from tvaprune.models.placement import place_of, put
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.run import Run


def narrow(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Slices the model by the plan and updates its weights as ``--weight_update`` says.

    Args:
        keep_dense: Whether ``run.model`` is needed again on its device; else it may be cut itself (``none``, ``fold``)
            or stay on the CPU (``refit`` with ``--refit_offload``).

    Returns:
        The narrower model, and what the refit did, for the results.
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
    if run.args.prune.weight_update == "refit":
        return _refitted(run, plan, keep_dense)
    model, folds = copy.deepcopy(run.model) if keep_dense else run.model, run.args.prune.weight_update == "fold"
    if folds and run.args.prune.prune_method == "flap" and (run.shape.output_bias or run.shape.mlp_bias):
        compensate_bias(model, plan, run.refit_blocks())
    place = place_of(model)
    model = apply_plan(model, plan)
    put(model, place)
    return (fold(model, plan) if folds else model), {}


def _refitted(run: Run, plan: KeepPlan, keep_dense: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Returns a narrower copy of the model, its kept weights refitted, and what the refit did."""
    begin, place, batch_size = time.perf_counter(), place_of(run.model), run.args.training.per_device_eval_batch_size
    calibration, held_out = refit_texts(run)
    put(run.model, torch.device("cpu"))  # the copy is cut there: a GPU never holds the unpruned model twice
    try:
        model = fold(apply_plan(copy.deepcopy(run.model), plan), plan)
        if isinstance(place, dict):  # half a layer of each at a time goes to one device
            both = Layers(run.model, run.args.training.device), Layers(model, run.args.training.device)
            done = refit_layers(*both, plan, calibration, held_out, batch_size)
            put(model, place)
        else:
            put(model, place)
            if not run.args.prune.refit_offload:
                put(run.model, place)
            done = refit(run.model, model, plan, calibration, held_out, batch_size)
    finally:
        if keep_dense:
            put(run.model, place)
    return model, told(done, calibration, held_out, begin)


def refit_texts(run: Run) -> tuple[Dataset, Dataset]:
    """Returns the blocks that a refit fits and those that choose among fits.

    Raises:
        InputError: If there is no such text, or too little for every process to have some.
    """
    try:
        calibration, held_out = run.refit_blocks(), run.choice_blocks()
    except InputError as error:
        raise InputError(f"{error}; --weight_update fold needs no text") from error
    if ranks.count() > max(1, min(len(calibration), len(held_out))):
        raise InputError(
            f"--weight_update refit: {ranks.count()} processes share {len(calibration)} calibration and "
            f"{len(held_out)} held-out blocks: start fewer, or give more text"
        )
    return calibration, held_out


def told(done: RefitReport, calibration: Dataset, held_out: Dataset, begin: float) -> dict[str, Any]:
    """Returns what a refit did, for the results.

    Args:
        begin: When it began, by `time.perf_counter`.
    """
    blocks = {"calibration_blocks": len(calibration), "held_out_blocks": len(held_out)}
    return {"refit": asdict(done) | blocks | {"seconds": time.perf_counter() - begin}}
