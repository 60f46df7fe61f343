"""What models say: the same eight prompts, greedy, side by side and unretouched.

python -m benchmarks.generations smollm2 out/smollm2/pruned out/smollm2/tuned/merged > generations.md

With ``--write out/smollm2`` the results page of that folder has these, once ``tvaprune report`` makes it anew, in place
of those that the run itself asked for (``--prompts``).
"""

import argparse
from pathlib import Path

import torch
from transformers.utils import logging

from tvaprune.cli import run_command
from tvaprune.errors import InputError, one_line
from tvaprune.measure.generations import PROMPTS, Answers, answers, in_a_line
from tvaprune.models.load import load_model
from tvaprune.report.folders import write_generations
from tvaprune.report.results import Results


def cell(text: str) -> str:
    """Returns a text as a cell of a Markdown table: line ends shown as `⏎`."""
    return one_line(in_a_line(text.strip("\n"))).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generations", description=str(__doc__).split("\n")[0])
    parser.add_argument("models", nargs="+", help="checkpoints, the dense one first")
    parser.add_argument("--tokens", type=int, default=40, help="tokens added at most")
    parser.add_argument("--chat", action="store_true", help="ask by the chat template, in place of continuing the text")
    parser.add_argument("--write", type=Path, help="a run's folder, whose results page is to have them")
    args = parser.parse_args()
    run = None if args.write is None else Results.read(args.write)
    if args.write is not None and run is None:
        raise InputError(f"--write {args.write}: holds no results.json; give a run's folder")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    said: dict[str, Answers] = {}
    for path in args.models:
        model, tokenizer = load_model(path, "auto", torch.device("cpu"))
        said[path] = answers(model, tokenizer, args.tokens, args.chat)
    columns = [[cell("".join(answer)) for answer in every] for every in said.values()]
    if run is not None:
        write_generations(args.write, run.command, said)
    print(f"| | {' | '.join(args.models)} |\n{'|---' * (1 + len(columns))}|")
    for prompt, *row in zip(PROMPTS, *columns, strict=True):
        print(f"| **{cell(prompt)}** | {' | '.join(row)} |")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
