"""What a run of these flags is to do, and which settings make it fit ``--memory``: from the config alone.

The settings change how much is there at a time, and not what is computed: activations that are computed again, smaller
passes and as many more of them in a step, the unpruned model on the host during the refit, no timing of two models that
do not fit beside each other. What the user set stays as it is. What each needs, `tvaprune.measure.cost` says.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from tvaprune.flags.arguments import Arguments
from tvaprune.flags.ranges import RESERVED_MEMORY
from tvaprune.given import plan_of, turned_shape
from tvaprune.measure import cost, update_cost
from tvaprune.measure.perplexity import windows_of_pass
from tvaprune.measure.work import GIB, Work, narrower, of_family
from tvaprune.models.load import load_config, precision
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import Masks
from tvaprune.run import SELECTION_SAMPLES, held_out_samples, most_windows, window_of

DEFAULT_MEMORY = 40.0  # GiB

_BATCH_FLAGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing")


def memory_of(args: Arguments) -> float:
    """Returns ``--memory``, in GiB; by default 40, or what the GPU has where that is less."""
    if args.source.memory is not None:
        return args.source.memory
    device = args.training.device
    if device.type != "cuda":
        return DEFAULT_MEMORY
    return min(DEFAULT_MEMORY, torch.cuda.get_device_properties(device).total_memory / GIB)


def work_of(args: Arguments, units: Masks | KeepPlan | None = None, on_card: bool | None = None) -> Work:
    """Returns what a run of these flags is to do; the passes of a training are not counted here.

    Args:
        units: What is kept; None: every layer loses the same share, ``--target_sparsity``.
        on_card: Whether it runs on a GPU; None: as the flags and the machine say.
    """
    training, finetune, config = args.training, args.finetune, load_config(args.source.model_name_or_path)
    on_card = training.device.type == "cuda" if on_card is None else on_card
    plan = None if units is None else plan_of(args, units)
    shape = turned_shape(args, config) if plan is None else plan.shape
    device = torch.device("cuda" if on_card else "cpu")
    asked, trains = finetune.train_lm_head, _step(args) is not None or args.prune.reconstructs
    return Work(
        dense=shape,
        pruned=narrower(shape, min(args.prune.target_sparsity)) if plan is None else plan.shape_stored,
        weight_bytes=precision(args.source.dtype, device, config.dtype, trains).itemsize,
        block=args.data.block_size,
        batch=training.per_device_train_batch_size,
        accumulates=training.gradient_accumulation_steps > 1,
        checkpointing=bool(training.activation_checkpointing),
        redraws=on_card,
        distill=args.distill.distill and finetune.teacher_cache is None,
        window=window_of(args, config),
        windows=most_windows(args, config),
        eval_batch=training.per_device_eval_batch_size,
        selection_blocks=SELECTION_SAMPLES,
        held_blocks=held_out_samples(args.prune.refit_samples),
        refits=args.prune.refits,
        reconstructs=args.prune.reconstructs,
        refit_blocks=args.prune.refit_samples,
        refit_offload=args.prune.refit_offload,
        compare_dense=args.evaluation.compare_dense,
        lora_r=0 if finetune.full_ft else finetune.lora_r,
        train_lm_head=not shape.tie_word_embeddings if asked is None else asked,
        measures=args.recipe["verb"] != "apply" or training.do_eval,
        targets=len(set(args.prune.target_sparsity)),
        **of_family(config),
    )


def fitted(args: Arguments, work: Work, memory: float | None = None) -> Work:
    """Returns a work as it is done to fit: the quickest way of those that the user's flags leave.

    Args:
        memory: In place of ``--memory``, in GiB.
    """
    step, room = _step(args), _room(args, memory)
    if step is not None:
        ways = list(_ways(args, work))
        work = next((way for way in ways if step(way) <= room), ways[-1])
    if work.refits and _update(work) > room and "refit_offload" not in args.recipe:
        work = replace(work, refit_offload=True)
    teaches = args.recipe["verb"] == "finetune" and work.distill
    again = args.recipe["verb"] == "prune" and len(set(args.prune.target_sparsity)) > 1  # cut at each target
    return replace(work, keep_dense=work.compare_dense or teaches or again or _times(args, work, room))


def _update(work: Work) -> float:
    return max(update_cost.refit(work), update_cost.reconstruct(work) if work.reconstructs else 0)


def changes(args: Arguments, work: Work) -> dict[str, bool | int]:
    """Returns the flags, by name, in which a work differs from what the flags say."""
    training, found = args.training, dict[str, bool | int]()
    if work.checkpointing and not training.activation_checkpointing:
        found["activation_checkpointing"] = True
    if work.batch != training.per_device_train_batch_size:
        blocks = training.per_device_train_batch_size * training.gradient_accumulation_steps
        found |= {"per_device_train_batch_size": work.batch, "gradient_accumulation_steps": blocks // work.batch}
    if work.refit_offload and not args.prune.refit_offload:
        found["refit_offload"] = True
    return found


def in_flags(settings: dict[str, bool | int]) -> str:
    """Returns settings as they are given."""
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def fit(args: Arguments, units: Masks | KeepPlan | None = None) -> None:
    """Sets what lets a run fit, in place; says what it set, and what does not fit all the same."""
    work = fitted(args, work_of(args, units))
    settings = changes(args, work)
    for name, value in settings.items():
        setattr(args.prune if name == "refit_offload" else args.training, name, value)
    for line in _over(args, work):
        print(f"note: {line}")
    if settings:
        print(f"note: to fit --memory {memory_of(args):g}: {in_flags(settings)}")


def times(args: Arguments, units: Masks | KeepPlan | None = None) -> bool:
    """Tells whether both models are timed: asked for, and they fit beside each other."""
    return _times(args, work_of(args, units), _room(args))


def times_training(args: Arguments, units: Masks | KeepPlan | None = None) -> bool:
    """Tells whether training steps of both models are timed, likewise."""
    return times(args, units) and cost.training_timing(work_of(args, units)) <= _room(args)


def rotation_batch(args: Arguments, work: Work | None = None, memory: float | None = None) -> int:
    """Returns how many blocks a pass of what learns a rotation takes: those of a pass, halved until they fit.

    Args:
        work: The run's, where it is known.
        memory: In place of ``--memory``, in GiB.
    """
    work, room = work or work_of(args), _room(args, memory)
    batch = windows_of_pass(work.block)
    while batch > 1 and cost.gradient_pass(replace(work, rotation_batch=batch)) > room:
        batch //= 2
    return batch


def _step(args: Arguments) -> Callable[[Work], float] | None:
    """Returns what tells the bytes of a step of the run's training; None: it trains nothing."""
    if args.recipe["verb"] == "finetune":
        return cost.finetuning_step
    gates = args.recipe["verb"] == "prune" and args.prune.prune_method == "vib"
    return cost.gate_step if gates else None


