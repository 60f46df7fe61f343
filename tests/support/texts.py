"""Texts of a hundred documents, in every kind of file, and copies of the hub's repositories."""

import gzip
import json

from datasets import Dataset

SPLITS = ("train", "validation", "test")
DOCUMENTS = [f"document {i} of one hundred" for i in range(100)]


def write_text(folder, kind):
    path = folder / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(DOCUMENTS))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": d, "source": "made up"}) + "\n" for d in DOCUMENTS))
    elif kind == "parquet":
        Dataset.from_dict({"text": DOCUMENTS}).to_parquet(path)
    else:
        Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(path)
    return str(path)


def write_hub_copies(folder):
    for split in SPLITS:
        rows = [f"{split} {i}" for i in range(4)]
        wikitext = folder / f"Salesforce/wikitext/wikitext-2-raw-v1/{split}-00000-of-00001.parquet"
        ptb = folder / f"ptb-text-only/ptb_text_only/penn_treebank/{split}/0000.parquet"
        for path, column in ((wikitext, "text"), (ptb, "sentence")):
            path.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_dict({column: rows}).to_parquet(path)
    c4 = folder / "allenai/c4/en"
    c4.mkdir(parents=True)
    for name, prefix in (("c4-train.00000-of-01024", "train"), ("c4-validation.00000-of-00008", "held out")):
        with gzip.open(c4 / f"{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{prefix} {i}", "url": "made up"}) + "\n" for i in range(100))
