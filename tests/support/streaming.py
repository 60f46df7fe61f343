"""`apply` in memory and out of core, on a tiny checkpoint with a plan beside it."""

from support import tiny
from support.families import make_plan
from support.in_process import half_written, run
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import save_masks

WINDOWS = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 6, "--use_cpu")
STREAM = ("--stream", "True")


def save_dense(make_model, make_masks, tmp_path):
    """A checkpoint with a mask, a plan of it beside it."""
    model = make_model("llama", num_key_value_heads=4)
    save_masks(make_masks(shape_of(model.config)), tmp_path / "mask_info_1.0.pkl")
    make_plan(model, make_masks, empty_layer=0).save(tmp_path / "plan.json")
    return tiny.save_checkpoint(model, tmp_path / "dense")


def flags_of(dense, text, output):
    plan = ("--plan", dense.parent / "plan.json", "--dataset_name", text)
    folders = ("--output_dir", output / "at", "--save_pruned", output / "pruned")
    return ("--model_name_or_path", dense, *plan, *folders, *WINDOWS)


def apply(*flags):
    """Runs apply; where weights are refitted, on few blocks."""
    few = () if {"none", "fold"} & set(flags) else ("--refit_samples", 12)
    return run("apply", *flags, *few)


def files_in(folder):
    """The bytes of every file; of the card without the command that was given."""
    content = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    card = content["README.md"].splitlines()
    return content | {"README.md": b"\n".join(line for line in card if not line.startswith(b"- command"))}


def applied(dense, text, output, *flags):
    """Runs apply and returns the files that it saved and its results, without what differs by itself."""
    ended = apply(*flags_of(dense, text, output), *flags)
    assert ended.code == 0, ended.err + ended.trace
    results = output / "at" / "results.json"
    results = tiny.read_json(results) if results.exists() else {}  # nothing was measured
    results.get("refit", {}).pop("seconds", None)
    results.pop("command", None)
    assert half_written(output) == []
    return files_in(output / "pruned"), results


def both(dense, text, output, *flags):
    """The same in memory and out of core."""
    memory = applied(dense, text, output / "memory", "--speed_batches", 0, *flags)
    return memory, applied(dense, text, output, *STREAM, *flags)
