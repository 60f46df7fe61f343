"""Files made to run code, to reach elsewhere, or to lie: nothing of it happens, and a naive loader would have let it.

Each test has a canary that shows what ran, and as a control the loader that lets it sing.
"""

import ast
import json
import os
import pickle
import shutil
import struct
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from support.families import logits
from support.folders import edit_config
from support.in_process import half_written, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tvaprune.checkpoint.folder import load_pruned
from tvaprune.errors import quoted
from tvaprune.models.shape import shape_of
from tvaprune.models.units import PerUnit
from tvaprune.plan.masks import Masks, save_masks

CODE = """
import os
open(os.environ["CANARY"], "a").close()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class Mine(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = Mine

class MineTokenizer(PreTrainedTokenizerFast):
    pass
"""
YES = "y\n" * 20


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A file that exists once hostile code has run."""
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


@pytest.fixture
def folder(make_model, tmp_path):
    """A checkpoint, a mask that keeps everything beside it, and the hostile module within it."""
    model = make_model()
    folder = tiny.save_checkpoint(model, tmp_path / "model")
    shape = shape_of(model.config)
    save_masks(Masks(PerUnit.full(shape, 1.0), PerUnit.full(shape, -9.0)), tmp_path / "mask_info_1.0.pkl")
    (folder / "mine.py").write_text(f"# {tmp_path}: no module that an earlier test ran{CODE}")
    return folder


def save(folder, out):
    """Applies the mask that keeps everything, with a yes to every question."""
    return run(
        "apply", "--model_name_or_path", folder, "--mask_loc", folder.parent / "mask_info_1.0.pkl",
        "--save_pruned", out, "--do_eval", "False", "--weight_update", "none", "--dim_multiple", 1, "--use_cpu",
        stdin=YES,
    )  # fmt: skip


def describe(mask, folder):
    return run("describe", mask, "--model_name_or_path", folder, stdin=YES)


def refused(ended, words):
    assert ended.fault == "" and ended.code == 2, ended
    assert words in ended.err, ended.err
    return ended.err


class Runs:
    def __init__(self, call, *args):
        self.reduced = call, args

    def __reduce__(self):
        return self.reduced


SINGS = "import os; open(os.environ['CANARY'], 'a').close()"


def legacy(value):
    """A value as torch stored it before zip files, in the bytes of a storage."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, value, [])
    return b"".join(pickle.dumps(part, protocol=2) for part in parts)


PICKLES = {
    "at the top": lambda: pickle.dumps(Runs(exec, SINGS)),
    "as a value": lambda: pickle.dumps({"hidden_mask_z_mu": Runs(exec, SINGS)}),
    "as a key": lambda: pickle.dumps([Runs(exec, SINGS)]).replace(b"]", b"}", 1),
    "in an old protocol": lambda: pickle.dumps(Runs(exec, SINGS), protocol=0),
    "by a method's name": lambda: b"cbuiltins\nexec\n(X" + struct.pack("<I", len(SINGS)) + SINGS.encode() + b"tR.",
    "as an instance": lambda: b"(X" + struct.pack("<I", len(SINGS)) + SINGS.encode() + b"ibuiltins\nexec\n.",
    "in the bytes of a storage": lambda: pickle.dumps(
        {"hidden_mask_z_mu": Runs(torch.storage._load_from_bytes, legacy(Runs(exec, SINGS)))}
    ),
}


@pytest.mark.parametrize("where", PICKLES)
def test_a_pickle_runs_nothing(where, folder, canary, tmp_path):
    mask = tmp_path / "mask_info_2.0.pkl"
    mask.write_bytes(PICKLES[where]())
    refused(describe(mask, folder), "--mask_loc")
    assert not canary.exists()
    with warnings.catch_warnings():  # control; torch itself asks for weights only
        warnings.simplefilter("ignore")
        monkey = pytest.MonkeyPatch()
        load = torch.load
        monkey.setattr(torch, "load", lambda *args, **kwargs: load(*args, **(kwargs | {"weights_only": False})))
        try:
            pickle.loads(mask.read_bytes())
        except Exception:  # what stands around the code need not be whole
            pass
        monkey.undo()
    assert canary.exists()


