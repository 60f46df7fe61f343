"""Every flag of both scripts, typed, with its help and its checks; transformers' TrainingArguments come on top.

A default of ``None`` means "by the model, the target or the length of the run", as the help says; what the user sets is
never overwritten.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tvaprune.errors import InputError

RELEASED_MAX_WINDOW = 8192  # the longest window that the released tool reports (Llama-3, Mistral)
RELEASED_BATCH = 128  # blocks of one fine-tuning step, over all devices and accumulation steps
# Below this many tokens the released gate settings cannot reach their target (method: section 10). Tokens, not steps:
# the same run in larger batches takes fewer steps and is no shorter.
SHORT_RUN_TOKENS = 512_000


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """The model to prune."""

    model_name_or_path: str | None = _flag(None, "A Llama, Mistral, Qwen2 or Qwen3 checkpoint: a folder or a hub id.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag(
        "auto", "Precision of the weights; auto: as stored on a GPU, float32 on a CPU."
    )


@dataclass
class DataArguments:
    """The text that gates are trained on and perplexity is measured on."""

    dataset_name: str = _flag(
        "c4",
        "python_docs, package_readmes, c4, wikitext2, ptb, or a path: .txt, .jsonl, .parquet, a save_to_disk folder.",
    )
    data_dir: str = _flag("data", "Folder with local copies of hub data sets, e.g. data/Salesforce/wikitext/...")
    block_size: int = _flag(512, "Tokens of a training block.")
    ctx_length: int | None = _flag(
        None, f"Tokens of an evaluation window; default: the model's longest, at most {RELEASED_MAX_WINDOW}."
    )
    max_train_samples: int | None = _flag(None, "Training blocks drawn; default: 4,500, for one-shot scores 128.")
    max_eval_samples: int | None = _flag(None, "Evaluation windows drawn; default: all, of C4 256.")
    protocol: Literal["own", "wikitext2-2048", "wikitext2-4096", "ptb-2048", "ptb-4096", "c4-2048", "c4-4096"] = _flag(
        "own",
        "What perplexity is reported on. own: --eval_split of --dataset_name, windows of --ctx_length; else a test "
        "text as the field takes it, to stand beside published figures.",
    )

    def __post_init__(self) -> None:
        """Checks the sizes."""
        sizes = ("block_size", "ctx_length", "max_train_samples", "max_eval_samples")
        _check_positive(self, *sizes)
        if min(self.block_size, self.ctx_length or 2) < 2:
            raise InputError("--block_size and --ctx_length need at least 2 tokens: one is predicted from the other")


@dataclass
class PruneArguments:
    """Mask learning, and applying a mask."""

    prune_method: Literal["vib", "magnitude", "wanda_sp", "flap", "taylor", "taylor_global", "bonsai", "random"] = (
        _flag(
            "vib",
            "How units are chosen: vib trains gates; the others score in one shot (taylor: LLM-Pruner's). Applying a "
            "mask, the default is as its record says.",
        )
    )
    target_sparsity: list[float] = field(
        default_factory=lambda: [0.5],
        metadata={
            "help": "Share of the decoder layers' parameters to remove, between 0 and 1. Several: one choice of units, "
            "its gates trained to the largest, is cut at each."
        },
    )
    vib_learning_rate: float | None = _flag(
        None,
        f"Learning rate of the gates; default 0.1 in a short run (under {SHORT_RUN_TOKENS:,} tokens) or above 50%% "
        "sparsity, else 0.05.",
    )
    reg_learning_rate: float = _flag(0.1, "Learning rate of the two Lagrangian multipliers.")
    kl_factor: float = _flag(1e-6, "Weight of the information loss.")
    att_mul: float | None = _flag(
        None, "Weight of the attention gates within it; default 256, above 60%% sparsity 512."
    )
    inter_mul: float = _flag(1.0, "Weight of the MLP gates within it.")
    emb_mult: float = _flag(30.0, "Weight of the hidden gates at the embedding within it.")
    lagrangian_warmup_epochs: float | None = _flag(
        None, "Epochs over which the target sparsity rises; default 0.1, above 60%% sparsity 0.2, in a short run 0.3."
    )
    beta: float | None = _flag(
        None, "Sharpness of the keep probability at the end; default by family: Llama 10, Mistral 5."
    )
    beta_start: float | None = _flag(
        None, "Sharpness at the start, rising geometrically; default 0.5 in a short run, else the final value."
    )
    settle_share: float = _flag(
        0.33, "Last share of the steps, in which the choice stands and the kept gates' means train on without noise."
    )
    gate_noise: Literal["token", "sequence"] = _flag("token", "What a gate is drawn anew for.")
    gate_ce_weight: float = _flag(0.0, "Weight of the cross-entropy beside the distillation of the gates.")
    initial_log_variance: float | None = _flag(
        None, "Start of the gates' log-variances; default -5 in a short run, else the released -9."
    )
    dim_multiple: int | None = _flag(
        None,
        "Multiple that hidden and MLP widths are adjusted to; 0: off; default: as the mask's record says; without one: "
        "128, in a model under 1,024 wide 8.",
    )
    keep_one_kv_head: bool | None = _flag(
        None,
        "Keep at least one KV head in every layer, as the released tool does; default: as the mask's record says; "
        "without one: False.",
    )
    uniform: bool | None = _flag(
        None,
        "Keep as many KV heads and MLP channels in every layer: a stock model, which any engine serves; default: as "
        "the mask's record says; without one: False.",
    )
    tensor_parallel: int | None = _flag(
        None,
        "Keep KV heads and MLP channels in multiples of this, to serve on as many devices; default: as the mask's "
        "record says; without one: 1.",
    )
    mask_loc: str | None = _flag(None, "A mask file (mask_info_*.pkl) to apply.")
    save_pruned: str | None = _flag(None, "Folder to write the narrower model to, as a Hugging Face checkpoint.")
    weight_update: Literal["none", "fold", "refit"] = _flag(
        "refit",
        "Instant weight update: none: cut only; fold: the gates' means (flap: its bias terms, where there are biases) "
        "go into the weights; refit: the kept weights' closed-form optimum on training blocks, where that helps.",
    )
    refit_samples: int = _flag(128, "Training blocks whose statistics the refit fits.")
    refit_offload: bool = _flag(
        False, "Keep the unpruned model and its activations on the CPU during the refit, a layer at a time on the GPU."
    )

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for target in self.target_sparsity:
            if not 0 < target < 1:
                raise InputError(
                    f"--target_sparsity is {target}: it is a share of the decoder's parameters, give a "
                    "number between 0 and 1, such as 0.5"
                )
        if not 0 <= self.settle_share < 1:
            raise InputError(f"--settle_share is {self.settle_share}: give a share of the steps, from 0 to below 1")
        if self.gate_ce_weight < 0:
            raise InputError(f"--gate_ce_weight is {self.gate_ce_weight}: give 0 or more")
        if self.dim_multiple is not None and self.dim_multiple < 0:
            raise InputError(f"--dim_multiple is {self.dim_multiple}: give a width such as 128, or 0 for no adjustment")
        if self.mask_loc is not None and not Path(self.mask_loc).is_file():
            raise InputError(f"--mask_loc {self.mask_loc}: there is no such file; give a mask_info_*.pkl")
        _check_positive(self, "vib_learning_rate", "reg_learning_rate", "beta", "beta_start")
        _check_positive(self, "tensor_parallel", "refit_samples")


@dataclass
class DistillArguments:
    """Distillation from the unpruned model."""

    distill: bool = _flag(
        True, "Train on the KL to the unpruned model's own logits (gates: in place of cross-entropy; one more forward)."
    )
    distill_temp: float = _flag(1.0, "Temperature of the distillation.")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _check_positive(self, "distill_temp")


@dataclass
class FinetuneArguments:
    """Recovering the narrower model's quality: LoRA, or all weights, under distillation from the unpruned model."""

    finetune: bool = _flag(
        False,
        "Fine-tune what --mask_loc leaves of the model; --do_train with --mask_loc says so too. Defaults of its own: "
        "--learning_rate 1e-4, --num_train_epochs 2, --per_device_train_batch_size 8, accumulated to "
        f"{RELEASED_BATCH} blocks a step, --eval_steps and --save_steps 0.1, --load_best_model_at_end True.",
    )
    lora_r: int = _flag(128, "Rank of LoRA.")
    lora_alpha_ratio: float = _flag(4.0, "LoRA's alpha over its rank: the factor of its update.")
    lora_dropout: float = _flag(0.05, "Dropout before LoRA's matrices.")
    full_ft: bool = _flag(False, "Train all weights in place of LoRA; leaves no adapter.")
    train_lm_head: bool | None = _flag(
        None, "Train the lm_head too, whole; default: where it is not tied to the embeddings."
    )
    epoch_f: float | None = _flag(
        None, "Passes over the training blocks in fine-tuning; default: --num_train_epochs, here 2."
    )
    distill_ce_loss_alpha: float = _flag(
        0.01, "Weight of the KL to the unpruned model beside the cross-entropy; --distill False: none."
    )
    distill_hidden_alpha: float = _flag(
        0.0, "Weight of 1 minus the cosine to the unpruned model's hidden states, on the kept dims; 0: none."
    )
    early_stopping_patience: int | None = _flag(
        None,
        "Evaluations (--eval_steps) without a better validation perplexity after which training ends; default: never.",
    )
    teacher_cache: str | None = _flag(
        None,
        "Folder for the unpruned model's predictions on the training blocks: computed once, after which it leaves the "
        "memory; one subfolder for each model, text, --teacher_top_k and --distill_temp.",
    )
    teacher_top_k: int = _flag(64, "Tokens per position that the cache keeps; all others count as one.")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _check_positive(self, "lora_r", "lora_alpha_ratio", "epoch_f", "early_stopping_patience", "teacher_top_k")
        for name in ("distill_ce_loss_alpha", "distill_hidden_alpha"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name} is {getattr(self, name)}: give a weight of 0 or more")
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"--lora_dropout is {self.lora_dropout}: give a share from 0 to below 1")
        if self.teacher_cache is not None and self.distill_hidden_alpha:
            raise InputError("--teacher_cache holds no hidden states: leave it or --distill_hidden_alpha out")


