"""The step of gate training against a straightforward one, and what it costs by count."""

import copy

import pytest
import torch
from support.families import MORE_ROWS, ROWS
from support.other_families import OTHER_ROWS
from torch import nn

from benchmarks.step import kernels, saved_bytes, steps
from tvaprune.choose import gates
from tvaprune.choose.controller import expected_spread
from tvaprune.choose.gated_model import GatedModel
from tvaprune.choose.objective import PruningObjective
from tvaprune.choose.settings import gate_settings
from tvaprune.flags.settings import DistillSettings, PruneSettings
from tvaprune.models.layout import layout_of
from tvaprune.models.parameters import decoder_sparsity
from tvaprune.models.units import PerUnit
from tvaprune.plan.widths import WidthRules

pytestmark = pytest.mark.usefixtures("other_families")
BETA, TARGET = 0.7, 0.25
CHOSEN = ["llama GQA", "qwen2 untied", "qwen3 odd widths, tied", *OTHER_ROWS]


def settings(noise="token", **prune):
    prune = PruneSettings(target_sparsity=[0.3], lagrangian_warmup_epochs=0.25, gate_noise=noise, **prune)
    return gate_settings(prune, DistillSettings(), 8, 8, 5.0, WidthRules(4, uniform=True))


def plain_norm(norm, family, kept, width, x):
    """Zhang and Sennrich, eq. 4, over the kept dims, with a gain that makes it divide by another width."""
    wide = x.float() if x.dtype == torch.bfloat16 else x
    mean_square = (wide.square() * kept).sum(-1, keepdim=True) / kept.sum()
    normed = wide / (mean_square + getattr(norm, family.norm_epsilon)).sqrt()
    gain = (norm.weight + family.norm_offset) * (width / kept.sum()).sqrt()
    return (normed * gain).to(x.dtype)


