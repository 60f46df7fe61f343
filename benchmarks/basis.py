"""What a basis is worth: hidden dims cut by hand, in the checkpoint's basis and in turned ones, no gates, no update.

    python -m benchmarks.basis mistral_saves_tva/mini_mistral llama3_saves_tva/mini_llama3

Prints perplexity on the validation blocks that masks are chosen on, where everything that is written to the residual
stream beyond the first dims is dropped and norms go on dividing by the dense width. Of a model with tied embeddings:
what keeping the tie costs, the KL from its predictions to those of the stretched stream, over the dims that stay axes.
"""

import argparse
import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from tvaprune.choose.rotation import learn_rotation, moments_of, rows_of
from tvaprune.choose.tie import BLOCKS, tried
from tvaprune.flags.arguments import Arguments
from tvaprune.measure.perplexity import perplexity
from tvaprune.models.families import family_of
from tvaprune.models.rotate import Rotation, rotate, turns_of
from tvaprune.models.shape import shape_of
from tvaprune.run import Run

SHARES = (1.0, 0.875, 0.75, 0.6875, 0.5)


def bases(run: Run) -> dict[str, torch.Tensor]:
    """Returns orthogonal matrices by name, each with its weightiest direction first."""
    carried, needed = moments_of(run)
    learned = learn_rotation(run)
    assert learned is not None, "an untied model keeps no tie"
    order = carried.diagonal().argsort(descending=True)
    vectors = {name: torch.linalg.eigh(moment).eigenvectors.flip(1) for name, moment in
               (("by what is carried (PCA)", carried), ("by what is needed (Fisher)", needed))}  # fmt: skip
    return {
        "the checkpoint's, by what is carried": torch.eye(len(carried), dtype=torch.float64)[:, order],
        **vectors,
        "by both (--rotate)": learned.matrix,
    }


@contextmanager
def cut(model: PreTrainedModel, keep: int) -> Iterator[None]:
    """Drops what is written to all dims of the stream but the first, for a while."""
    family, shape = family_of(model.config), shape_of(model.config)
    writers = [name.removesuffix(".weight") for name, turn in turns_of(family, shape).items() if turn.writes]
    there = (torch.arange(shape.hidden_size) < keep).to(model.dtype)

    def drop(module: object, args: object, output: torch.Tensor) -> torch.Tensor:
        return output * there

    modules = [model.get_submodule(name) for name in (family.embedding, *writers)]
    handles = [module.register_forward_hook(drop) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tell_tie(run: Run, path: str) -> None:
    """Prints what keeping a tie costs, over the axes."""
    carried, _ = moments_of(run)
    print(f"\n| {path}: axes of {run.shape.hidden_size} hidden dims | KL, nats |\n|---|---|")
    for _, axes, cost in tried(run.model, carried.diagonal(), rows_of(run, BLOCKS)):
        print(f"| {int(axes.sum())} | {cost:.2g} |", flush=True)


def main() -> None:
    """Prints a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoints")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    for path in args.models:
        flags = (
            f"--model_name_or_path {path} --dataset_name python_docs --block_size 256 --output_dir out/basis --use_cpu "
            f"--dtype {args.dtype}"
        )
        run = Run.load(Arguments.parse(flags.split(), "prune"))
        if run.shape.tie_word_embeddings:
            tell_tie(run, path)
            continue
        size, blocks = run.shape.hidden_size, run.selection_blocks()
        kept = [round(share * size) for share in SHARES]
        print(f"\n| {path}: hidden dims kept of {size} | {' | '.join(map(str, kept))} |\n|---|{'---|' * len(kept)}")
        for name, basis in bases(run).items():
            model, found = rotate(copy.deepcopy(run.model), Rotation(basis)), []
            for keep in kept:
                with cut(model, keep):
                    found.append(f"{perplexity(model, blocks, 0):.2f}")
            print(f"| {name} | {' | '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