def test_a_config_runs_no_code_of_its_folder(folder, canary, tmp_path, monkeypatch):
    edit_config(
        folder,
        model_type="mine",
        architectures=["MineForCausalLM"],
        auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    )
    mask = tmp_path / "mask_info_1.0.pkl"
    for ended in (save(folder, tmp_path / "out"), describe(mask, folder)):
        refused(ended, f"--model_name_or_path {folder}: its type 'mine' is code of its own (auto_map in config.json)")
    refused(
        run("prune", "--model_name_or_path", folder, "--output_dir", tmp_path / "out", "--prune_method", "magnitude",
            "--use_cpu", stdin=YES), f"--model_name_or_path {folder}",
    )  # fmt: skip
    refused(run("export", "--format", "vanilla", folder, tmp_path / "stock", stdin=YES), "not a pruned checkpoint")
    assert not canary.exists()
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    AutoConfig.from_pretrained(folder)  # control: the question, answered with yes
    assert canary.exists()


def test_a_known_types_config_runs_no_code_and_passes_none_on(folder, canary, tmp_path, input_ids, make_model):
    code = {
        "AutoConfig": "mine.Mine",
        "AutoModelForCausalLM": "mine.MineForCausalLM",
        "AutoTokenizer": ["mine.M", None],
    }
    edit_config(folder, auto_map=code, custom_pipelines={"text-generation": {"impl": "mine.Pipeline"}})
    (folder / "generation_config.json").write_text(json.dumps({"auto_map": code, "max_length": 20}))
    out = tmp_path / "out"
    ended = save(folder, out)
    assert ended.code == 0, ended
    assert torch.equal(logits(load_pruned(out), input_ids), logits(make_model(), input_ids))
    assert not canary.exists() and not [path for path in out.iterdir() if "mine" in path.name]
    assert "mine." not in "".join(path.read_text() for path in out.glob("*.json") if path.name != "tokenizer.json")
    AutoConfig.from_pretrained(folder, trust_remote_code=True)  # control
    assert canary.exists()


