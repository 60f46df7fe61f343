"""How much faster and smaller a pruned model is where people feel it: Hugging Face and llama.cpp, prefill and decoding.

Each pruned checkpoint is timed turn about with the dense one, in one run. A ratio is the median of the pairs, with the
quartiles; *ideal* is the ratio of the parameters that a token passes through (layers, final norm and head; of the
attention over the context, which no parameter tells, nothing is counted). llama.cpp is timed where llama-cpp-python is
installed, on the GGUF files that the export writes; their sizes are told anyway.

    python -m benchmarks.speed DENSE PRUNED [PRUNED ...] --output out/speed

``--dtypes`` without a name times llama.cpp alone.
"""

import argparse
import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from transformers.utils import logging

from tvaprune.cli import run_command
from tvaprune.export.in_llama_cpp import opened
from tvaprune.files import write_json, write_text
from tvaprune.measure import hardware
from tvaprune.measure.speed import turn_about
from tvaprune.models.load import load_model
from tvaprune.models.published import located
from tvaprune.stages.export import export


@dataclass(frozen=True)
class Timing:
    """One model against the dense one.

    Attributes:
        what: What was done, in which engine and precision.
        model: The pruned checkpoint.
        dense: Tokens a second of the dense model, the median.
        pruned: Of the pruned one.
        ratio: Lower quartile, median and upper quartile of the ratios of the pairs.
        ideal: Ratio of the parameters that a token passes through.
    """

    what: str
    model: str
    dense: float
    pruned: float
    ratio: tuple[float, float, float]
    ideal: float

    def row(self) -> str:
        """Returns it as a row of the table."""
        low, middle, high = self.ratio
        return (
            f"| {self.what} | {self.model} | {self.dense:,.0f} | {self.pruned:,.0f} | {middle:.2f}x "
            f"({low:.2f} to {high:.2f}) | {self.ideal:.2f}x | {middle / self.ideal:.0%} |"
        )


COLUMNS = ("", "model", "dense, tokens/s", "pruned, tokens/s", "faster by (quartiles)", "ideal", "of ideal")
Step = Callable[[int], object]


def touched(model: Any) -> int:
    """Returns the parameters that a token passes through: all but the embedding, whose rows are looked up."""
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    return sum(p.numel() for p in model.parameters() if p is not embedding and p is not head) + head.numel()


def timed(what: str, name: str, steps: tuple[Step, Step], tokens: int, repeats: int, ideal: float) -> Timing:
    """Times two steps of some tokens each."""
    slow, fast = turn_about(*steps, repeats)
    dense, pruned = (tokens / quartiles(seconds)[1] for seconds in (slow, fast))
    return Timing(what, name, dense, pruned, quartiles([a / b for a, b in zip(slow, fast, strict=True)]), ideal)


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns the lower quartile, the median and the upper quartile."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def prefill(model: Any, ids: torch.Tensor) -> Step:
    """Returns a forward pass without a cache."""
    return lambda index: model(input_ids=ids, use_cache=False)


def decode(model: Any, token: torch.Tensor, tokens: int) -> Step:
    """Returns the greedy decoding of some tokens after one, with a cache."""

    def step(index: int) -> None:
        last, cache = token, None
        for _ in range(tokens):
            found = model(input_ids=last, past_key_values=cache, use_cache=True)
            last, cache = found.logits[:, -1:].argmax(-1), found.past_key_values

    return step


def hugging_face(dense: str, pruned: str, args: argparse.Namespace) -> list[Timing]:
    """Times both models in transformers on the CPU, in each precision."""
    found = []
    for dtype in args.dtypes:
        models = [load_model(path, dtype, torch.device("cpu"))[0] for path in (dense, pruned)]
        ideal, vocabulary = touched(models[0]) / touched(models[1]), models[0].config.vocab_size
        with torch.inference_mode():
            for shape in args.prefill:
                batch, length = map(int, shape.split("x"))
                ids = torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
                first, second = (prefill(model, ids) for model in models)
                what = f"transformers {dtype}, prefill {batch} x {length}"
                found.append(timed(what, pruned, (first, second), batch * length, args.repeats, ideal))
            token = torch.zeros(1, 1, dtype=torch.long)
            first, second = (decode(model, token, args.decode) for model in models)
            what = f"transformers {dtype}, decoding 1 x {args.decode}"
            found.append(timed(what, pruned, (first, second), args.decode, args.repeats, ideal))
    return found


def gguf_files(path: str, output: Path, outtypes: list[str]) -> dict[str, Path]:
    """Writes a checkpoint as GGUF, once: another of its name, or one that was made anew, has files of its own."""
    folder = Path(located(path)).resolve()
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir())]
    identity = hashlib.sha256(repr((folder, found)).encode()).hexdigest()[:8]
    files = {outtype: output / f"{Path(path).name}-{identity}-{outtype}.gguf" for outtype in outtypes}
    for outtype, file in files.items():
        if not file.exists():
            export("gguf", folder, file, outtype, verify=False)
    return files