@dataclass
class EvalArguments:
    """What is measured of the pruned model, and where it goes."""

    save_loc: str | None = _flag(None, "Folder of results.json, plan.json and the plots; default: the output folder.")
    eval_split: Literal["validation", "test"] = _flag(
        "validation", "Split that the perplexity is reported on; choose nothing on the test split."
    )
    speed_batches: int = _flag(20, "Batches timed, dense and pruned turn about; 0: no timing.")
    do_zero_eval: bool = _flag(
        False, "Score zero-shot tasks by the lm-evaluation-harness; alone: the shipped model, offline."
    )
    zero_eval_tasks: list[str] | None = _flag(
        None,
        "Tasks, groups or tags of the harness; tva_offline needs no download; default: hellaswag winogrande openbookqa "
        "arc_easy arc_challenge piqa boolq rte.",
    )
    num_fewshot: int | None = _flag(None, "Examples shown before a zero-shot task's question; default: the task's own.")
    zero_eval_limit: int | None = _flag(None, "Examples of a zero-shot task that are scored; default: all.")
    compare_dense: bool = _flag(False, "Score the unpruned model on the zero-shot tasks too, side by side.")
    write_out: bool = _flag(False, "Write every zero-shot example with its log-likelihoods as JSONL.")

    def __post_init__(self) -> None:
        """Checks the ranges."""
        _check_positive(self, "zero_eval_limit")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise InputError(f"--num_fewshot is {self.num_fewshot}: give the number of examples to show, 0 or more")
        if self.zero_eval_tasks is not None:  # spaces or commas, as the harness's own command takes them
            self.zero_eval_tasks = [name for names in self.zero_eval_tasks for name in names.split(",") if name]
        if self.speed_batches < 0:
            raise InputError(
                f"--speed_batches is {self.speed_batches}: give the number of batches to time, or 0 for none"
            )


def _check_positive(arguments: Any, *names: str) -> None:
    for name in names:
        value = getattr(arguments, name)
        if value is not None and not value > 0:  # NaN is not
            raise InputError(f"--{name} is {value}: give a number above 0")