def test_a_tokenizer_runs_no_code_and_passes_none_on(folder, canary, tmp_path):
    settings = folder / "tokenizer_config.json"
    code = {"auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
    settings.write_text(json.dumps(tiny.read_json(settings) | code))
    out = tmp_path / "out"
    ended = save(folder, out)
    assert ended.code == 0, ended
    assert not canary.exists() and "auto_map" not in tiny.read_json(out / "tokenizer_config.json")
    naive = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # control: nothing ran, but it is passed on
    naive.save_pretrained(tmp_path / "naive")
    assert "auto_map" in tiny.read_json(tmp_path / "naive" / "tokenizer_config.json")
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert canary.exists()


def test_a_tokenizer_of_an_unknown_class_runs_nothing(folder, canary, tmp_path):
    settings = folder / "tokenizer_config.json"
    code = {"tokenizer_class": "MineTokenizer", "auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}}
    settings.write_text(json.dumps(tiny.read_json(settings) | code))
    ended = save(folder, tmp_path / "out")
    assert ended.fault == "" and not canary.exists()
    assert half_written(tmp_path) == []
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # control
    assert canary.exists()


def test_an_export_runs_no_code_and_passes_none_on(make_model, make_masks, folder, canary, tmp_path):
    shape = shape_of(make_model().config)
    save_masks(make_masks(shape), tmp_path / "mask_info_1.0.pkl")
    pruned = tmp_path / "pruned"
    assert save(folder, pruned).code == 0
    shutil.copyfile(folder / "mine.py", pruned / "mine.py")
    settings = pruned / "tokenizer_config.json"
    settings.write_text(
        json.dumps(tiny.read_json(settings) | {"auto_map": {"AutoTokenizer": [None, "mine.MineTokenizer"]}})
    )
    edit_config(pruned, auto_map={"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineForCausalLM"})
    ended = run("export", "--format", "vanilla", pruned, tmp_path / "stock", stdin=YES)
    assert ended.code == 0, ended
    assert not canary.exists() and "mine." not in "".join(
        p.read_text() for p in (tmp_path / "stock").glob("*config.json")
    )
    AutoTokenizer.from_pretrained(pruned, trust_remote_code=True)  # control
    assert canary.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_kernel_that_a_config_names_is_not_fetched(key, folder, tmp_path, monkeypatch, input_ids, make_model):
    asked = []
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", lambda *a, **k: asked.append(a))
    edit_config(folder, **{key: "someone/kernel"})
    ended = save(folder, tmp_path / "out")
    assert ended.code == 0 and not asked, ended
    assert "someone/kernel" not in (tmp_path / "out" / "config.json").read_text()
    edit_config(tmp_path / "out", **{key: "someone/kernel"})
    model = load_pruned(tmp_path / "out")
    assert model.config._attn_implementation == "sdpa" and not asked
    assert torch.equal(logits(model, input_ids), logits(make_model(), input_ids))
    if key != "_attn_implementation_internal":  # control: transformers asks the hub; the inner key it ignores
        AutoModelForCausalLM.from_pretrained(folder)
        assert asked


def index_to(folder, where):
    """Moves the weights of a folder and has its index name them there; returns the name."""
    (folder / "model.safetensors").rename(where / "other.safetensors")
    name = os.path.relpath(where / "other.safetensors", folder)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(load_file(where / "other.safetensors"), name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    AutoModelForCausalLM.from_pretrained(folder)  # control: transformers reads them wherever they are
    return name


@pytest.mark.parametrize("hostile", [False, True])
def test_weights_of_a_pickle_run_nothing(hostile, folder, canary, tmp_path):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | ({"x": Runs(exec, SINGS)} if hostile else {}), folder / "pytorch_model.bin")
    ended = save(folder, tmp_path / "out")
    if hostile:
        refused(ended, "Weights only load failed")
        assert not canary.exists() and not (tmp_path / "out").exists()
        torch.load(folder / "pytorch_model.bin", weights_only=False)  # control
        assert canary.exists()
    else:
        assert ended.code == 0, ended


@pytest.mark.parametrize("inside", [False, True])
def test_weights_outside_the_folder_are_not_read(inside, folder, tmp_path):
    name = index_to(folder, folder if inside else tmp_path)
    ended = save(folder, tmp_path / "out")
    if inside:
        assert ended.code == 0, ended
    else:
        refused(ended, f"names {name!r}, which is no file of this folder")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("inside", [False, True])
def test_weights_outside_a_pruned_folder_are_not_exported(inside, folder, tmp_path):
    pruned = tmp_path / "pruned"
    assert save(folder, pruned).code == 0
    name = index_to(pruned, pruned if inside else tmp_path)
    ended = run("export", "--format", "vanilla", pruned, tmp_path / "stock")
    if inside:
        assert ended.code == 0, ended
    else:
        refused(ended, f"names {name!r}, which is no file of this folder")
        assert not (tmp_path / "stock").exists()


FORGED = "x\ntvaprune: all is well\r\x1b[2J\u202e"


def test_no_name_in_a_file_forges_a_line(folder, tmp_path):
    mask = tmp_path / "mask_info_2.0.pkl"
    mask.write_bytes(pickle.dumps({FORGED: torch.ones(3)}))
    told = [refused(describe(mask, folder), "is no gate of a mask file")]
    name = FORGED.encode()
    mask.write_bytes(b"\x80\x04\x8c" + bytes([len(name)]) + name + b"\x8c\x06system\x93.")
    told.append(refused(describe(mask, folder), "asks to run"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {FORGED: torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    told.append(refused(save(folder, tmp_path / "out"), "1 of the file's are unknown to it"))
    edit_config(folder, model_type=FORGED)
    told.append(refused(save(folder, tmp_path / "out"), "model_name_or_path"))
    for lines in told:
        assert "\n" not in lines.rstrip("\n").split("tvaprune: ", 1)[1].replace("\r", "\n"), lines
        assert "\x1b" not in lines and "\u202e" not in lines


def test_a_storage_that_lies_takes_no_memory(folder, tmp_path, make_model):
    claimed = 10**7
    short = torch.storage.TypedStorage(
        wrap_storage=torch.ones(36).untyped_storage(), dtype=torch.float32, _internal=True
    )
    lie = Runs(torch._utils._rebuild_tensor_v2, short, 0, (claimed,), (1,), False, {})
    mask = tmp_path / "mask_info_2.0.pkl"
    mask.write_bytes(pickle.dumps({"hidden_mask_z_mu": lie}))
    refused(describe(mask, folder), "a tensor of 10000000 elements from 0 on, in a storage of 36")
    naive = pickle.loads(mask.read_bytes())["hidden_mask_z_mu"]  # control: grown to what it claims
    assert naive.untyped_storage().nbytes() == 4 * claimed


@pytest.mark.parametrize("best", ["elsewhere", "../elsewhere", "checkpoint-1"])
def test_the_best_checkpoint_is_one_of_the_run(best, folder, tmp_path, monkeypatch):
    output = tmp_path / "out"
    (output / "checkpoint-1").mkdir(parents=True)
    for name in ("identity.json", "optimizer.pt", "scheduler.pt", "model.safetensors", "rng_state.pth"):
        (output / "checkpoint-1" / name).touch()  # whole enough to be looked into
    monkeypatch.chdir(output)
    named = str(tmp_path / best) if best == "elsewhere" else best
    state = output / "checkpoint-1" / "trainer_state.json"
    state.write_text(json.dumps({"best_model_checkpoint": named}))
    ended = run("prune", "--model_name_or_path", folder, "--output_dir", output, "--use_cpu", "--block_size", 16,
                "--resume_from_checkpoint", "True", "--dataset_name", tmp_path / "no.txt")  # fmt: skip
    if best == "checkpoint-1":  # control: it goes on to what is wrong next
        refused(ended, "--dataset_name")
    else:
        refused(ended, f"its best_model_checkpoint is {quoted(named)}, outside --output_dir {output}")
        moved = json.dumps({"best_model_checkpoint": "/gone/out/checkpoint-1", "epoch": 1.5})
        state.write_text(moved)
        ended = run("prune", "--model_name_or_path", folder, "--output_dir", output, "--use_cpu",
                    "--resume_from_checkpoint", "True", "--dataset_name", tmp_path / "no.txt")  # fmt: skip
        refused(ended, "--dataset_name")  # a run that was moved goes on with its own
        assert state.read_text() == moved
    state.write_text("[" * 10**5)
    refused(run("prune", "--model_name_or_path", folder, "--output_dir", output, "--use_cpu",
                "--resume_from_checkpoint", "True"), "trainer_state.json: cannot be read")  # fmt: skip


def test_the_harness_sees_a_traceback_and_a_second_line(monkeypatch):
    """Control of the harness itself."""
    monkeypatch.setattr("tvaprune.cli._usage", lambda: 1 / 0)
    assert "ZeroDivisionError" in run("--help").fault
    monkeypatch.setattr("tvaprune.cli._usage", lambda: sys.exit(3))
    assert run("--help").fault.startswith("code 3")
    assert run("pune").fault == "" and run("pune").code == 2


def trusting(source):
    """The lines of a source where something is loaded by an Auto class without a word against code of its own."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        on_auto = isinstance(node.func.value, ast.Name) and node.func.value.id.startswith("Auto")
        if on_auto and node.func.attr in ("from_pretrained", "from_config"):
            said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
            if not (said and isinstance(said[0], ast.Constant) and said[0].value is False):
                found.append(node.lineno)
    return found


def test_nothing_is_loaded_without_a_word_against_its_code():
    sources = [*(tiny.ROOT / "tvaprune").rglob("*.py"), *(tiny.ROOT / "benchmarks").glob("*.py"),
               *(tiny.ROOT / "script").glob("*.py")]  # fmt: skip
    assert {str(path): trusting(path.read_text(encoding="utf-8")) for path in sources} == {
        str(path): [] for path in sources
    }
    assert trusting("AutoConfig.from_pretrained(p)\nAutoModel.from_config(c, trust_remote_code=True)") == [1, 2]
    assert trusting("AutoTokenizer.from_pretrained(p, trust_remote_code=False)") == []
