import copy
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from report.test_zero_shot_report import record_of
from support.byte_tokenizer import byte_tokenizer
from support.hub_rows import REPOSITORIES, ROWS, write_hub_copy

from tvaprune.cut.fold import fold
from tvaprune.cut.slice import apply_plan
from tvaprune.errors import InputError
from tvaprune.measure import zeroshot
from tvaprune.measure.zeroshot import RELEASED_TASKS, ZeroShot
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import plan_from_masks
from tvaprune.plan.widths import WidthRules


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def dense(make_model):
    return make_model("mistral", vocab_size=258, max_position_embeddings=512, sliding_window=None)


@pytest.fixture(scope="module")
def pruned(dense, make_masks):
    shape = shape_of(dense.config)
    plan = plan_from_masks(make_masks(shape), shape, WidthRules(4, 0))
    model = apply_plan(copy.deepcopy(dense), plan)
    fold(model, plan)
    return model


def run(models, tokenizer, names, data_dir, **settings):
    """Returns task -> model -> score, and what was missing."""
    scores = {}
    missing = ZeroShot(names, data_dir, **settings).run(
        models, tokenizer, lambda task, model, score: scores.setdefault(task, {}).update({model: score})
    )
    return scores, missing


@torch.inference_mode()
def log_likelihood(model, tokenizer, context, continuation):
    ids = torch.tensor([tokenizer.encode(context + continuation)])
    log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
    each = log_probabilities.gather(1, ids[0, 1:, None])[:, 0]
    return float(each[len(tokenizer.encode(context)) - 1 :].sum())


