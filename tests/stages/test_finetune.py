"""Mask -> fine-tuned model by whole commands on a tiny checkpoint: what is written, what goes on, what is refused."""

import gc
import math
import re
import shutil
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import tiny

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.files import MARK_NAME
from tvaprune.flags.arguments import Arguments
from tvaprune.identity import weights_digest
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import Masks, save_masks
from tvaprune.recover import job as finetune_job
from tvaprune.recover import training
from tvaprune.run import Run
from tvaprune.stages import finetune as recover


def without(flags, name):
    place = flags.index(name)
    return flags[:place] + flags[place + 2 :]


RUN = (
    *("--do_train", "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--max_train_samples", 24),
    *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2, "--use_cpu"),
    *("--dim_multiple", 4, "--lora_r", 2, "--distill_ce_loss_alpha", 1, "--speed_batches", 2, "--disable_tqdm", True),
    *("--eval_steps", 3, "--save_steps", 3),
)
FULL = (*without(RUN, "--lora_r"), "--full_ft", True)
CHECKPOINT_FILES = {"config.json", "generation_config.json", "model.safetensors", "modeling_pruned.py",
                    "tokenizer.json", "tokenizer_config.json", "README.md"}  # fmt: skip
RESULT_FILES = {
    "finetune.png",
    "finetune_log.json",
    "generations.json",
    "plan.json",
    "recipe.yaml",
    "report.html",
    "results.json",
    "widths.png",
}
pytestmark = [  # of peft itself, where a test calls it
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
]


def without_heads(masks):
    """The second layer keeps no head."""
    scores = masks.log_variance
    attn = (scores.attn[0], torch.full_like(scores.attn[1], 9.0), *scores.attn[2:])
    return Masks(masks.mu, type(scores)(scores.hidden, attn, scores.inter))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def make_source(make_model, make_masks, text, tmp_path_factory):
    """Returns a function: a tiny model's values -> the flags that name it, its mask and the text."""

    def make(seed=0, dtype=torch.float32, **values):
        folder = tmp_path_factory.mktemp("source")
        model = make_model("llama", **values).to(dtype)
        checkpoint = tiny.save_checkpoint(model, folder / "model")
        save_masks(without_heads(make_masks(shape_of(model.config), seed)), folder / "mask_info_1.0.pkl")
        return ("--model_name_or_path", checkpoint, "--mask_loc", folder / "mask_info_1.0.pkl", "--dataset_name", text)

    return make


@pytest.fixture(scope="module")
def source(make_source):
    return make_source()


@pytest.fixture(scope="module")
def tuned(source, tmp_path_factory):
    """The output of one fine-tuning, as a subprocess."""
    output = tmp_path_factory.mktemp("tuned") / "out"
    result = tiny.run("lora_ft_vib.py", *source, *RUN, "--output_dir", output)
    assert result.returncode == 0, result.stderr
    return output, result


def files_in(folder):
    return {path.name for path in folder.iterdir() if path.is_file() and path.name != MARK_NAME}


def logits(model, input_ids):
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits


def test_it_writes_exactly_these_files(tuned):
    output, _ = tuned
    folders = {path.name for path in output.iterdir() if path.is_dir()}
    assert folders == {"adapter", "merged", "pruned", "checkpoint-9", "checkpoint-12"}
    assert files_in(output) == RESULT_FILES
    assert files_in(output / "merged") == CHECKPOINT_FILES
    assert files_in(output / "pruned") == CHECKPOINT_FILES | {"weight_update.json"}
    assert files_in(output / "adapter") == {
        "adapter_config.json", "adapter_model.safetensors", "identity.json", "README.md"
    }  # fmt: skip
    base = tiny.read_json(output / "adapter" / "adapter_config.json")["base_model_name_or_path"]
    assert base == str((output / "pruned").resolve())  # found from any folder


