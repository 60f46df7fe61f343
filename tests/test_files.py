"""Files and folders that appear whole, and marks: also when the process dies between two steps."""

import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import save_file

from tvaprune import files
from tvaprune.errors import InputError
from tvaprune.files import (
    check_apart,
    check_output,
    clear_leftovers,
    foreign_files,
    new_folder,
    replacing,
    reserve,
    write_text,
)

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def dies(work):
    """Runs work in a forked process that kills itself at its end; returns once it is dead."""
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def save(folder, content, overwrite=True):
    with new_folder("save_pruned", folder, overwrite) as temporary:
        (temporary / "a.txt").write_text(content)


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    write_text("old", tmp_path / "a.txt")
    with pytest.raises(OSError, match="full"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise OSError("full")
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]
    write_text("new", tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_what_dead_processes_left_goes_and_nothing_else(tmp_path):
    def leave():
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            die()

    dies(leave)
    (left,) = names(tmp_path)
    mine = tmp_path / left.replace(left.split("-")[3], str(os.getppid()))  # of a process that lives
    elsewhere = tmp_path / left.replace(left.split("-")[2], "0" * 8)  # of another machine
    others = [".a.txt.part", ".tvaprune-notes", ".a.part-1"]
    for path in (mine, elsewhere, *(tmp_path / name for name in others)):
        path.write_text("mine")
    clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([mine.name, elsewhere.name, *others])


def test_a_leftover_of_this_processs_number_is_a_dead_ones(tmp_path):
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
        (tmp_path / temporary.name.replace("a.txt", "b.txt")).write_text("an earlier container's")
        clear_leftovers(tmp_path)
        assert names(tmp_path) == [temporary.name]
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_and_the_older_one_goes(exchanges, tmp_path, monkeypatch):
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    save(tmp_path / "m", "old")
    save(tmp_path / "m", "new")
    assert (tmp_path / "m" / "a.txt").read_text() == "new" and names(tmp_path) == ["m"]
    with pytest.raises(InputError, match="cannot be written"), new_folder("save_pruned", tmp_path / "m", True):
        raise OSError("full")
    assert (tmp_path / "m" / "a.txt").read_text() == "new" and names(tmp_path) == ["m"]


def test_two_folders_change_places_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])


def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path, monkeypatch):
    """Where names cannot be exchanged in one step."""
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    save(tmp_path / "m", "old")
    rename, done = os.replace, []

    def second_kills(source, target):
        if done:
            die()
        done.append(rename(source, target))

    def swap():
        with new_folder("save_pruned", tmp_path / "m", True) as temporary:
            (temporary / "a.txt").write_text("new")
            monkeypatch.setattr(files, "mark", lambda *_: None)
            monkeypatch.setattr(os, "replace", second_kills)

    dies(swap)
    assert not (tmp_path / "m").exists() and len(names(tmp_path)) == 2  # the old one and the new one, by other names
    with pytest.raises(InputError, match="is not empty"):
        check_output("save_pruned", tmp_path / "m", overwrite=False)
    assert (tmp_path / "m" / "a.txt").read_text() == "old" and names(tmp_path) == ["m"]


@pytest.mark.parametrize("place", ["/proc/m", "/proc/none/m", "file/m", "file/none/m"])
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"--save_pruned .*{place}: cannot be written .*; give another folder"):
        check_output("save_pruned", tmp_path / place, overwrite=True)
    check_output("save_pruned", tmp_path / "none" / "m", overwrite=True)
    assert names(tmp_path) == ["file"]  # nothing is made yet


def test_a_folder_that_holds_what_we_did_not_write_stays(tmp_path):
    save(tmp_path / "m", "old")
    assert foreign_files(tmp_path / "m") == []
    (tmp_path / "m" / "checkpoint-500").mkdir()
    (tmp_path / "m" / "checkpoint-500" / "optimizer.pt").touch()
    for call in (lambda: check_output("save_pruned", tmp_path / "m", True), lambda: save(tmp_path / "m", "new")):
        with pytest.raises(InputError, match="holds checkpoint-500/optimizer.pt, which this tool did not write"):
            call()
    assert (tmp_path / "m" / "a.txt").read_text() == "old"


def test_a_link_stays_a_link_to_the_new_folder(tmp_path):
    save(tmp_path / "disk" / "m", "old")
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    save(tmp_path / "m", "new")
    assert (tmp_path / "m").is_symlink() and (tmp_path / "disk" / "m" / "a.txt").read_text() == "new"


@pytest.mark.parametrize(("place", "how"), [("a/b", "is"), ("a", "holds"), ("a/b/c", "is within"), ("a/x/../b", "is")])
def test_a_folder_is_kept_apart_from_what_must_stay(place, how, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x").mkdir()
    with pytest.raises(InputError, match=f"--save_pruned .*: {how} --model_name_or_path "):
        check_apart("save_pruned", tmp_path / place, "--model_name_or_path", tmp_path / "a" / "b")
    check_apart("save_pruned", tmp_path / "a" / "y", "--model_name_or_path", tmp_path / "a" / "b")
    check_apart("save_pruned", "meta-llama/x", "--model_name_or_path", "meta-llama/x")  # a hub id is no folder


def test_a_cache_that_another_process_built_meanwhile_stays(tmp_path):
    with files.first_folder(tmp_path / "c") as temporary:
        (temporary / "mine").touch()
        shutil.copytree(temporary, tmp_path / "c")
        (tmp_path / "c" / "its").touch()
    assert names(tmp_path) == ["c"] and names(tmp_path / "c") == ["its", "mine"]


def test_weights_are_read_by_whom_the_user_lets_read(tmp_path, monkeypatch):
    """safetensors writes files that their owner alone reads: a server under another name could not open a model."""
    weights = {"w": torch.zeros(2)}
    save_file(weights, tmp_path / "own.safetensors")
    monkeypatch.setattr(files, "_UMASK", 0o027)
    with files.replacing(tmp_path / "one.safetensors") as temporary:
        save_file(weights, temporary)
    with files.new_folder("save_pruned", tmp_path / "model", False) as temporary:
        (temporary / "inner").mkdir()
        save_file(weights, temporary / "inner" / "model.safetensors")
    with files.first_folder(tmp_path / "cache") as temporary:
        save_file(weights, temporary / "model.safetensors")
    for path in ("one.safetensors", "model/inner/model.safetensors", "cache/model.safetensors"):
        assert (tmp_path / path).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "own.safetensors").stat().st_mode & 0o077 == 0  # control: else nothing is to be done


@pytest.mark.parametrize("knows", [True, False])
def test_room_is_taken_before_it_is_needed(knows, tmp_path, monkeypatch):
    if not knows:  # macOS
        monkeypatch.delattr(os, "posix_fallocate")
    path = tmp_path / "room"
    path.write_bytes(b"")
    reserve(path, 1000)
    assert path.stat().st_size == 1000
