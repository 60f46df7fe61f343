"""Where a command is and what is left of it: estimated of counted work, by a clock that the test turns."""

from types import SimpleNamespace

import pytest

from tvaprune.phases import Phases, TrainingBar, told_bar

PHASES = {"look": ("dense",), "train": ("rotation", "gates"), "cut": ("refit", "pruned")}
COUNTED = {"dense": 10.0, "rotation": 20.0, "gates": 180.0, "refit": 30.0, "pruned": 10.0}


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds

    def passes(self, seconds):
        self.seconds += seconds


@pytest.fixture
def clock():
    return Clock()


def test_a_phase_is_told_of_those_that_are_asked_for(capsys):
    phases = Phases({"a": (), "b": None})
    for name in ("a", "x", "b"):
        phases.begin(name)
    Phases({"a": ()}).begin("a")
    assert capsys.readouterr().out == "phase 1 of 2: a\nphase 2 of 2: b\n"


def test_what_is_left_is_the_work_to_come_at_the_pace_so_far(clock, capsys):
    phases = Phases(PHASES, COUNTED, clock)
    phases.begin("look")
    clock.passes(5000)  # of loading, which is no counted work
    assert phases.at("gates", 0.5) == "phase 1 of 3"  # nor is a part of another phase
    phases.start("dense")
    assert phases.at("dense", 0.0) == "phase 1 of 3"  # nothing was measured
    clock.passes(60)
    assert phases.at("dense", 0.5) == "phase 1 of 3, about 49 min left"  # 5 done in a minute, 245 to come
    clock.passes(60)
    phases.at("dense", 1.0)
    clock.passes(700)  # what follows is not the measured part's
    phases.begin("train")
    phases.start("gates")  # what was before it was not timed
    clock.passes(30)
    # 18 of 200 in half a minute: 162 to come at this pace, 40 after them at that of 28 in two and a half minutes
    assert phases.at("gates", 0.1) == "phase 2 of 3, about 8 min left"
    clock.passes(270)
    phases.at("gates", 1.0)
    phases.begin("cut")
    clock.passes(50)
    assert phases.at("pruned", 0.0) == "phase 3 of 3, less than a minute left"  # the refit is done
    assert capsys.readouterr().out.splitlines() == [
        "phase 1 of 3: look",
        "phase 2 of 3: train, about 48 min left",
        "phase 3 of 3: cut, about 1 min left",  # 190 in seven minutes: 40 in a minute and a half
    ]


@pytest.mark.parametrize(("slower", "left"), [(1, "about 40 min"), (2, "about 80 min"), (60, "about 40.0 h")])
def test_a_slower_machine_has_more_left(slower, left, clock, capsys):
    phases = Phases(PHASES, COUNTED, clock)
    phases.begin("look")
    clock.passes(100 * slower)
    phases.begin("train")
    assert f", {left} left" in capsys.readouterr().out


def test_what_is_known_better_is_counted_so(clock, capsys):
    phases = Phases(PHASES, COUNTED, clock)
    phases.recount(("dense", "pruned", "unknown"), 4)
    phases.begin("look")
    clock.passes(240)
    phases.begin("train")
    assert ", about 27 min left" in capsys.readouterr().out  # 200 + 30 + 40 at 40 in four minutes, not 240 at 10
    assert COUNTED["dense"] == 10  # whose it is


def test_steps_of_an_earlier_run_are_no_measure(clock):
    phases = Phases({"train": ("gates",)}, COUNTED, clock)
    phases.begin("train")
    phases.start("gates", 0.5)
    clock.passes(60)
    assert phases.at("gates", 0.6) == "about 4 min left"  # the only phase: its number says nothing


def test_what_nobody_counts_is_named_and_in_no_estimate(clock, capsys):
    phases = Phases({"look": ("dense",), "choose": None, "cut": ("refit",), "tasks": None}, COUNTED, clock)
    phases.begin("look")
    clock.passes(60)
    phases.begin("choose")
    clock.passes(6000)
    for name in ("cut", "tasks"):
        phases.begin(name)
        clock.passes(180)
    assert capsys.readouterr().out.splitlines() == [
        "phase 1 of 4: look",
        "phase 2 of 4: choose, about 3 min left without choose, tasks",
        "phase 3 of 4: cut, about 3 min left without tasks",
        "phase 4 of 4: tasks",
    ]


def test_of_work_that_nobody_counted_nothing_is_said(clock, capsys):
    phases = Phases(PHASES, {}, clock)
    for name in PHASES:
        phases.begin(name)
        clock.passes(60)
        assert "left" not in phases.at("gates", 0.5)
    assert "left" not in capsys.readouterr().out


@pytest.mark.parametrize("resumed", [0, 4])
def test_a_trainings_bar_tells_it(resumed, clock):
    phases, shown = Phases(PHASES, COUNTED, clock), []
    phases.begin("train")
    bar = TrainingBar(phases, "gates")
    state = SimpleNamespace(global_step=resumed, max_steps=8, is_world_process_zero=False, num_input_tokens_seen=0)
    bar.on_train_begin(None, state, None)
    bar.training_bar = SimpleNamespace(set_description=lambda words, refresh: shown.append(words))
    clock.passes(120)
    state.global_step += 2
    bar.on_step_end(None, state, None)
    left = {0: 6 + 1.78, 4: 2 + 1.78}[resumed]  # two minutes for 45: the steps to come, and 40 after them
    assert shown == [f"phase 2 of 3, about {round(left)} min left"]


def test_a_trainings_bar_moves_with_its_steps(clock):
    bar = TrainingBar(Phases(PHASES, COUNTED, clock), "gates")
    state = SimpleNamespace(global_step=0, max_steps=8, is_world_process_zero=True)
    bar.on_train_begin(None, state, None)
    state.global_step = 2
    bar.on_step_end(None, state, None)
    assert bar.training_bar.n == 2
    bar.training_bar.close()


def test_a_bar_tells_the_share_that_is_done():
    told = []
    with told_bar(4, "counting", "thing", lambda share: told.append(share) or "") as advance:
        for _ in range(4):
            advance()
    assert told == [0.25, 0.5, 0.75, 1.0]
