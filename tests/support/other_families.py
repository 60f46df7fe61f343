"""Two families that no transformers model is, made of its parts to show that a family is a row of data.

``fused``: q, k and v in one linear, gate and up in another, norms before and after each block whose gain is ``1 + w``,
an embedding that is scaled by the root of the hidden width. ``plain``: norms after the blocks alone, an MLP without a
gate, and layers without attention where their config gives them no KV heads.
"""

import functools

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaModel, LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3Attention, Phi3MLP

from tvaprune.models import auto_classes, families
from tvaprune.models.families import ModelFamily
from tvaprune.models.modeling_pruned import _rebuilt, _without_layers, layer_config

FUSED = ModelFamily(
    beta=10.0,
    scales_embedding=True,
    norm_offset=1.0,
    norm_rounds_once=True,
    norm_epsilon="eps",
    attention_norm="norm_before_attention",
    attention_post_norm="norm_after_attention",
    query="self_attn.qkv_proj",
    key="self_attn.qkv_proj",
    value="self_attn.qkv_proj",
    mlp_norm="norm_before_mlp",
    mlp_post_norm="norm_after_mlp",
    gate="mlp.gate_up_proj",
    up="mlp.gate_up_proj",
)
PLAIN = ModelFamily(
    beta=10.0,
    attention_norm=None,
    attention_post_norm="norm_after_attention",
    mlp_norm=None,
    mlp_post_norm="norm_after_mlp",
    gate=None,
)


@_rebuilt
class FusedConfig(LlamaConfig):
    model_type = "fused"

    def validate_architecture(self):
        pass


@_rebuilt
class PlainConfig(FusedConfig):
    model_type = "plain"


@_rebuilt
class PrunedFusedConfig(FusedConfig):
    model_type = "pruned_fused"


@_rebuilt
class PrunedPlainConfig(PlainConfig):
    model_type = "pruned_plain"


class PlainMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        fused = "fused" in config.model_type
        norm = Gemma2RMSNorm if fused else LlamaRMSNorm
        attention = Phi3Attention if fused else LlamaAttention
        self.self_attn = attention(config, index) if config.num_key_value_heads else None
        self.mlp = (Phi3MLP if fused else PlainMLP)(config)
        for place in ("before_attention", "before_mlp") if fused else ():
            setattr(self, f"norm_{place}", norm(config.hidden_size, eps=config.rms_norm_eps))
        for place in ("after_attention", "after_mlp") if self.self_attn else ("after_mlp",):
            setattr(self, f"norm_{place}", norm(config.hidden_size, eps=config.rms_norm_eps))

    def read(self, hidden, place):
        return getattr(self, f"norm_before_{place}", nn.Identity())(hidden)

    def forward(self, hidden_states, **options):
        hidden = hidden_states
        if self.self_attn is not None:
            written, _ = self.self_attn(hidden_states=self.read(hidden, "attention"), **options)
            hidden = hidden + self.norm_after_attention(written)
        return hidden + self.norm_after_mlp(self.mlp(self.read(hidden, "mlp")))


class KnowsTheScale:
    def _init_weights(self, module):
        super()._init_weights(module)
        if hasattr(module, "scalar_embed_scale"):
            nn.init.constant_(module.embed_scale, module.scalar_embed_scale)


class Decoder(KnowsTheScale, LlamaModel):
    config_class = FusedConfig

    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(Layer(layer_config(config, i), i) for i in range(config.num_hidden_layers))
        if "fused" in config.model_type:
            self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.embed_tokens = Gemma2TextScaledWordEmbedding(
                config.vocab_size, config.hidden_size, None, embed_scale=config.hidden_size**0.5
            )
        self.post_init()


class LanguageModel(KnowsTheScale, LlamaForCausalLM):
    config_class = FusedConfig

    def __init__(self, config):
        with _without_layers(config):
            super().__init__(config)
        self.model = Decoder(config)
        self.post_init()


def register(monkeypatch):
    """Makes both families known for the length of a test."""
    monkeypatch.setitem(families.FAMILIES, "fused", FUSED)
    monkeypatch.setitem(families.FAMILIES, "plain", PLAIN)
    for config in (FusedConfig, PlainConfig, PrunedFusedConfig, PrunedPlainConfig):
        decoder, model = _classes(config)
        if config.model_type.startswith(families.PREFIX):
            monkeypatch.setitem(auto_classes.MODELS, families.base_type(config), (config, decoder, model))


@functools.cache
def _classes(config):
    decoder = type("Decoder", (Decoder,), {"config_class": config, "__module__": __name__})
    model = type("LanguageModel", (LanguageModel,), {"config_class": config, "__module__": __name__})
    AutoConfig.register(config.model_type, config)
    AutoModel.register(config, decoder)
    AutoModelForCausalLM.register(config, model)
    return decoder, model


OTHER_ROWS = {  # as `support.families.ROWS`
    "fused GQA": ("fused", {"num_attention_heads": 6, "num_key_value_heads": 3}),
    "fused tied": ("fused", {"tie_word_embeddings": True}),
    "plain, layer 1 without attention": ("plain", {"per_layer_config": {"1": {"num_key_value_heads": 0}}}),
}
