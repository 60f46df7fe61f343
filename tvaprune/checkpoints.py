"""Checkpoints of `transformers.Trainer`, of gates and of fine-tuning alike.

One is marked before anything else is in it and told what it belongs to when all else is: what lacks the mark is another
tool's and stays, what lacks the identity, or a file, is half a checkpoint and does not count.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ProgressCallback
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from tvaprune import endings, ranks
from tvaprune.errors import InputError
from tvaprune.files import MARK_NAME, discard, first_folder, is_ours, mark, read_json
from tvaprune.identity import IDENTITY_NAME, Identity, write_identity
from tvaprune.models.pruned import shared_names

_NEEDED = (IDENTITY_NAME, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)  # without one, another result
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, ADAPTER_SAFE_WEIGHTS_NAME)
_RANDOM = "rng_state.pth"  # of one process; of several each has its own


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns all ``checkpoint-*`` of a folder, whosesoever, by their step."""
    found = (path for path in folder.glob("checkpoint-*") if path.name.split("-")[-1].isdigit())
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def own_checkpoints(folder: Path) -> list[Path]:
    """Returns those that this tool wrote, whole or half."""
    return [path for path in checkpoints_in(folder) if is_ours(path) or (path / IDENTITY_NAME).is_file()]


def missing_in(checkpoint: Path) -> list[str]:
    """Returns what a checkpoint lacks to be gone on from."""
    missing = [name for name in _NEEDED if not (checkpoint / name).is_file()]
    if not any((checkpoint / name).is_file() for name in _WEIGHTS):
        missing.append(_WEIGHTS[0])
    if not processes_of(checkpoint):
        missing.append(_RANDOM)
    return missing


def processes_of(checkpoint: Path) -> int:
    """Returns how many processes a checkpoint's run had; 0: its random states are not there."""
    return int((checkpoint / _RANDOM).is_file()) or len(list(checkpoint.glob("rng_state_*.pth")))