def test_it_says_what_it_did(tuned):
    output, result = tuned
    for words in ("perplexity, fine-tuned", "(gap ", "12 steps of 4 blocks", "speed-up of a training step",
                  "adapter and merged model differ by at most", "finetune.png", "adapter merged", "report.html",
                  "phase 1 of 3: dense and pruned model", "phase 2 of 3: training",
                  "phase 3 of 3: tuned model"):  # fmt: skip
        assert words in result.stdout
    assert re.search(r"phase 3 of 3: tuned model, .* left\n", result.stdout)
    results = tiny.read_json(output / "results.json")
    assert set(results["perplexity"]) == {"dense", "pruned", "finetuned", "stderr"}
    errors = results["perplexity"]["stderr"]
    assert all(0 < error < math.inf for error in errors.values()) and len(errors) == 5
    assert results["perplexity"]["finetuned"] < results["perplexity"]["pruned"]
    assert results["training_speed_up"]["num_batches"] == 2 and results["training_speed_up"]["batch_size"] == 4
    told = results["finetune"]
    assert told["adapter_merged_difference"] < 1e-4
    assert (told["r"], told["learning_rate"], told["steps"], told["train_lm_head"]) == (2, 1e-2, 12, True)
    log = tiny.read_json(output / "finetune_log.json")["log"]
    assert {"ce", "kl", "loss"} <= set(log[0])
    for folder in ("adapter", "merged"):
        card = (output / folder / "README.md").read_text(encoding="utf-8")
        assert "fine-tuned by: method lora" in card and "distill_ce_loss_alpha 1.0" in card
    assert "before fine-tuning" in card
    assert "and to no\nother" in (output / "adapter" / "README.md").read_text(encoding="utf-8")


