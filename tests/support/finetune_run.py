"""A fine-tuning by whole commands on a tiny checkpoint: its flags, its model and mask."""

import torch

from support import tiny
from tvaprune.files import MARK_NAME
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import Masks, save_masks


def without(flags, name):
    place = flags.index(name)
    return flags[:place] + flags[place + 2 :]


RUN = (
    *("--do_train", "--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 8, "--max_train_samples", 24),
    *("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1, "--learning_rate", 1e-2, "--use_cpu"),
    *("--dim_multiple", 4, "--lora_r", 2, "--distill_ce_loss_alpha", 1, "--speed_batches", 2, "--disable_tqdm", True),
    *("--eval_steps", 3, "--save_steps", 3),
)
FULL = (*without(RUN, "--lora_r"), "--full_ft", True)


def without_heads(masks):
    """The second layer keeps no head."""
    scores = masks.log_variance
    attn = (scores.attn[0], torch.full_like(scores.attn[1], 9.0), *scores.attn[2:])
    return Masks(masks.mu, type(scores)(scores.hidden, attn, scores.inter))


def sources(make_model, make_masks, tmp_path_factory):
    """Returns a function: a tiny model's values -> the flags that name it, its mask and the text."""
    text = tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")

    def make(seed=0, dtype=torch.float32, **values):
        folder = tmp_path_factory.mktemp("source")
        model = make_model("llama", **values).to(dtype)
        checkpoint = tiny.save_checkpoint(model, folder / "model")
        save_masks(without_heads(make_masks(shape_of(model.config), seed)), folder / "mask_info_1.0.pkl")
        return ("--model_name_or_path", checkpoint, "--mask_loc", folder / "mask_info_1.0.pkl", "--dataset_name", text)

    return make


def files_in(folder):
    return {path.name for path in folder.iterdir() if path.is_file() and path.name != MARK_NAME}


def logits(model, input_ids):
    with torch.no_grad():
        return model.eval()(input_ids=input_ids, use_cache=False).logits
