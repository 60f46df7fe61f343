"""What scores of units are tested on: a text, sizes of which every share is whole, and a channel made plain."""

import torch
from datasets import Dataset

BLOCKS = Dataset.from_dict({"input_ids": torch.arange(8 * 12).remainder(47).view(8, 12).tolist()}).with_format("torch")
# Hidden width 32, heads of 8 with as many query heads as KV heads: a KV head has 4 * 8 * 32 = 1,024 parameters, a
# channel 3 * 32 = 96; a layer of 4 heads and 64 channels 4,096 + 6,144, and 64 in its norms: 10,304 counted.
EVEN = {"hidden_size": 32, "head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64}


def make_constant(mlp, channel):
    """Makes a channel's value silu(20) * 5 = 100 whatever comes in."""
    with torch.no_grad():
        mlp.gate_proj.weight[channel], mlp.up_proj.weight[channel] = 0.0, 0.0
        mlp.gate_proj.bias[channel], mlp.up_proj.bias[channel] = 20.0, 5.0
