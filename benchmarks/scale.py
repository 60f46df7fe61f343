"""What a 7B or an 8B takes: memory of each phase, a step of gate training, prefill and decode of what is cut.

Random weights carry memory and time. On a GPU all is measured, of a refit and a reconstruction their first layers;
without one, memory and operations of the large shapes are those of the simulation (`benchmarks.simulate`), and only
``--shape small`` is timed. Of the published masks a path is given; without one every layer loses half. A ratio is the
median over turns in which both models run one after the other; the ideal is that of the parameters that a token meets.

    python -m benchmarks.scale --shape Mistral-7B --mask mistral_7b_mask_info_18.891157150268555.pkl
    python -m benchmarks.scale --shape small --out out/small.md
"""

import argparse
import copy
import gc
import re
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel, StaticCache

from benchmarks.card import RealCard, Taken
from benchmarks.simulate import CONFIGS, PHASES, Scene, by_formula, plan_to, simulate
from benchmarks.step import Step, steps
from tvaprune.budget import DEFAULT_MEMORY
from tvaprune.estimates import TFLOPS, Estimate, estimate_of
from tvaprune.flags.conditions import parse
from tvaprune.measure import cost
from tvaprune.measure.hardware import describe_device
from tvaprune.measure.speed import WARM_UP_BATCHES, seconds, turn_about
from tvaprune.measure.work import GIB, Work, narrower, weights
from tvaprune.models.parameters import model_parameters
from tvaprune.models.shape import ModelShape, shape_of
from tvaprune.plan.keep_plan import KeepPlan, plan_from_masks
from tvaprune.plan.masks import load_masks
from tvaprune.plan.multiples import fastest_multiple
from tvaprune.plan.widths import WidthRules

MULTIPLES = (0, 8, 64, 128, 256)
BLOCKS, BLOCK = 4500, 512
BATCHES = (1, 4)  # blocks of a step that is timed
FEW = 2  # layers of a refit and a reconstruction that are measured or simulated
PROMPT, NEW = 512, 16  # tokens before decoding, tokens decoded and timed
SMALL = LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=8,
                    num_key_value_heads=4, max_position_embeddings=1024)  # fmt: skip
SHAPES: dict[str, PretrainedConfig] = {"small": SMALL, **CONFIGS}


