"""What a run stands on: device and precision, the loaded model, versions for the record, and the end of a command."""

import platform
import shlex
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
)
from transformers.utils import logging

from tvaprune import __version__
from tvaprune.config import RELEASED_BATCH
from tvaprune.errors import InputError
from tvaprune.families import family_of

RECORDED_PACKAGES = ("tvaprune", "torch", "transformers", "datasets", "accelerate", "peft", "lm_eval")
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130
GOES_ON = "--resume_from_checkpoint True goes on from the last checkpoint"


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments with this project's defaults."""

    output_dir: str = field(default="out", metadata={"help": "Folder of checkpoints, masks and the log."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace what an earlier run left in the output folder."}
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training blocks."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Blocks a device takes at a step."})
    eval_strategy: str = field(default="steps", metadata={"help": "When masks are scored."})
    eval_steps: float = field(default=50, metadata={"help": "Steps between two scorings of the mask."})
    save_steps: float = field(default=100, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    disable_tqdm: bool | None = field(
        default=False, metadata={"help": "Print logs as lines in place of a progress bar."}
    )
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(),
        metadata={"help": "Pin the memory of batches; default: where there is a GPU."},
    )
    report_to: str | None = field(default="none", metadata={"help": "Where logs go: none, tensorboard, wandb, ..."})

    def __post_init__(self) -> None:
        """Keeps `--do_eval` as it was given: transformers sets it wherever `eval_strategy` is not no."""
        given = self.do_eval
        super().__post_init__()
        self.do_eval = given


@dataclass
class FinetuneRunArguments(RunArguments):
    """The same with the released defaults of fine-tuning, and the best adapter kept."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the training blocks."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Blocks a device takes at a time."})
    gradient_accumulation_steps: int = field(
        default=0, metadata={"help": f"Batches a step; 0: as many as make {RELEASED_BATCH} blocks."}
    )
    eval_steps: float = field(default=0.1, metadata={"help": "Steps between two validation perplexities, or share."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between two checkpoints, or share of the run."})
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logs."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Keep the best adapter, not the last."})
    metric_for_best_model: str | None = field(default="perplexity", metadata={"help": "What best means."})
    greater_is_better: bool | None = field(default=False, metadata={"help": "Whether more of it is better."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Go on with the count of early stopping."}
    )

    def __post_init__(self) -> None:
        """Resolves the accumulation, once the number of devices is known."""
        super().__post_init__()
        if self.gradient_accumulation_steps == 0:
            blocks = self.train_batch_size * self.world_size
            self.gradient_accumulation_steps = max(1, round(RELEASED_BATCH / blocks))


class _Parser(HfArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see --help")


def parse(classes: tuple[Any, ...], arguments: list[str] | None = None) -> tuple[Any, ...]:
    """Parses the command line into dataclasses.

    Raises:
        InputError: If a flag is unknown, or a value cannot be used.
    """
    try:
        return tuple(_Parser(classes).parse_args_into_dataclasses(arguments))
    except InputError:
        raise
    except (ValueError, ImportError) as error:  # TrainingArguments' own checks
        raise InputError(" ".join(str(error).split())) from error


def peek(classes: tuple[Any, ...], arguments: list[str] | None = None) -> Namespace:
    """Returns the flags' values as they are, unchecked: for what decides how the rest is read."""
    return _Parser(classes).parse_args(arguments)


def run_command(command: Callable[[], None], goes_on: str = GOES_ON) -> int:
    """Runs a command and returns its exit code; a user's mistake ends in one line.

    Args:
        goes_on: What an interrupted user is told.
    """
    logging.set_verbosity_error()
    try:
        command()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print(f"interrupted; {goes_on}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def load_config(path: str | None) -> Any:
    """Loads the config of a supported checkpoint.

    Raises:
        InputError: If there is none, or its family is not supported.
    """
    if path is None:
        raise InputError("--model_name_or_path is missing: give a checkpoint's folder or hub id")
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _unloadable(path, error) from error
    family_of(config)
    return config


def load_model(path: str | None, dtype: str, device: torch.device) -> tuple[PreTrainedModel, Any]:
    """Loads a supported checkpoint and its tokenizer.

    Raises:
        InputError: If there is no such checkpoint, it has no weights, or its family is not supported.
    """
    config = load_config(path)
    torch_dtype = ("auto" if device.type == "cuda" else "float32") if dtype == "auto" else dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path)
        model = AutoModelForCausalLM.from_pretrained(config.name_or_path, config=config, dtype=torch_dtype)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise _unloadable(path, error) from error
    module: torch.nn.Module = model
    module.to(device).eval()
    return model, tokenizer


def _unloadable(path: str | None, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:200]
    return InputError(
        f"--model_name_or_path {path}: cannot be loaded ({reason}); give a folder with config.json, safetensors "
        "weights and a tokenizer, or a hub id that is in the cache or reachable"
    )


def prepare_folder(flag: str, folder: Path, may_hold_files: bool) -> None:
    """Makes an output folder, and refuses one that is in use.

    Args:
        flag: The flag that named it, for the message.
        may_hold_files: Whether the user said so: overwriting, or going on with an earlier run.

    Raises:
        InputError: If the folder cannot be written, or holds files that nothing says to touch.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--{flag} {folder}: cannot be written ({error.strerror}); give another folder") from error
    if any(folder.iterdir()) and not may_hold_files:
        raise InputError(
            f"--{flag} {folder}: is not empty; go on with --resume_from_checkpoint True, replace it with "
            "--overwrite_output_dir, or give another folder"
        )


def describe_device(device: torch.device) -> str:
    """Returns the hardware's name for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Returns the versions that a run is recorded with."""
    return {"python": platform.python_version()} | {name: _version(name) for name in RECORDED_PACKAGES}


def _version(name: str) -> str:
    return __version__ if name == "tvaprune" else version(name)  # ours may be run from a checkout


def command_line() -> str:
    """Returns the command as it was typed."""
    return shlex.join(["python", *sys.argv])
