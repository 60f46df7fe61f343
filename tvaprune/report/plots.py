"""The pictures of a run."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from tvaprune.files import replacing, write_json
from tvaprune.outputs import OF_GATES
from tvaprune.plan.keep_plan import KeepPlan

matplotlib.use("Agg")  # pictures go to files; a machine without a screen has no other backend


def write_training(history: list[dict[str, float]], folder: Path) -> None:
    """Writes the log of a gate training, and its picture."""
    log, picture = OF_GATES
    plot_training(history, folder / picture)
    write_json({"log": history}, folder / log)


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


def plot_finetuning(history: list[dict[str, float]], path: Path, dense: float, pruned: float) -> None:
    """Draws the terms of the loss and the validation perplexity over the steps.

    Args:
        dense: Perplexity of the unpruned model, on the windows that are reported.
        pruned: That of the model that training began with.
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
    for name, value, style in (("pruned", pruned, ":"), ("dense", dense, "--")):
        panels[-1].axhline(value, color="0.4", linestyle=style, label=f"{name}, windows reported")
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
        axes.bar(layers, full, color="0.88", label="unpruned")
        axes.bar(layers, kept, color="tab:blue", label="kept")
        axes.set(ylabel=name)
    channels.set(xlabel="layer", xticks=layers)
    heads.legend(loc="lower right")
    heads.set_title(
        f"Kept widths: hidden {plan.hidden_size} of {plan.shape.hidden_size}, decoder sparsity {plan.sparsity:.3f}"
    )
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a picture, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
