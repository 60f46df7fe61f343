"""Seeded damage: to bytes, to JSON, to tensors, to texts."""

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

VALUES = (None, True, False, 0, 1, -1, 2, 7, 3.5, -0.0, 1e308, math.nan, math.inf, 10**20, "", "7", "x\n\x1b[2J",
          "\ud800", "../../etc", [], [0], [[]], {}, {"": None})  # fmt: skip


def damage_bytes(choose: random.Random, content: bytes) -> bytes:
    """Flips, cuts, doubles, fills or inserts at a random place, most often near the start, where headers are."""
    where = int(len(content) * choose.random() ** choose.choice((1, 1, 4)))
    length = choose.choice((1, 1, 2, 4, 8, 64, 512))
    head, cut, tail = content[:where], content[where : where + length], content[where + length :]
    return choose.choice(
        (
            lambda: head,
            lambda: head + tail,
            lambda: head + cut + cut + tail,
            lambda: head + bytes(choose.randrange(256) for _ in cut) + tail,
            lambda: head + bytes(byte ^ 1 << choose.randrange(8) for byte in cut) + tail,
            lambda: head + choose.choice((b"\x00", b"\xff", b"\n", b"}")) * length + cut + tail,
            lambda: head + struct.pack("<Q", choose.choice((0, 2**31, 2**63 - 1))) + tail,
            lambda: b"",
        )
    )()


def places_in(value: object) -> list[tuple[object, object]]:
    """Returns every place of a JSON value as (container, key)."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    found: list[tuple[object, object]] = []
    for key in keys:
        found += [(value, key), *places_in(value[key])]
    return found


def damage_json(choose: random.Random, content: bytes) -> bytes:
    """Replaces, removes, renames or doubles one entry, or damages the bytes."""
    if choose.random() < 0.15:
        return damage_bytes(choose, content)
    value = json.loads(content)
    places = places_in(value)
    if not places:
        return damage_bytes(choose, content)
    top = [place for place in places if place[0] is value]
    within, key = choose.choice(top if choose.random() < 0.5 else places)
    kind = choose.choice(("replace", "replace", "replace", "scale", "remove", "rename", "nest"))
    if kind == "scale" and isinstance(within[key], int | float) and not isinstance(within[key], bool):
        within[key] = choose.choice((within[key] + 1, within[key] - 1, within[key] * 2, -within[key], str(within[key])))
    elif kind == "remove":
        del within[key]
    elif kind == "rename" and isinstance(within, dict):
        within[choose.choice(("x", "", "__class__"))] = within.pop(key)
    elif kind == "nest":
        within[key] = [within[key]]
    else:
        within[key] = choose.choice(VALUES)
    return json.dumps(value).encode()


def damage_tensors(choose: random.Random, path: Path) -> None:
    """Removes, renames, resizes, casts or poisons one tensor of a safetensors file, or damages its bytes."""
    if choose.random() < 0.4:
        path.write_bytes(damage_bytes(choose, path.read_bytes()))
        return
    tensors = load_file(path)
    name = choose.choice(sorted(tensors))
    tensor = tensors.pop(name)
    acts: tuple[Callable[[], None], ...] = (
        lambda: None,
        lambda: tensors.update({choose.choice(("odd", f"model.{name}", f"{name}.qweight")): tensor}),
        lambda: tensors.update({name: torch.cat([tensor, tensor])}),
        lambda: tensors.update({name: tensor[:-1].clone()}),
        lambda: tensors.update({name: tensor.unsqueeze(0).clone()}),
        lambda: tensors.update({name: tensor.flatten().clone()}),
        lambda: tensors.update({name: tensor.to(choose.choice((torch.int8, torch.float64, torch.bfloat16)))}),
        lambda: tensors.update({name: tensor * choose.choice((0.0, math.nan, math.inf, 1e30, -1.0))}),
        lambda: tensors.update({name: torch.zeros(0)}),
    )
    choose.choice(acts)()
    save_file(tensors, path, {"format": "pt"})
