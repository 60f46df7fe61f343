"""Fine-tuning of tiny models: the trainer, its blocks, what an adapter belongs to."""

import torch
from datasets import Dataset

from tvaprune.flags.arguments import FinetuneRunArguments
from tvaprune.recover.lora import LoraSettings, add_lora
from tvaprune.recover.teacher import LiveTeacher
from tvaprune.recover.trainer import FinetuneTrainer, LossWeights

LORA = LoraSettings(r=3, alpha_ratio=4.0, dropout=0.0, train_lm_head=True)
IDENTITY = {"flags": {"lora_r": 3}, "contents": {"mask_loc": {"name": "m.pkl", "digest": "def"}}, "settings": {}}


def blocks(count=16, length=12, seed=0):
    tokens = torch.randint(0, 47, (count, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": tokens.tolist()}).with_format("torch")


def logits(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits


def trainers(make_model, tmp_path):
    """Returns a function: a trainer of a student towards a teacher, both tiny; the first writes to out-0."""
    outputs = []

    def make(teacher="live", settings=LORA, data=None, weights=None, patience=None, dtype=torch.float32, **args):
        base = make_model(seed=1).to(dtype)
        torch.manual_seed(0)
        student = base.requires_grad_(True) if settings is None else add_lora(base, settings)
        model = make_model(seed=2)
        found = LiveTeacher(model, 2.0) if teacher == "live" else teacher
        outputs.append(tmp_path / f"out-{len(outputs)}")
        defaults = {"output_dir": str(outputs[-1]), "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2}
        defaults |= {"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
        return FinetuneTrainer(
            student, FinetuneRunArguments(**(defaults | args)), data or blocks(), blocks(6, seed=9), found,
            weights or LossWeights(kl=0.5), IDENTITY, patience,
        )  # fmt: skip

    return make