def _room(args: Arguments, memory: float | None = None) -> float:
    if args.is_spread:  # what each device holds is not told here
        return math.inf
    return ((memory_of(args) if memory is None else memory) - RESERVED_MEMORY) * GIB


def _times(args: Arguments, work: Work, room: float) -> bool:
    return args.evaluation.speed_batches > 0 and not args.prune.stream and cost.timing(work) <= room


def _ways(args: Arguments, work: Work) -> Iterator[Work]:
    """Yields the ways to run a training's pass, the quickest first."""
    batches, given = [work.batch], args.recipe.keys()
    if not given & {"per_device_train_batch_size", "gradient_accumulation_steps"}:
        while batches[-1] % 2 == 0:
            batches.append(batches[-1] // 2)
    settled = work.checkpointing or given & {"activation_checkpointing", "gradient_checkpointing"}
    for checkpointing in [work.checkpointing] if settled else [False, True]:
        for batch in batches:
            accumulates = work.accumulates or batch < work.batch
            yield replace(work, batch=batch, checkpointing=checkpointing, accumulates=accumulates)


def _over(args: Arguments, work: Work) -> Iterator[str]:
    """Yields what does not fit, and what the user's flags have to do with it."""
    step, room = _step(args), _room(args)
    leaves = f"and --memory {memory_of(args):g} leaves {room / GIB:.0f}"
    if step is not None and (needed := step(work)) > room:
        kept = [in_flags({name: args.recipe[name]}) for name in _BATCH_FLAGS if name in args.recipe]
        asked = f" with {' and '.join(kept)}, as you gave" if kept else ""
        teaches = step == cost.finetuning_step and work.distill and not work.compare_dense
        hint = "; --teacher_cache DIR leaves the unpruned model out" if teaches else ""
        yield f"training needs about {needed / GIB:.0f} GiB{asked}, {leaves}{hint}"
    if work.refits and (needed := _update(work)) > room:
        update, less = args.prune.weight_update, "refit" if update_cost.refit(work) <= room else "fold"
        yield f"the {update} needs about {needed / GIB:.0f} GiB, {leaves}; --weight_update {less} needs less"
