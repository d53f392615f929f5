"""The cache: what is written is read, wherever the writer stopped, and every damage is refused."""

import os
import re
import sys
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from engine import UserError, checkpoint
from engine.ranks import memory_bytes
from teachers import cache as cache_module
from teachers.access import ACCESS_KINDS
from teachers.cache import TRAILER, Cache, CacheWriter
from teachers.quantize import decode, encode
from tests.recording import cache_spec, contents

SPEC = cache_spec(temperatures=(2.0,))
SHARD = "train-00001.bin"  # one of three


def teacher_output(split, blocks, spec):
    """ids, log_probs, log_norm, draws that a made-up teacher says at those blocks."""
    generator = torch.Generator().manual_seed(len(split))
    num_rows = spec.blocks[split] * 8
    log_t = torch.randn(num_rows, 40, generator=generator).log_softmax(1)
    log_probs, order = log_t.topk(spec.k)
    ids = spec.vocab_size - 1 - order
    log_norm = [(log_t / T).logsumexp(1) for T in spec.temperatures]
    log_norm = torch.stack(log_norm, 1)
    draws = torch.randint(spec.vocab_size, (num_rows, spec.n), generator=generator)
    rows = 8 * np.array(blocks)[:, None] + np.arange(8)
    return [part.numpy()[rows.ravel()] for part in (ids, log_probs, log_norm, draws)]


def capture(folder, spec=SPEC, world=1):
    for rank in range(world):
        writer = CacheWriter(folder, spec)
        for name in writer.missing(rank, world):
            split = name.split("-")[0]
            shard = writer.shards[name]
            with writer.shard(name) as add:
                for blocks in (shard[:2], shard[2:]):
                    tokens = 1000 * np.array(blocks)[:, None] + np.arange(8)
                    add(tokens, *teacher_output(split, blocks, spec))
    writer.finish({"tokens": "a text"})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cache"
    capture(folder)
    return folder


# ---- reading


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_what_is_written_is_read_in_any_order(kind, tmp_path):
    vocab_size = 40 if kind == "full" else 151_936
    spec = cache_spec(kind, vocab_size=vocab_size, temperatures=(2.0,))
    capture(tmp_path, spec)
    cache = Cache(tmp_path)
    assert cache.spec == spec
    blocks = [10, 0, 7, 0, 3]
    rows, _ = encode(spec, *teacher_output("train", blocks, spec))
    expected = decode(spec, rows)
    output = cache.read("train", blocks)
    first = cache.read("train", blocks, k=2, n=1)
    for name in output._fields:
        recorded = getattr(expected, name)
        np.testing.assert_equal(getattr(output, name), recorded)
        if recorded is not None and name != "log_norm":
            width = 1 if name == "draws" else 2
            assert (getattr(first, name) == recorded[:, :width]).all()


