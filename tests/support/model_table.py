"""The table of ``docs/models.md``, made from the rows: ``python tests/support/model_table.py`` prints it."""

from support.families import MORE_ROWS, NAMED_ROWS, REFUSED_VANILLA, ROWS
from tvaprune.models.families import FAMILIES
from tvaprune.models.formats import ARCHITECTURES
from tvaprune.models.rotate import why_not
from tvaprune.models.shape import ModelShape

CHECKPOINTS = {  # of each family, one that people have
    "llama": "meta-llama/Llama-3.2-1B",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen2": "Qwen/Qwen2.5-1.5B",
    "qwen3": "Qwen/Qwen3-0.6B-Base",
    "internlm3": "internlm/internlm3-8b-instruct",
    "ministral": "mistralai/Ministral-8B-Instruct-2410",
    "cwm": "facebook/cwm",
    "smollm3": "HuggingFaceTB/SmolLM3-3B-Base",
    "granite": "ibm-granite/granite-3.3-2b-base",
    "seed_oss": "ByteDance-Seed/Seed-OSS-36B-Base",
    "hunyuan_v1_dense": "tencent/Hunyuan-0.5B-Pretrain",
    "arcee": "arcee-ai/AFM-4.5B-Base",
    "gemma": "google/gemma-2b",
    "gemma2": "google/gemma-2-2b",
    "gemma3_text": "google/gemma-3-270m",
    "phi3": "microsoft/Phi-4-mini-instruct",
    "olmo2": "allenai/OLMo-2-0425-1B",
    "olmo3": "allenai/Olmo-3-7B-Instruct",
    "glm4": "THUDM/GLM-4-9B-0414",
    "exaone4": "LGAI-EXAONE/EXAONE-4.0-1.2B",
    "cohere2": "CohereLabs/c4ai-command-r7b-12-2024",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B-Base",
}
SHAPE = ModelShape.uniform(8, 1, 2, 1, 4, 8, 8)


def apart(model_type):
    """What a family's row says that Llama's does not, in words."""
    row, said = FAMILIES[model_type], []
    if row.query_norm is not None:
        said.append("q and k normalised over all heads" if row.norms_all_heads else "q and k normalised")
    if row.attention_post_norm is not None:
        said.append("norms around the blocks" if row.attention_norm is not None else "norms after the blocks only")
    if row.is_parallel:
        said.append("attention and MLP side by side")
    if row.norm_centres:
        said.append("norms that subtract the mean")
    if row.norm_offset:
        said.append("gains of 1 + w")
    if row.scales_embedding or row.embedding_multiplier is not None:
        said.append("scaled embedding")
    if row.residual_multiplier is not None:
        said.append("scaled residuals")
    if row.logit_cap or row.logit_divisor or row.logit_multiplier:
        said.append("capped logits" if row.logit_cap else "scaled logits")
    if row.query == row.key:
        said.append("fused q, k, v")
    if row.gate == row.up:
        said.append("fused gate and up")
    if row.gate is None:
        said.append("no gate")
    if row.experts is not None:
        said.append("a mixture of experts, whose channels stay")
    if row.attention_kernel != "sdpa":
        said.append(f"{row.attention_kernel} attention")
    if row.begins_with_bos:
        said.append("a BOS before every window")
    return ", ".join(said)


def vanilla(model_type):
    """Whether zeros may stand beside a layer's units."""
    reason = REFUSED_VANILLA.get(model_type)
    return "yes" if reason is None else "not with a long rope" if "long rope" in reason else "no: `--uniform`"


def gguf(model_type):
    """Which of llama.cpp's architectures take the family, those with a width for each layer first."""

    def named(known):
        limits = [limit for limit in ("tied", "square") if getattr(known, limit)]
        return f"`{known.name}`" + (f" ({', '.join(limits)})" if limits else "")

    if model_type not in ARCHITECTURES:
        return "vanilla first"
    by_layer = [named(known) for known in ARCHITECTURES[model_type] if known.per_layer]
    uniform = [named(known) for known in ARCHITECTURES[model_type] if not known.per_layer]
    return "; ".join([*by_layer, f"{', '.join(uniform)} where uniform"])


def table():
    """The lines of the table."""
    head = ["`model_type`", "such as", "what sets it apart", "`--rotate`", "`--format vanilla`", "`--format gguf`"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for model_type, family in FAMILIES.items():
        named = [CHECKPOINTS[model_type], *(name for name, row in NAMED_ROWS.items() if row[0] == model_type)]
        turned = "yes" if why_not(family, SHAPE) is None else "no"
        cells = [f"`{model_type}`", ", ".join(named), apart(model_type), turned, vanilla(model_type), gguf(model_type)]
        lines.append("| " + " | ".join(cells) + " |")
    assert {model_type for model_type, _ in (ROWS | MORE_ROWS).values()} == set(FAMILIES)
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