def test_the_adapter_loads_on_the_pruned_checkpoint_and_agrees_with_the_merged_model(tuned, input_ids):
    output, _ = tuned
    base = load_pruned(output / "pruned")
    before = logits(base, input_ids)
    adapted = logits(PeftModel.from_pretrained(base, str(output / "adapter")), input_ids)
    merged = logits(load_pruned(output / "merged"), input_ids)
    torch.testing.assert_close(adapted, merged, rtol=0, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2  # control: fine-tuning changed the model


def test_the_heads_that_a_layer_lost_stay_zero(tuned):
    output, _ = tuned
    for folder in ("pruned", "merged"):
        lost = load_pruned(output / folder).model.layers[1]
        assert lost.self_attn.q_proj.weight.shape[0] == 12  # one KV group
        assert all(not weight.any() for weight in lost.self_attn.parameters())
        assert all(weight.any() for weight in load_pruned(output / folder).model.layers[0].parameters())


def test_an_interrupted_run_goes_on_to_the_same_model(tuned, source, tmp_path, command):
    output, _ = tuned
    shutil.copytree(output / "checkpoint-9", tmp_path / "out" / "checkpoint-9")
    shutil.copytree(output / "pruned", tmp_path / "out" / "pruned")
    (tmp_path / "out" / "checkpoint-10").mkdir()  # the interruption came while this one was written
    code, out, error = command(*source, *RUN, "--output_dir", tmp_path / "out", "--resume_from_checkpoint", "True")
    assert code == 0, error
    first, again = (load_pruned(folder / "merged").state_dict() for folder in (output, tmp_path / "out"))
    assert all(torch.equal(first[name], again[name]) for name in first)
    results, earlier = (tiny.read_json(folder / "results.json") for folder in (tmp_path / "out", output))
    assert results["finetune"]["resumed_from"].endswith("checkpoint-9")
    assert results["refit"] == earlier["refit"] and "refit on" in out


@pytest.mark.parametrize("content", ["{", "[1]", '{"refit": {"of": 1}}'])
def test_a_damaged_record_of_the_weight_update_ends_in_one_line(content, tuned, source, tmp_path, command):
    output = shutil.copytree(tuned[0], tmp_path / "out")
    (output / "pruned" / "weight_update.json").write_text(content)
    code, _, error = command(*source, *RUN, "--output_dir", output, "--resume_from_checkpoint", "True")
    assert "weight_update.json: cannot be read as what the weight update did" in tiny.refusal(code, error)
    assert (output / "merged" / "model.safetensors").is_file()


def leave_what_an_interruption_leaves(output, finished):
    """Before the first checkpoint: the plan, the pruned model, and half a checkpoint."""
    output.mkdir()
    shutil.copy(finished / "plan.json", output)
    shutil.copytree(finished / "pruned", output / "pruned")
    (output / "checkpoint-3").mkdir()


def test_a_run_that_has_no_checkpoint_yet_begins_anew(tuned, source, tmp_path, command):
    output = tmp_path / "out"
    leave_what_an_interruption_leaves(output, tuned[0])
    code, _, error = command(*source, *RUN, "--output_dir", output)
    assert "is not empty; go on with --resume_from_checkpoint True" in tiny.refusal(code, error)
    code, out, error = command(*source, *RUN, "--output_dir", output, "--resume_from_checkpoint", "True")
    assert code == 0, error
    assert f"note: there is no checkpoint in {output} yet: the run begins anew" in out
    first, again = (load_pruned(folder / "merged").state_dict() for folder in (tuned[0], output))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("has", ["a finished run", "other files"])
def test_a_folder_without_checkpoints_that_is_no_interrupted_run_stays(has, tuned, source, tmp_path, command):
    output = tmp_path / "out"
    leave_what_an_interruption_leaves(output, tuned[0])
    if has == "a finished run":
        shutil.copy(tuned[0] / "results.json", output)
    else:
        (output / "plan.json").unlink()
    code, _, error = command(*source, *RUN, "--output_dir", output, "--resume_from_checkpoint", "True")
    assert "no checkpoint there" in tiny.refusal(code, error)
    assert files_in(output / "pruned") == CHECKPOINT_FILES | {"weight_update.json"}


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (("--lora_r", 3), "is the checkpoint of a run with --lora_r 2, not 3; give"),
        (("--weight_update", "none"), "is the checkpoint of a run with --weight_update refit, not none; give"),
        (("--refit_samples", 5), "is the checkpoint of a run with --refit_samples 128, not 5; give"),
        (("--full_ft", True), "is the checkpoint of a run with --full_ft False, not True"),
    ],
)
def test_a_checkpoint_of_other_flags_is_refused(other, words, tuned, source, tmp_path, command):
    given = ("--resume_from_checkpoint", tuned[0] / "checkpoint-9", "--output_dir", tmp_path / "out")
    code, _, error = command(*source, *(FULL if "--full_ft" in other else RUN), *other, *given)
    assert words in tiny.refusal(code, error)
    assert not (tmp_path / "out" / "pruned").exists()


def test_a_checkpoint_of_another_mask_or_model_is_refused(tuned, make_source, tmp_path, command):
    given = ("--resume_from_checkpoint", tuned[0] / "checkpoint-9", "--output_dir", tmp_path / "out")
    for other, words in ((make_source(seed=3), "--mask_loc"), (make_source(vocab_size=48), "--model_name_or_path")):
        code, _, error = command(*other, *RUN, *given)
        assert f"is the checkpoint of a run with {words} /" in tiny.refusal(code, error)


def test_a_checkpoint_goes_on_with_the_pruned_model_that_it_began_with_or_not_at_all(tuned, source, tmp_path, command):
    output = shutil.copytree(tuned[0], tmp_path / "out")
    weights = load_pruned(output / "pruned")
    with torch.no_grad():
        weights.model.norm.weight.add_(1.0)
    weights.save_pretrained(output / "pruned")
    code, _, error = command(*source, *RUN, "--output_dir", output, "--resume_from_checkpoint", "True")
    assert "is the checkpoint of a run with --save_pruned" in tiny.refusal(code, error)


