"""The teacher's cache: it trains as the live one, is never another's, and is whole or not at all."""

import errno
import os

import pytest
import torch
from support.tuning import blocks, logits, trainers

from tvaprune.errors import InputError
from tvaprune.losses import Predictions
from tvaprune.recover.teacher import CachedTeacher, LiveTeacher, cache_teacher

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks


@pytest.fixture
def trainer(make_model, tmp_path):
    return trainers(make_model, tmp_path)


def test_a_cached_teacher_with_the_whole_vocabulary_trains_as_the_live_one(trainer, make_model, tmp_path):
    data, model = blocks(), make_model(seed=2)
    live = trainer(data=data)
    live.train()
    runs = {}
    for k in (47, 2):
        folder = cache_teacher(tmp_path / "cache", model, data, k, 2.0, batch_size=3)
        runs[k] = trainer(teacher=CachedTeacher(folder, 2.0), data=data)
        runs[k].train()

    def kls(run):
        return [row["kl"] for row in run.state.log_history if "kl" in row]

    assert kls(runs[47]) == pytest.approx(kls(live), rel=1e-3)
    assert all(few < full for few, full in zip(kls(runs[2])[:1], kls(live), strict=False))


def test_a_cached_teacher_leaves_out_the_labels_that_the_live_one_does(make_model, tmp_path):
    data, model = blocks(), make_model(seed=2)
    cached = CachedTeacher(cache_teacher(tmp_path, model, data, 47, 2.0), 2.0)
    rows = torch.tensor([5, 2])  # by their place in the training set
    ids = data[rows.tolist()]["input_ids"]
    student, ignored = Predictions(logits(make_model(seed=1), ids)), ids.clone()
    ignored[0, 4:9] = -100

    def paid(teacher, labels):
        terms = teacher.terms(student, None, {"input_ids": ids, "labels": labels, "index": rows})
        return [float(terms[name]) for name in ("ce", "kl")]

    expected = paid(LiveTeacher(model, 2.0), ignored)
    assert paid(cached, ignored) == pytest.approx(expected, rel=1e-4)
    assert all(abs(a / b - 1) > 1e-3 for a, b in zip(paid(cached, ids), expected, strict=True))  # control


def test_a_cache_is_found_again_and_never_taken_for_another(make_model, tmp_path):
    model, data = make_model(), blocks()
    first = cache_teacher(tmp_path, model, data, 4, 1.0)
    stamp = (first / "tokens.npy").stat().st_mtime_ns
    assert cache_teacher(tmp_path, model, data, 4, 1.0) == first
    assert (first / "tokens.npy").stat().st_mtime_ns == stamp
    others = [
        cache_teacher(tmp_path, make_model(seed=5), data, 4, 1.0),
        cache_teacher(tmp_path, model, blocks(seed=3), 4, 1.0),
        cache_teacher(tmp_path, model, data, 5, 1.0),
        cache_teacher(tmp_path, model, data, 4, 2.0),
    ]
    assert len({first, *others}) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in {first, *others})


def test_an_interrupted_cache_leaves_nothing(make_model, tmp_path):
    model = make_model()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1) if len(calls) < 1 else stop())

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache_teacher(tmp_path / "cache", model, blocks(), 4, 1.0, batch_size=4)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_the_disk_has_no_room_for_is_refused_before_it_is_written(make_model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match="--teacher_cache .*: cannot be written .*No space left on device"):
        cache_teacher(tmp_path / "cache", make_model(), blocks(), 4, 1.0)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_used_is_refused(make_model, tmp_path):
    folder = cache_teacher(tmp_path, make_model(), blocks(), 4, 1.0)
    (folder / "tokens.npy").write_bytes((folder / "tokens.npy").read_bytes()[:200])
    with pytest.raises(InputError, match="is damaged .*; remove it"):
        CachedTeacher(folder, 1.0)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        cache_teacher(tmp_path / "file", make_model(), blocks(), 4, 1.0)
