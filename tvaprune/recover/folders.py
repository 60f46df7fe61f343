"""The folders of a fine-tuning: what may be used, what an earlier one left."""

import shutil
from pathlib import Path

from tvaprune.errors import InputError
from tvaprune.files import check_output, prepare_folder
from tvaprune.flags.arguments import Arguments
from tvaprune.recover.trainer import last_checkpoint
from tvaprune.run import given_checkpoint


def found_checkpoint(args: Arguments) -> Path | None:
    """Returns the checkpoint to go on from, if any; without one, only an interrupted run's folder begins anew.

    Raises:
        InputError: If ``--resume_from_checkpoint`` names none, in a folder of something else.
    """
    nothing = not args.output_dir.is_dir() or not any(args.output_dir.iterdir())
    begun = (args.save_loc / "plan.json").is_file() and not (args.save_loc / "results.json").exists()
    may_be_none = nothing or begun or args.training.overwrite_output_dir
    found = given_checkpoint(args, last_checkpoint, may_be_none)
    return None if found is None else Path(found)


def prepare_folders(args: Arguments, checkpoint: Path | None) -> None:
    """Refuses folders that are in use, before any work."""
    overwrite = args.training.overwrite_output_dir
    resumes = (args.training.resume_from_checkpoint or "false").lower() != "false"
    if args.prune.save_pruned is not None and checkpoint is None:
        check_output("save_pruned", args.prune.save_pruned, overwrite)
    prepare_folder("output_dir", args.output_dir, overwrite or resumes)
    prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    if (args.save_loc / "results.json").exists() and not (overwrite or checkpoint):
        raise InputError(f"--save_loc {args.save_loc}: holds results.json; --overwrite_output_dir replaces it")


def clear(args: Arguments, whole: bool) -> None:
    """Removes what an earlier fine-tuning left, nothing else; not ``whole``: what this one goes on from stays."""
    folder = args.output_dir
    stale = [folder / "adapter", folder / "merged"]
    for old in [*stale, folder / "pruned", *folder.glob("checkpoint-*")] if whole else stale:
        shutil.rmtree(old, ignore_errors=True)
    (args.save_loc / "results.json").unlink(missing_ok=True)
