"""What a comparison's cells are run with: their seeds, targets and texts."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support import tiny

from tvaprune.flags.arguments import parse_comparison
from tvaprune.models.rotate import Rotation
from tvaprune.study import cells
from tvaprune.study.grid import Cell, Grid


@pytest.fixture
def grid(tmp_path):
    """Of every kind of choice, at two sparsities, of two seeds."""
    flags = [
        "--models", "m", "--output", tmp_path, "--methods", "vib", "vib_once", "bonsai", "--weight_updates", "refit",
        "--sparsities", 0.3, 0.5, "--seeds", 3, 4, "--train_samples", 16, "--calibration_samples", 8,
        "--zero_eval_sparsities", 0.5, "--zero_eval_seeds", 4, "--zero_eval_limit", 7, "--block_size", 32,
    ]  # fmt: skip
    args = parse_comparison([*map(str, flags)])
    return Grid(args, args.models[0])


@pytest.mark.parametrize("seed", [3, 4])
def test_a_cell_has_its_own_seed(seed, grid, monkeypatch):
    """In its flags, in what is drawn beside them, and in its files."""
    found, cell = [], Cell("vib", "refit", 0.3, seed)
    monkeypatch.setattr(cells, "set_seed", found.append)
    measurement = object.__new__(cells.Measurement)
    measurement.grid = grid
    measurement.base = cells.Run(grid.arguments(cell), None, None)
    monkeypatch.setattr(cells.Run, "dense_model", lambda run: None)
    run = measurement._run(cell, choosing=True)
    assert found == [seed] and run.args.training.seed == seed
    assert grid.mask_path(cell).stem == run.args.output_dir.name == f"vib-0.3-{seed}"


def test_gates_see_the_text_of_training_and_what_scores_or_updates_that_of_calibration(grid):
    def samples(method, choosing):
        args = grid.arguments(Cell(method, "refit", 0.3, 3), choosing)
        return args.data.max_train_samples, args.prune.refit_samples

    assert [samples(method, True) for method in ("vib", "vib_once", "bonsai")] == [(16, 8), (16, 8), (8, 8)]
    assert samples("vib", False) == (8, 8)  # the update's


def test_a_cell_is_learned_and_measured_in_windows_of_one_size(grid):
    data = grid.arguments(grid.cells[0]).data
    assert (data.block_size, data.ctx_length) == (32, 32)


def test_one_choice_for_several_targets_is_made_for_the_largest(grid, monkeypatch):
    def asked(method):
        cell = Cell(method, "refit", 0.3, 3)
        return grid.arguments(cell, choosing=True).prune.target_sparsity, grid.targets(cell)

    assert asked("vib") == ([0.3], [0.3])  # gates of its own
    assert asked("vib_once") == ([0.5], [0.3, 0.5])
    made, run = [], SimpleNamespace(train_blocks=lambda count: None, shape=None, rules=None, rotation=None)
    run.args = run.model = SimpleNamespace(config=None)
    monkeypatch.setattr(cells, "wants_rotation", lambda args, config: False)
    monkeypatch.setattr(cells, "scored", lambda run, blocks, target: (made.append(target), None))
    monkeypatch.setattr(cells, "calibrate", lambda masks, shape, target, rules: target)
    assert cells._Choice.of(run, "bonsai", asked("bonsai")[1], {}).masks == {0.3: 0.3, 0.5: 0.5}
    assert made == [0.5]


def test_tasks_are_scored_where_sparsity_and_seed_are_asked_for(grid):
    assert {(cell.target_sparsity, cell.seed) for cell in grid.cells if grid.is_scored(cell)} == {(0.5, 4)}
    assert {(cell.target_sparsity, cell.seed) for cell in grid.cells} == {(0.3, 3), (0.3, 4), (0.5, 3), (0.5, 4)}
    limits = {grid.is_scored(cell): grid.settings(cell)["zero_eval_limit"] for cell in grid.cells}
    assert limits == {True: 7, False: None}  # scores of fewer examples serve no other limit


def test_a_given_mask_that_holds_something_else_by_now_is_refused(tmp_path):
    path, measurement = tmp_path / "mask.pkl", object.__new__(cells.Measurement)
    measurement.grid = SimpleNamespace(is_given=lambda cell: True, mask_path=lambda cell: path, folder=tmp_path)
    measurement.contents = {"model": "a digest"}
    path.write_bytes(b"one")
    content = {"contents": measurement._contents("cell")}
    measurement._check(path, content, "cell")  # control
    path.write_bytes(b"two")
    with tiny.refused("mask.pkl: made when its mask held something else; give another --output"):
        measurement._check(path, content, "cell")


def test_a_model_is_turned_anew_for_a_mask_of_another_basis(grid, monkeypatch):
    monkeypatch.setattr(cells.Run, "dense_model", lambda run: None)
    monkeypatch.setattr(cells.Run, "turned", lambda run, rotation: replace(run, rotation=rotation))
    measurement, run = object.__new__(cells.Measurement), cells.Run(None, torch.nn.Linear(1, 1), None)
    measurement._last = None
    one, two = Rotation(torch.eye(2)), Rotation(-torch.eye(2))
    first, again, other = (measurement._turned(run, rotation) for rotation in (one, one, two))
    assert first.model is again.model is not other.model and run.model not in (first.model, other.model)
    assert measurement._turned(run, None) is run and measurement._last is None
