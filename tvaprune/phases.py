"""Where in its command a run is, and about how long the rest takes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

# The phases that several commands have.
DENSE_MODEL, CUT, ZERO_SHOT = "dense model", "cut", "zero-shot tasks"
# The parts of phases whose work is counted; of a refit and a reconstruction the last one chooses a share of the way.
DENSE_PERPLEXITY, PRUNED_PERPLEXITY = "dense perplexity", "pruned perplexity"
ROTATION, GATE_TRAINING, UNIT_SCORES, FINE_TUNING = "rotation", "gate training", "scores", "fine-tuning"
REFIT, REFIT_CHOICE = "refit", "choice after refit"
RECONSTRUCT, RECONSTRUCT_CHOICE = "reconstruct", "choice after reconstruct"
NARROWING = (CUT, REFIT, REFIT_CHOICE, RECONSTRUCT, RECONSTRUCT_CHOICE)


class Phases:
    """The phases of a command in their order: a line as each begins, and an estimate of the time that is left.

    That is the work still to come, in counted operations, at the speed that this run has shown so far: in the phase at
    hand at this phase's own, after it at that of all phases. Nothing is said before something was measured.

    Args:
        phases: The parts of each phase, by its name; None: nobody counts its work, and its time is in no estimate.
        counted: The operations of each part, as `tvaprune.measure.cost` counts them; one that is not there
            is not done.
        now: A clock, in seconds.
    """

    def __init__(
        self,
        phases: Mapping[str, Sequence[str] | None] | None = None,
        counted: Mapping[str, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._phases, self._counted, self._now = dict(phases or {}), dict(counted or {}), now
        self._names = list(self._phases)
        self._place = -1  # of the phase at hand
        self._seconds = self._work = 0.0  # what was measured in the phases before it
        self._begun = self._base = 0.0  # since when it is measured, and what of its work was behind it then
        self._told = self._done = 0.0  # when it was last heard of, and what was behind it then

    def begin(self, name: str) -> None:
        """Prints that a phase begins; nothing where it was not asked for, or is the only one."""
        if name not in self._phases:
            return
        self._close()
        self._place = self._names.index(name)
        self._restart(0.0)
        if len(self._names) > 1:
            left, unknown = self.left(), [one for one in self._names[self._place :] if self._phases[one] is None]
            beside = f" without {', '.join(unknown)}" if left and unknown else ""
            print(", ".join(filter(None, (f"{self._where()}: {name}", left + beside))), flush=True)

    def start(self, part: str, share: float = 0.0) -> None:
        """Notes that a phase is measured from here on: what came before was no counted work, or not this run's.

        Args:
            part: The part that begins.
            share: Of it, what an earlier run did.
        """
        self._restart(self._up_to(part, share))

    def recount(self, parts: Sequence[str], factor: float) -> None:
        """Corrects the count of some parts by what is known of them now."""
        self._counted |= {part: factor * self._counted[part] for part in parts if part in self._counted}

    def at(self, part: str, share: float) -> str:
        """Notes that a share of a part is done; returns what its bar says."""
        self._told, self._done = self._now(), self._up_to(part, share)
        return ", ".join(filter(None, (self._where(), self.left())))

    def left(self) -> str:
        """Returns about how long the rest of the command takes, in words; nothing while nobody can know."""
        spent, did = self._told - self._begun, self._done - self._base
        seconds, work = (self._seconds + spent, self._work + did) if did > 0 else (self._seconds, self._work)
        here = self._total(self._place) - self._done
        later = sum(map(self._total, range(self._place + 1, len(self._names))))
        if work <= 0 or here + later <= 0:
            return ""
        pace = seconds / work
        return _in_words(here * (spent / did if did > 0 else pace) + later * pace)

    def _where(self) -> str:
        return f"phase {self._place + 1} of {len(self._names)}" if len(self._names) > 1 and self._place >= 0 else ""

    def _restart(self, done: float) -> None:
        self._begun = self._now()
        self._base = self._done = done

    def _close(self) -> None:
        """Adds what the phase at hand measured: one that was not heard of did all that is its own."""
        done, end = (self._done, self._told) if self._done > self._base else (self._total(self._place), self._now())
        if done > self._base:
            self._seconds, self._work = self._seconds + end - self._begun, self._work + done - self._base

    def _parts(self, place: int) -> Sequence[str]:
        return self._phases[self._names[place]] or () if place >= 0 else ()

    def _total(self, place: int) -> float:
        return sum(self._counted.get(part, 0.0) for part in self._parts(place))

    def _up_to(self, part: str, share: float) -> float:
        """Returns the work of the phase at hand up to a share of a part; 0: that is none of its parts."""
        done = 0.0
        for one in self._parts(self._place):
            work = self._counted.get(one, 0.0)
            if one == part:
                return done + share * work
            done += work
        return 0.0


def _in_words(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return "less than a minute left"
    return f"about {minutes} min left" if minutes < 100 else f"about {seconds / 3600:.1f} h left"


@contextmanager
def told_bar(
    total: int, label: str | None, unit: str, at: Callable[[float], str] | None = None
) -> Iterator[Callable[[], None]]:
    """Yields what moves a bar on by one.

    Args:
        label: None: no bar is shown.
        at: Told the share that is done; what it returns stands beside the label.
    """
    with tqdm(total=total, desc=label, disable=label is None, leave=False, unit=unit) as bar:

        def advance() -> None:
            bar.update()
            if label is not None and at is not None:
                bar.set_description(", ".join(filter(None, (label, at(bar.n / total)))), refresh=False)

        yield advance


class TrainingBar(ProgressCallback):
    """A training's bar, which says where in the command it is and what is left of that.

    Args:
        part: The training's, as the phases name it.
    """

    def __init__(self, phases: Phases, part: str) -> None:
        super().__init__()
        self._phases, self._part = phases, part

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Begins to measure, where an earlier run may have done the first steps."""
        super().on_train_begin(args, state, control, **options)
        self._phases.start(self._part, state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        """Moves the bar on."""
        words = self._phases.at(self._part, state.global_step / state.max_steps)
        if self.training_bar is not None:
            self.training_bar.set_description(words, refresh=False)
        super().on_step_end(args, state, control, **options)
