"""Makes pruned checkpoints load without remote code: the Auto classes learn the classes of `modeling_pruned`.

A model of these classes also takes the modeling file along wherever it is saved: by `save_pretrained`, by
`transformers.Trainer`, by `push_to_hub`.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tvaprune.models.modeling_pruned as modeling_pruned

MODELS: dict[str, tuple[Any, Any, Any]] = {  # by family: config, decoder, language model
    model_type: modeling_pruned.classes_of(model_type) for model_type in modeling_pruned.NAMES
}


def register() -> None:
    """Registers every pruned family; a second call changes nothing."""
    for config, model, causal_lm in MODELS.values():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        config.register_for_auto_class()
        for auto_class, registered in ((AutoModel, model), (AutoModelForCausalLM, causal_lm)):
            auto_class.register(config, registered, exist_ok=True)
            registered.register_for_auto_class(auto_class.__name__)


def auto_map(model_type: str) -> dict[str, str]:
    """Returns the entries of ``config.json`` by which transformers and vLLM find a pruned family's classes."""
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    module = modeling_pruned.__name__.rsplit(".", 1)[-1]
    return {name: f"{module}.{cls.__name__}" for name, cls in zip(names, MODELS[model_type], strict=True)}
