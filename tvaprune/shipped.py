"""What `lora_ft_vib.py --do_zero_eval` alone means: the shipped miniature Mistral, its mask, the offline tasks."""

import shlex
from pathlib import Path

from tvaprune.errors import InputError
from tvaprune.files import CONFIG_NAME
from tvaprune.flags.recipes import is_on, recipe_of
from tvaprune.measure.zeroshot import OFFLINE_GROUP
from tvaprune.models.load import load_config
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import MASK_NAME, load_masks, perplexity_of

MODEL = Path("mistral_saves_tva") / "mini_mistral"
_ASKS_FOR_MORE = {"model_name_or_path", "mask_loc", "plan", "do_train", "finetune", "do_eval", "help", "-h"}


def complete(arguments: list[str], root: Path) -> list[str]:
    """Returns the command line, completed by the shipped model where it names none; what the user gave stays.

    Args:
        root: Folder of the checkout.

    Raises:
        InputError: If the shipped model or a mask that fits it is not there.
    """
    recipe = recipe_of("apply", [word for word in arguments if word != "-h"])
    if not is_on(recipe, "do_zero_eval") or {*recipe, *arguments} & _ASKS_FOR_MORE:
        return arguments
    model = root / MODEL
    # Before the user's own: of a flag given twice the last one counts.
    completed = [
        *("--model_name_or_path", str(model), "--mask_loc", str(_mask(model)), "--zero_eval_tasks", OFFLINE_GROUP),
        *("--compare_dense", "True", "--dataset_name", "python_docs", "--block_size", "256", "--ctx_length", "256"),
        *("--output_dir", "out/zero_eval_mini_mistral", *arguments),
    ]
    print(f"python lora_ft_vib.py {shlex.join(completed)}")
    return completed


def _mask(model: Path) -> Path:
    """Returns the mask beside the model's folder that fits it, the one of least perplexity if there are more."""
    if not (model / CONFIG_NAME).is_file():
        raise InputError(
            f"--do_zero_eval: the shipped model is not at {model}; give --model_name_or_path and --mask_loc"
        )
    shape = shape_of(load_config(str(model)))
    fitting = []
    for path in sorted(model.parent.glob(MASK_NAME.format(perplexity="*"))):
        try:
            load_masks(path).check_fits(shape, str(path))
        except InputError:
            continue
        fitting.append(path)
    if not fitting:
        raise InputError(f"--do_zero_eval: no mask_info_*.pkl in {model.parent} fits {model}; give --mask_loc")
    return min(fitting, key=perplexity_of)
