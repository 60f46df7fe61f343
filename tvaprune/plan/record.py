"""What a mask's record says of the flags that it was learned with: the defaults wherever the mask is applied."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvaprune.errors import InputError
from tvaprune.models.shape import ModelShape
from tvaprune.plan.masks import read_record
from tvaprune.plan.widths import WidthRules, default_dim_multiple

_RULES = {  # the flag of each rule
    "dim_multiple": "dim_multiple",
    "min_key_value_heads": "keep_one_kv_head",
    "uniform": "uniform",
    "tensor_parallel": "tensor_parallel",
}
RULE_FLAGS = tuple(_RULES.values())
FLAGS = (*RULE_FLAGS, "prune_method")


def recorded_flags(mask: str | Path) -> Mapping[str, object]:
    """Returns the flags that a mask was learned with, as far as the JSON beside it tells.

    Raises:
        InputError: If that is damaged.
    """
    record = read_record(mask)
    rules = record.get("rules")
    if rules is None:  # an older record: the rules are among the settings, or the multiple alone is known
        settings = record.get("settings")
        rules = settings.get("rules") if isinstance(settings, dict) else None
    if rules is None:
        rules = {"dim_multiple": record["dim_multiple"]} if "dim_multiple" in record else {}
    found = {_RULES[name]: value for name, value in rules.items() if _fits(name, value)} if _is_known(rules) else None
    method = record.get("prune_method", "")
    if found is None or len(found) < len(rules) or not isinstance(method, str):
        raise InputError(
            f"{Path(mask).with_suffix('.json')}: the mask's record holds rules or a prune_method that no mask has; "
            "mend it, or move it away and give the mask's flags"
        )
    if "keep_one_kv_head" in found:
        found["keep_one_kv_head"] = bool(found["keep_one_kv_head"])
    return found | ({"prune_method": method} if method else {})


def as_recorded(given: Mapping[str, object], recorded: Mapping[str, object]) -> tuple[Mapping[str, object], str | None]:
    """Completes the flags that were given by those of the record.

    Args:
        given: Flags by name; None: not given.

    Returns:
        The flags, None where neither tells, and a line that says which of them differ from the record.
    """
    flags = {name: recorded.get(name) if value is None else value for name, value in given.items()}
    differing = [name for name, value in recorded.items() if name in flags and _plain(name, flags[name]) != value]
    if not differing:
        return flags, None
    learned, applied = (" ".join(f"--{name} {of[name]}" for name in differing) for of in (recorded, flags))
    return flags, f"note: the units were chosen with {learned}, applied with {applied}"


def width_rules(flags: Mapping[str, Any], shape: ModelShape) -> WidthRules:
    """Returns the rules that flags make, the default where one is None."""
    multiple, parts = flags["dim_multiple"], flags["tensor_parallel"]
    return WidthRules(
        dim_multiple=default_dim_multiple(shape.hidden_size) if multiple is None else _plain("dim_multiple", multiple),
        min_key_value_heads=int(flags["keep_one_kv_head"] or False),
        uniform=bool(flags["uniform"]),
        tensor_parallel=1 if parts is None else parts,
    )


def rules_as_flags(rules: WidthRules) -> Mapping[str, object]:
    """Returns rules by the names of their flags."""
    return {flag: getattr(rules, name) for name, flag in _RULES.items()}


def _plain(name: str, value: Any) -> Any:
    """Returns a flag's value as a rule has it: a multiple of 0 switches the adjustment off, as 1 does."""
    return max(1, value) if name == "dim_multiple" else value


def _is_known(rules: object) -> bool:
    return isinstance(rules, dict) and rules.keys() <= _RULES.keys()


def _fits(name: str, value: Any) -> bool:
    """Tells whether a rule of a record has a value that a flag gives it."""
    if name == "uniform":
        return isinstance(value, bool)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and (value in (0, 1) if name == "min_key_value_heads" else value >= 1)