def test_log_likelihoods_of_the_pruned_model_are_those_of_its_logits(tmp_path, tokenizer, dense, pruned):
    write_hub_copy(tmp_path, "piqa")
    scores, _ = run({"pruned": pruned}, tokenizer, ["piqa"], tmp_path)
    found, own, others = [], [], []
    for sample in scores["piqa"]["pruned"].samples:
        for (context, continuation), (value, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            found.append(value)
            own.append(log_likelihood(pruned, tokenizer, context, continuation))
            others.append(log_likelihood(dense, tokenizer, context, continuation))
    assert len(found) == 8
    assert found == pytest.approx(own, abs=1e-4)
    assert found != pytest.approx(others, abs=0.1)  # the dense model's


def test_the_released_tasks_run_on_local_copies_of_the_hubs_repositories(tmp_path, tokenizer, pruned):
    for task in RELEASED_TASKS:
        write_hub_copy(tmp_path, task)
    scores, missing = run({"pruned": pruned}, tokenizer, RELEASED_TASKS, tmp_path)
    assert missing == {} and tuple(scores) == RELEASED_TASKS == tuple(REPOSITORIES)
    first = {task: by_model["pruned"].samples[0] for task, by_model in scores.items()}
    data_sets = {task: by_model["pruned"].settings["data_set"] for task, by_model in scores.items()}
    assert data_sets == {task: repository for task, (repository, _, _) in REPOSITORIES.items()}  # not the copies
    texts = {task: ["".join(pair) for pair in sample["arguments"]] for task, sample in first.items()}
    assert texts["hellaswag"][1] == "Washing dishes: A man stands at sink 0. He sings. to it."
    assert texts["winogrande"] == [ROWS["winogrande"](0)["sentence"].replace("_", word) for word in ("cup", "bag")]
    assert texts["openbookqa"][2] == "What is hard, number 0? the 0th light"
    assert texts["arc_easy"][0] == "Question: Which is wet, number 0?\nAnswer: the 0th stone"
    assert texts["arc_challenge"][3] == "Question: Which is bright, number 0?\nAnswer: the 0th paper"
    assert texts["piqa"][0] == "Question: Open jar 0.\nAnswer: Turn the lid."
    assert texts["boolq"] == [f"0 is a number.\nQuestion: is 0 a number?\nAnswer: {word}" for word in ("no", "yes")]
    assert texts["rte"][0] == "0 cats sleep.\nQuestion: Cats sleep. True or False?\nAnswer: True"
    chances = {task: by_model["pruned"].chance for task, by_model in scores.items()}
    two = dict.fromkeys(("winogrande", "piqa", "boolq", "rte"), 0.5)
    assert chances == dict.fromkeys(("hellaswag", "openbookqa", "arc_easy", "arc_challenge"), 0.25) | two


def test_a_badly_pruned_model_scores_less_than_the_dense_one(tmp_path, tokenizer, dense, pruned):
    letters = random.Random(0)
    answers = [["".join(letters.choices("abcdefgh", k=8)) for _ in range(2)] for _ in range(24)]
    rows = [ROWS["piqa"](index) | {"sol1": one, "sol2": two} for index, (one, two) in enumerate(answers)]
    for row in rows:  # the dense model is right by construction
        context = f"Question: {row['goal']}\nAnswer:"
        values = [log_likelihood(dense, tokenizer, context, f" {row[key]}") for key in ("sol1", "sol2")]
        row["label"] = values.index(max(values))
    assert {row["label"] for row in rows} == {0, 1}
    write_hub_copy(tmp_path, "piqa", rows)
    scores, _ = run({"dense": dense, "pruned": pruned, "again": dense}, tokenizer, ["piqa"], tmp_path)
    acc = {model: score.metrics["acc"] for model, score in scores["piqa"].items()}
    assert acc["dense"] == acc["again"] == 1.0
    assert acc["pruned"] < 1.0


def test_limit_and_few_shot_examples_reach_the_harness(tmp_path, tokenizer, pruned):
    write_hub_copy(tmp_path, "boolq")
    scores, _ = run({"m": pruned}, tokenizer, ["boolq"], tmp_path, num_fewshot=2, limit=3)
    score = scores["boolq"]["m"]
    assert (score.settings["num_examples"], score.settings["num_fewshot"], score.settings["limit"]) == (3, 2, 3)
    assert score.samples[0]["arguments"][0][0].count("Question:") == 3
    scores, _ = run({"m": pruned}, tokenizer, ["boolq"], tmp_path)
    assert scores["boolq"]["m"].settings["num_examples"] == 4
    assert scores["boolq"]["m"].samples[0]["arguments"][0][0].count("Question:") == 1


def test_a_task_that_reads_answers_in_several_ways_counts_each_example_once():
    """As gsm8k does, of which the harness has a record for each example and way."""
    ways = ("strict-match", "flexible-extract")
    right = {"strict-match": [0.0, 1.0, 0.0], "flexible-extract": [1.0, 1.0, 0.0]}
    samples = [{"filter": way, "exact_match": value, "arguments": [("q", {})]} for way in ways for value in right[way]]
    figures = {f"exact_match,{way}": sum(right[way]) / 3 for way in ways}
    found = zeroshot._score(
        {
            "results": {"math": {"alias": "math", **figures, "exact_match_stderr,strict-match": 0.3}},
            "samples": {"math": samples},
            "configs": {"math": {"output_type": "generate_until"}},
            "n-shot": {"math": 5},
            "versions": {"math": 3.0},
        },
        "math",
        None,
        "its/data",
    )
    assert (found.metric, found.value, found.stderr) == ("exact_match,strict-match", 1 / 3, 0.3)
    assert found.settings["num_examples"] == 3 and found.per_example == right["strict-match"]
    assert found.samples == samples  # all of them are written out


@pytest.mark.parametrize(
    ("figures", "metric", "stderr"),
    [
        (
            {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.75, "acc_norm_stderr,none": 0.2},
            "acc_norm",
            0.2,
        ),
        ({"f1,none": 0.25, "acc,none": 0.5, "acc_stderr,none": 0.1}, "acc", 0.1),
        ({"f1,none": 0.25, "f1_stderr,none": "N/A"}, "f1", None),
    ],
)
def test_the_accuracy_by_length_counts_where_a_task_has_it_beside_that_of_a_blind_choice(figures, metric, stderr):
    samples = [{"filter": "none", metric: 1.0, "arguments": [("q", "a")] * choices} for choices in (2, 4, 4)]
    found = zeroshot._score(
        {
            "results": {"task": figures},
            "samples": {"task": samples},
            "configs": {"task": {"output_type": "multiple_choice"}},
            "n-shot": {"task": 0},
            "versions": {"task": 1.0},
        },
        "task",
        None,
        "its/data",
    )
    assert (found.metric, found.value, found.stderr) == (metric, figures[f"{metric},none"], stderr)
    assert found.chance == pytest.approx((1 / 2 + 1 / 4 + 1 / 4) / 3) and found.per_example == [1.0] * 3


@pytest.mark.parametrize(
    ("own", "asked", "wanted"), [(None, None, 0), (None, 3, 3), (5, None, 5), (5, 3, 3), (0, 3, 0)]
)
def test_few_shot_examples_are_as_asked_for_unless_the_task_has_none_and_always_the_same(own, asked, wanted):
    settings, seeds = {"num_fewshot": own}, []
    task = SimpleNamespace(
        get_config=settings.get, set_config=settings.__setitem__, set_fewshot_seed=lambda seed: seeds.append(seed)
    )
    zeroshot._set_fewshot(task, asked)
    assert settings == {"num_fewshot": wanted} and seeds == [1234]  # as the harness's own command


def test_missing_data_is_one_line_and_the_other_tasks_run(tmp_path, tokenizer, pruned, capsys):
    write_hub_copy(tmp_path, "piqa")
    scores, missing = run({"pruned": pruned}, tokenizer, ["hellaswag", "piqa"], tmp_path)
    assert list(scores) == ["piqa"] and missing == {"hellaswag": "Rowan/hellaswag"}
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("zero-shot task")]
    assert len(lines) == 1
    assert "hellaswag: data set Rowan/hellaswag" in lines[0] and str(tmp_path / "Rowan/hellaswag") in lines[0]


