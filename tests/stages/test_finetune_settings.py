"""What the settings of a fine-tuning change, and what it holds in memory, by whole commands on tiny checkpoints."""

import gc
import math
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import tiny
from support.finetune_run import FULL, RUN, logits, sources, without

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.flags.arguments import Arguments
from tvaprune.identity import weights_digest
from tvaprune.measure.perplexity import perplexity
from tvaprune.recover import job as finetune_job
from tvaprune.recover import training
from tvaprune.run import Run
from tvaprune.stages import finetune as recover

pytestmark = [  # of peft itself, where a test calls it
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


@pytest.fixture(scope="module")
def make_source(make_model, make_masks, tmp_path_factory):
    return sources(make_model, make_masks, tmp_path_factory)


@pytest.fixture(scope="module")
def source(make_source):
    return make_source()


def test_a_mask_of_another_model_is_refused(source, make_source, tmp_path, command):
    wide = dict(zip(make_source(hidden_size=40)[::2], make_source(hidden_size=40)[1::2], strict=True))
    code, _, error = command(
        *source, *RUN, "--mask_loc", wide["--mask_loc"], "--output_dir", tmp_path / "out", "--overwrite_output_dir"
    )
    assert "give the mask of this model" in tiny.refusal(code, error)
    assert not (tmp_path / "out").exists()


def test_a_learning_rate_that_breaks_the_model_ends_in_one_line(source, tmp_path, command):
    flags = ("--output_dir", tmp_path / "out", "--learning_rate", 1e30, "--max_grad_norm", 0, "--speed_batches", 0)
    code, _, error = command(*source, *RUN, *flags)
    assert "lower --learning_rate" in tiny.refusal(code, error)
    assert not (tmp_path / "out" / "merged").exists() and not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(("asked", "tied"), [((), True), (("--train_lm_head", True), False)])
def test_tied_embeddings_stay_tied_unless_the_head_is_trained(asked, tied, make_source, tmp_path, command, input_ids):
    output = tmp_path / "out"
    code, told, error = command(
        *make_source(tie_word_embeddings=True), *RUN, *asked, "--output_dir", output, "--speed_batches", 1
    )
    assert code == 0, error
    merged = load_pruned(output / "merged")
    more = merged.num_parameters() - load_pruned(output / "pruned").num_parameters()
    assert (more > 0) is not tied
    assert (
        f"note: --train_lm_head unties the lm_head from the embeddings: {more:,} parameters more" in told
    ) is not tied
    assert merged.config.tie_word_embeddings is tied
    assert torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight) is tied
    adapted = PeftModel.from_pretrained(load_pruned(output / "pruned"), str(output / "adapter"))
    torch.testing.assert_close(logits(adapted, input_ids), logits(merged, input_ids), rtol=0, atol=1e-4)
    assert tiny.read_json(output / "results.json")["finetune"]["train_lm_head"] is not tied


@pytest.mark.parametrize("trained", ["--train_lm_head", "--full_ft"])
def test_in_half_precision_the_dense_model_comes_through_the_timing_and_the_lm_head_learns(
    trained, source, tmp_path, command, monkeypatch
):
    digests = []

    def watched(job, student, timed=recover.training_speed):
        digests.append(weights_digest(job.run.model))
        found = timed(job, student)
        digests.append(weights_digest(job.run.model))
        return found

    monkeypatch.setattr(recover, "training_speed", watched)
    output = tmp_path / "out"
    code, _, error = command(
        *source,
        *(FULL if trained == "--full_ft" else RUN),
        "--dtype",
        "bfloat16",
        trained,
        True,
        "--learning_rate",
        1e-3,
        "--output_dir",
        output,
    )
    assert code == 0, error
    assert len(digests) == 2 and digests[0] == digests[1]
    results = tiny.read_json(output / "results.json")
    assert results["training_speed_up"]["per_batch"] > 0
    log = tiny.read_json(output / "finetune_log.json")["log"]
    assert all(math.isfinite(row["loss"]) for row in log if "loss" in row)
    before, after = (load_pruned(output / name, dtype="auto") for name in ("pruned", "merged"))
    assert {tensor.dtype for tensor in after.state_dict().values()} == {torch.bfloat16}
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_a_training_too_large_to_be_timed_goes_on_without(source, tmp_path, command, monkeypatch):
    def fail(*args):
        raise torch.cuda.OutOfMemoryError("too large")

    monkeypatch.setattr(training, "training_speed_up", fail)
    code, out, error = command(*source, *RUN, "--output_dir", tmp_path / "out")
    assert code == 0, error
    assert out.count("note: the dense model does not fit beside the pruned one in training") == 1
    results = tiny.read_json(tmp_path / "out" / "results.json")
    assert "training_speed_up" not in results and results["perplexity"]["finetuned"] < results["perplexity"]["pruned"]


def test_full_fine_tuning_leaves_a_merged_model_alone(source, tmp_path, command):
    output = tmp_path / "out"
    code, out, error = command(*source, *FULL, "--output_dir", output, "--learning_rate", 1e-3)
    assert code == 0, error
    assert {path.name for path in output.iterdir() if path.is_dir()} == {
        "merged", "pruned", "checkpoint-9", "checkpoint-12"
    }  # fmt: skip
    results = tiny.read_json(output / "results.json")
    assert results["finetune"]["method"] == "full"
    assert results["finetune"]["trained_parameters"] >= results["parameters"]["pruned"]
    assert results["perplexity"]["finetuned"] < results["perplexity"]["pruned"]
    before, after = (load_pruned(output / name).model for name in ("pruned", "merged"))
    assert not torch.equal(before.norm.weight, after.norm.weight)  # LoRA would have left the norms
    assert "both full" in out


