"""A run's folder with every file that the page reads, made without a run."""

import json

from report.test_zero_shot_report import made, record_of, score

from tvaprune.measure.speed import SpeedUp
from tvaprune.models.shape import ModelShape
from tvaprune.recover.training import Tuning
from tvaprune.report.results import KeptWidths, Parameters, Perplexities, PerplexityErrors, Refit
from tvaprune.text.protocols import EvaluationText

SHAPE = ModelShape(
    hidden_size=32, num_key_value_heads=(2, 2, 2), group_size=2, head_dim=4, intermediate_size=(64, 64, 64),
    vocab_size=50, tie_word_embeddings=False,
)  # fmt: skip
GATES = [
    {"step": 1, "task_loss": 0.31, "expected_sparsity": 0.1, "target_sparsity": 0.2, "lambda_1": -0.5, "lambda_2": 1.5},
    {"step": 2, "task_loss": 0.27, "expected_sparsity": 0.4, "target_sparsity": 0.5, "lambda_1": 0.5, "lambda_2": 2.5},
    {"step": 2, "eval_perplexity": 26.5, "eval_sparsity": 0.49},
]
TUNED = [
    {"step": 1, "ce": 3.2, "kl": 0.3},
    {"step": 2, "ce": 3.1, "kl": 0.2},
    {"step": 2, "eval_perplexity": 22.5},
]
COMMAND = "python run.py --x '<script>'"
GENERATIONS = {
    "command": COMMAND,
    "prompts": ["The capital <b>"],
    "models": {"dense": [[" is", " Paris", "."]], "pruned": [[" is", " Lyon", ","]], "tuned": [[" is", " Paris"]]},
}


def results(**change):
    """Results of which every part but the zero-shot scores is filled; two linears refused the refit."""
    parts = dict(
        model="models/mini", target_sparsity=0.5, shape=SHAPE,
        widths=KeptWidths(24, [2, 1, 0], [48, 32, 8], 0.51, 9, 8),
        sparsity_definition="decoder layers", parameters=Parameters(1_600_000, 1_000_000), versions={"torch": "2.13"},
        perplexity=Perplexities(20.0, 25.0, 22.0, PerplexityErrors(0.5, 0.62, 0.002, 0.55, 0.003)),
        command=COMMAND, hardware="a card",
        protocol=EvaluationText("own", "prose", "test", None, "</s>", False, 8, 3), dataset_name="prose",
        speed_up=SpeedUp(1.5, 1.4, 3.0, 2.0, 4, 8, 16), training_speed_up=SpeedUp(1.3, 1.2, 3.0, 2.5, 4, 8, 16),
        refit=Refit((0.0, 0.5, 1.0), (0.4, 0.3, 0.35), 0.5,
                    {"layer 0 q_proj": 0.1, "layer 1 o_proj": None, "lm_head": None}, 4, 2, 1.5),
        finetune=Tuning("lora", True, 10, "live", 1.0, 2.0, 0.0, 1e-3, 4, 24, 1.0, 6, 6, None, 2.5, 2, 4.0, 0.0, 1e-6),
    )  # fmt: skip
    return made(**parts | change)


def write_run(folder, **change):
    """Writes the folder and returns it."""
    folder.mkdir(parents=True)
    record = record_of(folder, results(**change))
    record.add("a", "dense", score([1.0, 1.0]))
    record.add("a", "pruned", score([1.0, 0.0]))
    record.finish({"b": "some/data"})
    (folder / "recipe.yaml").write_text("verb: prune\nseed: 1\n", encoding="utf-8")
    for name, content in (
        ("training_log", {"log": GATES}),
        ("finetune_log", {"log": TUNED}),
        ("generations", GENERATIONS),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
