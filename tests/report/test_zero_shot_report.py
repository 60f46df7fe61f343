import json
import math

import pytest

from tvaprune.measure.zeroshot import Score
from tvaprune.report.results import KeptWidths, Perplexities, Results
from tvaprune.report.zero_shot import ZeroShotRecord

WIDTHS = KeptWidths(8, [1], [4], 0.5, 100, 4)


def made(**change):
    """The results of a run before anything is measured."""
    first = {"model": "m", "model_digest": "d", "prune_method": "vib", "dataset_name": "t", "block_size": 8,
             "target_sparsity": None, "seed": 1, "hardware": "none", "versions": {}, "command": "c", "mask": "k",
             "weight_update": "fold", "widths": WIDTHS}  # fmt: skip
    return Results(**first | change)


def record_of(folder, results=None, write_out=False):
    return ZeroShotRecord(results or made(), folder, write_out)


def score(per_example, metric="acc", stderr=0.1, **change):
    value = sum(per_example) / len(per_example)
    sample = {
        "doc_id": 0,
        "doc": {"text": "one"},
        "target": 1,
        "arguments": [("one", " two"), ("one", " six")],
        "filtered_resps": [(-1.5, False), (-0.5, True)],
        "filter": "none",
        "metrics": [metric],
        metric: 1.0,
    }
    settings = {"num_examples": len(per_example), "num_fewshot": 0, "limit": None, "version": 1} | change
    return Score(metric, value, stderr, {metric: value}, 0.25, settings, per_example, [sample])


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_averages_differences_and_their_errors(tmp_path):
    record = record_of(tmp_path)
    record.add("a", "dense", score([1.0, 1.0, 0.0, 1.0]))  # 0.75
    record.add("a", "pruned", score([1.0, 0.0, 0.0, 1.0]))  # 0.50
    record.add("b", "dense", score([0.0, 0.5], stderr=0.2))  # 0.25
    record.add("b", "pruned", score([0.0, 0.0], stderr=0.2))  # 0
    record.add("c", "dense", score([40.0], metric="perplexity"))  # no accuracy: in the table, not in the average
    record.add("c", "pruned", score([90.0], metric="perplexity"))
    table = record.finish({})
    found = results(tmp_path)["zero_shot"]
    assert found["average"]["dense"]["value"] == pytest.approx(0.5)
    assert found["average"]["pruned"]["value"] == pytest.approx(0.25)
    assert found["average"]["dense"]["stderr"] == pytest.approx(math.sqrt(0.1**2 + 0.2**2) / 2)
    assert found["average"]["dense"]["num_tasks"] == 2
    # Pair by pair 0 -1 0 0: mean -1/4, variance (3 * (1/4)^2 + (3/4)^2) / 3 = 1/4, error sqrt(1/4) / sqrt(4)
    assert found["tasks"]["a"]["difference"]["value"] == pytest.approx(-0.25)
    assert found["tasks"]["a"]["difference"]["stderr"] == pytest.approx(0.25)
    lines = table.splitlines()
    assert [line.split()[0] for line in lines] == ["zero-shot", "a", "b", "c", "average"]
    assert "0.750 ± 0.100" in lines[1] and "0.500 ± 0.100" in lines[1] and "-0.250 ± 0.250" in lines[1]
    assert lines[-1].endswith("-0.250 ± 0.177")  # task b's error is 1/4 too: sqrt(2) / 4 / 2


def test_an_average_over_a_task_without_an_error_has_none(tmp_path):
    record = record_of(tmp_path)
    record.add("a", "dense", score([1.0], stderr=None))  # of a single example
    record.add("b", "dense", score([0.0, 1.0], stderr=0.5))
    lines = record.finish({}).splitlines()
    assert results(tmp_path)["zero_shot"]["average"]["dense"] == {"value": 0.75, "stderr": None, "num_tasks": 2}
    assert lines[-1].split() == ["average", "0.750"]


def test_fine_tuning_stands_beside_what_it_began_with(tmp_path):
    record = record_of(tmp_path)
    record.add("a", "finetuned", score([1.0, 1.0, 0.0, 1.0]))  # 0.75
    record.add("a", "pruned", score([1.0, 0.0, 0.0, 1.0]))  # 0.50
    lines = record.finish({}).splitlines()
    assert lines[0].split()[-3:] == ["pruned", "finetuned", "recovered"]
    assert lines[1].endswith("+0.250 ± 0.250") and lines[2].endswith("+0.250 ± 0.250")
    assert results(tmp_path)["zero_shot"]["tasks"]["a"]["recovered"]["value"] == pytest.approx(0.25)
    record.add("a", "dense", score([1.0, 1.0, 1.0, 1.0]))
    lines = record.finish({}).splitlines()
    assert lines[0].split()[-5:] == ["dense", "pruned", "finetuned", "difference", "recovered"]
    assert lines[1].split()[-6:] == ["-0.500", "±", "0.289", "+0.250", "±", "0.250"]  # 0 -1 -1 0; 0 1 0 0


def test_one_model_alone_has_no_difference(tmp_path):
    record = record_of(tmp_path)
    record.add("a", "pruned", score([1.0, 0.0]))
    assert "difference" not in record.finish({"b": "some/data"})
    assert "difference" not in results(tmp_path)["zero_shot"]["tasks"]["a"]
    assert results(tmp_path)["zero_shot"]["missing"] == {"b": "some/data"}


def test_a_later_run_adds_to_the_results_of_the_same_model(tmp_path):
    measured = made(perplexity=Perplexities(4.0, 5.0))
    first = record_of(tmp_path, measured)
    first.add("a", "pruned", score([1.0]))
    first.finish({"b": "some/data"})
    second = record_of(tmp_path, Results.read(tmp_path))
    second.add("b", "pruned", score([0.0]))
    second.finish({})
    found = results(tmp_path)
    assert found["perplexity"] == {"dense": 4.0, "pruned": 5.0}
    assert sorted(found["zero_shot"]["tasks"]) == ["a", "b"] and "missing" in found["zero_shot"]
    assert found["zero_shot"]["missing"] == {}


def test_a_task_that_is_scored_again_is_replaced_whole(tmp_path):
    first = record_of(tmp_path)
    first.add("a", "dense", score([1.0, 1.0]))
    first.add("a", "pruned", score([1.0, 0.0]))
    second = record_of(tmp_path, Results.read(tmp_path))
    second.add("a", "pruned", score([0.0]))
    assert set(results(tmp_path)["zero_shot"]["tasks"]["a"]) == {"pruned"}  # no difference to another run's dense


def test_write_out_writes_each_example_with_its_log_likelihoods(tmp_path):
    record_of(tmp_path).add("a", "pruned", score([1.0]))
    assert not (tmp_path / "zero_shot").exists()
    record_of(tmp_path, write_out=True).add("a", "pruned", score([1.0]))
    lines = (tmp_path / "zero_shot" / "pruned_a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "doc_id": 0,
            "doc": {"text": "one"},
            "target": 1,
            "requests": [
                {"context": "one", "continuation": " two", "log_likelihood": -1.5, "is_greedy": False},
                {"context": "one", "continuation": " six", "log_likelihood": -0.5, "is_greedy": True},
            ],
            "acc": 1.0,
        }
    ]
