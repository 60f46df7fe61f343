"""How a command ends: a signal, a reader that leaves, a full disk."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError
from support import tiny
from tqdm.auto import tqdm

from tvaprune import endings, ranks
from tvaprune.cli import run_command
from tvaprune.errors import InputError
from tvaprune.flags.recipes import advice_of


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("prune", [], "--resume_from_checkpoint True"),
        ("prune", ["--prune_method", "vib"], "--resume_from_checkpoint True"),
        ("prune", ["--prune-method=taylor"], "the same command with --overwrite_output_dir does it again"),
        ("prune", ["--prune_method", "bonsai"], "the same command with --overwrite_output_dir goes on after its last"),
        ("finetune", ["--prune_method", "flap"], "--resume_from_checkpoint True"),
        ("apply", [], "the same command does it again"),
        ("export", ["--format", "gguf"], "the same command does it again"),
        ("compare", [], "the same command goes on where it was"),
    ],
)
def test_an_interrupted_user_is_told_what_the_command_takes(verb, flags, words):
    assert advice_of(verb, flags).startswith(words)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_command_at_once(number, code, capsys):
    def command():
        os.kill(os.getpid(), number)
        time.sleep(1)
        raise AssertionError("went on")

    before = signal.getsignal(number)
    assert run_command(command) == code
    assert "interrupted; --resume_from_checkpoint True goes on" in capsys.readouterr().err
    assert signal.getsignal(number) is before


def test_the_line_stands_behind_no_bar_that_an_error_left_open(capsys):
    def command():
        command.bar = tqdm(total=3)  # as a Trainer holds its own
        command.bar.update()
        raise InputError("give a folder")

    assert run_command(command) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert "33%" in before[-1] and line.endswith(": give a folder") and "33%" not in line


def test_in_a_training_a_signal_waits_for_the_next_step_also_where_an_exception_is_swallowed():
    steps = []

    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def command():
        with endings.at_steps():
            for step in range(5):
                endings.check()
                if step == 2:
                    Swallows()
                steps.append(step)

    assert run_command(command) == 130
    assert steps == [0, 1, 2]


def test_elsewhere_a_signal_that_a_destructor_swallows_comes_again(capsys):
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)

    def command():
        Swallows()
        time.sleep(5)
        raise AssertionError("went on")

    before = sys.unraisablehook
    assert run_command(command) == 130
    assert capsys.readouterr().err.startswith("interrupted;")  # and not by what Python says of ignored exceptions
    assert sys.unraisablehook is before


def test_a_swallowed_signal_does_not_come_again_once_the_command_has_ended(monkeypatch):
    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)

    due, came = [], []
    timer = lambda seconds, send: SimpleNamespace(start=lambda: due.append(send))  # noqa: E731
    monkeypatch.setattr(endings.threading, "Timer", timer)
    before = signal.signal(signal.SIGINT, lambda *_: came.append("again"))
    try:
        assert run_command(Swallows) == 0
        (send,) = due
        send()
        time.sleep(0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == []


def test_in_another_thread_a_command_runs_without_hearing_signals():
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_command(lambda: None)))
    thread.start()
    thread.join()
    assert codes == [0]


def test_other_exceptions_that_a_destructor_ignores_are_told(monkeypatch):
    class Fails:
        def __del__(self):
            raise ValueError("in a destructor")

    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(str(lost.exc_value)))
    assert run_command(Fails) == 0
    assert told == ["in a destructor"]


def test_a_second_signal_does_not_wait():
    def command():
        with endings.at_steps():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("went on")

    assert run_command(command) == 143


def test_a_signal_to_one_process_ends_all_at_the_same_step(monkeypatch):
    monkeypatch.setattr(ranks, "largest", lambda own: max(own, signal.SIGTERM))  # another process was asked to end

    def command():
        with endings.at_steps():
            endings.check_together()
            raise AssertionError("went on")

    assert run_command(command) == 143


@pytest.mark.parametrize(("within", "done"), [(10.0, ["the rest of the step"]), (-1.0, [])])
def test_what_a_launcher_passes_on_after_the_terminal_is_one_signal(within, done, monkeypatch):
    monkeypatch.setattr(endings, "_PASSED_ON", within)
    steps = []

    def command():
        with endings.at_steps():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            steps.append("the rest of the step")
            endings.check()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        assert run_command(command) == 130
    finally:
        ignored = signal.getsignal(signal.SIGTERM)
        for number, handler in before.items():
            signal.signal(number, handler)
    assert steps == done
    assert ignored == signal.SIG_IGN  # a launcher sends it to those that end already


def test_a_signal_in_the_last_step_is_not_lost():
    def command():
        with endings.at_steps():
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    assert run_command(command) == 130


SAYS = """
import sys
from tvaprune.cli import run_command
def command():
    for i in range(20000):
        print("line", i)
        print("line", i, file=sys.stderr)
    open(sys.argv[1], "w").close()
sys.exit(run_command(command))
"""


def test_a_reader_that_leaves_ends_nothing(tmp_path):
    command = f"{sys.executable} -c '{SAYS}' {tmp_path}/done 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tiny.ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("line 0")
    assert (tmp_path / "done").exists()


def test_a_stream_within_has_all_that_it_had():
    with endings.unclosed():
        assert (sys.stdout.encoding, sys.stderr.isatty()) == (sys.__stdout__.encoding, False)


def raised(kind, *args, cause=None, context=None):
    error = kind(*args)
    error.__cause__, error.__context__ = cause, context
    return error


FULL = OSError(errno.ENOSPC, "No space left on device", "model.safetensors")


@pytest.mark.parametrize(
    ("error", "is_full"),
    [
        (FULL, True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EFBIG, "File too large"), True),
        (raised(RuntimeError, "while saving", cause=FULL), True),
        (raised(RuntimeError, "while saving", context=FULL), True),
        *(
            (SafetensorError(f"Error while serializing: I/O error: (os error {number})"), True)
            for number in (28, 122, 27)
        ),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0"), True),
        (RuntimeError("basic_ios::clear: iostream error"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_a_full_disk_is_one_line(error, is_full, capsys):
    def command():
        raise error

    if not is_full:
        with pytest.raises(type(error)):
            run_command(command)
        return
    assert run_command(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "there is no room on the disk" in line and "make room, and run again" in line


def test_outputs_that_were_closed_before_the_start_end_nothing(monkeypatch):
    done = []
    for name in ("stdout", "stderr"):  # what Python has for them
        monkeypatch.setattr(sys, name, None)
    assert run_command(lambda: print("said", flush=True) or done.append(sys.stderr.write("told"))) == 0
    assert done and sys.stdout is None


def test_a_terminal_that_lacks_a_letter_ends_nothing(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run_command(lambda: print("19.66 ± 0.85", "of модель")) == 0
    assert written.getvalue() == b"19.66 ? 0.85 of ??????\n"


@pytest.mark.parametrize("command", ["-m tvaprune", "tva_prune.py"])
def test_a_reader_that_leaves_the_help_sees_no_traceback(command):
    line = f"{sys.executable} {command} --help 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tiny.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stdout + done.stderr
