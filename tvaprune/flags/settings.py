"""The verbs' flags, typed, with their help and their checks; transformers' TrainingArguments come on top.

A default of ``None`` means "by the model, the target or the length of the run", as the help says; what the user sets is
never overwritten.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from tvaprune.errors import InputError, check_file
from tvaprune.flags.ranges import AUTO, BYTES, NUMBERS, amount, check_ranges, number_or

RELEASED_MAX_WINDOW = 8192  # the longest window that the released tool reports (Llama-3, Mistral)
REPORTED_TOKENS = 2**19  # evaluated by default, 256 windows of 2,048: more cost as much as the training
RELEASED_BATCH = 128  # blocks of one fine-tuning step, over all devices and accumulation steps

Method = Literal["vib", "magnitude", "wanda_sp", "flap", "taylor", "taylor_global", "bonsai", "random"]
METHODS: tuple[str, ...] = get_args(Method)
Precision = Literal["auto", "float32", "bfloat16", "float16"]
VIB_ONCE = "vib_once"  # in a comparison: gates trained to the largest sparsity alone, and cut at each


def flag(default: object, help: str) -> Any:
    """Returns the field of a flag."""
    return field(default=default, metadata={"help": help})


def _flags(default: list[object], help: str) -> Any:
    return field(default_factory=lambda: list(default), metadata={"help": f"{help}."})


class _InRange:
    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_ranges(self)


@dataclass
class ModelSettings(_InRange):
    """The model to prune."""

    model_name_or_path: str | None = flag(
        None,
        "A checkpoint of a supported family (docs/models.md): a folder, a hub id, a .gguf file or a folder with one, "
        "or a name that tvaprune fetch knows.",
    )
    dtype: Precision = flag("auto", "Precision of the weights; auto: as stored on a GPU, float32 on a CPU.")
    shard: bool = flag(
        False,
        "Spread the frozen layers over the processes of torchrun or accelerate launch (FSDP2), for a model that is "
        "larger than one GPU; script/fsdp2.yaml says so too. Gates then train in the basis of the checkpoint.",
    )
    device_map: Literal["none", "auto"] = flag(
        "none", "auto: one process spreads a model that is larger than one GPU over all of them, layer by layer."
    )

    memory: float | None = flag(
        None,
        "GiB of the device that the run is to fit: sets --activation_checkpointing, the batch, its accumulation (their "
        "product stays), --refit_offload, and leaves out timing two models that do not fit together; what you give of "
        "these stays. Default: 40, or the GPU's where it has less.",
    )


@dataclass
class DataSettings(_InRange):
    """The text that gates are trained on and perplexity is measured on."""

    dataset_name: str = flag(
        "c4",
        "python_docs, package_readmes, english_prose (once tvaprune fetch has got it), c4, wikitext2, ptb, or a path: "
        ".txt, .jsonl, .parquet, a save_to_disk folder; or several with commas between, as much of each.",
    )
    data_dir: str = flag("data", "Folder with local copies of hub data sets, e.g. data/Salesforce/wikitext/...")
    block_size: int = flag(512, "Tokens of a training block.")
    ctx_length: int | None = flag(
        None, f"Tokens of an evaluation window; default: the model's longest, at most {RELEASED_MAX_WINDOW}."
    )
    max_train_samples: int | None = flag(None, "Training blocks drawn; default: 4,500, for one-shot scores 128.")
    max_eval_samples: int | None = flag(
        None, f"Evaluation windows drawn; default: all, at most {REPORTED_TOKENS:,} tokens, of C4 at most 256 windows."
    )
    protocol: Literal["own", "wikitext2-2048", "wikitext2-4096", "ptb-2048", "ptb-4096", "c4-2048", "c4-4096"] = flag(
        "own",
        "What perplexity is reported on. own: --eval_split of --dataset_name, windows of --ctx_length; else a test "
        "text as the field takes it, to stand beside published figures.",
    )


@dataclass
class PruneSettings:
    """Mask learning, and applying a mask."""

    prune_method: Method = flag(
        "vib",
        "How units are chosen: vib trains gates; the others score in one shot (taylor: LLM-Pruner's). Applying a mask "
        "or a plan, the default is as the mask's record or the plan says.",
    )
    target_sparsity: list[float] = _flags(
        [0.5],
        "Share of the decoder layers' parameters to remove, between 0 and 1. Several: one choice of units, for the "
        "largest, is cut at each; scores within each layer are made for each",
    )
    target_params: str | None = flag(
        None,
        "In place of --target_sparsity: parameters to leave of the whole model, embeddings included, such as 100M; "
        "counted with all hidden dims, what is reached is told.",
    )
    target_memory: str | None = flag(
        None,
        "In place of --target_sparsity: what the weights are to take as they are saved, such as 6GB or 5.5GiB; counted "
        "likewise.",
    )
    target_speedup: float | None = flag(
        None,
        "In place of --target_sparsity: how many times fewer operations a forward pass is to take, such as 1.5. "
        "Counted, not timed: what the hardware makes of it is measured after the cut.",
    )
    rotate: Literal["auto", "on", "off"] = flag(
        "auto",
        "Turn the residual stream, before units are chosen, to the directions that matter: cutting hidden dims costs "
        "less. auto: for gates; tied embeddings stay tied. on: for scores too; tied embeddings are untied, exactly.",
    )
    vib_learning_rate: float = flag(0.1, "Learning rate of the gates.")
    reg_learning_rate: float = flag(0.1, "Learning rate of the two Lagrangian multipliers.")
    kl_factor: float = flag(1e-6, "Weight of the information loss.")
    att_mul: float | None = flag(None, "Weight of the attention gates within it; default 256, above 60%% sparsity 512.")
    inter_mul: float = flag(1.0, "Weight of the MLP gates within it.")
    emb_mult: float = flag(30.0, "Weight of the hidden gates at the embedding within it.")
    lagrangian_warmup_epochs: float | None = flag(
        None,
        "Epochs over which the target sparsity rises; default 0.3, in a run of few steps half of those that choose.",
    )
    beta: float | None = flag(
        None, "Sharpness of the keep probability at the end; default by family: Llama 10, Mistral 5."
    )
    beta_start: float = flag(
        0.5, "Sharpness at the start, at most --beta, to which it rises geometrically while units are chosen."
    )
    settle_share: float = flag(
        0.33, "Last share of the steps, in which the choice stands and the kept gates' means train on without noise."
    )
    gate_noise: Literal["token", "sequence"] = flag("token", "What a gate is drawn anew for.")
    gate_ce_weight: float = flag(0.0, "Weight of the cross-entropy beside the distillation of the gates.")
    norm_width: Literal["dense", "kept"] = flag(
        "dense",
        "What norms divide the sum of the kept hidden dims' squares by while gates train: dense, the width they were "
        "trained at, which the cut writes into their gains; kept, the number of kept dims, as in the paper.",
    )
    initial_log_variance: float = flag(-5.0, "Start of the gates' log-variances; 0 is where a gate is cut.")
    dim_multiple: int | str | None = flag(
        None,
        "Multiple that hidden and MLP widths are adjusted to; 0: off; auto: the one at which linear layers of such "
        "widths are quickest on the device, measured; default: as the mask's record says; without one: 128, in a model "
        "under 1,024 wide 32, under 512 8. To quantise the result: FP8 blocks and groups of AWQ and GPTQ need 128, "
        "GGUF's K-quants 256.",
    )
    keep_one_kv_head: bool | None = flag(
        None,
        "Keep at least one KV head in every layer, as the released tool does; default: as the mask's record says; "
        "without one: False.",
    )
    uniform: bool | None = flag(
        None,
        "Keep as many KV heads and MLP channels in every layer: a stock model, which any engine serves; default: as "
        "the mask's record says; without one: False.",
    )
    tensor_parallel: int | None = flag(
        None,
        "Keep KV heads and MLP channels in multiples of this, to serve on as many devices; default: as the mask's "
        "record says; without one: 1.",
    )
    mask_loc: str | None = flag(None, "A mask file (mask_info_*.pkl) to apply.")
    plan: str | None = flag(
        None, "A keep plan (plan.json of a run) to apply as it is, in place of --mask_loc and the width flags."
    )
    save_pruned: str | None = flag(None, "Folder to write the narrower model to, as a Hugging Face checkpoint.")
    weight_update: Literal["none", "fold", "refit", "reconstruct"] = flag(
        "refit",
        "Instant weight update: none: cut only; fold: the gates' means (flap: its bias terms, where there are biases) "
        "go into the weights; refit: the kept weights' closed-form optimum on training blocks, where that helps; "
        "reconstruct: refit, then two layers at a time are trained to the unpruned model's hidden states on the same "
        "blocks, the last two to its predictions, where that helps.",
    )
    refit_samples: int = flag(
        128, "Training blocks that refit and reconstruct are fitted on; half as many, 128 at most, choose among fits."
    )
    stream: bool = flag(
        False,
        "Cut, fold, refit and measure a model that fits neither the GPU nor the memory: half a layer at a time, from "
        "safetensors files to those of --save_pruned, hidden states on disk. The same folder, in more time; nothing is "
        "timed.",
    )
    refit_offload: bool = flag(
        False,
        "Keep the unpruned model and its activations on the CPU during refit and reconstruct, a layer or two at a time "
        "on the GPU.",
    )

    def __post_init__(self) -> None:
        """Checks the ranges, and that the files are there."""
        self.dim_multiple = number_or(AUTO, "dim_multiple", self.dim_multiple)
        check_ranges(self)
        for name, units in (("target_params", NUMBERS), ("target_memory", BYTES)):
            if (given := getattr(self, name)) is not None:
                amount(name, given, units)
        if self.mask_loc is not None:
            check_file(f"--mask_loc {self.mask_loc}", self.mask_loc, "a mask_info_*.pkl")
        if self.plan is not None:
            self._check_plan()

    @property
    def refits(self) -> bool:
        """Whether the weight update is fitted on text."""
        return self.weight_update == "refit" or self.reconstructs

    @property
    def reconstructs(self) -> bool:
        """Whether it trains, too."""
        return self.weight_update == "reconstruct"

    def _check_plan(self) -> None:
        decided = ("mask_loc", "dim_multiple", "keep_one_kv_head", "uniform", "tensor_parallel")
        other = [f"--{name}" for name in decided if getattr(self, name) is not None]
        if other:
            raise InputError(
                f"--plan {self.plan}: says already what is kept; leave out {' and '.join(other)}, or --plan"
            )
        check_file(f"--plan {self.plan}", self.plan or "", "the plan.json of a run")


@dataclass
class DistillSettings(_InRange):
    """Distillation from the unpruned model."""

    distill: bool = flag(
        True, "Train on the KL to the unpruned model's own logits (gates: in place of cross-entropy; one more forward)."
    )
    distill_temp: float = flag(1.0, "Temperature of the distillation.")


@dataclass
class FinetuneSettings:
    """Recovering the narrower model's quality: LoRA, or all weights, under distillation from the unpruned model."""

    finetune: bool = flag(
        False,
        "Fine-tune what --mask_loc leaves of the model; --do_train with --mask_loc says so too. Defaults of its own: "
        "--learning_rate 1e-4, --num_train_epochs 2, --per_device_train_batch_size 8, accumulated to "
        f"{RELEASED_BATCH} blocks a step, --eval_steps and --save_steps 0.1, --load_best_model_at_end True.",
    )
    lora_r: int = flag(128, "Rank of LoRA.")
    lora_alpha_ratio: float = flag(4.0, "LoRA's alpha over its rank: the factor of its update.")
    lora_dropout: float = flag(0.05, "Dropout before LoRA's matrices.")
    full_ft: bool = flag(False, "Train all weights in place of LoRA; leaves no adapter.")
    train_lm_head: bool | None = flag(
        None, "Train the lm_head too, whole; default: where it is not tied to the embeddings."
    )
    epoch_f: float | None = flag(
        None, "Passes over the training blocks in fine-tuning; default: --num_train_epochs, here 2."
    )
    distill_ce_loss_alpha: float = flag(
        0.01, "Weight of the KL to the unpruned model beside the cross-entropy; --distill False: none."
    )
    distill_hidden_alpha: float = flag(
        0.0, "Weight of 1 minus the cosine to the unpruned model's hidden states, on the kept dims; 0: none."
    )
    early_stopping_patience: int | None = flag(
        None,
        "Evaluations (--eval_steps) without a better validation perplexity after which training ends; default: never.",
    )
    teacher_cache: str | None = flag(
        None,
        "Folder for the unpruned model's predictions on the training blocks: computed once, after which it leaves the "
        "memory; one subfolder for each model, text, --teacher_top_k and --distill_temp.",
    )
    teacher_top_k: int = flag(64, "Tokens per position that the cache keeps; all others count as one.")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_ranges(self)
        if self.teacher_cache is not None and self.distill_hidden_alpha:
            raise InputError("--teacher_cache holds no hidden states: leave it or --distill_hidden_alpha out")


