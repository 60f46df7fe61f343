"""Which units stay: gates trained, or units scored in one shot; mask files either way."""

import math
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import Dataset
from transformers import TrainerCallback

from tvaprune import ranks
from tvaprune.checkpoints import own_checkpoints
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.rotation import learn_rotation, loses_rotation, wants_rotation
from tvaprune.choose.scores import PER_TARGET, score_masks
from tvaprune.choose.scores.kept import KeptRounds
from tvaprune.choose.settings import Cadence, GateSettings, describe, gate_settings
from tvaprune.choose.trainer import GateTrainer
from tvaprune.errors import SCORING_UNITS, TRAINING, InputError, running_out_in
from tvaprune.files import cache_folder, discard
from tvaprune.flags.arguments import EVAL_STEPS, Arguments
from tvaprune.flags.recipes import RECIPE_NAME
from tvaprune.given import given_checkpoint
from tvaprune.identity import Identity, check_identity, digest_of, read_identity
from tvaprune.measure.perplexity import perplexity, windows_of_pass
from tvaprune.models.families import family_of
from tvaprune.outputs import (
    GENERATIONS_NAME,
    OF_TUNING,
    PAGE_NAME,
    PLAN_NAME,
    RESULTS_NAME,
    WIDTHS_NAME,
    drop,
)
from tvaprune.plan.exact_cut import calibrate
from tvaprune.plan.keep_plan import describe_widths, plan_from_masks
from tvaprune.plan.masks import Masks, keep_best, load_masks, read_record
from tvaprune.plan.record import rules_as_flags
from tvaprune.plan.rotation import drop_rotations, read_rotation, rotation_name, save_rotation
from tvaprune.run import Run

DEFAULT_TRAIN_SAMPLES = 4500  # blocks; the released runs take 4,000 to 5,000
DEFAULT_CALIBRATION_SAMPLES = 128  # blocks for the one-shot scores
SCORED_WINDOWS = 4  # of a pass, at most: some scores go backward through all weights


# Flags of gate training with a default of their own; the others are told as they were resolved.
_GATE_FLAGS = (
    "reg_learning_rate", "kl_factor", "inter_mul", "emb_mult", "settle_share", "gate_noise", "gate_ce_weight",
)  # fmt: skip


# What a target's folder holds beside its mask and its zero-shot examples.
_TARGET_FILES = (PLAN_NAME, WIDTHS_NAME, RESULTS_NAME, RECIPE_NAME, PAGE_NAME, GENERATIONS_NAME, *OF_TUNING)


@dataclass(frozen=True)
class Chosen:
    """A mask file for every target, and the log of the training that chose; None: units were scored in one shot."""

    masks: dict[float, Path]
    history: list[dict[str, float]] | None = None


def gate_checkpoint(args: Arguments) -> str | None:
    """Returns the checkpoint that gate training goes on from; None begins anew.

    Raises:
        InputError: If there is none, or the masks of an earlier training lie behind a link.
    """
    if (args.output_dir / "best").is_symlink() and args.training.overwrite_output_dir:
        raise InputError(
            f"--output_dir {args.output_dir}: its best is a symbolic link, behind which nothing is replaced; remove "
            "the link, or give another folder"
        )
    return given_checkpoint(args, may_be_none=args.training.overwrite_output_dir or _is_interrupted(args.output_dir))


