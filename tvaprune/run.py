"""One command: its flags, the loaded model, and what follows from both."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, set_seed

from tvaprune import ranks
from tvaprune.errors import EVALUATING, InputError, running_out_in
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.settings import RELEASED_MAX_WINDOW, REPORTED_TOKENS
from tvaprune.given import given_rotation, with_recorded_flags
from tvaprune.identity import Identity, blocks_digest, content, model_digest
from tvaprune.measure import hardware
from tvaprune.measure.generations import Answers
from tvaprune.measure.perplexity import TextLoss, text_loss
from tvaprune.measure.zeroshot import check_tokenizer
from tvaprune.models.families import family_of
from tvaprune.models.layers import Streamed
from tvaprune.models.load import Where, load_config, load_model, open_model
from tvaprune.models.placement import place_of, put
from tvaprune.models.rotate import Rotation, rotate, rotated
from tvaprune.models.shape import ModelShape, shape_of
from tvaprune.models.sharding import shard
from tvaprune.phases import DENSE_PERPLEXITY, PRUNED_PERPLEXITY, Phases
from tvaprune.plan.keep_plan import KeepPlan, plan_from_masks
from tvaprune.plan.masks import Masks, read_record
from tvaprune.plan.record import width_rules
from tvaprune.plan.widths import WidthRules
from tvaprune.refusals import check_protocol
from tvaprune.text.blocks import token_blocks
from tvaprune.text.protocols import (
    C4_WINDOWS,
    OWN,
    PROTOCOLS,
    EvaluationText,
    evaluation_text,
    protocol_windows,
)
from tvaprune.text.sources import check_named, is_streamed

_CPU = torch.device("cpu")
MANY_PARAMETERS = 10**8  # from where half the bytes are quicker than float32 on a CPU that computes with them
SELECTION_SAMPLES = 128  # validation blocks: enough to tell masks apart


# transformers' own flags that change what a training ends with; where masks or checkpoints are compared is among them.
_TRAINING_FLAGS = (
    "seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "bf16", "fp16", "eval_strategy",
    "eval_steps", "eval_delay", "dataloader_drop_last",
)  # fmt: skip


@dataclass
class Run:
    """One command's flags, the loaded model and what follows from both.

    Attributes:
        digest: The unpruned model's, of its config and weights.
        rotation: What its residual stream was turned by; None: it is as it came.
        tied: Whether its embeddings came tied.
        streamed: Where its layers are fetched from, if the model is without its weights (``--stream``).
        trains: Whether gradients flow through it, which settles the precision that a float16 checkpoint is loaded in.
        phases: Of the command.
        answers: What its models added to the prompts so far, by what the page calls them.
    """

    args: Arguments
    model: PreTrainedModel
    tokenizer: Any
    digest: str = ""
    rotation: Rotation | None = None
    tied: bool = False
    streamed: Streamed | None = None
    trains: bool = False
    phases: Phases = field(default_factory=Phases)
    answers: dict[str, Answers] = field(default_factory=dict)

    @classmethod
    def load(
        cls, args: Arguments, scratch: Path | None = None, trains: bool = False, phases: Phases | None = None
    ) -> "Run":
        """Loads the model that the flags name; what its mask or plan was made with is the default.

        Args:
            scratch: Folder for what does not fit in memory: the model's weights stay on disk.
            trains: Whether gradients will flow through it.
            phases: Of the command.
        """
        check_protocol(args)
        reads_text = args.recipe["verb"] != "apply" or args.training.do_eval or args.prune.refits
        if reads_text and args.data.protocol == OWN:
            check_named(args.data.dataset_name)
        args = with_recorded_flags(args)
        set_seed(args.training.seed)
        device, streamed = args.training.device, None
        source = args.source.model_name_or_path, args.source.dtype, device
        if scratch is None:
            place: Where = _CPU if args.source.shard else "auto" if args.source.device_map == "auto" else None
            model, tokenizer = load_model(*source, place, trains)
            digest = model_digest(model)
        else:
            model, tokenizer, shards = open_model(*source, trains)
            digest = model_digest(model, shards.parts)  # reads, and so checks, all before any work
            streamed = Streamed(model, shards.weight, device, scratch)
        tied = bool(model.config.tie_word_embeddings)
        run = cls(args, model, tokenizer, digest, None, tied, streamed, trains, phases or Phases())
        ranks.agree({"model_name_or_path": f"{args.source.model_name_or_path} [{run.digest}]"})
        _tell_idle_devices(args)
        if args.evaluation.do_zero_eval:
            check_tokenizer(tokenizer)
        if args.prune.mask_loc is not None:
            record = read_record(args.prune.mask_loc)
            run._tell_another_model("mask", record.get("model"), record.get("model_digest"))
        _tell_precision(run)
        if (rotation := given_rotation(args, run.shape.hidden_size)) is not None:
            run = run.turned(rotation)
        if args.source.shard:
            run.model = shard(run.model, args.training.device)
        longest = run.model.config.max_position_embeddings
        for name in ("block_size", "ctx_length"):
            tokens = getattr(args.data, name)
            if tokens is not None and tokens > longest:
                print(f"note: --{name} {tokens} is above the model's longest, {longest} (max_position_embeddings)")
        return run

    def whole(self) -> "Run":
        """Returns the run with the unpruned model in one process again, over all GPUs, where it was sharded."""
        if not self.args.source.shard:
            return self
        source, device = self.args.source, self.args.training.device
        place: Where = "auto" if device.type == "cuda" else _CPU
        model, _ = load_model(source.model_name_or_path, source.dtype, device, place, self.trains)
        run = replace(self, model=model)
        return run if run.rotation is None else run.turned(run.rotation)

    def dense_model(self) -> PreTrainedModel:
        """Returns the unpruned model where it computes: a refit may have left it on the CPU."""
        if place_of(self.model) == _CPU and not self.args.source.shard:
            put(self.model, self.args.training.device)
        return self.model

    @property
    def shape(self) -> ModelShape:
        """The unpruned model's sizes."""
        return shape_of(self.model.config)

    @property
    def precision(self) -> str:
        """That of the unpruned model's weights, as ``--dtype`` names it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def rules(self) -> WidthRules:
        """What the widths must satisfy."""
        return width_rules(vars(self.args.prune), self.shape)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The precision that a narrower model is saved in: the checkpoint's, unless ``--dtype`` names one."""
        if self.args.source.dtype != "auto":
            return self.model.dtype
        stored: torch.dtype | None = load_config(self.args.source.model_name_or_path).dtype
        return stored or self.model.dtype

    @property
    def bos(self) -> int | None:
        """The token that every block of text begins with, where the model needs it."""
        token: int | None = self.tokenizer.bos_token_id if family_of(self.model.config).begins_with_bos else None
        return token

    @property
    def window(self) -> int:
        """Tokens of an evaluation window."""
        return window_of(self.args, self.model.config)

    def blocks(self, split: str, size: int, count: int | None, flag: str = "block_size") -> Dataset:
        """Returns token blocks of a split of the run's text; evaluation windows are the same whatever the seed.

        Args:
            flag: That says their size.
        """
        data, seed = self.args.data, self.args.training.seed if split == "train" else 0
        with ranks.main_first():
            blocks = token_blocks(
                self.tokenizer, data.dataset_name, split, size, count, seed, data.data_dir, self.bos, flag
            )
        return _agreed(data.dataset_name, blocks)

    def windows(self) -> Dataset:
        """Returns the windows that are reported on, as ``--protocol`` says."""
        data = self.args.data
        if data.protocol != OWN:
            with ranks.main_first():
                windows = protocol_windows(self.tokenizer, data.protocol, data.data_dir, self.bos)
            return _agreed(data.protocol, windows)
        most = most_windows(self.args, self.model.config)
        return self.blocks(self.args.evaluation.eval_split, self.window, most, "ctx_length")

    def evaluation_text(self, windows: Dataset) -> EvaluationText:
        """Returns what a perplexity on these windows may be compared by."""
        data, split = self.args.data, self.args.evaluation.eval_split
        return evaluation_text(self.tokenizer, data.protocol, data.dataset_name, split, windows, self.bos)

    def dense_loss(self, windows: Dataset) -> TextLoss:
        """Measures the unpruned model's perplexity, before anything is trained or cut.

        Raises:
            InputError: If the model itself gives no number.
        """
        model, batch_size = self.streamed or self.model, self.args.training.per_device_eval_batch_size
        counted = most_windows(self.args, self.model.config)  # before the text was read
        self.phases.recount((DENSE_PERPLEXITY, PRUNED_PERPLEXITY), len(windows) / counted)
        with running_out_in(EVALUATING):
            self.phases.start(DENSE_PERPLEXITY)  # what was loaded and read before is no operation
            loss = text_loss(model, windows, batch_size, DENSE_PERPLEXITY, partial(self.phases.at, DENSE_PERPLEXITY))
        if not math.isfinite(loss.perplexity):
            raise InputError(
                f"--model_name_or_path {self.args.source.model_name_or_path}: the unpruned model itself gives a "
                f"perplexity of {loss.perplexity}: its weights or its config (rope_theta, rms_norm_eps) are at fault, "
                "or float16 overflows; mend the checkpoint, or give --dtype float32"
            )
        return loss

    def train_blocks(self, default_count: int, tells: bool = False) -> Dataset:
        """Returns the blocks that gates are trained or units are scored on; if ``tells``, says where they are few."""
        data, asked = self.args.data, self.args.data.max_train_samples or default_count
        blocks = self.blocks("train", data.block_size, asked)
        if tells and len(blocks) < asked:
            print(
                f"note: --dataset_name {data.dataset_name} has {len(blocks):,} blocks of {data.block_size} tokens to "
                f"train on, not {asked:,}: so many fewer steps; more text, or --num_train_epochs, makes up for it"
            )
        return blocks

    def selection_blocks(self) -> Dataset:
        """Returns the validation blocks that masks are compared on, whatever split is reported in the end."""
        return self.blocks("validation", self.args.data.block_size, SELECTION_SAMPLES)

    def refit_blocks(self) -> Dataset:
        """Returns the training blocks whose statistics the refit fits; says where there are fewer than were asked."""
        data, asked = self.args.data, self.args.prune.refit_samples
        blocks = self.blocks("train", data.block_size, asked)
        if len(blocks) < asked:
            print(f"note: --dataset_name {data.dataset_name} has {len(blocks):,} blocks of {data.block_size} tokens to "
                  f"fit, not the {asked:,} of --refit_samples")  # fmt: skip
        return blocks

    def held_out_blocks(self) -> Dataset:
        """Returns the validation blocks that choose among fits."""
        return self.blocks("validation", self.args.data.block_size, held_out_samples(self.args.prune.refit_samples))

    def turned(self, rotation: Rotation) -> "Run":
        """Returns the run in another basis: its model is turned, at once or when fetched, and computes as it did."""
        if self.streamed is None:
            return replace(self, model=rotate(self.model, rotation), rotation=rotation)
        fetch = rotated(self.model, self.streamed.fetch, rotation, self.streamed.device)
        streamed = Streamed(self.model, fetch, self.streamed.device, self.streamed.scratch)
        return replace(self, streamed=streamed, rotation=rotation)

    def at(self, target: float) -> "Run":
        """Returns the run of one of several targets: the same model, folders of its own."""
        return replace(self, args=self.args.at(target))

    def identity(
        self, flags: Mapping[str, object], texts: Sequence[Dataset], settings: Mapping[str, object]
    ) -> Identity:
        """Returns what tells this run's masks and checkpoints from another's.

        Args:
            flags: The flags of the run's kind, by name.
            texts: The blocks that it learns and chooses on.
            settings: Flags whose defaults were resolved.
        """
        training, data = self.args.training, self.args.data
        common = {name: getattr(training, name) for name in _TRAINING_FLAGS}
        if training.world_size > 1:  # a step is of so many batches
            common["num_processes"] = training.world_size
        common |= {"dtype": self.precision, "block_size": data.block_size}
        contents = {
            "model_name_or_path": content(self.args.source.model_name_or_path, self.digest),
            "dataset_name": content(data.dataset_name, blocks_digest(*texts)),
        }
        basis = {"rotate": "off" if self.rotation is None else self.rotation.digest}
        return {"flags": common | dict(flags), "contents": contents, "settings": dict(settings) | basis}

    def plan(self, units: Masks | KeepPlan) -> KeepPlan:
        """Returns what is kept: masks cut by the run's rules, a plan as it is."""
        if isinstance(units, KeepPlan):
            self._tell_another_model("plan", "the model", units.model_digest)
            return units
        basis = None if self.rotation is None else self.rotation.digest
        plan = plan_from_masks(units, self.shape, self.rules)
        return replace(plan, rotation=basis, prune_method=self.args.prune.prune_method, model_digest=self.digest)

    def _tell_another_model(self, what: str, name: object, digest: object) -> None:
        """Says so where a mask or a plan was made of other weights than it is applied to; None: it is not told."""
        if digest not in (None, self.digest):
            print(
                f"note: the {what} was made of {name} [{str(digest)[:8]}], applied to "
                f"{self.args.source.model_name_or_path} [{self.digest[:8]}], whose weights are others, or rounded "
                "otherwise"
            )

    def record(self) -> dict[str, Any]:
        """Returns what repeats the run."""
        return {
            "model": self.args.source.model_name_or_path,
            "model_digest": self.digest,
            "prune_method": self.args.prune.prune_method,
            "rotation": None if self.rotation is None else self.rotation.digest,
            "dataset_name": self.args.data.dataset_name,
            "block_size": self.args.data.block_size,
            "target_sparsity": max(self.args.prune.target_sparsity),
            "seed": self.args.training.seed,
            "hardware": hardware.describe_device(self.args.training.device),
            "versions": hardware.versions(),
            "command": hardware.command_line(),
        }


