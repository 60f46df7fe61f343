"""A handful of made-up rows for each released zero-shot task, in the layout of its repository on the hub."""

import yaml
from datasets import Dataset

LETTERS = ["A", "B", "C", "D"]


def question(index):
    texts = [f"the {index}th {thing}" for thing in ("stone", "river", "light", "paper")]
    return {"choices": {"text": texts, "label": LETTERS}, "answerKey": LETTERS[index % 4], "id": str(index)}


ROWS = {
    "hellaswag": lambda index: {
        "ind": index,
        "activity_label": "Washing dishes",
        "ctx_a": f"A man stands at sink {index}.",
        "ctx_b": "he",
        "ctx": f"A man stands at sink {index}. he",
        "endings": ["washes a plate.", "sings [title] to it.", "flies away.", "eats the sink."],
        "source_id": f"activitynet~{index}",
        "split": "indomain",
        "split_type": "indomain",
        "label": str(index % 4),
    },
    "winogrande": lambda index: {
        "sentence": f"The cup {index} did not fit in the bag because the _ was too big.",
        "option1": "cup",
        "option2": "bag",
        "answer": str(1 + index % 2),
    },
    "openbookqa": lambda index: {"question_stem": f"What is hard, number {index}?"} | question(index),
    "arc_easy": lambda index: {"question": f"Which is wet, number {index}?"} | question(index),
    "arc_challenge": lambda index: {"question": f"Which is bright, number {index}?"} | question(index),
    "piqa": lambda index: {
        "goal": f"Open jar {index}.",
        "sol1": "Turn the lid.",
        "sol2": "Sing to the lid.",
        "label": index % 2,
    },
    "boolq": lambda index: {
        "question": f"is {index} a number",
        "passage": f"{index} is a number.",
        "idx": index,
        "label": index % 2,
    },
    "rte": lambda index: {
        "sentence1": f"{index} cats sleep.",
        "sentence2": "Cats sleep.",
        "label": index % 2,
        "idx": index,
    },
}
# Task -> the hub's repository, the configuration, the split that is scored.
REPOSITORIES = {
    "hellaswag": ("Rowan/hellaswag", "default", "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "piqa": ("baber/piqa", "default", "validation"),
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "rte": ("nyu-mll/glue", "rte", "validation"),
}


def write_hub_copy(data_dir, task, rows=None):
    """Writes the repository of a task below ``data_dir``: parquet files, and the README that lists configurations."""
    repository, config, scored = REPOSITORIES[task]
    folder = data_dir / repository
    inner = "data" if config == "default" else config
    splits = {
        "train": [ROWS[task](index) for index in range(10, 14)],
        scored: rows or [ROWS[task](i) for i in range(4)],
    }
    for split, content in splits.items():
        path = folder / inner / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(content).to_parquet(path)
    readme = folder / "README.md"
    known = yaml.safe_load(readme.read_text().split("---")[1])["configs"] if readme.exists() else []
    known.append(
        {"config_name": config, "data_files": [{"split": name, "path": f"{inner}/{name}-*"} for name in splits]}
    )
    readme.write_text(f"---\n{yaml.safe_dump({'configs': known})}---\n")