def _is_interrupted(folder: Path) -> bool:
    """Tells whether a folder holds no more than a gate training leaves that ended before its first checkpoint."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".tvaprune-")}
    return names <= {"best", "runs", *(path.name for path in own_checkpoints(folder))}  # runs: tensorboard's


def in_basis(run: Run, checkpoint: str | None = None) -> Run:
    """Returns the run in the basis that ``--rotate`` asks for; one that is gone on with, in the one it began in."""
    if not wants_rotation(run.args, run.model.config):
        if loses_rotation(run.args, run.model.config):
            print("note: --rotate auto turns nothing beside --shard True: gates train in the checkpoint's own basis")
        return run
    best, found = run.args.output_dir / "best", None
    if checkpoint is not None:
        digest = read_identity("checkpoint", Path(checkpoint))["settings"].get("rotate")
        if (best / rotation_name(str(digest))).is_file():  # else it is found anew: the same, on the same machine
            found = read_rotation(best / "mask_info", digest, run.shape.hidden_size)
    rotation = found or learn_rotation(run)
    if rotation is None:
        return run
    ranks.on_main(save_rotation, rotation, best)
    return run.turned(rotation)


def choose_masks(run: Run, checkpoint: str | None = None, watching: TrainerCallback | None = None) -> Chosen:
    """Chooses units for every ``--target_sparsity``.

    Gates are trained once, to the largest target, and units scored once, and cut at each; what ranks within each layer
    is scored anew for each. The file of the largest target is in ``<output_dir>/best``, the others are in
    ``<output_dir>/sparsity_<target>/best``.

    Args:
        checkpoint: What gate training goes on from; None begins anew.
        watching: Is told of the steps of gate training, and of its checkpoints.
    """
    targets = sorted(run.args.each_target())
    others = [run.at(target) for target in targets[:-1]]
    method, history = run.args.prune.prune_method, None
    if method == "vib":
        largest, history = _train_gates(run, checkpoint, watching)
    else:
        largest = _score_units(run)
    if method in PER_TARGET:
        rest = [_score_units(one) for one in others]
    else:
        rest = [_write_mask(one, load_masks(largest), _cut_of(largest, one)) for one in others]
    return Chosen(dict(zip(targets, [*rest, largest], strict=True)), history)


def _train_gates(
    run: Run, checkpoint: str | None, watching: TrainerCallback | None
) -> tuple[Path, list[dict[str, float]]]:
    """Trains the gates and returns the best mask's file and the log."""
    args, training = run.args, run.args.training
    train_blocks = run.train_blocks(DEFAULT_TRAIN_SAMPLES, tells=True)
    selection_blocks = run.selection_blocks()
    cadence = Cadence.of(args, training.num_train_epochs, len(train_blocks), len(selection_blocks))
    steps_per_epoch = math.ceil(len(train_blocks) * args.data.block_size / cadence.step_tokens)
    num_steps = cadence.num_steps
    beta = family_of(run.model.config).beta
    settings = gate_settings(args.prune, args.distill, num_steps, steps_per_epoch, beta, run.rules)
    print(describe(settings, num_steps))
    if training.eval_strategy == "steps":
        print(cadence.describe(training.eval_steps if training.eval_steps_given else None, EVAL_STEPS))
        if not training.eval_steps_given:
            training.eval_steps = cadence.interval(EVAL_STEPS)
    identity = _gate_identity(run, settings, train_blocks, selection_blocks)
    if checkpoint is not None:
        check_identity("checkpoint", Path(checkpoint), identity)
    keeps_norm_width = settings.norm_width == "dense"
    gated = GatedModel(run.model, settings.initial_log_variance, settings.gate_noise, keeps_norm_width)
    record = run.record() | {"train_blocks": len(train_blocks), "identity": identity}
    trainer = GateTrainer(gated, settings, training, train_blocks, selection_blocks, record, run.phases)
    if watching is not None:
        trainer.add_callback(watching)
    with running_out_in(TRAINING):
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.score_last_mask()
    if checkpoint is None:
        ranks.on_main(_clear_targets, args.output_dir)
    gated.detach_gates()
    assert trainer.best is not None  # a perplexity that is no number ends the training
    return trainer.best, trainer.state.log_history


def _score_units(run: Run) -> Path:
    """Scores the units in one shot and returns the mask's file."""
    blocks = run.train_blocks(DEFAULT_CALIBRATION_SAMPLES)
    target = max(run.args.prune.target_sparsity)
    masks, kept = scored(run, blocks, target)
    flags = {"prune_method": run.args.prune.prune_method, "max_train_samples": len(blocks)}
    identity = run.identity(
        flags | {"target_sparsity": target}, (blocks, run.selection_blocks()), rules_as_flags(run.rules)
    )
    path = _write_mask(run, masks, {"train_blocks": len(blocks), "identity": identity})
    kept.discard()
    return path


def _kept_as(run: Run, blocks: Dataset) -> str:
    """Returns what tells the state of an interrupted scoring from any other's; a larger target goes on from it too."""
    flags = {"prune_method": run.args.prune.prune_method, "windows": _windows(run)}
    return digest_of(run.identity(flags, (blocks,), {}))


