"""What a saved folder tells the hub in its present form of results: which figures of which data sets."""

import pytest
from huggingface_hub import EvalResultEntry
from support.folders import hub_results

from tvaprune.checkpoint.eval_results import eval_results, write_eval_results
from tvaprune.files import foreign_files, mark

RECORD = {
    "protocol": {"dataset_name": "c4", "split": "test", "window": 2048, "num_windows": 256},
    "perplexity": {
        "dense": 9.25, "pruned": 12.34567, "finetuned": 10.5,
        "stderr": {"dense": 0.2, "pruned": 0.31, "gap": 0.01, "finetuned": None},
    },
}  # fmt: skip
SCORE = {"metric": "acc_norm", "value": 0.51234, "stderr": 0.0101, "num_examples": 2376, "num_fewshot": 0,
         "limit": None, "data_set": "allenai/ai2_arc"}  # fmt: skip


def scored(**change):
    tasks = {"arc_easy": {"dense": SCORE | {"value": 0.7}, "pruned": SCORE | change}}
    return RECORD | {"zero_shot": {"tasks": tasks}}


def test_a_perplexity_stands_under_its_texts_hub_id(tmp_path):
    write_eval_results(tmp_path, RECORD, "pruned")
    # C4 has no test split on the hub: ours is its validation file.
    told = "perplexity (less is better), validation split, 256 windows of 2048 tokens"
    assert hub_results(tmp_path) == [
        EvalResultEntry("allenai/c4", "en", 12.3457, notes=f"{told}; standard error 0.31")
    ]  # fmt: skip
    write_eval_results(tmp_path, RECORD, "finetuned")  # the same file, of another model
    assert hub_results(tmp_path) == [EvalResultEntry("allenai/c4", "en", 10.5, notes=told)]


@pytest.mark.parametrize(
    "change",
    [{"protocol": RECORD["protocol"] | {"dataset_name": "python_docs"}}, {"perplexity": {"dense": 9.0}},
     {"perplexity": {"dense": 9.0, "pruned": None}}, {"perplexity": None}, {"protocol": None}],
)  # fmt: skip
def test_a_text_of_ones_own_and_what_was_not_measured_have_no_file(change, tmp_path):
    write_eval_results(tmp_path, RECORD | change, "pruned")
    assert not list(tmp_path.iterdir())


def test_scores_stand_under_the_tasks_data(tmp_path):
    write_eval_results(tmp_path, scored(), "pruned")
    told = "acc_norm of the lm-evaluation-harness, 0-shot, all 2376 examples; standard error 0.01"
    arc, c4 = hub_results(tmp_path)
    assert arc == EvalResultEntry("allenai/ai2_arc", "arc_easy", 0.5123, notes=told) and c4.dataset_id == "allenai/c4"
    both = scored()
    both["zero_shot"]["tasks"]["arc_challenge"] = {"pruned": SCORE | {"value": 0.25}}
    (file,) = (content for name, content in eval_results(both, "pruned").items() if "arc" in name)
    assert "arc_easy" in file and "arc_challenge" in file  # one data set, one file


@pytest.mark.parametrize("change", [{"limit": 100}, {"data_set": "python_docs"}, {"data_set": None}])
def test_a_part_of_a_task_and_data_that_is_not_on_the_hub_have_none(change):
    assert list(eval_results(scored(**change), "pruned")) == [".eval_results/allenai--c4.yaml"]
    assert len(eval_results(scored(), "pruned")) == 2  # control


def test_files_that_come_later_are_the_folders_own(tmp_path):
    mark(tmp_path, ["config.json"])
    (tmp_path / "config.json").write_text("{}")
    write_eval_results(tmp_path, RECORD, "pruned")
    assert hub_results(tmp_path) and foreign_files(tmp_path) == []
    (tmp_path / ".eval_results" / "by-hand.yaml").write_text("[]")
    assert foreign_files(tmp_path) == [".eval_results/by-hand.yaml"]  # control
