"""The closing table of a command."""

import math
from collections.abc import Sequence
from typing import Any

from tvaprune.models.shape import in_words
from tvaprune.text.protocols import EvaluationText


def table(rows: Sequence[tuple[str, str]]) -> str:
    """Returns two aligned columns."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def summary_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns the closing table's rows for the results of one measurement."""
    ppl, speed, widths = results["perplexity"], results.get("speed_up"), results["widths"]
    text = EvaluationText(**results["protocol"])
    rows = [
        (
            f"perplexity ({text.dataset_name} {text.split}, windows of {text.window})",
            f"{ppl['dense']:.2f} dense -> {ppl['pruned']:.2f} pruned "
            f"(gap in log perplexity {math.log(ppl['pruned'] / ppl['dense']):.3f})",
        ),
        ("protocol", text.line),
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


def _of(kept: Sequence[int], full: Sequence[int]) -> str:
    return f"{' '.join(map(str, kept))} of {in_words(full)}"
