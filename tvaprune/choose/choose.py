"""Which units stay: gates trained, or units scored in one shot; mask files either way."""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.scores import score_masks
from tvaprune.choose.settings import describe, gate_settings
from tvaprune.choose.trainer import GateTrainer
from tvaprune.errors import InputError
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.families import family_of
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import describe_widths, plan_from_masks
from tvaprune.plan.masks import Masks, best_mask, keep_best, load_masks
from tvaprune.run import Run

DEFAULT_TRAIN_SAMPLES = 4500  # blocks; the released runs take 4,000 to 5,000
DEFAULT_CALIBRATION_SAMPLES = 128  # blocks for the one-shot scores


@dataclass(frozen=True)
class Chosen:
    """A mask file for every target, and the log of the training that chose; None: units were scored in one shot."""

    masks: dict[float, Path]
    history: list[dict[str, float]] | None = None


def choose_masks(run: Run, checkpoint: str | None = None) -> Chosen:
    """Chooses units for every ``--target_sparsity``.

    Gates are trained once, to the largest target, and cut at each; units are scored anew for each. The file of the
    largest target is in ``<output_dir>/best``, the others are in ``<output_dir>/sparsity_<target>/best``.
    """
    targets = sorted(run.args.each_target())
    others = [run.at(target) for target in targets[:-1]]
    history = None
    if run.args.prune.prune_method == "vib":
        largest, history = _train_gates(run, checkpoint)
        rest = [_write_mask(one, load_masks(largest), {}) for one in others]
    else:
        largest, rest = _score_units(run), [_score_units(one) for one in others]
    return Chosen(dict(zip(targets, [*rest, largest], strict=True)), history)


def _train_gates(run: Run, checkpoint: str | None) -> tuple[Path, list[dict[str, float]]]:
    """Trains the gates and returns the best mask's file and the log."""
    args, training = run.args, run.args.training
    train_blocks = run.train_blocks(DEFAULT_TRAIN_SAMPLES)
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    steps_per_epoch = math.ceil(len(train_blocks) / batch)
    num_steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * steps_per_epoch)
    num_tokens = num_steps * batch * args.data.block_size
    beta = family_of(run.model.config).beta
    settings = gate_settings(args.prune, args.distill, num_steps, steps_per_epoch, num_tokens, beta, run.rules)
    print(describe(settings, num_steps, num_tokens))
    choice_blocks = run.choice_blocks()
    if checkpoint is None:
        _clear(args.output_dir)
    else:
        _check_same_run(run)
    gated = GatedModel(run.model, settings.initial_log_variance, settings.gate_noise)
    record = run.record() | {"train_blocks": len(train_blocks)}
    trainer = GateTrainer(gated, settings, training, train_blocks, choice_blocks, record)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.score_mask()
    gated.detach_gates()
    best = best_mask(trainer.best_folder)
    if best is None:
        raise InputError("no mask has a finite perplexity; lower --vib_learning_rate or use --dtype float32")
    return best, trainer.state.log_history


def _score_units(run: Run) -> Path:
    """Scores the units in one shot and returns the mask's file."""
    blocks = run.train_blocks(DEFAULT_CALIBRATION_SAMPLES)
    target, seed = max(run.args.prune.target_sparsity), run.args.training.seed
    masks = score_masks(run.model, run.args.prune.prune_method, blocks, target, seed)
    return _write_mask(run, masks, {"train_blocks": len(blocks)})


def _write_mask(run: Run, masks: Masks, record: dict[str, Any]) -> Path:
    """Cuts masks at a run's target, and writes them by their perplexity."""
    target, batch_size = max(run.args.prune.target_sparsity), run.args.training.per_device_eval_batch_size
    masks = calibrate(masks, run.shape, target, run.rules)
    plan = plan_from_masks(masks, run.shape, run.rules)
    gated = GatedModel(run.model)
    with gated.applying(plan):
        value = perplexity(gated, run.choice_blocks(), batch_size)
    gated.detach_gates()
    _clear(run.args.output_dir)
    record = run.record() | record | describe_widths(plan) | {"rules": asdict(run.rules)}
    return keep_best(run.args.output_dir / "best", masks, value, record)


def _check_same_run(run: Run) -> None:
    """Refuses to go on in a folder whose best mask is of another run: it would be taken for this one's."""
    best = best_mask(run.args.output_dir / "best")
    if best is None or not best.with_suffix(".json").is_file():
        return
    found, record = json.loads(best.with_suffix(".json").read_text(encoding="utf-8")), run.record()
    for name in ("target_sparsity", "seed"):
        if found.get(name) != record[name]:
            raise InputError(
                f"--resume_from_checkpoint: the run in {run.args.output_dir} has {name} {found.get(name)}, not "
                f"{record[name]}; give the flags that it began with"
            )


def _clear(folder: Path) -> None:
    """Removes what an earlier run of this tool left: masks, checkpoints and other targets' folders, nothing else."""
    for old in [folder / "best", *folder.glob("checkpoint-*"), *folder.glob("sparsity_*")]:
        shutil.rmtree(old, ignore_errors=True)