def test_no_data_at_all_is_the_users_mistake(tmp_path, tokenizer, pruned):
    with pytest.raises(InputError, match="none of hellaswag, rte could run"):
        run({"pruned": pruned}, tokenizer, ["hellaswag", "rte"], tmp_path)


def test_a_crash_in_a_later_task_keeps_the_earlier_results(tmp_path, tokenizer, pruned):
    write_hub_copy(tmp_path, "piqa")
    broken = ROWS["winogrande"](1) | {"sentence": "Nothing to fill in."}
    write_hub_copy(tmp_path, "winogrande", [ROWS["winogrande"](0), broken])
    record = record_of(tmp_path)
    with pytest.raises(ValueError, match="substring not found"):
        ZeroShot(["piqa", "winogrande"], tmp_path).run({"pruned": pruned}, tokenizer, record.add)
    tasks = json.loads((tmp_path / "results.json").read_text())["zero_shot"]["tasks"]
    assert list(tasks) == ["piqa"] and tasks["piqa"]["pruned"]["num_examples"] == 4


def test_an_unknown_task_gives_the_nearest_names():
    with pytest.raises(InputError, match="helaswag: no such task.*nearest are hellaswag"):
        zeroshot.check_known(["piqa", "helaswag"], ["hellaswag", "piqa", "rte"])
    zeroshot.check_known(["piqa"], ["hellaswag", "piqa", "rte"])


def test_a_task_that_no_file_of_the_harness_names_is_refused_before_the_harness_is_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)  # its import fails
    with pytest.raises(InputError, match="lambada_openay: no such task.* nearest are.*lambada_openai"):
        ZeroShot(["piqa", "lambada_openay"], "data")
    with pytest.raises(ImportError):  # control
        ZeroShot(["piqa"], "data")


@pytest.mark.slow
def test_a_task_that_is_no_more_than_a_word_of_these_files_is_looked_up_in_the_whole_harness():
    with pytest.raises(InputError, match="lambada_opena: no such task.* nearest are.*lambada_openai"):
        ZeroShot(["lambada_opena"], "data")


@pytest.mark.slow
def test_every_task_of_the_harness_stands_in_the_files_that_are_looked_at():
    import lm_eval.tasks

    known = lm_eval.tasks.TaskManager(include_path=zeroshot.task_folder()).all_tasks
    text = "\n".join(zeroshot._texts([Path(lm_eval.tasks.__file__).parent, zeroshot.task_folder()]))
    words = set(re.split(r"[\s\"',\[\]{}#:]+", text))  # quicker than a look at the text for each
    assert [name for name in known if name not in words and name not in text] == [] and len(known) > 10_000


def test_groups_and_tags_are_scored_task_by_task():
    offline = [path.stem for path in zeroshot.task_folder().glob("*.yaml") if path.stem != zeroshot.OFFLINE_GROUP]
    assert sorted(ZeroShot(["tva_offline"], "data").names) == sorted(offline) != []
    assert ZeroShot(["ai2_arc", "arc_easy"], "data").names == ["arc_challenge", "arc_easy"]


def test_a_tokenizer_without_a_beginning_or_an_end_is_refused():
    tokenizer = byte_tokenizer()
    for bos, eos in (("<s>", None), (None, "</s>"), ("<s>", "</s>")):
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        zeroshot.check_tokenizer(tokenizer)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="--do_zero_eval: the tokenizer has no bos_token and no eos_token"):
        zeroshot.check_tokenizer(tokenizer)


def test_scoring_leaves_the_tokenizer_as_it_is_saved(tokenizer, pruned):
    own = copy.deepcopy(tokenizer)
    own.pad_token = None
    harness = zeroshot._harness_model(pruned, own)
    assert harness.tokenizer.pad_token is not None and own.pad_token is None