@pytest.mark.parametrize(
    ("flags", "is_timed", "stays"),
    [(("--teacher_cache", "cache", "--speed_batches", 0), False, False), (("--teacher_cache", "cache"), True, False),
     (("--distill", "False"), True, False), ((), True, True)],  # control: it teaches
)  # fmt: skip
def test_the_dense_model_leaves_the_memory_where_nothing_needs_it(
    flags, is_timed, stays, source, tmp_path, command, monkeypatch
):
    """Where it is timed, after that."""
    asked, dense, alive = [], [], []
    narrow, load, train = recover.narrow, recover.Job.load, recover.train

    def loaded(*args):
        job = load(*args)
        dense.append(weakref.ref(job.run.model))
        return job

    def trained(job, student):
        alive.append(dense[0]() is not None)
        return train(job, student)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recover.Job, "load", loaded)
    monkeypatch.setattr(recover, "train", trained)
    monkeypatch.setattr(
        recover, "narrow", lambda *args, keep_dense: asked.append(keep_dense) or narrow(*args, keep_dense=keep_dense)
    )
    given = without(RUN, "--distill_ce_loss_alpha") if "--distill" in flags else RUN
    code, _, error = command(*source, *given, *flags, "--output_dir", tmp_path / "out")
    assert code == 0, error
    assert asked == [is_timed] and alive == [stays]
    parameters = tiny.read_json(tmp_path / "out" / "results.json")["parameters"]
    assert parameters["dense"] > parameters["pruned"]  # of the model that is gone


def test_the_hidden_term_is_trained_on(source, tmp_path, command):
    code, _, error = command(
        *source, *RUN, "--distill_hidden_alpha", 20, "--weight_update", "none", "--speed_batches", 0,
        "--output_dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, error
    log = tiny.read_json(tmp_path / "out" / "finetune_log.json")["log"]
    hidden = [row["hidden"] for row in log if "hidden" in row]
    assert max(hidden[-3:]) < min(hidden[:3])


@pytest.mark.parametrize("compare", [False, True])
def test_zero_shot_scores_stand_before_and_after(compare, source, tmp_path, command, monkeypatch):
    """The harness itself is tested elsewhere: here, which models it is handed, and that no other is in memory."""
    loaded, handed, alive, folders = [], {}, [], {}

    def noted(load, model_of=lambda found: found):
        def call(*args, **options):
            found = load(*args, **options)
            loaded.append(weakref.ref(model_of(found)))
            return found

        return call

    def score(run, tasks, models, results, saved):
        handed.update(models)
        folders.update(saved)
        gc.collect()
        alive.extend(ref() for ref in loaded if ref() is not None)

    monkeypatch.setattr(recover, "zero_shot_tasks", lambda args: "tasks" if args.evaluation.do_zero_eval else None)
    monkeypatch.setattr(recover, "zero_shot", score)
    monkeypatch.setattr(Run, "load", noted(Run.load, lambda run: run.model))
    monkeypatch.setattr(finetune_job, "load_pruned", noted(load_pruned))
    code, _, error = command(
        *source, *RUN, "--do_zero_eval", True, "--compare_dense", compare, "--output_dir", tmp_path / "out"
    )
    assert code == 0, error
    assert list(handed) == [*(["dense"] if compare else []), "pruned", "finetuned"]
    assert {id(model) for model in alive} == {id(model) for model in handed.values()}
    assert len(loaded) == 6  # the dense one, the student, adapter and merged model to compare, those to score
    ids = torch.arange(12).reshape(2, 6)
    assert folders == {"pruned": tmp_path / "out" / "pruned", "finetuned": tmp_path / "out" / "merged"}
    pruned, merged = (load_pruned(tmp_path / "out" / name) for name in ("pruned", "merged"))
    assert torch.equal(logits(handed["pruned"], ids), logits(pruned, ids))
    assert torch.equal(logits(handed["finetuned"], ids), logits(merged, ids))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--finetune", "--output_dir", "out"), "--finetune needs --mask_loc"),
        (("--resume_from_checkpoint", "nowhere"), "no checkpoint there"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, words, source, tmp_path, command):
    given = source if "--finetune" not in flags else source[:2]
    code, _, error = command(
        *given, *(RUN if "--finetune" not in flags else ()), *flags, "--output_dir", tmp_path / "o"
    )
    assert words in tiny.refusal(code, error)


@pytest.mark.parametrize(("words", "stored"), [((), torch.bfloat16), (("--dtype", "float32"), torch.float32)])
def test_a_tuned_model_is_saved_in_the_checkpoints_precision_and_measured_so(
    words, stored, make_source, tmp_path, command
):
    """A CPU trains in float32 what came in bfloat16."""
    source = make_source(dtype=torch.bfloat16)
    flags = (*without(RUN, "--speed_batches"), "--speed_batches", 0, "--max_steps", 3, "--output_dir", tmp_path / "out")
    code, _, error = command(*source, *flags, *words)
    assert code == 0, error
    weights = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {stored}
    results = tiny.read_json(tmp_path / "out" / "results.json")
    windows = Run.load(Arguments.parse([*map(str, (*source, *flags))], "finetune")).windows()
    again = load_pruned(tmp_path / "out" / "merged", dtype="float32")
    assert results["perplexity"]["finetuned"] == pytest.approx(perplexity(again, windows, 8), rel=1e-6)
