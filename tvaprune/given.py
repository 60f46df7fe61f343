"""What the flags name, read before the model: masks or a plan, their rotation, a checkpoint to go on from, tasks."""

import copy
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PretrainedConfig
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tvaprune import ranks
from tvaprune.checkpoints import check_ours, check_whole, last_checkpoint
from tvaprune.errors import InputError, quoted, reason
from tvaprune.files import read_json
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.ranges import AUTO
from tvaprune.identity import IDENTITY_NAME
from tvaprune.measure.zeroshot import RELEASED_TASKS, ZeroShot
from tvaprune.models.load import load_config
from tvaprune.models.rotate import Rotation
from tvaprune.models.shape import ModelShape, shape_of
from tvaprune.outputs import PLAN_NAME
from tvaprune.plan.keep_plan import KeepPlan, plan_from_masks
from tvaprune.plan.masks import Masks, load_masks, read_record
from tvaprune.plan.multiples import fastest_multiple
from tvaprune.plan.record import FLAGS, as_recorded, recorded_flags, width_rules
from tvaprune.plan.rotation import read_rotation


def given_units(args: Arguments) -> Masks | KeepPlan | None:
    """Reads ``--mask_loc`` and its record, or ``--plan``, and compares it with the model's config before the weights.

    Raises:
        InputError: If the file cannot be used, or is of another model.
    """
    path, plan = args.prune.mask_loc, args.prune.plan
    if path is None and plan is None:
        return None
    shape = shape_of(load_config(args.source.model_name_or_path))
    units: Masks | KeepPlan
    if plan is not None:
        units = KeepPlan.load(Path(plan))
        units.check_fits(shape, f"--plan {plan}")
    else:
        assert path is not None
        units = load_masks(path, shape)
        recorded_flags(path)  # a damaged one ends the command here
        units.check_fits(shape, f"--mask_loc {path}")
    given_rotation(args, shape.hidden_size)  # of another model's the mask or plan says more
    return units


def given_rotation(args: Arguments, hidden_size: int) -> Rotation | None:
    """Reads the rotation that ``--mask_loc`` or ``--plan`` was made under; None: under none, or neither is given.

    Raises:
        InputError: If it is not beside the file that names it, or not of this model.
    """
    if args.prune.mask_loc is not None:
        return read_rotation(Path(args.prune.mask_loc), read_record(args.prune.mask_loc).get("rotation"), hidden_size)
    if args.prune.plan is not None:
        return read_rotation(Path(args.prune.plan), KeepPlan.load(Path(args.prune.plan)).rotation, hidden_size)
    return None


def turned_shape(args: Arguments, config: PretrainedConfig) -> ModelShape:
    """Returns the unpruned model's sizes in the basis that is asked for."""
    shape = shape_of(config)
    if args.prune.rotate == "on":  # a turned head is no longer the embedding
        return replace(shape, tie_word_embeddings=False)
    return shape


def plan_of(args: Arguments, units: Masks | KeepPlan) -> KeepPlan:
    """Returns what `given_units` keep of the model, before it is loaded: masks cut by the rules that the run takes."""
    if isinstance(units, KeepPlan):
        return units
    recorded = {} if args.prune.mask_loc is None else recorded_flags(args.prune.mask_loc)
    given = {name: getattr(args.prune, name) for name in FLAGS}
    if given["dim_multiple"] == AUTO:  # nothing is measured yet
        given["dim_multiple"] = None
    flags, _ = as_recorded(given, recorded)
    shape = shape_of(load_config(args.source.model_name_or_path))
    rotation = given_rotation(args, shape.hidden_size)
    shape = shape if rotation is None else rotation.turned(shape)
    return plan_from_masks(units, shape, width_rules(flags, shape))


def with_recorded_flags(args: Arguments) -> Arguments:
    """Returns the flags, those not given as the mask's record or the plan says; tells which differ from that."""
    if args.prune.mask_loc is not None:
        recorded = recorded_flags(args.prune.mask_loc)
    elif args.prune.plan is not None:
        method = KeepPlan.load(Path(args.prune.plan)).prune_method
        recorded = {} if method is None else {"prune_method": method}
    else:
        return args
    given = {name: getattr(args.prune, name) for name in FLAGS}
    if "prune_method" in recorded and "prune_method" not in args.recipe:  # its default is no None
        given["prune_method"] = None
    flags, note = as_recorded(given, recorded)
    if note is not None:
        print(note)
    args = copy.copy(args)
    args.prune = copy.copy(args.prune)
    for name, value in flags.items():
        setattr(args.prune, name, value)
    return args


