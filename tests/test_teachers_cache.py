"""The cache: what is written is read, whatever killed the writer, and every damage is refused.

python -m tests.test_teachers_cache FOLDER    captures that are killed, each at another line
"""

import os
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import UserError, checkpoint
from teachers import cache as cache_module
from teachers.access import ACCESS_KINDS
from teachers.cache import TRAILER, VERSION, Cache, CacheWriter
from teachers.quantize import decode, encode, log_sums
from tests.recording import cache_spec, contents

SPEC = cache_spec(temperatures=(2.0,))
SMALL = replace(SPEC, blocks={"train": 3, "val": 3}, blocks_per_shard=3)
SHARD = "train-00001.bin"  # one of three


def teacher_output(split, blocks, spec):
    """ids, log_probs, log_norm, draws that a made-up teacher says at those blocks."""
    rng = np.random.default_rng(len(split))
    num_rows = spec.blocks[split] * 8
    order = rng.random((num_rows, 40)).argsort()
    ids = spec.vocab_size - 1 - order[:, : spec.k]
    logits = np.sort(rng.normal(size=ids.shape))[:, ::-1]
    mass = 1 if spec.k == spec.vocab_size else 0.8
    lse = np.logaddexp.reduce(logits, axis=1, keepdims=True, initial=-np.inf)
    log_probs = logits - lse + np.log(mass)
    log_norm = np.zeros((num_rows, 0))
    if spec.k > 0:
        log_norm = log_sums(log_probs, spec.temperatures) - np.log(mass)
    draws = rng.integers(0, spec.vocab_size, (num_rows, spec.n))

    starts = 8 * np.array(blocks)[:, None]
    rows = (starts + np.arange(8)).ravel()
    return ids[rows], log_probs[rows], log_norm[rows], draws[rows]


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
    checksums = np.full(count, cache_module.zlib.crc32(block), "<u4")
    trailer = TRAILER.pack(count * 1024, 0, 0, bytes.fromhex(spec.digest), bytes(32))
    with open(tmp_path / "train-00000.bin", "wb") as stream:
        stream.seek(count * block.nbytes)  # rows of zeros: a hole
        stream.write(checksums.tobytes() + trailer)
    monkeypatch.setattr(cache_module, "sha256", lambda path: "")
    CacheWriter(tmp_path, spec).finish({})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cache = Cache(tmp_path)
    for number in range(0, count, count // 100):
        cache.read("train", [number])
    most = before + 100_000  # KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most


# ---- writing


def test_ranks_share_the_shards_and_write_the_same_bytes(tmp_path, folder):
    shared = tmp_path / "shared"
    writer = CacheWriter(shared, SPEC)
    assert writer.missing(0, 2) == ["train-00000.bin", "train-00002.bin"]
    assert writer.missing(1, 2) == ["train-00001.bin", "val-00000.bin"]
    with pytest.raises(UserError, match="not finished; run its teachers.capture command"):
        Cache(shared)
    capture(shared, world=2)
    assert contents(shared) == contents(folder)


def killed_captures(folder):
    """Captures in child processes, each SIGKILLed at another line of the writer.

    For a process of its own that has no threads, which a fork would leave behind locked.
    """
    files = (cache_module.__file__, checkpoint.__file__)

    def capture_until(last_line, to):
        lines = 0

        def trace(frame, event, _):
            nonlocal lines
            if frame.f_code.co_filename not in files:
                return None
            lines += 1
            if lines == last_line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        capture(to, SMALL)
        sys.settrace(None)
        return lines

    total = capture_until(None, folder / "whole")
    for line in range(1, total, 8):  # a file is written in 9 lines or more
        if os.fork() == 0:
            capture_until(line, folder / str(line))
            os._exit(1)  # it was to be killed
        _, status = os.wait()
        assert os.WIFSIGNALED(status)


def test_a_killed_capture_ends_in_the_same_bytes(tmp_path):
    module = "tests.test_teachers_cache"
    subprocess.run([sys.executable, "-m", module, tmp_path], check=True)
    whole = contents(tmp_path / "whole")
    seen = set()
    for killed in tmp_path.iterdir():
        seen |= contents(killed).keys()
        shards = list(killed.glob("[tv]*.bin"))
        modified = [path.stat().st_mtime_ns for path in shards]
        (killed / ".train-00009.bin.tmp").write_text("what an earlier one left")
        capture(killed, SMALL)
        assert contents(killed) == whole
        # No finished shard was done again.
        assert modified == [path.stat().st_mtime_ns for path in shards]
    assert {".val-00000.bin.tmp", ".manifest.json.tmp", "manifest.json"} <= seen


def test_foreign_folders_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"^out=\S+: cache is there; give a new or an empty"):
        CacheWriter(tmp_path, SPEC)
    for changes in ({"seed": 1}, {"k": 5}):
        writer = CacheWriter(folder, replace(SPEC, **changes))
        with pytest.raises(UserError, match="train-00000.bin is another capture's, or damaged"):
            writer.missing()


# ---- damage


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def read_all(folder):
    cache = Cache(folder)
    for split, count in SPEC.blocks.items():
        cache.read(split, range(count))


DAMAGED = f"{SHARD} is not what was written; delete it and run the same"


def test_every_flipped_bit_is_seen(folder):
    shard = folder / SHARD
    size = shard.stat().st_size
    checksums = 4 * 8 * SPEC.row.itemsize
    trailer = size - TRAILER.size
    rng = np.random.default_rng(0)
    places = [0, checksums - 1, checksums, trailer - 1, trailer, size - 1]
    places += rng.integers(0, size, 9).tolist()
    for place in places:
        opened = Cache(folder)
        bit = 1 << int(rng.integers(8))
        flip(shard, place, bit)
        with pytest.raises(UserError, match=DAMAGED):
            opened.verify()
        with pytest.raises(UserError, match=DAMAGED):
            read_all(folder)
        opened.read("train", [0, 1, 8])  # the other shards serve on
        flip(shard, place, bit)
    read_all(folder)
    Cache(folder).verify()


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
    with pytest.raises(FileNotFoundError, match=SHARD):
        Cache(folder)
    capture(folder)  # what the line says helps
    assert contents(folder) == whole


MANIFESTS = [
    (r"(?s).*", "no JSON"),
    (r"(?s).*", "{}"),
    (f'"version": {VERSION}', '"version": 1'),
    ('"block_size": 8', '"block_size": 9'),
]


@pytest.mark.parametrize("old, new", MANIFESTS)
def test_foreign_and_damaged_manifests(folder, old, new):
    path = folder / "manifest.json"
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    with pytest.raises(UserError, match=r"manifest.json is damaged, or not .* version 2; capture"):
        Cache(folder)


def test_command_line(folder, capsys, monkeypatch):
    def call(command):
        monkeypatch.setattr(sys, "argv", ["cache", command, str(folder)])
        cache_module.main()
        return capsys.readouterr().out

    info = call("info")
    for word in ("topk", "112 of 28 bytes", "a" * 64, f"{'c' * 64} (a text)"):
        assert word in info
    assert call("verify") == f"{folder}: whole, 4 shards\n"
    flip(folder / SHARD, 5)
    with pytest.raises(SystemExit) as caught:
        call("verify")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: cache {folder}: {DAMAGED}")


if __name__ == "__main__":
    killed_captures(Path(sys.argv[1]))