def plain_gates(model, gated, mu, log_variance):
    """Gates as hooks that draw and multiply, a leaf tensor each, every formula where it is needed."""
    family, shape, per_token = gated.family, gated.shape, gated.noise == "token"
    score = (log_variance.hidden - (mu.hidden.square() + 1e-8).log()).detach()
    kept = ((score < 0) | (score == score.min())).to(score.dtype)
    width = torch.tensor(len(kept)) if gated.keeps_norm_width else kept.sum()

    def drawn(mean, log_var, like):
        size = (*(like.shape[:2] if per_token else (like.shape[0], 1)), len(mean))
        return mean + torch.randn(size, dtype=like.dtype) * (log_var / 2).exp()

    def times(x, gate):
        return x * gate.repeat_interleave(x.shape[-1] // gate.shape[-1], -1)

    def scale(mean, log_var, x):
        return times(x, drawn(mean, log_var, x))

    def output(module, args, result):
        return scale(mu.hidden, log_variance.hidden, result)

    def normed(module, args, result):
        return plain_norm(module, family, kept, width, args[0])

    model.get_submodule(family.embedding).register_forward_hook(output)
    model.get_submodule(family.final_norm).register_forward_hook(normed)
    layout = layout_of(family, shape)
    pairs = zip((*mu.attn, *mu.inter), (*log_variance.attn, *log_variance.inter), strict=True)
    for block, (mean, log_var) in zip((*layout.attention, *layout.mlp), pairs, strict=True):
        if block is None:
            continue
        writer = model.get_submodule(block.writer)
        last = {}

        def multiplied(module, args, mean=mean, log_var=log_var, last=last):
            last["gate"] = drawn(mean, log_var, args[0])
            return (times(args[0], last["gate"]),)

        def as_strong(module, args, result, mean=mean, log_var=log_var, last=last):
            """Which the norm makes of any strength: times the root mean square of the kept heads' gates."""
            heads = (log_var - (mean.square() + 1e-8).log()).detach() < 0
            heads = heads if heads.any() else ~heads
            return result * last["gate"][..., heads].square().mean(-1, keepdim=True).sqrt()

        writer.register_forward_pre_hook(multiplied)
        for norm in block.norms:
            model.get_submodule(norm).register_forward_hook(normed)
        if block.post_norm is not None and block in layout.attention:
            model.get_submodule(block.post_norm).register_forward_hook(as_strong)
        (writer if block.post_norm is None else model.get_submodule(block.post_norm)).register_forward_hook(output)


def plain_step(stock, objective, input_ids):
    """Returns the loss, its gradients to means, log-variances and multipliers, all by plain operations."""
    gated, chosen = objective.gated, objective.settings
    shape = gated.shape
    mu, log_variance = (
        PerUnit.of(flat.detach(), shape).map(lambda v: v.clone().requires_grad_())
        for flat in (gated.mu, gated.log_variance)
    )
    multipliers = [value.detach().clone().requires_grad_() for value in objective.lagrangian.parameters()]
    student = copy.deepcopy(stock).requires_grad_(False)
    plain_gates(student, gated, mu, log_variance)
    with torch.no_grad():
        teacher = stock(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    own = student(input_ids=input_ids).logits[:, :-1].log_softmax(-1)
    task = (teacher.exp() * (teacher - own)).sum(-1).mean()
    score = mu.map(lambda m, v: v - (m.square() + 1e-8).log(), log_variance)
    widths = score.map(lambda value: torch.sigmoid(-BETA * value).sum())
    gap = decoder_sparsity(widths.hidden, widths.attn, widths.inter, shape) - TARGET
    penalty = multipliers[0] * gap + multipliers[1] * (gap**2 + expected_spread(score, BETA, shape))
    kl = mu.map(lambda m, v: 0.5 * (1 + m.square() / (v.exp() + 1e-8)).log().sum(), log_variance)
    layers = 2 * shape.num_hidden_layers
    information = chosen.att_mul * sum(kl.attn) + chosen.inter_mul * sum(kl.inter)
    information = information + (layers + chosen.emb_mult) * kl.hidden
    loss = task + chosen.kl_factor * information + penalty
    leaves = [*mu, *log_variance, *multipliers]
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    count = len(tuple(mu))
    return loss.detach(), torch.cat(found[:count]), torch.cat(found[count : 2 * count]), torch.stack(found[2 * count :])


def gated_step(objective, input_ids):
    parts = objective(input_ids, BETA, TARGET)
    parts["loss"].backward()
    gated = objective.gated
    multipliers = torch.stack([value.grad for value in objective.lagrangian.parameters()])
    return parts["loss"].detach(), gated.mu.grad, gated.log_variance.grad, multipliers


def make_objective(model, dtype=torch.float64, noise="token", keeps_norm_width=False):
    torch.manual_seed(5)
    objective = PruningObjective(GatedModel(model, -2.0, noise, keeps_norm_width), settings(noise)).to(dtype)
    with torch.no_grad():
        # Noise of up to e^3 of the means, where single precision is not at its end.
        spread = 3.0 if dtype == torch.float64 else 1.0
        objective.gated.log_variance.add_(spread * torch.randn_like(objective.gated.log_variance))
        objective.lagrangian.lambda_1.fill_(2.0)
        objective.lagrangian.lambda_2.fill_(3.0)
    return objective


def both(make_model, row, input_ids, dtype, noise="token", options=None, keeps_norm_width=False):
    model_type, values = (ROWS | OTHER_ROWS)[row]
    model = make_model(model_type, **values).to(dtype)
    stock = copy.deepcopy(model)
    objective = make_objective(model, dtype, noise, keeps_norm_width)
    torch.manual_seed(11)
    expected = plain_step(stock, objective, input_ids)
    torch.manual_seed(11)
    if options is not None:
        model.train()  # only then does transformers recompute
        objective.activation_checkpointing_enable(**options)
    return gated_step(objective, input_ids), expected


@pytest.mark.parametrize("redrawing", [frozenset(), frozenset({"cpu"})], ids=["kept", "drawn again"])
@pytest.mark.parametrize("keeps_norm_width", [False, True], ids=["", "norms by the dense width"])
@pytest.mark.parametrize("row", CHOSEN)
def test_loss_and_gradients_are_those_of_plain_operations(
    row, keeps_norm_width, redrawing, make_model, input_ids, monkeypatch
):
    monkeypatch.setattr(gates, "REDRAWING", redrawing)
    steps = both(make_model, row, input_ids, torch.float64, keeps_norm_width=keeps_norm_width)
    large = {"fused tied": 1e-4, "fused GQA": 1e-5} if keeps_norm_width else {}  # losses, which float32 sums up
    near = large.get(row, 1e-6)
    for found, expected in zip(*steps, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found, expected, rtol=near, atol=near)


@pytest.mark.parametrize("noise", ["token", "sequence"])
@pytest.mark.parametrize("options", [None, {}], ids=["", "checkpointing"])
@pytest.mark.parametrize(
    ("row", "near"), [("llama GQA", 1e-6), ("fused GQA", 1e-5)]
)  # one more norm, and its amplitude
def test_so_they_are_in_single_precision(row, near, options, noise, make_model, input_ids):
    for found, expected in zip(*both(make_model, row, input_ids, torch.float32, noise, options), strict=True):
        torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_other_noise_gives_other_gradients(make_model, input_ids):
    """The control: how far apart two draws are."""
    model = make_model("llama").double()
    stock, objective = copy.deepcopy(model), make_objective(model)
    torch.manual_seed(11)
    expected = plain_step(stock, objective, input_ids)
    torch.manual_seed(12)
    found = gated_step(objective, input_ids)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(found[:3], expected[:3], strict=True))


NARROW = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 168,
    "vocab_size": 128,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_32_layers_start_6000_kernels_at_most(dtype):
    plain, gated = steps({"num_hidden_layers": 32} | NARROW, (1, 8), "cpu", dtype)
    assert 4000 < kernels(plain) < kernels(gated) <= 5700  # some 200 more of either on a GPU


@pytest.mark.parametrize(
    ("dtype", "redrawing", "limit"),
    [
        (torch.float32, frozenset({"cpu"}), 1.4),
        (torch.bfloat16, frozenset({"cpu"}), 1.4),
        (torch.float32, frozenset(), 1.6),  # a CPU keeps the noise: drawing it again takes longer
    ],
    ids=["float32", "bfloat16", "noise kept"],
)
def test_a_step_keeps_at_most_four_tenths_more(dtype, redrawing, limit, monkeypatch):
    monkeypatch.setattr(gates, "REDRAWING", redrawing)
    plain, gated = steps({"num_hidden_layers": 3} | NARROW, (2, 64), "cpu", dtype)
    assert 1.0 < saved_bytes(gated) / saved_bytes(plain) <= limit


def test_a_step_walks_through_the_modules_as_often_at_any_depth(monkeypatch):
    """Asked at every gate, a question to all modules cost a SmolLM2 on a GPU as much as the plain step."""
    stock, walks = nn.Module.modules, []

    def counted(module):
        walks.append(module)
        return stock(module)

    def count(layers):
        _, gated = steps({"num_hidden_layers": layers} | NARROW, (1, 4), "cpu", torch.float32)
        walks.clear()
        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "modules", counted)
            gated()
        return len(walks)

    assert count(1) == count(3) <= 4
    monkeypatch.setattr(GatedModel, "_multiply", _asking(GatedModel._multiply))
    assert count(1) < count(3)  # control


