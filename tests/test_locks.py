import errno
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tvaprune import locks
from tvaprune.errors import InputError
from tvaprune.files import prepare_folder
from tvaprune.locks import holding_folders, lock_folder, one_at_a_time

HOLDS = """
import sys
from pathlib import Path
from tvaprune.locks import lock_folder
with lock_folder("output_dir", Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_run_holds_a_folder_until_it_ends_however_it_ends(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(
        InputError, match=rf"--output_dir .*: is in use by process {holder.pid} on .*; wait for its end"
    ):
        with lock_folder("output_dir", tmp_path):
            pass
    with pytest.raises(InputError, match="is in use by process"), holding_folders():
        prepare_folder("output_dir", tmp_path, may_hold_files=True)
    holder.kill()
    holder.communicate()
    assert os.listdir(tmp_path) == [".tvaprune-lock"]
    with holding_folders():
        prepare_folder("output_dir", tmp_path, may_hold_files=False)  # a lock is no file of the user's
        prepare_folder("save_loc", tmp_path, may_hold_files=True)  # the same folder by another flag
        assert str(os.getpid()) in (tmp_path / ".tvaprune-lock").read_text()
    assert os.listdir(tmp_path) == []


def test_folders_that_a_refused_run_made_go_again_and_those_that_were_there_stay(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").write_text("")
    for place, left in ((Path("mine"), True), (Path("new", "er"), False), (Path("file", "below"), False)):
        with pytest.raises(InputError), holding_folders():
            prepare_folder("output_dir", tmp_path / place, may_hold_files=False)
            raise InputError("no text")
        assert (tmp_path / place).exists() == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]
    with holding_folders():
        prepare_folder("output_dir", tmp_path / "new" / "er", may_hold_files=False)
        (tmp_path / "new" / "er" / "results.json").write_text("{}")
    assert (tmp_path / "new" / "er" / "results.json").exists()


@pytest.mark.parametrize(
    ("lock", "name"), [(partial(lock_folder, "output_dir"), "m/.tvaprune-lock"), (one_at_a_time, ".m.lock")]
)
def test_a_lock_that_its_holder_removed_meanwhile_is_taken_anew(lock, name, tmp_path, monkeypatch):
    flock, path, calls = locks.fcntl.flock, tmp_path / name, []
    (tmp_path / "m").mkdir()

    def removed_meanwhile(file, how):
        flock(file, how)
        calls.append(file)
        if len(calls) == 1:
            path.unlink()

    monkeypatch.setattr(locks.fcntl, "flock", removed_meanwhile)
    with lock(tmp_path / "m"):
        assert len(calls) == 2 and os.path.samestat(os.fstat(calls[1].fileno()), path.stat())
    assert calls[0].closed and not path.exists()


@pytest.mark.parametrize("lock", [partial(lock_folder, "output_dir"), one_at_a_time])
def test_where_nothing_can_be_locked_a_note_says_so(lock, tmp_path, monkeypatch, capsys):
    def unsupported(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with lock(tmp_path), lock(tmp_path):
        assert capsys.readouterr().out.count("cannot be locked; let no second run write there meanwhile\n") == 2
