"""results.json is one dataclass: written whole, read back as it was, without NaN."""

import json
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from report.test_zero_shot_report import made, record_of, score
from support import tiny
from support.run_folder import results, write_run

from tvaprune.cut.reconstruct import Reconstruction
from tvaprune.errors import InputError
from tvaprune.measure.perplexity import TextLoss
from tvaprune.measure.speed import SpeedUp
from tvaprune.models.shape import shape_of
from tvaprune.recover.training import Tuning
from tvaprune.report.results import (
    VERSION,
    ModelPerplexity,
    Parameters,
    Perplexities,
    PerplexityErrors,
    Refit,
    RefitBlocks,
    Results,
)
from tvaprune.report.steps import write_results
from tvaprune.text.protocols import EvaluationText


@pytest.fixture
def whole(make_model, tmp_path):
    """Results of which every part is filled."""
    results = made(
        plan="p", rotation="r", units="u", dtype="float32", calibration=RefitBlocks("t", 8, 4, 1),
        protocol=EvaluationText("own", "t", "test", None, "</s>", False, 8, 3),
        shape=shape_of(make_model("llama").config), sparsity_definition="d", parameters=Parameters(9, 5),
        perplexity=Perplexities(4.0, 5.0, 4.5, PerplexityErrors(0.1, 0.2, 0.01, 0.15, 0.02)),
        model_perplexity=ModelPerplexity(4.0, 0.1),
        speed_up=SpeedUp(1.5, 1.4, 3.0, 2.0, 4, 8, 16),
        refit=Refit((0.0, 1.0), (0.5, 0.4), 1.0, {"q": 0.1, "k": None}, 4, 2, 1.5),
        reconstruct=Reconstruction((0.0, 1.0), (0.4, 0.3), 1.0, ((2.0, 1.0), (3.0, 3.0))),
        training_speed_up=SpeedUp(1.5, 1.4, 3.0, 2.0, 4, 8, 16),
        finetune=Tuning("lora", True, 10, "live", 1.0, 2.0, 0.0, 1e-3, 4, 24, 1.0, 6, 6, None, 2.5, 2, 4.0, 0.0, 1e-6),
    )  # fmt: skip
    record = record_of(tmp_path, results)
    record.add("a", "dense", score([1.0, 1.0]))
    record.add("a", "pruned", score([1.0, 0.0]))
    record.finish({"b": "some/data"})
    return results


def test_what_is_written_is_read_back_as_it_was(whole, tmp_path):
    assert [entry.name for entry in fields(whole) if getattr(whole, entry.name) is None] == ["target_sparsity"]
    assert Results.read(tmp_path) == whole
    assert Results.read(tmp_path / "nowhere") is None
    whole.perplexity.pruned = 6.0
    assert Results.read(tmp_path) != whole  # control


def test_results_without_the_errors_of_perplexities_are_read(whole, tmp_path):
    content = whole.content()
    del content["perplexity"]["stderr"]  # as runs wrote them before
    (tmp_path / "results.json").write_text(json.dumps(content))
    found = Results.read(tmp_path)
    assert found.perplexity == Perplexities(4.0, 5.0, 4.5) and found.perplexity.error("dense") is None
    assert whole.perplexity.error("dense") == 0.1 and found.refit == whole.refit  # control


def test_perplexities_carry_the_errors_of_their_windows():
    dense, pruned, tuned = (TextLoss(sum(windows) / 2, torch.tensor(windows, dtype=torch.float64))
                            for windows in ([1.0, 3.0], [1.5, 3.7], [1.1, 3.1]))  # fmt: skip
    found = Perplexities.of(dense, pruned)
    found.add_finetuned(tuned, dense)
    # of two windows the standard error of the mean is half their distance
    assert (found.dense, found.pruned, found.finetuned) == pytest.approx([math.exp(x) for x in (2.0, 2.6, 2.1)])
    errors = (math.exp(2.0) * 1.0, math.exp(2.6) * 1.1, 0.1, math.exp(2.1) * 1.0, 0.0)
    assert list(vars(found.stderr).values()) == pytest.approx(list(errors))
    one = TextLoss(2.0, dense.windows[:1])
    alone = Perplexities.of(one, one)
    alone.add_finetuned(one, one)
    assert alone.stderr is None and alone.finetuned == alone.dense


def test_a_part_that_no_stage_filled_is_left_out(tmp_path):
    made().write(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["version"] == VERSION and content["target_sparsity"] is None
    assert {"perplexity", "refit", "finetune", "zero_shot", "plan"} & set(content) == set()
    assert Results.read(tmp_path) == made()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_null(value, tmp_path):
    made(perplexity=Perplexities(4.0, value)).write(tmp_path)
    text = (tmp_path / "results.json").read_text()

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(text, parse_constant=refuse)["perplexity"] == {"dense": 4.0, "pruned": None}
    found = Results.read(tmp_path)
    assert found.perplexity.dense == 4.0 and math.isnan(found.perplexity.pruned)


@pytest.mark.parametrize(
    "content", ["{", "[1]", "{}", "null", '{"model": "m"}', '{"version": 99}', '{"no_such_part": 1}']
)
def test_a_file_of_another_kind_is_refused_in_one_line_and_kept(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with tiny.refused("cannot be read as results of version 2"):
        Results.read(tmp_path)
    assert (tmp_path / "results.json").read_text() == content


def test_results_of_another_version_are_refused(tmp_path):
    made(version=VERSION + 1).write(tmp_path)
    with pytest.raises(InputError, match="--overwrite_output_dir to replace it"):
        Results.read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"model": "n"}, {"model_digest": "e"}, {"mask": "j"}, {"plan": "p"}, {"weight_update": "none"}, {"widths": None},
     {"calibration": RefitBlocks("t", 8, 4, 1)}],
)  # fmt: skip
def test_results_of_another_model_are_told_apart(change):
    assert made().differing(made(**change)) == list(change)
    both = {"units": "a", "dtype": "float32"}
    for name in both:
        assert made(**both).differing(made(**(both | {name: "other"}))) == [name]
    assert made(**both).differing(made(**both, mask="j")) == []  # the same units in another file
    assert made().differing(made(seed=2, command="other", perplexity=Perplexities(1.0, 2.0))) == []  # control


@pytest.mark.parametrize("overwrites", [True, False])
def test_a_model_as_it_is_that_replaces_a_cut_ones_results_leaves_no_plan_of_it(overwrites, tmp_path):
    folder, plan = write_run(tmp_path / "out"), '{"dim_multiple": 8}'
    for name, content in (("plan.json", plan), ("widths.png", "Matplotlib")):
        (folder / name).write_text(content)
    left = {"plan.json", "widths.png", "generations.json"}
    args = SimpleNamespace(
        save_loc=folder, recipe={"verb": "apply"}, training=SimpleNamespace(overwrite_output_dir=overwrites),
        prune=SimpleNamespace(mask_loc=None, plan=None), evaluation=SimpleNamespace(prompt_tokens=32),
    )  # fmt: skip
    write_results(args, results())  # control: of this one widths were cut
    assert left <= {path.name for path in folder.iterdir()}
    args.evaluation.prompt_tokens = 0  # nobody was asked
    write_results(args, results())
    assert (folder / "generations.json").exists() == (not overwrites) and (folder / "plan.json").exists()
    write_results(args, made(widths=None))
    assert left & {path.name for path in folder.iterdir()} == (set() if overwrites else left)
