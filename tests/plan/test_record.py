"""A mask carries its rules: applied without flags it gives the plan that was learned, whatever applies it."""

import json

import pytest
from support import tiny
from transformers import AutoConfig

from tvaprune.errors import InputError
from tvaprune.flags.arguments import Arguments
from tvaprune.flags.settings import PruneSettings
from tvaprune.models.shape import shape_of
from tvaprune.plan.keep_plan import KeepPlan
from tvaprune.plan.masks import read_record, save_masks
from tvaprune.plan.record import recorded_flags
from tvaprune.plan.widths import WidthRules
from tvaprune.run import Run
from tvaprune.stages.describe import describe, main

SMALL = ("--block_size", 16, "--ctx_length", 16, "--max_eval_samples", 4, "--speed_batches", 0, "--use_cpu")
RULES = {"dim_multiple": 4, "min_key_value_heads": 1, "uniform": True, "tensor_parallel": 2}
AS_FLAGS = {"dim_multiple": 4, "keep_one_kv_head": True, "uniform": True, "tensor_parallel": 2}
SHIPPED = sorted(path for name in ("mistral", "llama3") for path in tiny.ROOT.glob(f"{name}_saves_tva/mask_info_*.pkl"))


@pytest.fixture(scope="module")
def source(make_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    model = tiny.save_checkpoint(make_model("llama", attention_bias=True, mlp_bias=True), folder / "model")
    return ("--model_name_or_path", model, "--dataset_name", tiny.write_text(folder / "text.txt"))


@pytest.fixture
def learn(source, tmp_path, command):
    """Returns a function: flags of a training -> its mask and its output folder."""

    def run(*flags):
        output = tmp_path / "learned"
        train = ("--do_train", "--max_train_samples", 8, "--per_device_train_batch_size", 4, "--weight_update", "fold",
                 "--rotate", "off")  # fmt: skip
        code, _, error = command(*train, *source, *SMALL, "--output_dir", output, *flags)
        assert code == 0, error
        (mask,) = (output / "best").glob("*.pkl")
        return mask, output

    return run


@pytest.fixture
def apply(source, tmp_path, command):
    """Returns a function: mask or plan, flags -> what applying it prints, its plan.json's text and its results."""

    def run(units, *flags):
        output = tmp_path / "applied"
        named = "--plan" if units.suffix == ".json" else "--mask_loc"
        base = ("--do_eval", named, units, "--output_dir", output, "--overwrite_output_dir")
        code, out, error = command(*base, "--weight_update", "fold", *source, *SMALL, *flags)
        assert code == 0, error
        return out, (output / "plan.json").read_text(), tiny.read_json(output / "results.json")

    return run


@pytest.mark.parametrize("method", ["vib", "magnitude"])
@pytest.mark.parametrize(
    "flags",
    [("--uniform", "--dim_multiple", 4), ("--dim_multiple", 32), ("--tensor_parallel", 2), ("--dim_multiple", 0)],
)
def test_a_mask_is_applied_by_the_rules_that_it_was_learned_with(flags, method, learn, apply):
    mask, output = learn("--prune_method", method, *flags)
    out, plan, _ = apply(mask)
    assert plan == (output / "plan.json").read_text()
    assert "note: the units were chosen" not in out
    mask.with_suffix(".json").unlink()
    _, other, _ = apply(mask)
    assert other != plan  # negative control: nothing else tells the rules
    assert apply(mask, "--prune_method", method, *flags)[1] == plan


def test_a_flag_that_differs_is_told_once_and_wins(learn, apply):
    mask, output = learn("--prune_method", "random", "--uniform", "--dim_multiple", 4)
    out, plan, _ = apply(mask, "--uniform", "False")
    assert out.count("note: the units were chosen") == 1
    assert "note: the units were chosen with --uniform True, applied with --uniform False\n" in out
    mask.with_suffix(".json").unlink()
    assert plan == apply(mask, "--prune_method", "random", "--dim_multiple", 4)[1] != (output / "plan.json").read_text()


@pytest.mark.parametrize("kind", ["mask", "plan"])
def test_flaps_bias_is_compensated_wherever_its_choice_is_applied(kind, learn, apply):
    mask, output = learn("--prune_method", "flap")
    plan = output / "plan.json"
    units, told = (mask, mask.with_suffix(".json")) if kind == "mask" else (plan, plan)
    first = tiny.read_json(output / "results.json")["perplexity"]["pruned"]
    out, _, results = apply(units)
    assert (results["prune_method"], "note: the units" in out) == ("flap", False)
    assert results["perplexity"]["pruned"] == pytest.approx(first)
    out, _, results = apply(units, "--prune_method", "vib")
    assert "note: the units were chosen with --prune_method flap, applied with --prune_method vib\n" in out
    assert abs(results["perplexity"]["pruned"] / first - 1) > 1e-6
    told.write_text(json.dumps(tiny.read_json(told) | {"prune_method": "vib" if kind == "mask" else None}))
    assert apply(units)[2]["prune_method"] == "vib"


@pytest.fixture
def mask(source, make_masks, tmp_path):
    path = tmp_path / "mask_info_1.5.pkl"
    save_masks(make_masks(shape_of(AutoConfig.from_pretrained(source[1]))), path)
    return path


def loaded(source, mask, verb, *flags):
    return Run.load(Arguments.parse([*map(str, source), "--mask_loc", str(mask), "--use_cpu", *flags], verb))


@pytest.mark.parametrize("verb", ["apply", "finetune"])
def test_every_verb_takes_the_record(verb, source, mask):
    assert loaded(source, mask, verb).rules == WidthRules(8)  # without one: the defaults
    mask.with_suffix(".json").write_text(json.dumps({"rules": RULES, "prune_method": "flap"}))
    run = loaded(source, mask, verb)
    assert (run.rules, run.record()["prune_method"]) == (WidthRules(**RULES), "flap")
    given = ("--dim_multiple", "0", "--keep_one_kv_head", "False", "--tensor_parallel", "1", "--prune_method", "vib")
    run = loaded(source, mask, verb, *given)
    assert (run.rules, run.record()["prune_method"]) == (WidthRules(1, 0, True, 1), "vib")


def test_the_description_takes_the_record(source, mask, tmp_path, capsys):
    mask.with_suffix(".json").write_text(json.dumps({"rules": RULES}))
    content = describe(mask, str(source[1]), PruneSettings())
    out, _ = loaded(source, mask, "apply"), capsys.readouterr()
    assert content == describe(mask, str(source[1]), PruneSettings(**AS_FLAGS))
    assert len(set(content.adjusted.intermediate_size)) == 1 and out.rules == WidthRules(**RULES)
    capsys.readouterr()
    main([str(mask), "--model_name_or_path", str(source[1]), "--uniform", "False", "--json"])
    shown = capsys.readouterr()
    assert shown.err == "note: the units were chosen with --uniform True, applied with --uniform False\n"
    assert len(set(json.loads(shown.out)["adjusted"]["intermediate_size"])) > 1
    for flag in ("--tensor_parallel", "--dim_multiple"):  # a rule is refused as the verbs that cut refuse it
        with pytest.raises(InputError, match=f"{flag} is -1: give a "):
            main([str(mask), "--model_name_or_path", str(source[1]), flag, "-1"])


@pytest.mark.parametrize(
    ("record", "flags"),
    [
        ({"dim_multiple": 32, "prune_method": "vib"}, {"dim_multiple": 32, "prune_method": "vib"}),
        ({"dim_multiple": 4, "settings": {"rules": RULES}}, AS_FLAGS),
        ({"rules": {"uniform": True}, "dim_multiple": 8}, {"uniform": True}),
        ({}, {}),
    ],
)  # fmt: skip
def test_older_records_tell_what_they_hold(record, flags, mask):
    mask.with_suffix(".json").write_text(json.dumps(record))
    assert recorded_flags(mask) == flags


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_masks_tell_their_rules(path):
    free = {"keep_one_kv_head": False, "uniform": False, "tensor_parallel": 1}
    older = path.stem in ("mask_info_26.844462387911015", "mask_info_38.272763225167864")
    assert recorded_flags(path) == {"dim_multiple": 8, "prune_method": "vib"} | ({} if older else free)


@pytest.mark.parametrize(
    "content",
    ["", '{"rules": ', "[1]", "\xff", '{"rules": 3}', '{"rules": {"uniform": 1}}', '{"rules": {"dim_multiple": 0}}',
     '{"rules": {"dim_multiple": "8"}}', '{"rules": {"of_tomorrow": 1}}', '{"prune_method": 3}',
     '{"dim_multiple": null}', '{"rules": {"min_key_value_heads": 2}}'],
)  # fmt: skip
def test_a_damaged_record_is_refused_in_one_line(content, source, mask, command, tmp_path):
    mask.with_suffix(".json").write_bytes(content.encode("latin-1"))
    flags = ("--do_eval", "--mask_loc", mask, "--output_dir", tmp_path / "out", *source, *SMALL)
    code, _, error = command(*flags)
    assert f"{mask.with_suffix('.json')}: the mask's record" in tiny.refusal(code, error)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_a_mask_without_a_record_has_none(mask):
    assert read_record(mask) == {} == recorded_flags(mask)


def test_the_record_holds_the_rules(learn):
    mask, output = learn("--prune_method", "random", "--uniform", "--dim_multiple", 4)
    assert read_record(mask)["rules"] == RULES | {"min_key_value_heads": 0, "tensor_parallel": 1}
    assert len(set(KeepPlan.load(output / "plan.json").intermediate_size)) == 1


def test_devices_that_share_no_layer_are_refused_before_the_model_is_loaded(source, tmp_path, command, monkeypatch):
    monkeypatch.setattr(Run, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    flags = ("--do_train", "--max_train_samples", 8, *source, *SMALL, "--output_dir", tmp_path / "out")
    code, _, error = command(*flags, "--tensor_parallel", 3)
    assert code == 2 and "--tensor_parallel is 3: the model's num_key_value_heads, 2, is no multiple of it" in error
    assert not (tmp_path / "out").exists()
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):  # negative control
        command(*flags, "--tensor_parallel", 2)
