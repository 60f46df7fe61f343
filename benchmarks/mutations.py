"""Do the tests see what must not go wrong? Each mutation is put into a copy of the project, and its tests must fail.

python -m benchmarks.mutations
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*_cache", "out", "shared")


@dataclass(frozen=True)
class Mutation:
    """A mistake that somebody could make.

    Attributes:
        says: What goes wrong.
        path: The file.
        right: What stands there, once.
        wrong: What it becomes.
        tests: What must fail.
    """

    says: str
    path: str
    right: str
    wrong: str
    tests: str


REFIT, TRAINER, RUN = "tvaprune/cut/refit.py", "tvaprune/choose/trainer.py", "tvaprune/run.py"
RUNS = "tests/test_run.py"
MUTATIONS = [
    Mutation(
        "gates that train under the frozen model's dropout",
        "tvaprune/choose/gated_model.py",
        "        super().train(mode)\n        self.model.eval()\n",
        "        super().train(mode)\n",
        "tests/choose/test_trainer.py",
    ),
    Mutation(
        "a basis learned of the beginning of the text",
        "tvaprune/choose/rotation.py",
        'spread(run.train_blocks(ROTATION_BLOCKS), count)[:]["input_ids"]',
        'run.train_blocks(ROTATION_BLOCKS)[:count]["input_ids"]',
        "tests/choose/test_rotation.py",
    ),
    Mutation(
        "a finished training that goes on when it is resumed",
        "tvaprune/checkpoints.py",
        "if self.state.global_step >= self.state.max_steps:",
        "if self.state.global_step > self.state.max_steps:",
        "tests/robustness/test_nothing_is_lost.py",
    ),
    Mutation(
        "a fine-tuning that may replace the model that it is of",
        "tvaprune/recover/folders.py",
        'check_apart("output_dir", args.output_dir / name, "--model_name_or_path", read)',
        "",
        "tests/robustness/test_nothing_is_lost.py",
    ),
    Mutation(
        "a plan that does not say how its units were chosen",
        RUN,
        "return replace(plan, rotation=basis, prune_method=self.args.prune.prune_method)",
        "return replace(plan, rotation=basis)",
        "tests/plan/test_record.py",
    ),
    Mutation(
        "named zero-shot tasks that a comparison does not score",
        "tvaprune/study/cells.py",
        "names = evaluation.zero_eval_tasks or [OFFLINE_GROUP]",
        "names = [OFFLINE_GROUP]",
        "tests/stages/test_compare.py",
    ),
    Mutation(
        "every gate asks all modules whether activations are computed again",
        "tvaprune/choose/gated_model.py",
        'return multiply(x, by, self.noise == "token", self._pass.recomputes)',
        'return multiply(x, by, self.noise == "token", not self.model.is_activation_checkpointing)',
        "tests/choose/test_step.py",
    ),
    Mutation(
        "a process that llama.cpp took down counts as one that ended",
        "tvaprune/export/in_llama_cpp.py",
        "if ended.returncode:",
        "if ended.returncode > 1:",
        "tests/export/test_gguf_families.py",
    ),
    Mutation(
        "chapters of one novel in several splits",
        "tvaprune/text/english_prose.py",
        '_PART.sub("", path.stem)',
        "path.stem",
        "tests/text/test_english_prose.py",
    ),
    Mutation(
        "a text of its own that a model writes at another temperature than was asked for",
        "tvaprune/text/sampled.py",
        "(logits.float() / temperature)",
        "logits.float()",
        "tests/text/test_sampled.py",
    ),
    Mutation(
        "pages that an interrupted run wrote in part and that are taken for whole",
        "tvaprune/stages/sample.py",
        "range(0, len(lines) - size + 1, size)",
        "range(0, len(lines), size)",
        "tests/stages/test_sample.py",
    ),
    Mutation(
        "gains that do not know what norms divided by while the gates were trained",
        "tvaprune/plan/edits.py",
        "gain = (plan.shape.hidden_size / plan.hidden_size) ** 0.5 if",
        "gain = 1.0 if",
        "tests/models/test_each_family.py",
    ),
    Mutation(
        "an epsilon that the cut makes larger",
        "tvaprune/choose/norms.py",
        "mask / over, count / over)",
        "mask / over, torch.ones_like(count))",
        "tests/choose/test_step.py",
    ),
    Mutation(
        "settled gates whose norms average over the kept dims again",
        "tvaprune/choose/objective.py",
        "kept, self.gated.keeps_norm_width)",
        "kept)",
        "tests/choose/test_trainer.py",
    ),
    Mutation(
        "a norm past the attention that hides its gates after the cut",
        "tvaprune/plan/edits.py",
        "stream.means if size is None else stream.means * size",
        "stream.means",
        "tests/models/test_each_family.py",
    ),
    Mutation(
        "cut heads in the amplitude of gates",
        "tvaprune/plan/edits.py",
        "vector_norm(gates * counting, dim=-1) / count.clamp(min=1).sqrt()",
        "vector_norm(gates, dim=-1) / counting.numel() ** 0.5",
        "tests/choose/test_step.py",
    ),
    Mutation(
        "a lost attention whose bias the norm past it no longer passes on",
        "tvaprune/plan/edits.py",
        "torch.where(count > 0, size, 1.0)",
        "size",
        "tests/plan/test_edits.py",
    ),
    Mutation(
        "a gain's refit that forgets what the norm adds to it",
        REFIT,
        "(norm.weight.double() + offset) * found[best] - offset",
        "norm.weight * found[best]",
        "tests/cut/test_refit.py",
    ),
    Mutation(
        "losses in chunks without the weight of each position",
        "tvaprune/losses.py",
        "torch.mul(gradient, by.unsqueeze(-1), out=torch.empty_like(gradient))",
        "gradient * by.abs().max()",
        "tests/test_losses.py",
    ),
    Mutation(
        "prompts of a batch that read what fills up the shorter ones",
        "tvaprune/measure/generations.py",
        "[0] * gap + [1] * (longest - gap)",
        "[1] * longest",
        "tests/measure/test_generations.py",
    ),
    Mutation(
        "one target's page with the words of the model before",
        "tvaprune/report/steps.py",
        "run.answers.pop(name, None)",
        "run.answers.get(name)",
        "tests/stages/test_prompts.py",
    ),
    Mutation(
        "error bars to one side",
        "tvaprune/report/charts.py",
        "return self.y - (error or 0.0), self.y",
        "return self.y, self.y",
        "tests/report/test_page.py",
    ),
    Mutation(
        "experts that are not counted",
        "tvaprune/models/shape.py",
        "norms + count * each for norms, count",
        "norms for norms, count",
        "tests/models/test_mixtures.py",
    ),
    Mutation(
        "experts that write without the hidden means",
        "tvaprune/plan/edits.py",
        "mixture.down: Edit(stream.kept, row_factors=stream.means)",
        "mixture.down: Edit(stream.kept)",
        "tests/models/test_family_contract.py",
    ),
    Mutation(
        "LoRA on the experts of a stock mixture, and not of a pruned one",
        "tvaprune/recover/lora.py",
        "if family.experts is None:",
        "if True:",
        "tests/models/test_mixtures.py",
    ),
    Mutation(
        "the residual target without the factors",
        "tvaprune/cut/walk.py",
        "index_select(-1, kept).float() * scale",
        "index_select(-1, kept).float()",
        "tests/cut/test_refit.py",
    ),
    Mutation(
        "massive tokens ruling the fits",
        "tvaprune/cut/walk.py",
        "return 1 / sizes.clamp(min=torch.finfo(torch.float32).tiny)",
        "return 0 * sizes + 1",
        "tests/cut/test_refit.py",
    ),
    Mutation(
        "the residual target with half the stream",
        REFIT,
        "lacking = aim - batch.pruned[0]",
        "lacking = aim - 0.5 * batch.pruned[0]",
        "tests/cut/test_refit.py",
    ),
    Mutation(
        "a parallel MLP that reads what its attention wrote",
        "tvaprune/models/layout.py",
        'int(family.is_parallel and kind == "mlp")',
        "0",
        "tests/cut/test_refit.py",
    ),
    Mutation(
        "a norm that subtracts the mean of all dims",
        "tvaprune/choose/norms.py",
        "(wide * kept.share).sum(-1, keepdim=True)",
        "wide.mean(-1, keepdim=True)",
        "tests/models/test_family_contract.py",
    ),
    Mutation(
        "lam chosen on its own calibration text",
        "tvaprune/cut/ridge.py",
        "own = Moments(held.inputs, outputs(held.cross, rows))",
        "own = Moments(fit.inputs, outputs(fit.cross, rows))",
        "tests/cut",
    ),
    Mutation(
        "gate distillation with the KL reversed",
        "tvaprune/choose/objective.py",
        "return evaluated(student, distance)[0]",
        "return evaluated(teacher, distillation(student, self.settings.distill_temp))[0]",
        "tests/choose",
    ),
    Mutation(
        "scoring while the target rises",
        TRAINER,
        "rising = self.state.global_step < self.settings.num_warmup_steps",
        "rising = False",
        "tests/choose/test_trainer.py",
    ),
    Mutation(
        "scoring outside the band",
        TRAINER,
        "self.settings.target_sparsity) <= BAND  # NaN",
        "self.settings.target_sparsity) <= 1.0  # NaN",
        "tests/choose/test_trainer.py",
    ),
    Mutation(
        "the multipliers' rate taken from the gates'",
        TRAINER,
        '"lr": self.settings.reg_learning_rate',
        '"lr": self.settings.vib_learning_rate',
        "tests/choose/test_trainer.py",
    ),
    Mutation(
        "selection blocks from the training split",
        RUN,
        'return self.blocks("validation", self.args.data.block_size, SELECTION_SAMPLES)',
        'return self.blocks("train", self.args.data.block_size, SELECTION_SAMPLES)',
        RUNS,
    ),
    Mutation(
        "the refit on validation",
        RUN,
        'blocks = self.blocks("train", data.block_size, asked)\n        if len(blocks) < asked:',
        'blocks = self.blocks("validation", data.block_size, asked)\n        if len(blocks) < asked:',
        RUNS,
    ),
    Mutation(
        "--eval_split ignored", RUN, "self.blocks(self.args.evaluation.eval_split, ", 'self.blocks("validation", ', RUNS
    ),
    Mutation(
        "evaluation windows that follow the seed",
        RUN,
        'self.args.training.seed if split == "train" else 0',
        "self.args.training.seed",
        RUNS,
    ),
    Mutation(
        "--refit_offload ignored",
        "tvaprune/cut/narrow.py",
        "_CPU if run.args.prune.refit_offload else training.device",
        "training.device",
        RUNS,
    ),
    Mutation(
        "the speed-up upside down",
        "tvaprune/measure/speed.py",
        "per_batch=median(a / b for",
        "per_batch=median(b / a for",
        "tests/measure",
    ),
    Mutation(
        "the error of a gap not paired by window",
        "tvaprune/measure/perplexity.py",
        "return _stderr(self.windows - other.windows)",
        "return _stderr(torch.cat([self.windows, other.windows]))",
        "tests/measure/test_perplexity.py",
    ),
    Mutation(
        "steps of an earlier run taken for this one's pace",
        "tvaprune/phases.py",
        "did = self._told - self._begun, self._done - self._base",
        "did = self._told - self._begun, self._done",
        "tests/test_phases.py",
    ),
    Mutation(
        "query heads grouped otherwise than their KV head",
        "tvaprune/plan/edits.py",
        "rows, means = {",
        "queries = queries.flip(0)\n            rows, means = {",
        "tests/plan/test_edits.py",
    ),
    Mutation(
        "a GGUF file of Gemma whose gains are one too small",
        "tvaprune/export/gguf_tensors.py",
        "values = values + family.norm_offset",
        "values = values + 0.0",
        "tests/export/test_gguf_families.py",
    ),
    Mutation(
        "a GGUF file of Granite without the embedding's factor",
        "tvaprune/export/gguf_tensors.py",
        "residual_factor(config) / embedding_factor(config)",
        "residual_factor(config)",
        "tests/export/test_gguf_families.py",
    ),
    Mutation(
        "a GGUF architecture that takes the first layer's widths for all",
        "tvaprune/models/formats.py",
        "is None and (uniform or architecture.per_layer)",
        "is None",
        "tests/export/test_gguf_families.py",
    ),
    Mutation(
        "a gain of 1 + w multiplied in its own precision",
        "tvaprune/plan/edits.py",
        "((values.float() + self.offset) * self.constant - self.offset).to(values.dtype)",
        "(values + self.offset) * self.constant - self.offset",
        "tests/plan/test_edits.py",
    ),
    Mutation(
        "a token that a tokenizer does not have counts as one that it adds",
        "tvaprune/export/gguf_tokenizer.py",
        "return token is not None and any(",
        "return any(",
        "tests/export/test_export.py",
    ),
    Mutation(
        "scoring changes the tokenizer that is saved next",
        "tvaprune/measure/zeroshot.py",
        "tokenizer=copy.deepcopy(tokenizer)",
        "tokenizer=tokenizer",
        "tests/measure/test_zeroshot.py",
    ),
    Mutation(
        "a comparison's cells can be told another seed",
        "tvaprune/flags/arguments.py",
        '"seed": "seeds", ',
        "",
        "tests/stages/test_compare.py",
    ),
]


def survives(mutation: Mutation) -> bool:
    """Tells whether the tests pass although the mistake is there.

    Raises:
        ValueError: If what is to be changed does not stand in its file exactly once.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        path = copy / mutation.path
        source = path.read_text(encoding="utf-8")
        if source.count(mutation.right) != 1:
            raise ValueError(f"{mutation.path} holds {mutation.right!r} {source.count(mutation.right)} times, not once")
        path.write_text(source.replace(mutation.right, mutation.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", mutation.tests]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise ValueError(f"{mutation.says}: the tests did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 0


def main() -> None:
    """Tries every mutation and prints a line each; exit code 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose words contain this")
    args = parser.parse_args()
    alive = 0
    for mutation in MUTATIONS:
        if args.only in mutation.says:
            survived = survives(mutation)
            alive += survived
            print(f"{'SURVIVES' if survived else 'seen    '}  {mutation.says}  ({mutation.tests})", flush=True)
    sys.exit(alive > 0)


if __name__ == "__main__":
    main()
