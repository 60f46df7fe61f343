"""Mask -> fine-tuned model by whole commands on a tiny checkpoint: what is written, what goes on, what stays."""

import math
import re
import shutil

import pytest
import torch
from peft import PeftModel
from support import tiny
from support.finetune_run import FULL, RUN, files_in, logits, sources

from tvaprune.checkpoint.folder import load_pruned

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


@pytest.fixture(scope="module")
def make_source(make_model, make_masks, tmp_path_factory):
    return sources(make_model, make_masks, tmp_path_factory)


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
    assert load_pruned(output / "merged").config.use_cache is base.config.use_cache is True  # which training is without


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
    assert results["finetune"]["resumed_from"].endswith("checkpoint-9") and " s since checkpoint-9, weights of" in out
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
        (("--full_ft", True, "--dtype", "float16"), "float16 weights cannot be trained; give --dtype float32"),
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


def test_a_cached_teacher_gives_the_live_ones_model(tuned, source, tmp_path, command):
    flags = ("--teacher_cache", tmp_path / "cache", "--teacher_top_k", 47, "--output_dir", tmp_path / "out")
    code, _, error = command(*source, *RUN, *flags)
    assert code == 0, error
    live, cached = (tiny.read_json(folder / "results.json") for folder in (tuned[0], tmp_path / "out"))
    assert cached["finetune"]["teacher"] == "cached, top 47"
    assert cached["perplexity"]["finetuned"] == pytest.approx(live["perplexity"]["finetuned"], rel=1e-3)
    (folder,) = (tmp_path / "cache").iterdir()
    assert files_in(folder) == {"tokens.npy", "log_probs.npy", "identity.json"}
    assert load_pruned(tmp_path / "out" / "merged").config.use_cache is True
