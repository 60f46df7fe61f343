"""`python -m benchmarks.scale` at small shapes on a CPU."""

import re

import pytest
import torch

from benchmarks import scale
from benchmarks.scale import MULTIPLES, SHAPES, Setting, kind_of, main, met, shallow
from tvaprune.models.shape import shape_of
from tvaprune.plan.masks import save_masks


def test_the_page_of_a_small_shape_has_every_measure(make_masks, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "NEW", 2)
    mask = tmp_path / "mask_info_1.0.pkl"
    save_masks(make_masks(shape_of(SHAPES["small"])), mask)
    main(["--shape", "small", "--mask", str(mask), "--turns", "1", "--out", str(tmp_path / "scale.md")])
    page = (tmp_path / "scale.md").read_text(encoding="utf-8")
    assert page.strip().endswith(capsys.readouterr().out.strip())
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    memory = {row[0]: row for row in rows if len(row) == 7 and not row[0].isdigit()}
    steps = {"gate step, 1 x 512", "finetuning step, 8 x 512"}
    assert {"dense perplexity", "refit"} | steps <= set(memory)
    speeds = {row[0]: row for row in rows if len(row) == 7 and row[0].isdigit()}
    assert list(speeds) == [str(multiple) for multiple in MULTIPLES]
    assert all(float(cell) > 0 for row in speeds.values() for cell in row[1:])
    assert all(re.search(rf"gated step over plain step \({batch} x 512\): \d", page) for batch in (1, 4))
    assert mask.name in page and "--dim_multiple auto: " in page


@pytest.mark.parametrize("multiple", MULTIPLES)
def test_widths_are_multiples_and_the_ideal_is_the_ratio_of_parameters(multiple):
    setting = Setting("small", SHAPES["small"], None, torch.device("cpu"))
    plan = setting.plan(multiple)
    assert all(width % max(1, multiple) == 0 for width in plan.intermediate_size)
    head = plan.shape.vocab_size
    assert met(setting.work(plan).pruned) == plan.num_parameters - head * plan.hidden_size


def test_the_first_layers_are_a_model_of_their_own():
    for config in SHAPES.values():
        few, shape = shallow(config, shape_of(config), 1)
        assert shape == shape_of(few) and shape.channels_per_token == (config.intermediate_size,)


def test_a_step_is_simulated_as_the_budget_runs_it():
    setting = Setting("Llama-3-8B", SHAPES["Llama-3-8B"], None, torch.device("cpu"))
    work = setting.work(setting.plan(128), "finetune")
    assert work.checkpointing and work.accumulates
    assert not setting.work(setting.plan(128)).checkpointing  # control: gates fit


def test_kernels_are_told_apart_by_their_names():
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_TNN": "products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "products",
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>": "attention",
        "void at::native::vectorized_elementwise_kernel<4, at::native::mul>": "else",
    }
    assert {name: kind_of(name) for name in names} == names
