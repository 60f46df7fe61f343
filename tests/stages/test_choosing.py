"""How units are chosen by a whole command: by every method, once or anew for each of several targets."""

import shutil

import pytest
import torch
from support import tiny

from tvaprune.choose.scores import bonsai, score_masks
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import load_masks
from tvaprune.report.folders import read_runs


@pytest.mark.parametrize("method", ["magnitude", "wanda_sp", "flap", "taylor", "taylor_global", "bonsai", "random"])
def test_the_baselines_run_by_the_same_command(method, checkpoint, text, tmp_path, command, monkeypatch):
    monkeypatch.setattr("tvaprune.choose.scores.bonsai.SUB_MODELS_PER_ROUND", 2)
    code, out, error = command(
        "--do_train", "--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", tmp_path / "out",
        *tiny.SHORT, "--prune_method", method, "--max_train_samples", 8,
    )  # fmt: skip
    assert code == 0, error
    assert tiny.read_json(tmp_path / "out" / "results.json")["prune_method"] == method
    assert list((tmp_path / "out" / "best").glob("mask_info_*.pkl"))


@pytest.mark.parametrize(("method", "times"), [("flap", 1), ("taylor", 2)])
def test_units_are_scored_once_where_the_choice_serves_all_targets(
    method, times, checkpoint, text, tmp_path, command, monkeypatch
):
    asked = []

    def scores(model, method, blocks, target, seed, batch_size, kept):
        asked.append((target, batch_size))
        return score_masks(model, method, blocks, target, seed, batch_size, kept)

    monkeypatch.setattr("tvaprune.choose.choose.score_masks", scores)
    flags = ("--do_train", "--model_name_or_path", checkpoint, "--dataset_name", text, *tiny.SHORT, "--prune_method",
             method, "--max_train_samples", 8, "--weight_update", "none", "--per_device_eval_batch_size",
             2)  # fmt: skip
    code, _, error = command(*flags, "--target_sparsity", 0.2, 0.4, "--output_dir", tmp_path / "both")
    assert code == 0, error
    assert asked == [(0.4, 2), (0.2, 2)][:times]
    assert command(*flags, "--target_sparsity", 0.2, "--output_dir", tmp_path / "one")[0] == 0
    plans = [KeepPlan.load(tmp_path / folder / "plan.json") for folder in ("both/sparsity_0.2", "one")]
    assert plans[0].intermediate_size == plans[1].intermediate_size
    assert all(torch.equal(*pair) for pair in zip(*(plan.kept for plan in plans), strict=True))


def test_one_training_is_cut_at_several_targets(checkpoint, text, tmp_path, command):
    output = tmp_path / "out"
    flags = (
        "--do_train", "--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", output, *tiny.SHORT,
        "--max_train_samples", 16, "--per_device_train_batch_size", 4, "--save_pruned", tmp_path / "saved",
        "--refit_samples", 8, "--target_sparsity",
    )  # fmt: skip
    assert command(*flags, 0.3, 0.2)[0] == 0
    code, _, error = command(*flags, 0.4, 0.2)
    assert "is not empty; replace it with --overwrite_output_dir" in tiny.refusal(code, error)
    for name in ("results.json", "plan.json"):  # as a run of one target leaves them
        shutil.copy(output / "sparsity_0.3" / name, output)
    (output / "notes.txt").write_text("mine")
    code, out, error = command(*flags, 0.4, 0.2, "--overwrite_output_dir")
    assert code == 0, error
    assert [run.results.target_sparsity for run in read_runs([output])] == [0.2, 0.4]
    assert not (output / "plan.json").exists() and (output / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in output.glob("sparsity_*")) == ["sparsity_0.2", "sparsity_0.4"]
    assert out.count("(target 0.2)") == out.count("(target 0.4)") == 1
    page = (output / "report.html").read_text(encoding="utf-8")  # of both targets, beside their own
    assert "2 runs side by side" in page and "Gap over sparsity" in page
    assert page.count("Perplexity of the masks</b>") == 1  # the training is shared
    assert f"page of all targets: {output / 'report.html'}" in out and "phase 4 of 4: cut at 0.4" in out
    masks = {}
    for target in (0.2, 0.4):
        assert "1 runs" not in (output / f"sparsity_{target}" / "report.html").read_text(encoding="utf-8")
        results = tiny.read_json(output / f"sparsity_{target}" / "results.json")
        assert results["widths"]["decoder_sparsity"] == pytest.approx(target, abs=0.03)
        assert results["target_sparsity"] == target and results["weight_update"] == "refit"
        assert results["refit"]["calibration_blocks"] == 8
        masks[target] = load_masks(results["mask"])
        assert (tmp_path / "saved" / f"sparsity_{target}" / "config.json").is_file()
    assert len(list(output.rglob("mask_info_*.pkl"))) == 2
    for low, high in zip(masks[0.2].log_alpha, masks[0.4].log_alpha, strict=True):
        assert torch.equal(low.argsort(stable=True), high.argsort(stable=True))  # the same gates, cut elsewhere


def test_an_interrupted_bonsai_goes_on_after_its_last_round_to_the_same_mask(
    checkpoint, text, tmp_path, command, monkeypatch
):
    monkeypatch.setenv("TVAPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(bonsai, "SUB_MODELS_PER_ROUND", 8)
    measured, regress = [], bonsai.coefficients

    def run(folder, *flags, rounds=99):
        def until(present, utility):
            if len(measured) == rounds:
                raise KeyboardInterrupt
            measured.append(len(utility))
            return regress(present, utility)

        measured.clear()
        monkeypatch.setattr(bonsai, "coefficients", until)
        code, said, _ = command(
            "--do_train", "--model_name_or_path", checkpoint, "--dataset_name", text, "--output_dir", tmp_path / folder,
            *tiny.SHORT, "--prune_method", "bonsai", "--max_train_samples", 8, "--target_sparsity", 0.3, *flags,
        )  # fmt: skip
        return code, said, len(measured)

    def mask(folder):
        (path,) = (tmp_path / folder / "best").glob("mask_info_*.pkl")
        return load_masks(path).log_alpha

    code, _, rounds = run("whole")
    assert code == 0 and rounds > 3
    assert run("again", rounds=2)[0] == 130
    (left,) = (tmp_path / "cache").glob("scores-*")
    code, said, rest = run("again")
    assert code == 0 and "note: Bonsai goes on after 2 rounds that an interrupted run measured" in said
    assert rest == rounds - 2 and not left.exists()
    assert all(torch.equal(*pair) for pair in zip(mask("whole"), mask("again"), strict=True))
    assert run("other", rounds=2)[0] == 130
    (left,) = (tmp_path / "cache").glob("scores-*")
    left.write_bytes(left.read_bytes()[:-100])
    assert run("other")[2] == rounds  # control: a damaged file is measured again
    assert run("third", rounds=2)[0] == 130
    assert run("third", "--seed", 1)[2] >= rounds  # and so is another seed's
