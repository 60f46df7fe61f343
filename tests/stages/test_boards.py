"""What a real board holds of a training of gates: TensorBoard's own reader reads what `--report_to` wrote."""

import pytest
from support import tiny

from tvaprune.plan.keep_plan import KeepPlan

RUN = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 6, "--speed_batches", 0, "--use_cpu",
       "--max_train_samples", 32, "--per_device_train_batch_size", 4, "--eval_steps", 4, "--logging_steps", 1,
       "--dim_multiple", 4, "--weight_update", "fold", "--prompt_tokens", 0, "--do_train")  # fmt: skip
EACH_STEP = ("expected_sparsity", "target_sparsity", "lambda_1", "lambda_2")


def test_tensorboard_shows_sparsity_multipliers_and_the_masks_figures(make_model, tmp_path, command):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder, text = tiny.save_checkpoint(make_model("llama"), tmp_path / "model"), tiny.write_text(tmp_path / "text.txt")
    out = tmp_path / "out"
    flags = ("--model_name_or_path", folder, "--dataset_name", text, *RUN, "--output_dir", out)
    code, _, error = command(*flags, "--report_to", "tensorboard")
    assert code == 0, error
    (events,) = (out / "runs").rglob("events.out.tfevents.*")
    board = accumulators.EventAccumulator(str(events)).Reload()
    shown = {name: {each.step: each.value for each in board.Scalars(name)} for name in board.Tags()["scalars"]}
    log = tiny.read_json(out / "training_log.json")["log"]
    for name in EACH_STEP:
        assert shown[f"train/{name}"] == pytest.approx({row["step"]: row[name] for row in log if name in row})
        assert list(shown[f"train/{name}"]) == list(range(1, 9))
    assert len(set(shown["train/expected_sparsity"].values())) > 1  # control: they are read, not repeated
    plan, last = KeepPlan.load(out / "plan.json"), max(shown["eval/perplexity"])
    assert last == 8 and shown["eval/perplexity"][last] > 1
    assert shown["eval/hidden_size"][last] == plan.hidden_size
    assert shown["eval/mean_num_key_value_heads"][last] == pytest.approx(sum(plan.num_key_value_heads) / 3)
    assert shown["eval/mean_intermediate_size"][last] == pytest.approx(sum(plan.intermediate_size) / 3)
    assert shown["eval/sparsity"][last] == pytest.approx(plan.sparsity)
    code, _, error = command(*flags, "--overwrite_output_dir")
    assert code == 0 and list((out / "runs").rglob("events*")) == [events], error  # control: unasked, no board