@dataclass(frozen=True)
class Setting:
    """One shape, its mask and where it is measured."""

    name: str
    config: PretrainedConfig
    mask: Path | None
    device: torch.device

    @property
    def shape(self) -> ModelShape:
        """The dense model's sizes."""
        return shape_of(self.config)

    @property
    def on_card(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return torch.bfloat16 if self.on_card else torch.float32

    def plan(self, multiple: int) -> KeepPlan:
        """Returns what the mask keeps at a multiple; without a mask half of every layer, as near as the multiple."""
        if self.mask is not None:
            masks = load_masks(self.mask, self.shape)
            masks.check_fits(self.shape, f"--mask {self.mask}")
            return plan_from_masks(masks, self.shape, WidthRules(max(1, multiple)))
        half, step = narrower(self.shape, 0.5), max(1, multiple)
        channels = tuple(max(1, round(width / step)) * step for width in half.intermediate_size)
        return plan_to(self.shape, sized(self.shape, half.hidden_size, half.num_key_value_heads, channels))

    def work(self, plan: KeepPlan, verb: str = "prune") -> Work:
        """Returns what the phases of a verb do: the defaults, with what their budget sets."""
        flags = ["--refit_samples", "8"] if self.name == "small" else []
        work = self.estimate(verb, DEFAULT_MEMORY, *flags).work
        return replace(
            work, pruned=plan.shape_stored, redraws=self.on_card, selection_blocks=8 if flags else work.selection_blocks
        )

    def estimate(self, verb: str, memory: float, *flags: str) -> Estimate:
        """Returns what a run of a verb's defaults will take on a card."""
        units = None if self.mask is None else load_masks(self.mask, self.shape)
        with tempfile.TemporaryDirectory() as folder:
            self.config.save_pretrained(folder)
            given = ["--model_name_or_path", folder, "--dtype", "bfloat16", "--memory", f"{memory:g}", "--use_cpu"]
            return estimate_of(parse(verb, [*given, *flags]), units, on_card=True)


def sized(shape: ModelShape, hidden: int, heads: tuple[int, ...], channels: tuple[int, ...]) -> ModelShape:
    """Returns a shape at other widths."""
    return replace(shape, hidden_size=hidden, num_key_value_heads=heads, intermediate_size=channels)


def memory_rows(setting: Setting) -> list[str]:
    """Returns a row for each phase: memory and operations beside those of the formulas."""
    plan = setting.plan(128 if setting.shape.hidden_size >= 1024 else 8)
    works = {
        phase: setting.work(plan, "finetune" if phase == "finetuning_step" else "prune")
        for phase in PHASES
        if phase != "scoring_pass"
    }
    rows = ["| phase | device, GiB | by formula | host, GiB | TFLOP a pass | by formula | s |", f"|{'---|' * 7}"]
    for phase, work in works.items():
        if phase in ("refit", "reconstruct") and work.dense.num_hidden_layers > FEW:
            # Its windows pass layer by layer: the first layers, held against the formula, and all by the formula.
            few, part = (shallow(setting.config, shape, FEW) for shape in (work.dense, work.pruned))
            less = replace(work, dense=few[1], pruned=part[1])
            rows.append(row(f"{phase}, first {FEW} layers", *measured(setting, few[0], less, phase)))
            rows.append(row(named(phase, work), None, None, by_formula(phase, work)))
        else:
            rows.append(row(named(phase, work), *measured(setting, setting.config, work, phase, plan)))
    return rows


def measured(
    setting: Setting, config: PretrainedConfig, work: Work, phase: str, plan: KeepPlan | None = None
) -> tuple[Taken, float | None, tuple[float, float]]:
    """Returns what a phase takes, its seconds on a card without the model's making, and what the formulas say."""
    if not setting.on_card:
        return simulate(config, work, phase, plan), None, by_formula(phase, work)
    taken, took = in_scene(setting, config, work, phase, plan or plan_to(work.dense, work.pruned))
    gc.collect()
    torch.cuda.empty_cache()
    return taken, took, by_formula(phase, work)


def in_scene(setting: Setting, config: PretrainedConfig, work: Work, phase: str, plan: KeepPlan) -> tuple[Taken, float]:
    """Returns what a phase takes on the card that is there, and its seconds."""
    scene, found = Scene(RealCard(), work, config, plan, setting.device), list[Taken]()
    took = seconds(lambda: found.append(getattr(scene, phase)()), setting.device)
    return found[0], took


def named(phase: str, work: Work) -> str:
    """Returns a phase's name; of a training's pass with its size."""
    name = phase.replace("_", " ")
    if phase not in ("gate_step", "finetuning_step"):
        return name
    return f"{name}, {work.batch} x {work.block}" + ", checkpointing" * work.checkpointing


def memory_line(setting: Setting) -> str:
    """Returns what the whole of ``prune`` takes at most on a card, by the formulas, with what ``--memory`` sets."""
    told, on_host = [], []
    for memory in (DEFAULT_MEMORY, 24):
        found = setting.estimate("prune", memory)
        most = found.largest
        told.append(f"{most.device / GIB:.2f} GiB at --memory {memory:g} ({most.name})")
        on_host.append(f"{found.host / weights(found.work.dense, found.work):.2f}")
    return (
        f"All of `prune`, by the formulas, at most: {', '.join(told)}; on the host {' and '.join(on_host)} times the "
        "weights."
    )


def row(name: str, taken: Taken | None, took: float | None, formula: tuple[float, float]) -> str:
    """Returns a row of the table of memory; what was not counted stays empty: a card counts its own memory alone."""
    device, flops = formula
    cells = [name, "" if taken is None else f"{taken.card / GIB:.2f}", f"{device / GIB:.2f}"]
    cells += [f"{taken.host / GIB:.2f}", f"{taken.flops / 1e12:.4g}"] if taken is not None and taken.flops else ["", ""]
    cells += [f"{flops / 1e12:.4g}", "" if took is None else f"{took:.2f}"]
    return f"| {' | '.join(cells)} |"


def shallow(config: PretrainedConfig, shape: ModelShape, layers: int) -> tuple[PretrainedConfig, ModelShape]:
    """Returns a config and a shape of the first layers."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    names = ("num_key_value_heads", "intermediate_size", "layer_norms", "experts")
    return config, replace(shape, **{name: getattr(shape, name)[:layers] for name in names})


def step_rows(setting: Setting, turns: int) -> list[str]:
    """Returns the gated step over the plain one, and the minutes of a mask."""
    flops = cost.gate_flops(setting.work(setting.plan(128))) * BLOCKS
    computed = (
        f"{BLOCKS:,} blocks of {BLOCK}: {flops / 1e15:.3g} PFLOP, {flops / TFLOPS / 6e13:.3g} min at {TFLOPS:g} TFLOP/s"
    )
    if not (setting.on_card or setting.name == "small"):
        return [computed]
    names = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
    )
    sizes, rows = {name: getattr(setting.config, name) for name in names}, [computed, ""]
    for batch in BATCHES:
        plain, gated = steps(sizes, (batch, BLOCK), str(setting.device), setting.dtype)
        others, own = turn_about(partial(_call, plain), partial(_call, gated), turns, setting.device)
        minutes = BLOCKS / batch * statistics.median(own) / 60
        ratio = f"gated step over plain step ({batch} x {BLOCK}): {ratio_of(own, others):.2f}"
        rows.append(f"- {ratio}; {BLOCKS:,} blocks: {minutes:.3g} min")
        del plain, gated
    return rows


def _call(step: Step, turn: int) -> None:
    step()


def met(shape: ModelShape) -> int:
    """Returns the parameters that a token meets: the embedding is looked up."""
    return model_parameters(shape) - (0 if shape.tie_word_embeddings else shape.vocab_size * shape.hidden_size)


def prefill(batch: int, length: int) -> Callable[[PreTrainedModel], Callable[[int], object]]:
    """Returns what times a model's pass over prompts, the last position's logits alone."""

    def of(model: PreTrainedModel) -> Callable[[int], object]:
        ids = torch.zeros(batch, length, dtype=torch.int64, device=model.device)
        return lambda _: model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return of


def decode(batch: int, prompt: int) -> Callable[[PreTrainedModel], Callable[[int], object]]:
    """Returns what times a model's tokens after a prompt, one by one; the cache grows from turn to turn."""

    def of(model: PreTrainedModel) -> Callable[[int], object]:
        ids = torch.zeros(batch, prompt, dtype=torch.int64, device=model.device)
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        def run(turn: int) -> None:
            for _ in range(NEW):
                model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

        return run

    return of


def kind_of(kernel: str) -> str:
    """Returns what a GPU's kernel computes, by its name: matrix products, attention, or all else."""
    if re.search("flash|fmha|attention", kernel):
        return "attention"
    return "products" if re.search("gemm|cutlass|nvjet|xmma|splitK", kernel) else "else"


def busy(step: Callable[[], object]) -> dict[str, float]:
    """Returns the milliseconds that the GPU is at work in a step, by kind of kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    found = dict.fromkeys(("products", "attention", "else"), 0.0)
    for event in profiler.key_averages():
        found[kind_of(event.key)] += event.self_device_time_total / 1000
    return found


@torch.inference_mode()
def busy_rows(setting: Setting, multiple: int = 128) -> list[str]:
    """Returns where the GPU's time goes, dense and pruned: what narrower products gain, and what stays."""
    plan = setting.plan(multiple)
    scene = Scene(RealCard(), setting.work(plan), setting.config, plan, setting.device, setting.dtype)
    pruned = scene.pruned()
    rows = [f"The GPU at work, ms, dense -> pruned at --dim_multiple {multiple}:", ""]
    for name, of in {"prefill 8 x 512": prefill(8, 512), f"{NEW} tokens of decode 1": decode(1, PROMPT)}.items():
        steps_of = [partial(of(model), 0) for model in (scene.dense, pruned)]
        for step in steps_of:
            step()  # kernels are chosen at the first call
        slow, fast = map(busy, steps_of)
        rows.append(f"- {name}: " + ", ".join(f"{kind} {slow[kind]:.1f} -> {fast[kind]:.1f}" for kind in slow))
    return rows


def replayed(batch: int, prompt: int, turns: int) -> Callable[[PreTrainedModel], Callable[[int], object]]:
    """Returns what times a model's tokens as one CUDA graph each, as servers run them: no kernel waits for the host."""

    def of(model: PreTrainedModel) -> Callable[[int], object]:
        ids = torch.zeros(batch, prompt, dtype=torch.int64, device=model.device)
        cache = StaticCache(model.config, max_cache_len=prompt + NEW * (turns + WARM_UP_BATCHES + 1))
        token = {"input_ids": ids[:, :1].clone(), "past_key_values": cache, "use_cache": True}
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):  # what kernels set up at their first call is no part of a graph
            model(**token)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(**token)

        def run(turn: int, held: object = token) -> None:  # a graph holds none of the memory that it reads
            for _ in range(NEW):
                graph.replay()

        return run

    return of


