"""Trains the miniature models that the toolkit ships, on the training split of `python_docs`.

Everything else in the repository rests on them, so they are real language models: their own BPE tokenizer, the
architecture of their family, `transformers.Trainer`. An interrupted run goes on from its last checkpoint.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from tvaprune.checkpoint.tokenizer import write_tokenizer
from tvaprune.text.blocks import load_documents, token_blocks

VOCAB_SIZE = 2048
BLOCK_SIZE = 256  # longer than the Mistral's sliding window, so that the window is exercised
# The split of Llama-3's tokenizer (its tokenizer.json): contractions, words, numbers of up to three digits, the rest.
LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "intermediate_size": 384,
    "head_dim": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}


def build_model(family: str) -> PreTrainedModel:
    """Returns the freshly initialised miniature of a family."""
    if family == "mistral":
        config = MistralConfig(
            **SHARED, num_attention_heads=8, num_key_value_heads=4, sliding_window=128, max_position_embeddings=1024
        )
        return MistralForCausalLM(config)
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": BLOCK_SIZE,
    }
    return LlamaForCausalLM(
        LlamaConfig(
            **SHARED, num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024, rope_parameters=rope
        )
    )


def train_tokenizer(family: str, documents: list[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; Llama-3's differs from GPT-2's in how text is split before merging."""
    tokenizer = Tokenizer(models.BPE())
    if family == "llama":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=1024, padding_side="left"
    )


def pretrain(family: str, output_dir: Path, work_dir: Path, args: argparse.Namespace) -> None:
    """Trains tokenizer and model, and writes the Hugging Face folder."""
    set_seed(args.seed)
    tokenizer_dir = work_dir / "tokenizer"
    if not tokenizer_dir.exists():
        train_tokenizer(family, load_documents("python_docs", "train")).save_pretrained(tokenizer_dir)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    blocks = token_blocks(tokenizer, "python_docs", "train", BLOCK_SIZE)
    validation = token_blocks(tokenizer, "python_docs", "validation", BLOCK_SIZE, max_blocks=128)
    print(f"{family}: {len(blocks) * BLOCK_SIZE / 1e6:.1f}M training tokens, {len(validation)} validation blocks")
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.02},
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=50,
        eval_strategy="steps",
        eval_steps=500,
        save_steps=250,
        save_total_limit=2,
        seed=args.seed,
        report_to="none",
        remove_unused_columns=False,
        bf16=torch.cuda.is_available(),
    )

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        ids = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids}

    model = build_model(family)
    trainer = Trainer(model=model, args=arguments, train_dataset=blocks, eval_dataset=validation, data_collator=collate)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work_dir)))
    torch.nn.Module.to(model, torch.bfloat16)
    model.config.use_cache = True  # training switched it off
    model.save_pretrained(output_dir)
    write_tokenizer(tokenizer, output_dir)


def main() -> None:
    """Parses the flags and trains one miniature model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=("mistral", "llama"), required=True)
    parser.add_argument("--output_dir", type=Path, required=True, help="the model's folder")
    parser.add_argument("--work_dir", type=Path, required=True, help="checkpoints of the run; kept to resume from")
    parser.add_argument("--max_steps", type=int, default=2500, help="2500 steps of 16 x 256 tokens: 10.2M tokens")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    pretrain(args.family, args.output_dir, args.work_dir, args)


if __name__ == "__main__":
    main()
