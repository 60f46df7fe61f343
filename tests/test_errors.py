import errno
import json
import math
import os
import shlex
import sys

import pytest
import torch
from support.tiny import ROOT

from tvaprune.cli import run_command
from tvaprune.errors import (
    EVALUATING,
    REFITTING,
    TRAINING,
    InputError,
    out_of_memory,
    program,
    quoted,
    reason,
    running_out_in,
)
from tvaprune.files import as_json, write_json
from tvaprune.measure.hardware import command_line

CUDA = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 3.00 GiB is "
    "free. Process 1 has 76.25 GiB memory in use."
)


def ends(error, monkeypatch, capsys):
    """Returns a command's exit code and what it says when this is raised in it."""

    def command():
        raise error

    monkeypatch.setattr(sys, "argv", ["tva_prune.py"])
    return run_command(command), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError(CUDA), "GPU is out of memory (20.00 GiB asked for, 3.00 GiB free): 1/7 of the batch"),
        (torch.OutOfMemoryError("CUDA out of memory."), "the GPU is out of memory: a smaller batch"),
        (MemoryError(), "the machine is out of memory: a smaller batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "the machine is out of memory"),
        (RuntimeError("unable to mmap 9 bytes from file <x>: Cannot allocate memory (12)"), "the machine is out of"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "the machine is out of memory"),
        (RuntimeError("CUDA error: out of memory"), "the GPU is out of memory: a smaller batch"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `x`"), "the GPU is out of memory"),
    ],
)
def test_memory_that_ran_out_is_one_line_with_what_would_fit(error, told, monkeypatch, capsys):
    code, line = ends(error, monkeypatch, capsys)
    assert code == 2 and line.startswith("tva_prune.py: the ") and told in line
    assert line.count("\n") == 1 and "--per_device_eval_batch_size" in line and "--ctx_length" in line


@pytest.mark.parametrize(
    ("phase", "told"),
    [
        (EVALUATING, "in an evaluation (20.00 GiB asked for, 3.00 GiB free): 1/7 of the --per_device_eval_batch_size"),
        (
            TRAINING,
            "in training (20.00 GiB asked for, 3.00 GiB free): a smaller --memory, or 1/7 of the --per_device_train",
        ),
        (REFITTING, "in the refit (20.00 GiB asked for, 3.00 GiB free): --refit_offload True"),
    ],
)
def test_a_phase_that_runs_out_names_its_own_flag(phase, told, monkeypatch, capsys):
    error = torch.OutOfMemoryError(CUDA)
    with pytest.raises(torch.OutOfMemoryError), running_out_in(TRAINING), running_out_in(phase):
        raise error
    code, line = ends(error, monkeypatch, capsys)
    assert code == 2 and told in line and line.count("\n") == 1
    other = RuntimeError("size mismatch")
    with pytest.raises(RuntimeError), running_out_in(phase):
        raise other
    assert not hasattr(other, "while_doing")


def test_what_is_a_fault_of_ours_stays_a_traceback(monkeypatch, capsys):
    assert out_of_memory(RuntimeError("size mismatch")) is None
    with pytest.raises(RuntimeError, match="size mismatch"):
        ends(RuntimeError("size mismatch"), monkeypatch, capsys)
    assert ends(InputError("give a folder"), monkeypatch, capsys) == (2, "tva_prune.py: give a folder\n")


@pytest.mark.gpu
def test_a_gpus_own_error_is_read(monkeypatch, capsys):
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    code, line = ends(caught.value, monkeypatch, capsys)
    assert code == 2 and "asked for" in line and "of the batch" in line


def test_a_librarys_message_is_part_of_one_line():
    assert reason(ValueError("first\n  second\x1b[2J\ttab")) == "first second?[2J tab"
    assert reason(KeyError()) == "KeyError" and reason(KeyError("gelu_9")) == "unknown: 'gelu_9'"
    assert reason(ValueError("x" * 1000)) == "x" * 200 + " ..." and reason(ValueError("x" * 200)) == "x" * 200
    assert reason(ValueError("word " * 60)) == "word " * 39 + "word ..."


def test_a_name_forges_no_line():
    assert quoted("a\nb\x1b") == r"'a\nb\x1b'"
    assert quoted(3) == "3" and quoted(("a",)) == "'tuple'"


def test_no_json_of_ours_holds_nan(tmp_path):
    write_json({"a": [1.5, math.nan, {"b": (math.inf, -math.inf, 2)}], "c": "nan", "d": None}, tmp_path / "x.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse)
    assert content == {"a": [1.5, None, {"b": [None, None, 2]}], "c": "nan", "d": None}
    with pytest.raises(AssertionError, match="NaN is not JSON"):  # control
        json.loads(json.dumps({"a": math.nan}), parse_constant=refuse)
    assert as_json({"a": math}, indent=None, default=lambda value: value.__name__) == '{"a": "math"}'


@pytest.mark.parametrize(
    ("called", "command", "name"),
    [
        (str(ROOT / "tvaprune" / "__main__.py"), "python -m tvaprune --x 'a b'", "tvaprune"),
        (str(ROOT / "tvaprune" / "export" / "__main__.py"), "python -m tvaprune.export --x 'a b'", "tvaprune.export"),
        ("/somewhere/bin/tvaprune", "tvaprune --x 'a b'", "tvaprune"),
        ("path/tva_prune.py", "python path/tva_prune.py --x 'a b'", "tva_prune.py"),
        ("/another/__main__.py", "python /another/__main__.py --x 'a b'", "__main__.py"),  # control: not ours
    ],
)
def test_a_command_is_told_as_it_was_typed(called, command, name, monkeypatch, capsys):
    def mistake():
        raise InputError("wrong")

    monkeypatch.setattr(sys, "argv", [called, "--x", "a b"])
    assert command_line() == command and shlex.join(program()) == command.removesuffix(" --x 'a b'")
    assert run_command(mistake) == 2
    assert capsys.readouterr().err == f"{name}: wrong\n"
