"""The closed formulas against the simulation of the real code, and the simulation against what is known by hand."""

from dataclasses import replace

import pytest
import torch
from support import tiny
from transformers import Gemma2Config, Gemma3TextConfig, Qwen3Config

from benchmarks.card import CARD, RealCard, simulated
from benchmarks.simulate import CONFIGS, PHASES, Scene, by_formula, plan_to, simulate
from tvaprune.measure import cost, update_cost
from tvaprune.measure.work import GIB, Work, narrower, of_family, weights
from tvaprune.models.shape import shape_of

MIB = 2**20
TOLERANCE = 0.1


# What other families keep: pairs of tokens where attention has no kernel, norms of heads and past blocks, large tied
# vocabularies.
OTHERS = {
    "Gemma-2-9B": Gemma2Config(vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_attention_heads=16,
                               num_key_value_heads=8, head_dim=256, query_pre_attn_scalar=256),
    "Gemma-3-4B": Gemma3TextConfig(vocab_size=262208, hidden_size=2560, intermediate_size=10240, head_dim=256,
                                   num_attention_heads=8, num_key_value_heads=4),
    "Qwen3-8B": Qwen3Config(vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_attention_heads=32,
                            num_key_value_heads=8, head_dim=128),
}  # fmt: skip


def work_of(name, layers, **settings):
    base = (CONFIGS | OTHERS)[name]
    config = type(base)(**base.to_dict() | {"num_hidden_layers": layers, "layer_types": None})
    shape = shape_of(config)
    settings = {"window": min(8192, config.max_position_embeddings), "refit_blocks": 8, "held_blocks": 8} | settings
    return config, Work(shape, narrower(shape, 0.5), **of_family(config), **settings)


def is_near(estimate, measured):
    return abs(estimate / measured - 1) < TOLERANCE


CASES = [
    ("Llama-2-7B", "dense_perplexity", {}),
    ("Llama-2-7B", "gradient_pass", {"rotation_batch": 8}),
    ("Llama-2-7B", "scoring_pass", {"scored_batch": 4}),
    ("Llama-3-8B", "scoring_pass", {"scored_batch": 1}),
    ("Llama-2-7B", "gate_step", {}),
    ("Llama-2-7B", "gate_step", {"batch": 4, "checkpointing": True}),
    ("Llama-2-7B", "refit", {}),
    ("Llama-2-7B", "reconstruct", {}),
    ("Llama-2-7B", "reconstruct", {"block": 1024}),
    ("Mistral-7B", "reconstruct", {"refit_offload": True}),
    ("Llama-2-7B", "finetuning_step", {"batch": 8}),
    ("Llama-2-7B", "finetuning_step", {"batch": 8, "distill": False}),
    ("Llama-2-7B", "finetuning_step", {"batch": 8, "distill": False, "compare_dense": True}),
    ("Llama-2-7B", "finetuning_step", {"lora_r": 0}),
    ("Mistral-7B", "dense_perplexity", {}),
    ("Mistral-7B", "gate_step", {"batch": 4}),
    ("Mistral-7B", "refit", {"refit_offload": True}),
    ("Mistral-7B", "finetuning_step", {}),
    ("Llama-3-8B", "pruned_perplexity", {}),
    ("Llama-3-8B", "gradient_pass", {"rotation_batch": 1, "batch": 4, "checkpointing": True}),
    ("Llama-3-8B", "gate_step", {"batch": 4}),
    ("Llama-3-8B", "refit", {}),
    ("Llama-3-8B", "finetuning_step", {"batch": 8, "checkpointing": True}),
    ("Llama-3-8B", "finetuning_step", {"batch": 8, "checkpointing": True, "accumulates": True}),
    ("Llama-2-7B", "finetuning_step", {"accumulates": True}),
    ("Gemma-2-9B", "dense_perplexity", {}),
    ("Gemma-2-9B", "gate_step", {"batch": 4}),
    ("Gemma-2-9B", "refit", {}),
    ("Gemma-3-4B", "gate_step", {"batch": 4}),
    ("Gemma-3-4B", "refit", {}),
    ("Qwen3-8B", "gate_step", {"batch": 4}),
]


def on_host(phase, work):
    """Returns the bytes on the host that the formulas give."""
    formulas = {"refit": update_cost.refit_host, "reconstruct": update_cost.reconstruct_host}
    return formulas[phase](work) if phase in formulas else 0


@pytest.mark.parametrize(("name", "phase", "settings"), CASES)
def test_the_formulas_give_what_the_simulation_counts(name, phase, settings):
    config, work = work_of(name, 2, **settings)
    taken = simulate(config, work, phase)
    assert taken.host == pytest.approx(on_host(phase, work), rel=0.02, abs=2**24)
    size, flops = by_formula(phase, work)
    assert is_near(size, taken.card) and is_near(flops, taken.flops)
    other, more = by_formula(phase, work_of(name, 8, **settings)[1])
    assert not is_near(other, taken.card) and not is_near(more, taken.flops)  # control: six layers more


