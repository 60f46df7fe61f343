"""`python -m tvaprune.describe MASK --model_name_or_path DIR`: what a mask, or a plan, keeps, from the config alone."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers.hf_argparser import string_to_bool

from tvaprune.errors import InOneLine, InputError
from tvaprune.files import as_json
from tvaprune.flags.ranges import AUTO
from tvaprune.flags.settings import PruneSettings
from tvaprune.models.load import load_config
from tvaprune.models.parameters import model_parameters
from tvaprune.models.shape import in_words, shape_of
from tvaprune.plan.keep_plan import KeepPlan, plan_from_masks
from tvaprune.plan.masks import load_masks, read_record
from tvaprune.plan.record import RULE_FLAGS, as_recorded, recorded_flags, width_rules
from tvaprune.plan.rotation import read_rotation
from tvaprune.plan.widths import WidthRules
from tvaprune.report.results import KeptWidths
from tvaprune.report.tables import table


@dataclass(frozen=True)
class Description:
    """What a mask keeps of a model: the widths that were learned, and those that the width rules make of them.

    Of a plan both are its own. Layers of ``experts`` keep these whole.
    """

    mask: str
    model: str
    dense_parameters: int
    experts: tuple[int, ...]
    learned: KeptWidths
    adjusted: KeptWidths


def describe(mask: Path, model: str, asked: PruneSettings) -> Description:
    """Returns the widths before and after adjustment, the sparsity and the parameters.

    ``mask`` may be a plan's JSON, to which no rule applies.

    Args:
        asked: Of it the width flags count; one that is None is as the mask's record says, one that differs is told on
            stderr.

    Raises:
        InputError: If the mask or the config cannot be read, or they are not of the same model.
    """
    if asked.dim_multiple == AUTO:
        raise InputError(f"--dim_multiple {AUTO}: is measured by the verbs that cut; give a number")
    shape = shape_of(load_config(model))
    dense = model_parameters(shape)
    given = {name: getattr(asked, name) for name in RULE_FLAGS}
    if mask.suffix == ".json":
        plan = _plan(mask, given)
        plan.check_fits(shape, str(mask))
        kept = KeptWidths.of(plan)
        return Description(str(mask), model, dense, shape.experts, kept, kept)
    masks = load_masks(mask, shape)
    masks.check_fits(shape, str(mask))
    rotation = read_rotation(mask, read_record(mask).get("rotation"), shape.hidden_size)
    shape = shape if rotation is None else rotation.turned(shape)
    flags, note = as_recorded(given, recorded_flags(mask))
    rules = width_rules(flags, shape)
    if note is not None:
        print(note, file=sys.stderr)
    learned, adjusted = (
        KeptWidths.of(plan_from_masks(masks, shape, one)) for one in (WidthRules(1, rules.min_key_value_heads), rules)
    )
    return Description(str(mask), model, dense, shape.experts, learned, adjusted)


def _plan(path: Path, rules: Mapping[str, object]) -> KeepPlan:
    given = [name for name, value in rules.items() if value is not None]
    if given:
        raise InputError(f"--{given[0]}: acts on a mask, and {path} is a plan, whose widths are what they are")
    return KeepPlan.load(path)


def _print(content: Description) -> None:
    """Prints a description as a table of two columns of widths."""
    learned, adjusted = content.learned, content.adjusted
    rows = [("", f"{'learned':>14} {'multiple of ' + str(adjusted.dim_multiple):>16}")]
    for name, form in (("hidden_size", ",d"), ("decoder_sparsity", ".4f"), ("num_parameters", ",d")):
        rows.append((name, f"{getattr(learned, name):>14{form}} {getattr(adjusted, name):>16{form}}"))
    print(table([("parameters of the dense model", f"{content.dense_parameters:,}"), *rows]))
    print("\nlayer  KV heads  adjusted  MLP channels  adjusted")
    widths = (learned.num_key_value_heads, adjusted.num_key_value_heads)
    channels = (learned.intermediate_size, adjusted.intermediate_size)
    for index, (heads, heads_after, kept, after) in enumerate(zip(*widths, *channels, strict=True)):
        print(f"{index:>5}  {heads:>8}  {heads_after:>8}  {kept:>12}  {after:>8}")
    if any(content.experts):
        print(f"\nexperts per layer, with all their channels: {in_words(content.experts)}")


def main(arguments: list[str] | None = None) -> None:
    """Parses the flags and prints the description."""
    parser = InOneLine(prog="tvaprune describe", description=__doc__)
    parser.add_argument("mask", type=Path, help="a mask_info_*.pkl, or the plan.json of a run")
    parser.add_argument(
        "--model_name_or_path", required=True, help="folder or hub id of the model; config.json is enough"
    )
    said = {entry.name: entry.metadata["help"] for entry in fields(PruneSettings)}
    said["dim_multiple"] = "Multiple that hidden and MLP widths are adjusted to; 0: off; default: as for prune."
    switch: dict[str, Any] = {"type": string_to_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    for name in RULE_FLAGS:
        kind = switch if name in ("keep_one_kv_head", "uniform") else {"type": int}
        parser.add_argument(f"--{name}", help=said[name], **kind)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    asked = PruneSettings(**{name: getattr(args, name) for name in RULE_FLAGS})
    content = describe(args.mask, args.model_name_or_path, asked)
    if args.json:
        print(as_json(asdict(content)))
    else:
        _print(content)
