"""Results: `results.json`, the closing table, and the pictures of a run."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tvaprune.plan import KeepPlan

matplotlib.use("Agg")  # pictures go to files; a machine without a screen has no other backend


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes JSON under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Returns two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def summary_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the closing table's rows for the results of one measurement."""
    ppl, speed, widths = results["perplexity"], results.get("speed_up"), results["widths"]
    rows = [
        (
            f"perplexity ({results['dataset_name']} {results['split']}, windows of {results['window']})",
            f"{ppl['dense']:.2f} dense -> {ppl['pruned']:.2f} pruned "
            f"(gap in log perplexity {math.log(ppl['pruned'] / ppl['dense']):.3f})",
        ),
        ("sparsity of the decoder layers", _sparsity(results)),
        ("parameters", f"{results['parameters']['dense']:,} -> {results['parameters']['pruned']:,}"),
        ("kept hidden dims", f"{widths['hidden_size']} of {results['shape']['hidden_size']}"),
        ("kept KV heads per layer", _of(widths["num_key_value_heads"], results["shape"]["num_key_value_heads"])),
        ("kept MLP channels per layer", _of(widths["intermediate_size"], results["shape"]["intermediate_size"])),
        ("instant weight update", _update(results)),
    ]
    if speed:
        rows.append(
            (
                f"speed-up (forward, batch {speed['batch_size']} x {speed['window']}, {results['hardware']})",
                f"{speed['per_batch']:.2f}x per batch, {speed['whole_set']:.2f}x over {speed['num_batches']} batches",
            )
        )
    return rows


def finetune_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the closing table's rows for what fine-tuning did."""
    ppl, told, speed = results["perplexity"], results["finetune"], results.get("training_speed_up")
    before, after = (math.log(ppl[name] / ppl["dense"]) for name in ("pruned", "finetuned"))
    closed = f", {1 - after / before:.0%} of it closed" if before > 0 else ""
    rows = [
        (
            "perplexity, fine-tuned",
            f"{ppl['pruned']:.2f} pruned -> {ppl['finetuned']:.2f} (gap {before:.3f} -> {after:.3f}{closed})",
        ),
        (
            f"fine-tuning ({told['method']}, {told['steps']} steps of {told['blocks_per_step']} blocks)",
            f"{told['seconds']:.0f} s, best step {told['best_step']}",
        ),
    ]
    if speed:
        name = f"speed-up of a training step (batch {speed['batch_size']} x {speed['window']}, both {told['method']})"
        rows.append((name, f"{speed['per_batch']:.2f}x per batch, {speed['whole_set']:.2f}x over all"))
    if "adapter_merged_difference" in told:
        rows.append(
            ("adapter and merged model differ by at most", f"{told['adapter_merged_difference']:.1e} in logits")
        )
    return rows


def _sparsity(results: dict[str, Any]) -> str:
    achieved = results["widths"]["decoder_sparsity"]
    target = results.get("target_sparsity")
    return f"{achieved:.4f}" if target is None else f"{achieved:.4f} (target {target})"


def _update(results: dict[str, Any]) -> str:
    done = results.get("refit")
    if done is None:
        return str(results["weight_update"])
    known = dict(zip(done["shares"], done["divergences"], strict=True))
    before, after = known[0.0], known[done["share"]]
    return (
        f"refit on {done['calibration_blocks']} blocks, {done['share']:g} of the way from the fold: "
        f"held-out KL to dense {before:.3f} -> {after:.3f}, {done['seconds']:.0f} s"
    )


def _of(kept: Sequence[int], full: int) -> str:
    return f"{' '.join(map(str, kept))} of {full}"


def plot_training(history: list[dict[str, float]], path: Path) -> None:
    """Draws the loss, expected and target sparsity, and the multipliers over the steps."""
    rows = [row for row in history if "expected_sparsity" in row]
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(7, 7), layout="constrained")
    loss, sparsity, multipliers = figure.subplots(3, 1, sharex=True)
    loss.plot(steps, [row["task_loss"] for row in rows], color="tab:blue")
    loss.set(ylabel="task loss", title="Gate training")
    sparsity.plot(steps, [row["expected_sparsity"] for row in rows], label="expected")
    sparsity.plot(steps, [row["target_sparsity"] for row in rows], "--", label="target")
    scored = [(row["step"], row["eval_sparsity"]) for row in history if "eval_sparsity" in row]
    if scored:
        sparsity.plot(*zip(*scored, strict=True), "k.", label="scored mask")
    sparsity.set(ylabel="decoder sparsity")
    for name in ("lambda_1", "lambda_2"):
        multipliers.plot(steps, [row[name] for row in rows], label=name)
    multipliers.set(ylabel="multipliers", xlabel="step")
    for axes in (sparsity, multipliers):
        axes.legend()
    for axes in (loss, sparsity, multipliers):
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_finetuning(history: list[dict[str, float]], path: Path, perplexity: dict[str, float]) -> None:
    """Draws the terms of the loss and the validation perplexity over the steps.

    Args:
        perplexity: Of ``dense`` and ``pruned``, on the windows that are reported.
    """
    rows = [row for row in history if "ce" in row]
    scored = [(row["step"], row["eval_perplexity"]) for row in history if "eval_perplexity" in row]
    others = [name for name in ("kl", "hidden") if rows and name in rows[0]]
    figure = Figure(figsize=(7, 7 if others else 5), layout="constrained")
    panels = figure.subplots(2 + bool(others), 1, sharex=True)
    steps = [row["step"] for row in rows]
    panels[0].plot(steps, [row["ce"] for row in rows], color="tab:blue", label="cross-entropy")
    panels[0].set(ylabel="nats per token", title="Fine-tuning")
    for name, label in (("kl", "KL to the dense model"), ("hidden", "hidden states, 1 - cosine")):
        if name in others:
            panels[1].plot(steps, [row[name] for row in rows], label=label)
    for name, style in (("pruned", ":"), ("dense", "--")):
        panels[-1].axhline(perplexity[name], color="0.4", linestyle=style, label=f"{name}, windows reported")
    if scored:
        panels[-1].plot(*zip(*scored, strict=True), "o-", color="tab:blue", label="fine-tuned, windows compared on")
    panels[-1].set(ylabel="perplexity", xlabel="step")
    for axes in panels:
        axes.legend(loc="center right" if axes is panels[-1] else "upper right")
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def plot_widths(plan: KeepPlan, path: Path) -> None:
    """Draws the kept KV heads and MLP channels of every layer."""
    layers = list(range(plan.shape.num_hidden_layers))
    figure = Figure(figsize=(max(6, len(layers) / 3), 5), layout="constrained")
    heads, channels = figure.subplots(2, 1, sharex=True)
    panels = (
        (heads, plan.num_key_value_heads, plan.shape.num_key_value_heads, "KV heads"),
        (channels, plan.intermediate_size, plan.shape.intermediate_size, "MLP channels"),
    )
    for axes, kept, full, name in panels:
        axes.bar(layers, [full] * len(layers), color="0.88", label="unpruned")
        axes.bar(layers, kept, color="tab:blue", label="kept")
        axes.set(ylabel=name)
    channels.set(xlabel="layer", xticks=layers)
    heads.legend(loc="lower right")
    heads.set_title(
        f"Kept widths: hidden {plan.hidden_size} of {plan.shape.hidden_size}, decoder sparsity {plan.sparsity:.3f}"
    )
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Draws a picture under a temporary name, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".part-{path.name}")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)