def _asking(stock):
    def multiply(gated, *args):
        assert not gated.model.is_activation_checkpointing
        return stock(gated, *args)

    return multiply


def test_gates_as_autograd_would_keep_them_are_found(monkeypatch):
    """The control: a product and a sample of plain operations."""

    def product(x, gates, per_token, recomputes):
        noise = torch.randn(*x.shape[:-1], len(gates.mu), dtype=x.dtype)
        z = torch.addcmul(gates.mu, noise, gates.deviation).to(x.dtype)
        return (x.unflatten(-1, (len(gates.mu), -1)) * z.unsqueeze(-1)).flatten(-2)

    monkeypatch.setattr("tvaprune.choose.gated_model.multiply", product)
    plain, gated = steps({"num_hidden_layers": 3} | NARROW, (2, 64), "cpu", torch.float32)
    assert saved_bytes(gated) / saved_bytes(plain) > 1.8


@pytest.mark.parametrize("row", ["gemma3_text, one KV head", "gemma2 tied", "glm4", "exaone4"])
def test_a_norm_past_the_attention_hides_no_gate(row, make_model, input_ids, monkeypatch):
    """Gates of 0.1 leave little of an attention; the norm past it would make all of it of them."""
    model_type, values = MORE_ROWS[row]
    gated = GatedModel(make_model(model_type, **values).double(), -2.0)
    ones = PerUnit.full(gated.shape, 1.0)

    def with_first_layers(value):
        attn = (torch.full_like(ones.attn[0], value), *ones.attn[1:])
        with torch.no_grad(), gated.using(PerUnit(ones.hidden, attn, ones.inter)):
            return gated(input_ids=input_ids).logits

    stock, cut = with_first_layers(1.0), with_first_layers(0.0)
    away = (stock - cut).abs().max()
    assert (with_first_layers(0.1) - stock).abs().max() > 0.3 * away
    monkeypatch.setattr("tvaprune.choose.gated_model.amplitude", lambda by, kept: by.new_ones(by.shape[:-1]))  # control
    assert (with_first_layers(0.1) - stock).abs().max() < 0.05 * away
