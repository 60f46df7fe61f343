"""`python -m tvaprune.describe MASK --model_name_or_path DIR`: what a mask keeps, from the model's config alone."""

import argparse
import json
from pathlib import Path

from tvaprune.models.families import shape_of
from tvaprune.models.load import load_config
from tvaprune.models.parameters import dense_parameters
from tvaprune.plan.keep_plan import describe_widths, plan_from_masks
from tvaprune.plan.masks import load_masks
from tvaprune.plan.widths import WidthRules, default_dim_multiple
from tvaprune.report.tables import table


def describe(
    mask: Path, model: str, dim_multiple: int | None = None, min_key_value_heads: int = 0
) -> dict[str, object]:
    """Returns the widths before and after adjustment, the sparsity and the parameters.

    Raises:
        InputError: If the mask or the config cannot be read, or they are not of the same model.
    """
    shape = shape_of(load_config(model))
    masks = load_masks(mask)
    masks.check_fits(shape, str(mask))
    multiple = default_dim_multiple(shape.hidden_size) if dim_multiple is None else max(1, dim_multiple)
    return {
        "mask": str(mask),
        "model": model,
        "dense_parameters": dense_parameters(shape),
        "learned": describe_widths(plan_from_masks(masks, shape, WidthRules(1, min_key_value_heads))),
        "adjusted": describe_widths(plan_from_masks(masks, shape, WidthRules(multiple, min_key_value_heads))),
    }


def _print(content: dict[str, object]) -> None:
    """Prints a description as a table of two columns of widths."""
    learned, adjusted = content["learned"], content["adjusted"]
    assert isinstance(learned, dict) and isinstance(adjusted, dict)
    rows = [("", f"{'learned':>14} {'multiple of ' + str(adjusted['dim_multiple']):>16}")]
    for name in ("hidden_size", "decoder_sparsity", "num_parameters"):
        form = ".4f" if name == "decoder_sparsity" else ",d"
        rows.append((name, f"{learned[name]:>14{form}} {adjusted[name]:>16{form}}"))
    print(table([("parameters of the dense model", f"{content['dense_parameters']:,}"), *rows]))
    print("\nlayer  KV heads  MLP channels  adjusted")
    layers = zip(
        learned["num_key_value_heads"], learned["intermediate_size"], adjusted["intermediate_size"], strict=True
    )
    for index, (heads, channels, after) in enumerate(layers):
        print(f"{index:>5}  {heads:>8}  {channels:>12}  {after:>8}")


def main(arguments: list[str] | None = None) -> None:
    """Parses the flags and prints the description."""
    parser = argparse.ArgumentParser(prog="python -m tvaprune.describe", description=__doc__)
    parser.add_argument("mask", type=Path, help="a mask_info_*.pkl")
    parser.add_argument(
        "--model_name_or_path", required=True, help="folder or hub id of the model; config.json is enough"
    )
    parser.add_argument(
        "--dim_multiple", type=int, help="adjust widths to multiples of this; 0: off; default 128, small models 8"
    )
    parser.add_argument("--keep_one_kv_head", action="store_true", help="keep at least one KV head in every layer")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    content = describe(args.mask, args.model_name_or_path, args.dim_multiple, int(args.keep_one_kv_head))
    if args.json:
        print(json.dumps(content, indent=2))
    else:
        _print(content)