def test_a_mask_of_another_model_is_refused(source, make_source, tmp_path, command):
    wide = dict(zip(make_source(hidden_size=40)[::2], make_source(hidden_size=40)[1::2], strict=True))
    code, _, error = command(
        *source, *RUN, "--mask_loc", wide["--mask_loc"], "--output_dir", tmp_path / "out", "--overwrite_output_dir"
    )
    assert "give the mask of this model" in tiny.refusal(code, error)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_model_is_replaced_only_when_asked(tuned, source, tmp_path, command):
    output = shutil.copytree(tuned[0], tmp_path / "out")
    (output / "mine.txt").write_text("mine")
    before = (output / "merged" / "model.safetensors").read_bytes()
    code, _, error = command(*source, *RUN, "--output_dir", output)
    assert "is not empty" in tiny.refusal(code, error)
    assert (output / "merged" / "model.safetensors").read_bytes() == before
    code, _, error = command(*source, *RUN, "--output_dir", output, "--overwrite_output_dir", "--seed", 5)
    assert code == 0, error
    assert (output / "merged" / "model.safetensors").read_bytes() != before
    assert (output / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--dataset_name", "nowhere"), "neither a file or folder nor one of"),
        (("--block_size", 100_000), "is shorter than one block"),
        (("--model_name_or_path", "nowhere"), "cannot be loaded"),
        (("--full_ft", True, "--dtype", "float16"), "float16 weights cannot be trained; give --dtype float32 or"),
        (("--early_stopping_patience", 2, "--eval_strategy", "no", "--load_best_model_at_end", False),
         "--early_stopping_patience would do nothing beside --eval_strategy no: it counts"),
    ],
)  # fmt: skip
def test_an_earlier_model_stays_where_the_new_one_cannot_be_made(flags, words, tuned, source, tmp_path, command):
    output = shutil.copytree(tuned[0], tmp_path / "out")
    base = FULL if "--full_ft" in flags else RUN
    code, _, error = command(*source, *base, *flags, "--output_dir", output, "--overwrite_output_dir")
    assert words in tiny.refusal(code, error)
    assert tree(output) == tree(tuned[0])


def tree(folder):
    return {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*")}


def test_a_learning_rate_that_breaks_the_model_ends_in_one_line(source, tmp_path, command):
    flags = ("--output_dir", tmp_path / "out", "--learning_rate", 1e30, "--max_grad_norm", 0, "--speed_batches", 0)
    code, _, error = command(*source, *RUN, *flags)
    assert "lower --learning_rate" in tiny.refusal(code, error)
    assert not (tmp_path / "out" / "merged").exists() and not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(("asked", "tied"), [((), True), (("--train_lm_head", True), False)])
def test_tied_embeddings_stay_tied_unless_the_head_is_trained(asked, tied, make_source, tmp_path, command, input_ids):
    output = tmp_path / "out"
    code, _, error = command(
        *make_source(tie_word_embeddings=True), *RUN, *asked, "--output_dir", output, "--speed_batches", 1
    )
    assert code == 0, error
    merged = load_pruned(output / "merged")
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


def test_a_cached_teacher_gives_the_live_ones_model(tuned, source, tmp_path, command):
    flags = ("--teacher_cache", tmp_path / "cache", "--teacher_top_k", 47, "--output_dir", tmp_path / "out")
    code, _, error = command(*source, *RUN, *flags)
    assert code == 0, error
    live, cached = (tiny.read_json(folder / "results.json") for folder in (tuned[0], tmp_path / "out"))
    assert cached["finetune"]["teacher"] == "cached, top 47"
    assert cached["perplexity"]["finetuned"] == pytest.approx(live["perplexity"]["finetuned"], rel=1e-3)
    (folder,) = (tmp_path / "cache").iterdir()
    assert files_in(folder) == {"tokens.npy", "log_probs.npy", "identity.json"}


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
