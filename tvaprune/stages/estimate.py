"""`tvaprune estimate --model_name_or_path DIR --verb prune ...`: what a run would take, from the config alone."""

import argparse
from dataclasses import asdict, replace

import torch

from tvaprune.budget import changes, in_flags
from tvaprune.errors import InOneLine, InputError
from tvaprune.estimates import TFLOPS, Estimate, estimate_of, in_gib
from tvaprune.files import as_json
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.conditions import parse
from tvaprune.flags.recipes import expand, naming_recipe
from tvaprune.flags.verbs import VERBS, check_flags
from tvaprune.given import given_units
from tvaprune.measure import cost
from tvaprune.measure.work import GIB
from tvaprune.report.tables import table
from tvaprune.targets import settle_target, settled

RUNS = ("prune", "apply", "finetune")


def estimate(verb: str, flags: list[str]) -> Estimate:
    """Returns what a run of a verb's flags would take, on a GPU unless they say ``--use_cpu True``.

    Raises:
        InputError: If a flag cannot be used, or does not act in the verb.
    """
    if verb not in RUNS:
        raise InputError(f"--verb {verb}: give one of {', '.join(RUNS)}")
    with naming_recipe(verb, flags):
        return _estimated(verb, expand(verb, [*VERBS[verb].given, *flags]))


def _estimated(verb: str, flags: list[str]) -> Estimate:
    check_flags(verb, flags)
    args = parse(verb, flags)
    if args.prune.stream:
        raise InputError("--stream True: an estimate is of a model in memory, and apply tells what a refit out of core "
                         "needs before it begins; leave it out")  # fmt: skip
    target = settle_target(args)
    units, on_card = given_units(args), not args.training.use_cpu
    found = estimate_of(args, units, on_card)
    if target is not None:
        found = replace(found, target=settled(args, target))
    if not on_card or args.is_spread:
        return found
    fits = {name: _verdict(args, estimate_of(args, units, on_card, there / GIB), there) for name, there in _cards()}
    return replace(found, fits=fits)


def _cards() -> list[tuple[str, float]]:
    """Returns cards of common sizes and the one that is there, with their bytes."""
    there = torch.cuda.is_available()
    own = [(f"{torch.cuda.get_device_name()}, free now", torch.cuda.mem_get_info()[0])] if there else []
    return [*cost.CARDS.items(), *own]


def _verdict(args: Arguments, found: Estimate, there: float) -> str:
    """Returns whether a run whose settings were chosen for a card fits it, and which those are."""
    over = [phase for phase in found.phases if phase.device + cost.OVERHEAD > there]
    if over:
        return "; ".join(f"too small for {phase.name}: {phase.helps}" for phase in over)
    settings = in_flags(changes(args, found.work))
    return f"fits, {in_gib(found.largest.device)}" + (f" with {settings}" if settings else "")


def parser() -> argparse.ArgumentParser:
    """Returns the parser of this verb's own flags; the rest are those of the verb that is estimated."""
    own = InOneLine(
        prog="tvaprune estimate", description=__doc__, allow_abbrev=False,
        epilog="All other flags are the verb's: --model_name_or_path is needed, --block_size and its like change the "
        "estimate.",
    )  # fmt: skip
    own.add_argument("--verb", default="prune", help=f"what would run: {', '.join(RUNS)}; default: prune")
    own.add_argument(
        "--tflops", type=float, default=TFLOPS,
        help=f"speed that the device reaches, in TFLOP/s; default: {TFLOPS:g}, about half of what an A100 can do",
    )  # fmt: skip
    own.add_argument("--json", action="store_true", help="print JSON")
    return own


def main(arguments: list[str]) -> Estimate:
    """Parses the flags, prints the table and returns what it tells."""
    own, flags = parser().parse_known_args(arguments)
    if not own.tflops > 0:
        raise InputError(f"--tflops is {own.tflops}: give a speed in TFLOP/s, a number above 0")
    found = estimate(own.verb, flags)
    print(as_json(_content(found, own.tflops)) if own.json else _told(found, own.tflops))
    return found


def _content(found: Estimate, tflops: float) -> dict[str, object]:
    figures = {"flops": found.flops, "minutes": found.minutes(tflops), "tflops": tflops, "fits": found.fits}
    told = {"target": found.target} if found.target else {}
    return {"verb": found.verb} | told | {"phases": [asdict(phase) for phase in found.phases]} | figures


def _told(found: Estimate, tflops: float) -> str:
    where = ("GPUs" if found.is_spread else "GPU") if found.on_card else "memory"
    rows = [("phase", f"{where:>10}  {'host':>9}  {'PFLOP':>8}  {'min':>6}")]
    for phase in found.phases:
        flops = phase.times * phase.flops
        figures = f"{in_gib(phase.device):>10}  {in_gib(phase.host):>9}  {flops / 1e15:>8.4g}  "
        figures += f"{flops / tflops / 1e12 / 60:>6.1f}"
        rows.append((phase.name if phase.times == 1 else f"{phase.name}, {phase.times} times", figures))
    rows.append(("all", f"{in_gib(found.largest.device):>10}  {in_gib(found.host):>9}  {found.flops / 1e15:>8.4g}  "
                        f"{found.minutes(tflops):>6.1f}"))  # fmt: skip
    if found.on_card:
        rows += [(name, told) for name, told in found.fits.items()]
    note = f"(minutes at {tflops:g} TFLOP/s; a GPU takes some {in_gib(cost.OVERHEAD)} more by itself)"
    return "\n".join([*([found.target] if found.target else []), table(rows), note])