def scored_windows(block_size: int, asked: int) -> int:
    """Returns how many blocks a pass of the scores takes; ``asked``: ``--per_device_eval_batch_size``."""
    return min(SCORED_WINDOWS, windows_of_pass(block_size, asked))


def _windows(run: Run) -> int:
    return scored_windows(run.args.data.block_size, run.args.training.per_device_eval_batch_size)


def scored(run: Run, blocks: Dataset, target: float) -> tuple[Masks, KeptRounds]:
    """Scores units for a target, as ``--prune_method`` says; ``--per_device_eval_batch_size`` makes passes smaller.

    Returns:
        The masks, and what an interrupted scoring goes on from: to be discarded once the masks are written.
    """
    method, seed = run.args.prune.prune_method, run.args.training.seed
    kept = KeptRounds(cache_folder() / f"scores-{_kept_as(run, blocks)}.pt")
    with running_out_in(SCORING_UNITS):
        return score_masks(run.model, method, blocks, target, seed, _windows(run), kept), kept


def _write_mask(run: Run, masks: Masks, record: dict[str, object]) -> Path:
    """Cuts masks at a run's target, and writes them by their perplexity; what an earlier run left goes then."""
    target, batch_size = max(run.args.prune.target_sparsity), run.args.training.per_device_eval_batch_size
    masks = calibrate(masks, run.shape, target, run.rules)
    plan = plan_from_masks(masks, run.shape, run.rules)
    gated = GatedModel(run.model)
    with gated.applying(plan):
        value = perplexity(gated, run.selection_blocks(), batch_size)
    gated.detach_gates()
    record = run.record() | record | describe_widths(plan) | {"rules": asdict(run.rules)}
    return ranks.on_main(_replace_masks, run, masks, value, record)


def _replace_masks(run: Run, masks: Masks, value: float, record: dict[str, object]) -> Path:
    """Writes a mask by its perplexity, and its rotation, in the place of what an earlier run left."""
    folder = run.args.output_dir
    if run.rotation is not None:
        save_rotation(run.rotation, folder / "best")
    path = keep_best(folder / "best", masks, value, record)
    for old in own_checkpoints(folder):
        discard(old)
    _clear_targets(folder)
    return path


def _cut_of(largest: Path, run: Run) -> dict[str, object]:
    """Returns the record of a choice for the largest target that is cut at another."""
    identity = read_record(largest)["identity"]
    target = {"target_sparsity": max(run.args.prune.target_sparsity), "learned for": largest.stem}
    return {"identity": identity | {"flags": identity["flags"] | target}}


def _gate_identity(run: Run, settings: GateSettings, train: Dataset, choice: Dataset) -> Identity:
    """Returns what a gate training's masks and checkpoints belong to."""
    prune = run.args.prune
    flags = {name: getattr(prune, name) for name in _GATE_FLAGS} | {
        "prune_method": prune.prune_method,
        "target_sparsity": settings.target_sparsity,
        "max_train_samples": len(train),
        "distill": settings.distill,
        "distill_temp": settings.distill_temp,
    }
    resolved = asdict(settings) | {"rules": settings.rules}
    resolved |= rules_as_flags(resolved.pop("rules"))
    warmup, settle = (f"{resolved.pop(name)} steps" for name in ("num_warmup_steps", "num_settle_steps"))
    resolved = {name: value for name, value in resolved.items() if name not in flags}
    resolved |= {"lagrangian_warmup_epochs": warmup, "settle_share": settle}
    return run.identity(flags, (train, choice), resolved)


def clear_results(folder: Path) -> None:
    """Removes what a run left of one target beside its mask, nothing else."""
    drop(folder, _TARGET_FILES)
    drop_rotations(folder)
    shutil.rmtree(folder / "zero_shot", ignore_errors=True)


def _clear_targets(folder: Path) -> None:
    """Removes what an earlier run of this tool left of other targets, nothing else."""
    for target in folder.glob("sparsity_*"):
        clear_results(target)
        for mask in (target / "best").glob("mask_info_*"):
            mask.unlink()
        drop_rotations(target / "best")
        for emptied in (target / "best", target):
            with suppress(OSError):  # somebody else's files stay
                emptied.rmdir()