def test_ten_gigabytes_stay_on_disk(tmp_path, monkeypatch):
    spec = cache_spec(block_size=1024)
    block = np.zeros(1024, spec.row)
    count = 10 * 2**30 // block.nbytes
    spec = replace(spec, blocks={"train": count}, blocks_per_shard=count)
    checksums = np.full(count, zlib.crc32(block), "<u4")
    trailer = TRAILER.pack(count * 1024, 0, 0, bytes.fromhex(spec.digest), bytes(32))
    with open(tmp_path / "train-00000.bin", "wb") as stream:
        stream.seek(count * block.nbytes)  # rows of zeros: a hole
        stream.write(checksums.tobytes() + trailer)
    monkeypatch.setattr(cache_module, "sha256", lambda path: "")
    CacheWriter(tmp_path, spec).finish({})
    before = memory_bytes(torch.device("cpu"))
    cache = Cache(tmp_path)
    for number in range(0, count, count // 100):
        cache.read("train", [number])
    assert memory_bytes(torch.device("cpu")) < before + 10**8


# ---- writing


def test_ranks_share_the_shards_and_write_the_same_bytes(tmp_path, folder):
    shared = tmp_path / "shared"
    writer = CacheWriter(shared, SPEC)
    assert writer.missing(0, 2) == ["train-00000.bin", "train-00002.bin"]
    assert writer.missing(1, 2) == ["train-00001.bin", "val-00000.bin"]
    capture(shared, world=2)
    assert contents(shared) == contents(folder)


@pytest.mark.parametrize("nth", range(5))
@pytest.mark.parametrize("module, step", [(checkpoint, "fsync"), (os, "replace")])
def test_a_capture_that_stopped_ends_in_the_same_bytes(
    module, step, nth, tmp_path, folder, monkeypatch
):
    out = tmp_path / "out"
    real = getattr(module, step)
    calls_left = nth

    def stop(*args):
        nonlocal calls_left
        calls_left -= 1
        if calls_left == -1:
            raise OSError
        return real(*args)

    monkeypatch.setattr(module, step, stop)
    with pytest.raises(OSError):
        capture(out)
    monkeypatch.undo()
    shards = list(out.glob("[tv]*.bin"))
    assert len(shards) == nth
    modified = [path.stat().st_mtime_ns for path in shards]
    (out / ".train-00009.bin.tmp").write_text("what an earlier one left")
    capture(out)
    assert contents(out) == contents(folder)
    # No finished shard was done again.
    assert modified == [path.stat().st_mtime_ns for path in shards]


def test_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"^out=\S+: cache is there; remove it, or"):
        CacheWriter(tmp_path, SPEC)
    for changes in ({"seed": 1}, {"k": 5}):
        writer = CacheWriter(folder, replace(SPEC, **changes))
        with pytest.raises(UserError, match="train-00000.bin is another capture's, or damaged"):
            writer.missing()

    # A rank sees those of the others too.
    for name in ("train-00001.bin", "val-00000.bin", "manifest.json"):
        (folder / name).unlink()
    writer = CacheWriter(folder, replace(SPEC, seed=1))
    with pytest.raises(UserError, match="train-00000.bin is another"):
        writer.missing(1, 2)


# ---- damage


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


DAMAGED = f"{SHARD} is not what was written; delete it and run the same"


def test_every_flipped_bit_is_seen(folder):
    shard = folder / SHARD
    size = shard.stat().st_size
    checksums = 4 * 8 * SPEC.row.itemsize
    trailer = size - TRAILER.size
    rng = np.random.default_rng(0)
    places = [0, checksums - 1, checksums, trailer - 1, trailer, size - 1]
    places += rng.integers(0, size, 9).tolist()
    opened = Cache(folder)
    for place in places:
        bit = 1 << int(rng.integers(8))
        flip(shard, place, bit)
        with pytest.raises(UserError, match=DAMAGED):
            opened.verify()
        with pytest.raises(UserError, match=DAMAGED):
            opened.read("train", [4, 5, 6, 7])
        opened.read("train", [0, 1, 8])  # the other shards serve on
        flip(shard, place, bit)
    opened.verify()


def test_cut_and_replaced_shards(folder):
    whole = contents(folder)
    opened = Cache(folder)
    for content in (whole[SHARD][:-1], whole["train-00000.bin"]):
        (folder / SHARD).write_bytes(content)
        with pytest.raises(UserError, match=DAMAGED):
            Cache(folder)
        with pytest.raises(UserError, match=DAMAGED):
            opened.read("train", [5])
    (folder / SHARD).unlink()
    capture(folder)  # what the line says helps
    assert contents(folder) == whole


REFUSED = r"manifest.json is missing \(an unfinished capture\), damaged or not of version 2; run"
MANIFESTS = [
    (r"(?s).*", "no JSON"),
    ('"block_size": 8', '"block_size": 9'),
]


@pytest.mark.parametrize("old, new", MANIFESTS)
def test_foreign_and_damaged_manifests(folder, old, new):
    path = folder / "manifest.json"
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    with pytest.raises(UserError, match=REFUSED):
        Cache(folder)
    path.unlink()
    with pytest.raises(UserError, match=REFUSED):
        Cache(folder)


def test_another_version_is_refused(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "VERSION", 3)
    with pytest.raises(UserError, match="or not of version 3"):
        Cache(folder)


def test_command_line(folder, capsys, monkeypatch):
    def call(command):
        monkeypatch.setattr(sys, "argv", ["cache", command, str(folder)])
        cache_module.main()
        return capsys.readouterr().out

    info = call("info")
    assert "bytes a token    28" in info
    assert f"{'c' * 64} (a text)" in info
    assert call("verify") == f"{folder}: whole, 4 shards\n"
    flip(folder / SHARD, 5)
    with pytest.raises(SystemExit):
        call("verify")
    assert capsys.readouterr().err.startswith(f"error: cache {folder}: {DAMAGED}")