def check_whole(checkpoint: Path) -> None:
    """Raises `InputError` if a checkpoint lacks a file: Trainer would go on without it, to another result."""
    missing = missing_in(checkpoint)
    if missing:
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: holds no {missing[0]}; give a whole checkpoint-* folder of such a "
            "run"
        )
    if (had := processes_of(checkpoint)) != ranks.launched():
        raise InputError(
            f"--resume_from_checkpoint {checkpoint}: is of a run of {had} processes, this one has {ranks.launched()}: "
            f"start it with as many (torchrun --nproc_per_node {had})"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last whole checkpoint of an output folder; says which later ones are not whole."""
    for path in reversed(checkpoints_in(folder)):
        missing = missing_in(path)
        if not missing:
            return path
        print(f"note: {path} is half a checkpoint (no {missing[0]}) and does not count")
    return None


def check_ours(folder: Path) -> None:
    """Raises `InputError` if checkpoints of another tool lie in an output folder: Trainer would rotate them away."""
    own = own_checkpoints(folder)
    for path in checkpoints_in(folder):
        if any(path.iterdir()) and path not in own:
            raise InputError(
                f"--output_dir {folder}: {path.name} is not of this tool (no {MARK_NAME} in it); move it away, or give "
                "another folder"
            )


class CheckpointedTrainer(Trainer):
    """A `Trainer` whose checkpoints count only when whole, and which ends between two steps when asked to.

    Args:
        identity: What its checkpoints belong to.
        bar: What shows its progress in place of transformers' own, where any is shown.
    """

    _rows: tuple[int, ...] = ()  # of each batch of the step; a loss alone, without a training, has none

    def __init__(self, *args: Any, identity: Identity, bar: TrainerCallback, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # a loss is a mean: Trainer divides it by the accumulation steps
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(bar)
        self.identity = identity
        self._resumed: str | None = None
        self.add_callback(_AtSteps(self._find_best))
        model: Any = self.model  # frozen weights and buffers are the same in all processes, or sharded
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        frozen += [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        if self.accelerator.ddp_handler is not None:  # else every gradient is there twice
            self.accelerator.ddp_handler.gradient_as_bucket_view = True

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Trains; an earlier run's checkpoints, or halves that this one left, go when all else is built."""
        self._resumed = resume_from_checkpoint
        with endings.at_steps():
            result = super().train(resume_from_checkpoint, *args, **options)
        if self.args.should_save:  # also where a kill came between the last checkpoint and this
            self._rotate(Path(str(self.args.output_dir)), self.args.save_total_limit)
        return result

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """Returns the batches of a step, and notes how many rows each has: an epoch's last may have fewer."""
        found = super().get_batch_samples(*args, **options)
        self._rows = tuple(len(batch["input_ids"]) for batch in found[0])
        return found

    def of_step(self, loss: torch.Tensor, rows: int) -> torch.Tensor:
        """Returns a batch's loss so that the mean over the step's batches, which `Trainer` takes, is that of all rows.

        Args:
            rows: Of the batch.
        """
        share = rows * len(self._rows) / sum(self._rows) if self._rows else 1.0
        return loss if share == 1 else share * loss

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Trains no further where the checkpoint is of the step that ended a run: `Trainer` asks after steps alone."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _save(self, *args: Any, **options: Any) -> None:
        """Saves weights by their names in memory, by which `Trainer` reads them: a checkpoint's experts have others."""
        if not isinstance(self.model, PreTrainedModel):
            return super()._save(*args, **options)
        model: Any = self.model
        model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
        try:
            super()._save(*args, **options)
        finally:
            del model.save_pretrained

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Raises `InputError` if a checkpoint lacks a weight: it would stay what it was, and nothing would be said."""
        model: Any = self.model
        lacking = [names for names in shared_names(model) if set(names) <= set(load_result.missing_keys)]
        if lacking:
            raise InputError(
                f"--output_dir {self.args.output_dir}: a checkpoint in it has no weights of {lacking[0][0]}, as an "
                "older version of this tool wrote them; begin anew"
            )

    def _save_checkpoint(self, model: Any, trial: object) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            discard(folder)
            with first_folder(folder) as marked:
                mark(marked)
        ranks.wait()
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # older ones go when this one is whole
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        ranks.wait()  # whole is what holds the random states of all processes
        if self.args.should_save:
            write_identity(folder, self.identity)
            self._rotate(folder.parent, limit)
        ranks.wait()

    def _find_best(self) -> None:
        """Sets the best checkpoint to where it lies now: `Trainer` forgets the path of a folder that was moved."""
        if self._resumed is None:
            return
        resumed = Path(self._resumed)
        best = read_json(resumed / TRAINER_STATE_NAME).get("best_model_checkpoint")
        if best is not None:
            places = [folder / Path(best).name for folder in (Path(str(self.args.output_dir)), resumed.parent)]
            self.state.best_model_checkpoint = next((str(path) for path in places if path.is_dir()), best)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint, if it is there."""
        best = Path(str(self.state.best_model_checkpoint))
        if not best.is_dir():
            raise InputError(
                f"--load_best_model_at_end: the best checkpoint, {best.name}, is no longer in {self.args.output_dir}; "
                "train again, or give --load_best_model_at_end False"
            )
        super()._load_best_model()

    def _rotate(self, folder: Path, limit: int | None) -> None:
        """Removes the oldest checkpoints of this tool beyond a limit, not the best one."""
        best = Path(self.state.best_model_checkpoint or "").name
        own = own_checkpoints(folder)
        spare = [path for path in own[:-1] if path.name != best]
        surplus = len(own) - limit if limit else 0
        for path in spare[: max(0, surplus)]:
            discard(path)


class _AtSteps(TrainerCallback):
    """Clears old checkpoints when training begins; looks at the signals before each step, when the last is saved.

    From the first step on each process draws for itself (gates, dropout): the order of the data, drawn before, is one.
    """

    def __init__(self, find_best: Callable[[], None]) -> None:
        self._find_best, self._draws_apart = find_best, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._find_best()
        if args.should_save:
            for path in own_checkpoints(Path(str(args.output_dir))):
                if state.global_step == 0 or missing_in(path):  # else it goes on
                    discard(path)
        self._draws_apart = ranks.count() > 1 and state.global_step == 0
        if state.global_step > 0:  # what `Trainer` forgets: the checkpoint's run had ended, early perhaps
            told: Any = state.stateful_callbacks or {}
            control.should_training_stop = bool(
                told.get("TrainerControl", {}).get("args", {}).get("should_training_stop")
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._draws_apart:
            set_seed(args.seed, device_specific=True)
            self._draws_apart = False
        endings.check_together()
