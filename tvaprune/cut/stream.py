"""Keep plan -> narrower model, out of core: weights are cut and folded as they come from the dense model's files.

The same edits, the same walk and the same rounding as in memory, so the same model, bit for bit on a CPU; a
reconstruction whose passes are longer than a chunk of the loss differs by rounding. At its peak the refit holds half a
layer of both models, the moments of one linear, and a batch of hidden states.
"""

import shutil
import time
from typing import Any

from datasets import Dataset

from tvaprune.cut.narrow import refit_texts, rounded, told
from tvaprune.cut.reconstruct import reconstruct_layers
from tvaprune.cut.refit import refit_layers
from tvaprune.cut.room import disk_needed, memory_needed
from tvaprune.cut.slice import Cut, narrow_shell
from tvaprune.errors import InputError
from tvaprune.flags.settings import PruneSettings
from tvaprune.measure.perplexity import windows_per_pass
from tvaprune.models.layers import Streamed
from tvaprune.phases import REFIT
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.run import Run


def narrow_streamed(run: Run, dense: Streamed, plan: KeepPlan) -> tuple[Streamed, dict[str, Any]]:
    """Returns the narrower model as `narrow` does, its weights fetched as they are asked for.

    Raises:
        InputError: If the weight update needs the model in memory, or a text is missing.
    """
    prune, device = run.args.prune, dense.device
    if prune.weight_update == "fold" and prune.prune_method == "flap" and (run.shape.output_bias or run.shape.mlp_bias):
        raise InputError(
            "--stream True: the bias terms of --prune_method flap need the model in memory; give --weight_update "
            "refit or none, or leave --stream out"
        )
    model = narrow_shell(dense.model, plan, device)
    cut = Cut(dense, model, plan, folds=prune.weight_update != "none")
    pruned, update = Streamed(model, cut, device, dense.scratch), {}
    if prune.refits:
        calibration, held_out = refit_texts(run)
        begin = time.perf_counter()  # texts were read before
        batch_size = windows_per_pass(calibration, run.args.training.per_device_eval_batch_size)
        _check_room(plan, dense, batch_size, calibration, held_out, prune)
        texts = plan, calibration, held_out, batch_size
        run.phases.start(REFIT)
        done, more = refit_layers(dense, pruned, *texts, phases=run.phases), None
        if prune.reconstructs:
            folder = dense.scratch / "reconstructed"
            folder.mkdir()
            pruned = Streamed(model, pruned.weight, device, folder)  # from where the refit ends
            more = reconstruct_layers(dense, pruned, *texts, seed=run.args.training.seed, phases=run.phases)
        update = told(done, more, calibration, held_out, begin)
    stored = model.config.dtype = run.stored_dtype
    as_stored = Streamed(model, lambda name: rounded(name, pruned.weight(name), stored), device, dense.scratch)
    return as_stored, update


def _check_room(
    plan: KeepPlan, dense: Streamed, batch_size: int, calibration: Dataset, held_out: Dataset, prune: PruneSettings
) -> None:
    """Says what the weight update needs, and refuses to begin where the disk cannot hold it."""
    size, window, update = dense.model.dtype.itemsize, len(calibration[0]["input_ids"]), prune.weight_update
    memory = memory_needed(plan, size, batch_size * window, prune.reconstructs) / 2**30
    disk = disk_needed(plan, size, len(calibration) * window, len(held_out) * window, prune.reconstructs)
    free = shutil.disk_usage(dense.scratch).free
    if disk > free:
        raise InputError(
            f"--stream True: hidden states and weights of the {update} need {disk / 2**30:.1f} GiB beside "
            f"{dense.scratch.parent}, which has {free / 2**30:.1f}; put --save_pruned on a larger disk, or give fewer "
            "--refit_samples"
        )
    print(f"out of core: the {update} needs some {memory:.1f} GiB of memory and {disk / 2**30:.1f} GiB of disk")
