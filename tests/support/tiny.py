"""A tiny checkpoint with a tokenizer and a text, for the tests that run whole commands."""

import json
import os
import random
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tvaprune.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
EVERY = bool(os.environ.get("TVAPRUNE_EVERY"))  # the slow tests in all their cases, and not in some of each kind
SHORT = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--speed_batches", 2, "--use_cpu",
         "--dim_multiple", 4)  # fmt: skip
WORDS = "the gate of a unit keeps or drops what it carries while narrow models answer nearly as well".split()


def write_text(path, num_words=6000):
    choose = random.Random(0)
    sentences = (" ".join(choose.choices(WORDS, k=12)) for _ in range(num_words // 12))
    path.write_text("\n\n".join(sentences), encoding="utf-8")
    return path


def save_checkpoint(model, folder, **options):
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([" ".join(WORDS)], trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
    model.save_pretrained(folder, **options)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


def run(script, *flags, **environment):
    """Runs a script of the repository as a user would, and returns what it said."""
    command = [sys.executable, *script.split(), *map(str, flags)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def refusal(code, error):
    """Returns the one line that a command ended with; fails if it did not end as a user's mistake should.

    Progress bars of libraries may stand before it.
    """
    assert code == 2 and "Traceback" not in error, error
    names = ("tva_prune.py: ", "lora_ft_vib.py: ")
    (line,) = (line for line in error.splitlines() if line.startswith(names))
    assert error.rstrip().endswith(line)
    return line


@contextmanager
def refused(words):
    """Fails unless what is done within ends as a user's mistake should: in one line, with these words (a pattern)."""
    with pytest.raises(InputError, match=words) as error:
        yield error
    assert "\n" not in str(error.value)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
