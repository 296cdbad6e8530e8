"""A checkpoint's file: whole or the last one, whatever the disk does."""

import os
import random
import resource
import shutil
import zipfile
from collections import namedtuple
from contextlib import contextmanager

import pytest
import torch
from runs import SHORT, assert_same, quicken, state_of

from rkdo.checkpoint import SEAL, load, save, size_of
from rkdo.errors import UserError
from rkdo.record import Run
from rkdo.train import train


def values(seed=0, n=3000):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, generator=generator)
    return {"weights": weights, "view": weights[:5], "none": None, "pair": (1, torch.ones(3))}


@contextmanager
def largest_file(size):
    """No file of this process may be larger: writing more is an error, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_what_is_saved_is_loaded_and_is_an_archive_to_everybody_else(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, values())
    assert torch.equal(load(path)["weights"], values()["weights"])
    assert torch.equal(torch.load(path, weights_only=True)["view"], values()["weights"][:5])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert len(archive.comment) == SEAL
    assert path.stat().st_size <= size_of(values()) <= path.stat().st_size + 80_000
    assert load(tmp_path / "none.pt") is None


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, values(n=50))
    whole = path.read_bytes()
    rng = random.Random(0)
    last = range(len(whole) - 2 * SEAL, len(whole))
    for place in [*rng.sample(range(len(whole)), 300), *last]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"checkpoint\.pt (is|has)") as caught:
            load(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [1, SEAL - 1, SEAL, SEAL + 1, 3000])
def test_a_checkpoint_that_was_cut_is_damaged(cut, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, values())
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="is damaged"):
        load(path)


def test_checkpoints_from_before_checksums_are_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": "rkdo-checkpoint", "version": 2, **values()}, path)
    assert torch.equal(load(path)["weights"], values()["weights"])
    torch.save({"format": "rkdo-checkpoint", "version": 3, **values()}, path)
    with pytest.raises(UserError, match="is damaged: it has no checksum"):
        load(path)


def test_a_disk_that_is_full_at_any_moment_leaves_the_last_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save(path, values())
    before = path.read_bytes()
    for room in [0, 1, 100, *random.Random(0).sample(range(len(before)), 20), len(before) - 1]:
        with (
            largest_file(room),
            pytest.raises(UserError, match=r"checkpoint\.pt cannot be written: File too large"),
        ):
            save(path, values(seed=1))
        assert path.read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]
    with largest_file(len(before)):
        save(path, values(seed=1))
    assert path.read_bytes() != before


def free(monkeypatch, size):
    usage = namedtuple("usage", "total used free")(10**9, 0, size)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    free(monkeypatch, 5000)
    with pytest.raises(UserError, match=r"needs 0\.1 MB for a checkpoint, .* 0\.0 MB left"):
        save(path, values())
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_room_for_a_checkpoint_does_not_begin(tmp_path, monkeypatch):
    quicken(monkeypatch)
    free(monkeypatch, 5000)
    with pytest.raises(UserError, match="for two checkpoints"):
        train(SHORT, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_room_is_wanted_for_the_old_checkpoint_and_the_new(tmp_path, monkeypatch):
    quicken(monkeypatch)
    train(SHORT, tmp_path / "whole")
    size = (tmp_path / "whole" / "checkpoint.pt").stat().st_size
    free(monkeypatch, int(1.5 * size))  # the first would fit, and the second not
    with pytest.raises(UserError, match="for two checkpoints, the last and the next, and its disk"):
        train(SHORT, tmp_path / "run")
    free(monkeypatch, 4 * size)
    train(SHORT, tmp_path / "run")


def test_what_is_read_back_differently_does_not_replace_the_last(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save(path, values())
    before = path.read_bytes()
    sync = os.fsync

    def sync_and_spoil(file):
        sync(file)
        monkeypatch.setattr(os, "fsync", sync)
        os.pwrite(file, b"?", 2000)

    monkeypatch.setattr(os, "fsync", sync_and_spoil)
    with pytest.raises(UserError, match="what was read back is not what was written"):
        save(path, values(seed=1))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_line_of_metrics_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    quicken(monkeypatch)
    run = Run(tmp_path)
    run.open_metrics(0)
    run.write_metrics({"step": 1, "epoch": 1.0})
    size = run.metrics.stat().st_size
    for room in range(size, 2 * size):
        with largest_file(room), pytest.raises(UserError, match=r"metrics\.jsonl cannot be writ"):
            run.write_metrics({"step": 2, "epoch": 2.0})
        assert run.metrics.stat().st_size == size
    run.write_metrics({"step": 2, "epoch": 2.0})
    run.close()
    assert [line["step"] for line in run.read_metrics()] == [1, 2]


@pytest.mark.parametrize("room", [300, 1500, 4000, 60_000])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(room, tmp_path, monkeypatch):
    quicken(monkeypatch)
    train(SHORT, tmp_path / "whole")
    with largest_file(room), pytest.raises(UserError, match=r"cannot be written: File too large"):
        train(SHORT, tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not {name for name in names if name.startswith(".")}
    begun = "config.json" in names
    train(SHORT, tmp_path / "run", resume=begun, overwrite=not begun)
    assert_same(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))