@dataclass
class EvalSettings:
    """What is measured of the pruned model, and where it goes."""

    save_loc: str | None = flag(None, "Folder of results.json, plan.json and the plots; default: the output folder.")
    eval_split: Literal["validation", "test"] = flag(
        "validation", "Split that the perplexity is reported on; choose nothing on the test split."
    )
    speed_batches: int = flag(20, "Batches timed, dense and pruned turn about; 0: no timing.")
    prompt_tokens: int = flag(
        32, "Tokens that each model adds to eight short prompts, greedily: the page shows where they part; 0: none."
    )
    do_zero_eval: bool = flag(
        False,
        "Score zero-shot tasks by the lm-evaluation-harness; `lora_ft_vib.py --do_zero_eval` alone: the shipped one.",
    )
    zero_eval_tasks: list[str] | None = flag(
        None,
        "Tasks, groups or tags of the harness; tva_offline needs no download; default: hellaswag winogrande openbookqa "
        "arc_easy arc_challenge piqa boolq rte.",
    )
    num_fewshot: int | None = flag(None, "Examples shown before a zero-shot task's question; default: the task's own.")
    zero_eval_limit: int | None = flag(None, "Examples of a zero-shot task that are scored; default: all.")
    compare_dense: bool = flag(False, "Score the unpruned model on the zero-shot tasks too, side by side.")
    write_out: bool = flag(False, "Write every zero-shot example with its log-likelihoods as JSONL.")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_ranges(self)
        if self.zero_eval_tasks is not None:  # spaces or commas, as the harness's own command takes them
            self.zero_eval_tasks = [name for names in self.zero_eval_tasks for name in names.split(",") if name]