def window_of(args: Arguments, config: PretrainedConfig) -> int:
    """Returns the tokens of an evaluation window."""
    if args.data.protocol != OWN:
        return PROTOCOLS[args.data.protocol].window
    return args.data.ctx_length or min(config.max_position_embeddings, RELEASED_MAX_WINDOW)


def most_windows(args: Arguments, config: PretrainedConfig) -> int:
    """Returns how many evaluation windows there are at most: a shorter text has fewer."""
    data = args.data
    if data.protocol != OWN:
        return PROTOCOLS[data.protocol].num_windows or C4_WINDOWS
    fit = max(1, REPORTED_TOKENS // window_of(args, config))
    return data.max_eval_samples or (min(fit, C4_WINDOWS) if is_streamed(data.dataset_name) else fit)


def _agreed(name: str, blocks: Dataset) -> Dataset:
    """Returns the blocks, if they are the same in all processes."""
    if ranks.count() > 1:
        ranks.agree({"dataset_name": f"{name} [{blocks_digest(blocks)}]"})
    return blocks


def _tell_idle_devices(args: Arguments) -> None:
    """Says how all of a machine's GPUs are used, where a plain command uses one."""
    gpus = torch.cuda.device_count()
    if gpus > 1 and ranks.launched() == 1 and args.training.device.type == "cuda":
        print(f"note: one of {gpus} GPUs is used; torchrun --nproc_per_node {gpus} in place of python uses all")


def _tell_precision(run: Run) -> None:
    """Says where weights are trained in another precision than they are stored in, and where another is quicker."""
    if run.args.source.dtype != "auto":
        return
    if run.args.training.device.type == "cuda" and run.model.dtype != run.stored_dtype:
        name = str(run.model.dtype).removeprefix("torch.")
        print(
            f"note: the checkpoint is float16, in which small gradients are lost: trained in {name}; --dtype float16 "
            "--fp16 True keeps it, and scales the loss"
        )
    many = run.model.num_parameters() >= MANY_PARAMETERS
    if run.args.training.device.type == "cpu" and many and hardware.computes_bfloat16():
        print("note: this CPU computes in bfloat16 too: --dtype bfloat16 is quicker with a model of this size")


def held_out_samples(fitted: int) -> int:
    """Returns how many blocks choose among fits of some others: half as many, at most those that tell masks apart."""
    return max(1, min(SELECTION_SAMPLES, fitted // 2))
