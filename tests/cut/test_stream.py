"""Out of core is in memory: the same folder, byte for byte, whatever the family."""

import json

import pytest
from support.families import ROWS, make_plan
from support.in_process import run
from support.other_families import OTHER_ROWS
from support.tiny import save_checkpoint, write_text

pytestmark = pytest.mark.usefixtures("other_families")

WINDOWS = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 6, "--refit_samples", 12, "--use_cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def applied(folder, plan, text, output, *flags):
    """Runs apply and returns the folder that it saved and its results."""
    ended = run(
        "apply", "--model_name_or_path", folder, "--plan", plan, "--dataset_name", text, "--save_loc", output / "at",
        "--save_pruned", output / "pruned", "--output_dir", output / "at", *WINDOWS, *flags,
    )  # fmt: skip
    assert ended.code == 0, ended.err + ended.trace
    results = json.loads((output / "at" / "results.json").read_text())
    for name in ("command", "speed_up"):
        results.pop(name, None)
    results.get("refit", {}).pop("seconds", None)
    return files_in(output / "pruned"), results


@pytest.mark.parametrize("update", ["fold", "refit"])
@pytest.mark.parametrize("row", ROWS | OTHER_ROWS)
def test_the_folder_is_that_of_the_model_in_memory(row, update, make_model, make_masks, text, tmp_path):
    model_type, values = (ROWS | OTHER_ROWS)[row]
    model = make_model(model_type, **values)
    save_checkpoint(model, tmp_path / "dense")
    make_plan(model, make_masks, empty_layer=0).save(tmp_path / "plan.json")
    both = [
        applied(tmp_path / "dense", tmp_path / "plan.json", text, tmp_path / name, "--do_eval", "True",
                "--weight_update", update, *flags)
        for name, flags in (("memory", ("--speed_batches", 0)), ("streamed", ("--stream", "True")))
    ]  # fmt: skip
    (files, results), (streamed, streamed_results) = both
    for content in (files, streamed):
        for path in [path for path in content if path.name == "README.md"]:
            content[path] = b"\n".join(line for line in content[path].splitlines() if b"command" not in line)
    assert files.keys() == streamed.keys()
    assert [path for path in files if files[path] != streamed[path]] == []
    assert results == streamed_results