@dataclass
class SampleSettings(_InRange):
    """Text that a model writes, for masks to be learned from: OUTPUT_DIR/text.jsonl is a --dataset_name then."""

    model_name_or_path: str | None = flag(None, "The checkpoint that writes: the one to be pruned.")
    output_dir: str = flag("out/own_text", "Folder of the text.")
    overwrite_output_dir: bool = flag(False, "Replace the text of an earlier run.")
    tokens: int = flag(1_000_000, "Tokens written, at least: batches are whole.")
    page: int = flag(256, "Tokens of a page.")
    batch_size: int = flag(64, "Pages written at a time; another number gives other pages.")
    temperature: float = flag(0.8, "1 draws as the model predicts; below 1 likely tokens come oftener.")
    seed: int = flag(42, "Of the words that pages open with, and of the draws.")
    dtype: Precision = flag("auto", "Precision of the weights; auto: as stored on a GPU, float32 on a CPU.")
    use_cpu: bool = flag(False, "Leave a GPU alone.")


@dataclass
class CompareSettings:
    """A comparison of methods on one model or more; other flags are those of prune, and go to every cell.

    Attributes:
        flags: These other flags, as words of a command line.
    """

    models: list[str] = _flags(
        ["mistral_saves_tva/mini_mistral", "llama3_saves_tva/mini_llama3"], "Checkpoint folders or hub ids"
    )
    dataset: str = flag("python_docs", "Text that units are chosen by and that is tested first.")
    other_texts: list[str] = _flags(["package_readmes"], "Texts from other sources, tested only")
    split: Literal["validation", "test"] = flag("test", "Split of all texts; choose nothing on the test split.")
    methods: list[str] = _flags(
        list(METHODS), f"Of {', '.join(METHODS)} and {VIB_ONCE}; vib trains gates for each sparsity, {VIB_ONCE} to the "
        "largest only"
    )  # fmt: skip
    weight_updates: list[str] = _flags(["fold", "refit"], "Instant weight updates")
    sparsities: list[float] = _flags([0.2, 0.35, 0.5, 0.65], "Shares of the decoder to remove")
    masks: list[str] = _flags([], "Masks of vib that were learned before, one for each sparsity; none are trained")
    seeds: list[int] = _flags([0, 1, 2], "Seeds of the calibration blocks and of training")
    output: str = flag("out/compare", "Folder of cells, table and picture.")
    block_size: int = flag(256, "Tokens of a block and of an evaluation window.")
    train_samples: int = flag(1200, "Blocks that gates are trained on.")
    calibration_samples: int = flag(128, "Blocks of the one-shot scores and of the update.")
    max_eval_samples: int = flag(256, "Windows of each text, at most.")
    eval_batch_size: int = flag(8, "Windows of a forward pass.")
    zero_eval_limit: int = flag(50, "Examples of each zero-shot task.")
    zero_eval_sparsities: list[float] = _flags(
        [0.5], "Where --zero_eval_tasks, or our offline ones, are scored too, perhaps nowhere"
    )
    zero_eval_seeds: list[int] = _flags([0], "The seeds of these cells")
    threads: int | None = flag(None, "CPU threads; default: as many as torch takes.")
    flags: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Checks the ranges, and that nothing is compared with itself."""
        check_ranges(self)
        known = (*METHODS, VIB_ONCE)
        for name in ("methods", "weight_updates", "sparsities", "seeds"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise InputError(f"--{name} {' '.join(map(str, given))}: one is given twice; give each once")
        wrong = [method for method in self.methods if method not in known]
        if wrong:
            raise InputError(f"--methods {' '.join(wrong)}: give some of {', '.join(known)}")
        names = [Path(model).name for model in self.models]
        if len(set(names)) < len(names):
            raise InputError(f"--models {' '.join(self.models)}: two have the same name; give each once")
        texts = [self.dataset, *self.other_texts]
        if len(set(texts)) < len(texts):
            raise InputError(f"--other_texts {' '.join(self.other_texts)}: one is given twice, or is the --dataset too")
