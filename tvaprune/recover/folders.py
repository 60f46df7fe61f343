"""The folders of a fine-tuning: what may be used, and what is gone on from."""

from pathlib import Path

from tvaprune.files import check_apart, check_output, holds_files, prepare_folder
from tvaprune.flags.arguments import Arguments
from tvaprune.given import given_checkpoint, goes_on
from tvaprune.models.published import located
from tvaprune.outputs import PLAN_NAME, RESULTS_NAME
from tvaprune.refusals import check_beside_model, check_results, check_save


def found_checkpoint(args: Arguments) -> Path | None:
    """Returns the checkpoint to go on from, if any; without one, only an interrupted run's folder begins anew.

    Raises:
        InputError: If ``--resume_from_checkpoint`` names none, in a folder of something else.
    """
    nothing = not holds_files(args.output_dir)
    begun = (args.save_loc / PLAN_NAME).is_file() and not (args.save_loc / RESULTS_NAME).exists()
    may_be_none = nothing or begun or args.training.overwrite_output_dir
    found = given_checkpoint(args, may_be_none)
    return None if found is None else Path(found)


def prepare_folders(args: Arguments, checkpoint: Path | None) -> None:
    """Refuses folders that are in use, before any work."""
    overwrite = args.training.overwrite_output_dir
    check_beside_model(args)
    if checkpoint is None:
        check_save(args)
    source = args.source.model_name_or_path
    read = None if source is None else located(source)
    for name in ("adapter", "merged", "pruned"):
        check_apart("output_dir", args.output_dir / name, "--model_name_or_path", read)
        check_output("output_dir", args.output_dir / name, overwrite=True)
    prepare_folder("output_dir", args.output_dir, overwrite or goes_on(args))
    prepare_folder("save_loc", args.save_loc, may_hold_files=True)
    check_results(args, checkpoint is not None)