def settle_multiple(args: Arguments) -> None:
    """Replaces ``--dim_multiple auto`` by the number measured, in place, in the recipe too; tells which.

    A run that goes on takes the number that it began with.
    """
    if args.prune.dim_multiple != AUTO:
        return
    args.prune.dim_multiple = args.recipe["dim_multiple"] = ranks.on_main(_fastest, args)


def _fastest(args: Arguments) -> int:
    number = _begun_with(args) if goes_on(args) else None
    if number is None:
        config, device = load_config(args.source.model_name_or_path), args.training.device
        stored = config.dtype or torch.float32
        dtype = getattr(torch, args.source.dtype, stored if device.type == "cuda" else torch.float32)
        number, line = fastest_multiple(shape_of(config), max(args.prune.target_sparsity), device, dtype)
        print(line)
    return number


def _begun_with(args: Arguments) -> int | None:
    """Returns the multiple that a run began with: of its last checkpoint, or of its plan; None: it is not told."""
    asked = args.training.resume_from_checkpoint or ""
    checkpoint = last_checkpoint(args.output_dir) if asked.lower() == "true" else Path(asked)
    files = [] if checkpoint is None else [checkpoint / IDENTITY_NAME]
    for path in (*files, args.save_loc / PLAN_NAME):
        with suppress(OSError, ValueError):
            content = read_json(path)
            number = content.get("dim_multiple", content.get("settings", {}).get("dim_multiple"))
            if isinstance(number, int):
                return number
    return None


def goes_on(args: Arguments) -> bool:
    """Tells whether the flags ask to go on with an earlier run."""
    return (args.training.resume_from_checkpoint or "false").lower() != "false"


def given_checkpoint(args: Arguments, may_be_none: bool = False) -> str | None:
    """Returns the checkpoint to go on from; ``--resume_from_checkpoint True`` is the last whole one there is.

    Args:
        may_be_none: Whether a run that has no checkpoint yet begins anew, in place of an error.

    Raises:
        InputError: If there is none, it is not whole, or the output folder holds somebody else's.
    """
    check_ours(args.output_dir)
    asked = args.training.resume_from_checkpoint
    if asked is None or not goes_on(args):
        return None
    found: Path | str | None = asked
    if asked.lower() == "true":
        found = last_checkpoint(args.output_dir)
        if found is None and may_be_none:
            print(f"note: there is no checkpoint in {args.output_dir} yet: the run begins anew")
            return None
    if found is None or not Path(found).is_dir():
        raise InputError(
            f"--resume_from_checkpoint {asked}: no checkpoint there; give a checkpoint-* folder, or begin anew: leave "
            "the flag out, and give --overwrite_output_dir where an earlier run left files"
        )
    check_whole(Path(found))
    _check_best(Path(found), args.output_dir)
    return str(found)


def _check_best(checkpoint: Path, output_dir: Path) -> None:
    """Refuses a checkpoint whose best is another run's: weights would come from wherever that says.

    In a run that was moved the best is the one of that name beside the checkpoint, as `CheckpointedTrainer` finds it.
    """
    path = checkpoint / TRAINER_STATE_NAME
    if not path.is_file():
        return
    try:
        state = read_json(path)
        best = state.get("best_model_checkpoint")
        folders = output_dir.resolve(), checkpoint.resolve().parent
        if best is None or any(Path(best).resolve().is_relative_to(folder) for folder in folders):
            return
        beside = checkpoint.parent / Path(best).name
    except Exception as error:  # a broken file raises nearly anything
        raise InputError(f"{path}: cannot be read ({reason(error)}); go on from another checkpoint") from error
    if not (beside.name.startswith(PREFIX_CHECKPOINT_DIR) and beside.is_dir()):
        raise InputError(
            f"{path}: its best_model_checkpoint is {quoted(best)}, outside --output_dir {output_dir}: go on in the "
            "folder that the run began in, or begin anew"
        )


def zero_shot_tasks(args: Arguments) -> ZeroShot | None:
    """Finds the tasks that the flags name, before any work: a wrong name fails at once."""
    evaluation = args.evaluation
    if not evaluation.do_zero_eval:
        return None
    names = evaluation.zero_eval_tasks or RELEASED_TASKS
    return ZeroShot(names, args.data.data_dir, evaluation.num_fewshot, evaluation.zero_eval_limit)