@pytest.mark.parametrize(
    ("name", "phase", "settings"),
    [("Llama-2-7B", "timing", {}), ("Llama-3-8B", "timing", {})],
)
def test_so_they_do_of_what_settings_alone_ask_for(name, phase, settings):
    config, work = work_of(name, 2, **settings)
    counted = simulate(config, work, phase).card
    assert is_near(getattr(cost, phase)(work), counted)
    assert not is_near(getattr(cost, phase)(work_of(name, 8, **settings)[1]), counted)  # control: six layers more


@pytest.mark.slow
@pytest.mark.parametrize(("name", "phase"), [(name, phase) for name in CONFIGS for phase in PHASES if tiny.EVERY
                                             or (name, phase) == ("Llama-2-7B", "gate_step")])  # fmt: skip
def test_they_do_at_full_depth(name, phase):
    config, work = work_of(name, 32, refit_blocks=32, held_blocks=32, rotation_batch=4, scored_batch=4)
    taken = simulate(config, work, phase)
    size, flops = by_formula(phase, work)
    assert is_near(size, taken.card) and is_near(flops, taken.flops)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("name", "phase", "settings"), CASES)
def test_a_gpu_takes_as_much(name, phase, settings):
    config, work = work_of(name, 4, redraws=True, **settings)
    scene = Scene(RealCard(), work, config, plan_to(work.dense, work.pruned), torch.device("cuda"))
    assert by_formula(phase, work)[0] == pytest.approx(getattr(scene, phase)().card, rel=0.15)


@pytest.mark.parametrize("name", ["Gemma-2-9B", "Gemma-3-4B"])
def test_a_deep_model_of_another_family_takes_as_much(name):
    config, work = work_of(name, 12, batch=4)
    counted = simulate(config, work, "gate_step").card
    assert cost.gate_step(work) == pytest.approx(counted, rel=0.04)
    plain = replace(work, eager=False, post_norms=False, dense=replace(work.dense, head_norm=False))
    assert cost.gate_step(plain) != pytest.approx(counted, rel=0.04)  # control: what a Llama would


def test_gradients_of_earlier_passes_are_counted():
    for settings in ({}, {"lora_r": 0}, {"train_lm_head": False}):
        _, work = work_of("Llama-2-7B", 2, **settings)
        number = 4 if work.lora_r else 2
        more = cost.finetuning_step(replace(work, accumulates=True)) - cost.finetuning_step(work)
        assert more == number * cost.trained_parameters(work)


@pytest.mark.parametrize(("lora_r", "throughout"), [(0, 2 * 2), (128, 12)])
def test_timing_training_holds_the_narrower_model_and_what_trains_of_it_beside_a_step_of_the_dense_one(
    lora_r, throughout
):
    """And no teacher; the dense model's own head, which comes back, stays beside the one that is trained."""
    _, work = work_of("Llama-2-7B", 2, lora_r=lora_r)
    dense = replace(work, pruned=work.dense, distill=False)
    more = cost.training_timing(work) - cost.finetuning_step(dense)
    assert more == weights(work.pruned, work) + throughout * cost.trained_parameters(work)
    assert weights(work.pruned, work) < 0.7 * weights(work.dense, work)  # control


def test_the_simulation_counts_what_is_alive_and_where():
    with simulated() as card:
        x = torch.empty(1024, 1024, device=CARD, requires_grad=True)  # 4 MiB
        y = x.exp()
        assert card.alive == {"meta": 8 * MIB, "cpu": 0}
        z = y.exp()
        del y  # which the backward pass of both needs
        assert card.alive["meta"] == 12 * MIB
        on_host = z.detach().to("cpu")
        assert card.alive == {"meta": 12 * MIB, "cpu": 4 * MIB}
        view = x.detach()[:10]
        assert card.alive["meta"] == 12 * MIB  # control: no storage of its own
        del z, on_host, view
        assert card.alive == {"meta": 4 * MIB, "cpu": 0} and card.taken.card == 12 * MIB
        card.restart()
        assert card.taken.card == 4 * MIB
        x.detach() @ x.detach()
        assert card.taken.flops == 2 * 1024**3


def test_of_a_parallel_model_a_layers_input_waits_beside_each_stream():
    _, work = work_of("Llama-2-7B", 2)
    parallel = replace(work, dense=replace(work.dense, is_parallel=True))
    streams = 2 * (4096 + 4096) * 512 * (work.refit_blocks + work.held_blocks)
    for taken in (update_cost.refit, update_cost.reconstruct):
        assert taken(parallel) - taken(work) == streams


def test_weights_are_those_of_the_published_models():
    sizes = [weights(work.dense, work) / GIB for _, work in (work_of(name, 32) for name in CONFIGS)]
    assert sizes == pytest.approx([12.55, 13.49, 14.96], abs=0.01)  # 6.74, 7.24 and 8.03 billion of 2 bytes