def ratio_of(times: list[float], others: list[float]) -> float:
    """Returns the median over turns of one time over the other."""
    return statistics.median(one / other for one, other in zip(times, others, strict=True))


@torch.inference_mode()
def speed_rows(setting: Setting, turns: int) -> list[str]:
    """Returns a row for each multiple: how many times as fast the narrower model is, and how many times as small."""
    shrink = 1 if setting.on_card else 8  # of the lengths, on a CPU
    works = {
        "prefill 1 x 2,048": prefill(1, 2048 // shrink),
        "prefill 8 x 512": prefill(8, 512 // shrink),
        "decode 1": decode(1, PROMPT // shrink),
        "decode 16": decode(16, PROMPT // shrink),
    }
    if setting.on_card:
        works |= {f"decode {batch}, a graph": replayed(batch, PROMPT, turns) for batch in (1, 16)}
    head = ["--dim_multiple", "sparsity", "ideal", *works]
    rows = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for multiple in MULTIPLES:
        plan = setting.plan(multiple)
        work = setting.work(plan)
        scene = Scene(RealCard(), work, setting.config, plan, setting.device, setting.dtype)
        pruned, cells = scene.pruned(), []
        for of in works.values():
            slow, fast = turn_about(of(scene.dense), of(pruned), turns, setting.device)
            cells.append(f"{ratio_of(slow, fast):.2f}")
        ideal = met(work.dense) / met(work.pruned)
        rows.append(f"| {multiple} | {plan.sparsity:.3f} | {ideal:.2f} | {' | '.join(cells)} |")
        del scene, pruned
    return rows


def report(setting: Setting, turns: int) -> str:
    """Measures a shape and returns its part of the page."""
    where = describe_device(setting.device) if setting.on_card else "simulated: no GPU was there"
    mask = "no mask, half of every layer" if setting.mask is None else setting.mask.name
    title = setting.name + f", {where}" * setting.on_card
    lines = [f"## {title}", "", f"{mask}; memory and operations: {where}.", "", *memory_rows(setting), ""]
    lines += [memory_line(setting), ""]
    lines += [*step_rows(setting, turns), ""]
    if setting.on_card or setting.name == "small":
        lines += [
            f"Times as fast as the dense model ({describe_device(setting.device)}):",
            "",
            *speed_rows(setting, turns),
            "",
            *([*busy_rows(setting), ""] if setting.on_card else []),
            fastest_multiple(setting.shape, 0.5, setting.device, setting.dtype)[1],
        ]
    else:
        lines += ["Prefill and decode: not timed without a GPU."]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measures the shapes asked for, prints them and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", choices=list(SHAPES), default=list(CONFIGS), help="which shapes")
    parser.add_argument("--mask", type=Path, nargs="*", default=[], help="a mask file for each shape, in their order")
    parser.add_argument("--turns", type=int, default=7, help="turns of which the median is taken")
    parser.add_argument("--out", type=Path, help="the page to write")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    masks = [*args.mask, *[None] * len(args.shape)]
    parts, words = [], sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.scale", *words])
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, mask in zip(args.shape, masks, strict=False):
        parts.append(report(Setting(name, SHAPES[name], mask, device), args.turns))
        print(parts[-1], flush=True)
        if args.out is not None:  # a shape that fails takes none with it
            args.out.write_text(f"# Scale\n\n`{command}`\n\n" + "\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