def touched_in(file: Path) -> int:
    """Returns the same of a GGUF file."""
    import gguf

    sizes = {tensor.name: int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors}
    sizes.pop("rope_freqs.weight", None)  # no parameters: factors of the rotary embedding
    embedding = sizes.pop("token_embd.weight")
    return sum(sizes.values()) + (0 if "output.weight" in sizes else embedding)


def llama_cpp(dense: Path, pruned: Path, name: str, args: argparse.Namespace) -> list[Timing]:
    """Times both files in llama.cpp: a prompt, and tokens one by one from the beginning of a text."""
    ideal = touched_in(dense) / touched_in(pruned)
    prompt, tokens = max(int(shape.split("x")[1]) for shape in args.prefill), args.decode
    threads = torch.get_num_threads()
    models = [opened(file, threads, n_ctx=prompt + tokens, n_batch=prompt) for file in (dense, pruned)]
    ids = torch.randint(0, models[0].n_vocab(), (prompt,), generator=torch.Generator().manual_seed(0)).tolist()

    def read(model: Any) -> Step:
        return lambda index: (model.reset(), model.eval(ids))

    def write(model: Any) -> Step:
        return lambda index: (model.reset(), [model.eval([token]) for token in ids[:tokens]])

    what = f"llama.cpp {dense.stem.rsplit('-', 1)[1]}"
    first, second = (read(model) for model in models)
    found = [timed(f"{what}, prompt of {prompt}", name, (first, second), prompt, args.repeats, ideal)]
    first, second = (write(model) for model in models)
    return [*found, timed(f"{what}, generation of {tokens}", name, (first, second), tokens, args.repeats, ideal)]


def sizes(models: list[str], files: dict[str, dict[str, Path]]) -> str:
    """Returns the table of the sizes on disk."""
    lines = ["| MiB | safetensors | " + " | ".join(next(iter(files.values()))) + " |"]
    lines.append("|---" * (2 + len(next(iter(files.values())))) + "|")
    for model in models:
        stored = sum(path.stat().st_size for path in Path(located(model)).glob("*.safetensors"))
        each = [stored, *(path.stat().st_size for path in files[model].values())]
        lines.append(f"| {model} | " + " | ".join(f"{size / 2**20:,.1f}" for size in each) + " |")
    return "\n".join(lines)


def measured(args: argparse.Namespace, files: dict[str, dict[str, Path]]) -> Iterator[list[Timing]]:
    """Yields the timings of every pruned model beside the dense one, in transformers and in llama.cpp."""
    for model in args.pruned:
        yield hugging_face(args.dense, model, args)
        if importlib.util.find_spec("llama_cpp") is not None:
            for outtype in args.outtypes:
                yield llama_cpp(files[args.dense][outtype], files[model][outtype], model, args)


def write_page(found: list[Timing], table: str, args: argparse.Namespace) -> str:
    """Writes what has been timed so far, as llama.cpp may take the process along; returns the page."""
    device = hardware.describe_device(torch.device("cpu"))
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    where = f"({device}; median of {args.repeats} pairs)"
    page = "\n\n".join(["\n".join([*head, *(timing.row() for timing in found)]), where, table])
    write_text(page + "\n", args.output / "speed.md")
    told = {"timings": [asdict(timing) for timing in found], "versions": hardware.versions()}
    write_json(told | {"hardware": device}, args.output / "speed.json")
    return page


def main() -> None:
    """Times every pruned model against the dense one, prints the tables and writes them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=str(__doc__).split("\n")[0])
    parser.add_argument("dense", help="the checkpoint that the others were cut from")
    parser.add_argument("pruned", nargs="+", help="folders of --save_pruned, or of fine-tuning's merged model")
    parser.add_argument("--output", type=Path, default=Path("out/speed"), help="folder of speed.md and the GGUFs")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"], help="precisions in transformers")
    parser.add_argument("--outtypes", nargs="+", default=["f16", "q8_0"], help="precisions in llama.cpp")
    parser.add_argument("--prefill", nargs="+", default=["1x512", "8x256"], help="batch x tokens")
    parser.add_argument("--decode", type=int, default=64, help="tokens decoded one by one")
    parser.add_argument("--repeats", type=int, default=10, help="pairs of every timing")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    args.output.mkdir(parents=True, exist_ok=True)
    models = [args.dense, *args.pruned]
    files = {model: gguf_files(model, args.output, args.outtypes) for model in models}
    found: list[Timing] = []
    for timings in measured(args, files):
        found += timings
        page = write_page(found, sizes(models, files), args)
    print(page)
    if importlib.util.find_spec("llama_cpp") is None:
        print("note: llama.cpp is not timed: pip install llama-cpp-python")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
