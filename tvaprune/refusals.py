"""What is refused before any work: flags, folders and trainings of which a run could only fail later."""

from pathlib import Path

from torch import nn
from transformers import Trainer

from tvaprune.errors import InputError, reason
from tvaprune.files import check_apart, check_output
from tvaprune.flags.arguments import Arguments
from tvaprune.models.load import load_config
from tvaprune.models.published import located
from tvaprune.models.shape import shape_of
from tvaprune.outputs import BESIDE_RESULTS, RESULTS_NAME, check_replaced
from tvaprune.plan.widths import WidthRules, Widths
from tvaprune.text.protocols import (
    OWN,
    PROTOCOLS,
    SPLIT,
)


def check_protocol(args: Arguments) -> None:
    """Refuses what a protocol of the field settles itself, and windows that the model does not know."""
    name, data = args.data.protocol, args.data
    if name == OWN:
        return
    settled = {"ctx_length": data.ctx_length, "max_eval_samples": data.max_eval_samples}
    if args.recipe.get("eval_split", SPLIT) != SPLIT:
        settled["eval_split"] = args.recipe["eval_split"]
    for flag, value in settled.items():
        if value is not None:
            raise InputError(f"--{flag} {value}: --protocol {name} settles text and windows; leave one out")
    longest, window = load_config(args.source.model_name_or_path).max_position_embeddings, PROTOCOLS[name].window
    if window > longest:
        raise InputError(
            f"--protocol {name}: has windows of {window} tokens, the model is made for {longest} at most; choose one "
            "of shorter windows, or own"
        )


def check_widths(args: Arguments) -> None:
    """Refuses a ``--dim_multiple`` that no width reaches, a ``--tensor_parallel`` that divides not even the model's."""
    multiple = args.prune.dim_multiple
    rules = WidthRules(multiple if isinstance(multiple, int) else 1, tensor_parallel=args.prune.tensor_parallel or 1)
    Widths(shape_of(load_config(args.source.model_name_or_path)), rules)


def check_training(args: Arguments) -> None:
    """Builds a trainer of nothing, its optimizer and schedule: what cannot be built is told before anything is touched.

    Raises:
        InputError: If a package is missing (``--report_to``, ``--optim``), or flags do not go together.
    """
    try:
        Trainer(nn.Linear(1, 1), args.training, eval_dataset=[]).create_optimizer_and_scheduler(1)
    except (ImportError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise InputError(f"the training cannot begin: {reason(error)}") from error


def check_beside_model(args: Arguments) -> None:
    """Refuses folders of which a run would write into the model's own."""
    model = args.source.model_name_or_path
    for one in (args, *args.each_target().values()):
        for flag, folder in (("output_dir", one.output_dir), ("save_loc", one.save_loc)):
            for place in (folder, folder / "best"):  # that of the masks
                check_not_model(flag, place, "model_name_or_path", model)


def check_not_model(flag: str, folder: Path, model_flag: str, model: str | None) -> None:
    """Raises `InputError` if a folder that files are added to is the model's: they would stand among its own."""
    if model is not None and folder.resolve() == Path(located(model)).resolve():
        raise InputError(f"--{flag} {folder}: is the model of --{model_flag} {model}; give a folder apart from it")


def check_results(args: Arguments, may_hold_some: bool) -> None:
    """Refuses to replace results that nothing says to touch, and files of the user's own by their names."""
    if (args.save_loc / RESULTS_NAME).exists() and not (args.training.overwrite_output_dir or may_hold_some):
        raise InputError(f"--save_loc {args.save_loc}: holds {RESULTS_NAME}; --overwrite_output_dir replaces it")
    check_replaced("save_loc", args.save_loc, BESIDE_RESULTS)


def check_save(args: Arguments) -> None:
    """Refuses a checkpoint folder that is in use, or that would replace what is read or written, before the work."""
    folder = args.prune.save_pruned
    if folder is None:
        return
    source = args.source.model_name_or_path
    check_apart("save_pruned", folder, "--model_name_or_path", None if source is None else located(source))
    for flag, other in (("output_dir", args.output_dir), ("save_loc", args.save_loc)):
        if Path(folder).resolve() in (other.resolve(), *other.resolve().parents):
            raise InputError(f"--save_pruned {folder}: is --{flag} {other}, or holds it; give a folder of its own")
    check_output("save_pruned", folder, args.training.overwrite_output_dir)
