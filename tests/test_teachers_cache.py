"""The cache: what is written is read, whatever killed the writer, and every damage is refused.

python -m tests.test_teachers_cache FOLDER    captures that are killed, each at another line
"""

import errno
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import UserError, checkpoint
from teachers import cache as cache_module
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cache import TRAILER, VERSION, Cache, CacheWriter
from teachers.quantize import decode, encode, log_sums
from tests.recording import cache_spec, contents

SPEC = cache_spec(temperatures=(2.0,))
SMALL = replace(SPEC, blocks={"train": 3, "val": 3}, blocks_per_shard=3)
SHARD = "train-00001.bin"  # one of three


def tokens_of(split, blocks):
    """[blocks,T] the tokens of a made-up text."""
    start = 77 if split == "val" else 0
    first = 1000 * np.array(blocks)[:, None]
    return start + first + np.arange(8)


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


def add_blocks(add, split, blocks, spec):
    output = teacher_output(split, blocks, spec)
    add(tokens_of(split, blocks), *output)


def capture(folder, spec=SPEC, world=1):
    for rank in range(world):
        writer = CacheWriter(folder, spec)
        for name in writer.missing(rank, world):
            split = name.split("-")[0]
            blocks = writer.shards[name]
            with writer.shard(name) as add:
                add_blocks(add, split, blocks[:2], spec)
                add_blocks(add, split, blocks[2:], spec)
    return writer.finish()


def refusal(function, *args, **options):
    """The line with which a call is refused."""
    with pytest.raises(UserError) as caught:
        function(*args, **options)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "cache"
    assert capture(folder)
    return folder


# ---- reading


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_what_is_written_is_read_in_any_order(kind, tmp_path):
    vocab_size = 40 if kind == "full" else 151_936
    spec = cache_spec(kind, vocab_size=vocab_size, temperatures=(2.0,))
    assert capture(tmp_path, spec)
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


def test_tokens_that_a_shard_covers(folder):
    cache = Cache(folder)
    for name, blocks in cache.shards.items():
        tokens = tokens_of(name.split("-")[0], blocks)
        cache.check_tokens(name, tokens.astype(np.uint16))
        line = refusal(cache.check_tokens, name, np.roll(tokens, 1))
        assert f"{name} covers other tokens" in line


def test_ten_gigabytes_open_at_once_and_stay_on_disk(tmp_path, monkeypatch):
    spec = cache_spec(block_size=1024)
    block = np.zeros(1024, spec.row)
    count = 10 * 2**30 // block.nbytes
    spec = replace(spec, blocks={"train": count}, blocks_per_shard=count)
    checksums = np.full(count, cache_module.zlib.crc32(block), "<u4")
    trailer = TRAILER.pack(count * 1024, 0, 0, spec.digest, bytes(32))
    with open(tmp_path / "train-00000.bin", "wb") as stream:
        stream.seek(count * block.nbytes)  # rows of zeros: a hole
        stream.write(checksums.tobytes() + trailer)
    monkeypatch.setattr(cache_module, "sha256", lambda path: "")
    assert CacheWriter(tmp_path, spec).finish()
    usage = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    cache = Cache(tmp_path)
    for number in range(0, count, count // 100):
        cache.read("train", [number])
    assert time.perf_counter() - start < 5
    most = usage.ru_maxrss + 100_000  # KiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < most


# ---- writing


def test_ranks_share_the_shards_and_write_the_same_bytes(tmp_path, folder):
    shared = tmp_path / "shared"
    writer = CacheWriter(shared, SPEC)
    assert writer.missing(0, 2) == ["train-00000.bin", "train-00002.bin"]
    assert writer.missing(1, 2) == ["train-00001.bin", "val-00000.bin"]
    assert writer.finish() is False
    assert "no manifest.json" in refusal(Cache, shared)
    assert capture(shared, world=2)
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
        left = contents(killed)
        seen |= left.keys()
        if left.keys() != whole.keys():
            assert "no cache of sparse targets" in refusal(Cache, killed)
        shards = list(killed.glob("[tv]*.bin"))
        modified = {path: path.stat().st_mtime_ns for path in shards}
        (killed / ".train-00009.bin.tmp").write_text("what an earlier one left")
        assert capture(killed, SMALL)
        assert contents(killed) == whole
        for path in shards:
            assert path.stat().st_mtime_ns == modified[path], "a finished shard was done again"
    assert {".val-00000.bin.tmp", ".manifest.json.tmp", "manifest.json"} <= seen


STEPS = [  # where it runs out of room, and whether the writer says it in its own line
    (cache_module, "encode", False),
    (cache_module, "sha256", False),
    (checkpoint, "fsync", True),
    (os, "replace", True),
]


@pytest.mark.parametrize("module, step, ours", STEPS)
def test_an_error_at_each_step_leaves_nothing_half(
    module, step, ours, tmp_path, folder, monkeypatch
):
    out = tmp_path / "out"
    real = getattr(module, step)
    calls = itertools.count()

    def fail_third_time(*args):
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    error = UserError if ours else OSError
    with monkeypatch.context() as patch:
        patch.setattr(module, step, fail_third_time)
        with pytest.raises(error, match="No space left") as caught:
            capture(out)
    if ours:
        message = r"out=\S+: cannot write \S+ \(No space left .*finished shards are kept"
        assert re.fullmatch(message, str(caught.value))
    assert not (out / "manifest.json").exists()
    assert "unfinished" in refusal(Cache, out)
    assert capture(out)
    for scratch in out.glob(".*.tmp"):
        scratch.unlink()
    assert contents(out) == contents(folder)


def test_read_only_and_foreign_folders_are_refused(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    other = replace(SPEC, seed=1)
    for place, spec, problem in [
        (tmp_path / "file", SPEC, "cannot write there (File exists)"),
        (tmp_path, SPEC, "a folder of other files, cache among them"),
        (folder, other, "a cache with another seed is there; give another folder"),
    ]:
        assert problem in refusal(CacheWriter, place, spec)
    (folder / "manifest.json").unlink()
    line = refusal(CacheWriter(folder, other).missing)
    assert "train-00000.bin is of another teacher, other data or another access" in line


# ---- damage


def flip(path, place, bit=1):
    data = bytearray(path.read_bytes())
    data[place] ^= bit
    path.write_bytes(data)


def read_all(folder):
    cache = Cache(folder)
    for split, count in SPEC.blocks.items():
        cache.read(split, range(count))


def test_every_flipped_bit_is_seen(folder):
    shard = folder / SHARD
    size = shard.stat().st_size
    rows = 4 * 8 * SPEC.row.itemsize
    checksums = rows + 4 * 4
    hashes = size - 64
    rng = np.random.default_rng(0)
    places = [0, rows - 1, rows, checksums - 1, hashes, hashes + 32, size - 1]
    places += rng.integers(0, size, 9).tolist()
    for place in places:
        bit = 1 << int(rng.integers(8))
        flip(shard, place, bit)
        line = refusal(Cache(folder).verify)
        assert f"{SHARD} does not match its SHA-256" in line
        if place < checksums:
            line = refusal(read_all, folder)
            assert re.search(rf"{SHARD} is damaged: block \d+ does not match its CRC32", line)
            assert "delete that file and run the same" in line
        if place >= hashes:
            line = refusal(read_all, folder)
            assert f"{SHARD} is not the shard" in line
        Cache(folder).read("train", [0, 1, 8])  # the other shards serve on
        flip(shard, place, bit)
    read_all(folder)
    Cache(folder).verify()

    other = folder / "train-00000.bin"  # whole, but another
    shard.write_bytes(other.read_bytes())
    assert f"{SHARD} is not the shard" in refusal(read_all, folder)


DAMAGES = [
    ("cut", r"has \d+ bytes, not \d+; delete"),
    ("missing", r"is missing \(No such file"),
]


@pytest.mark.parametrize("damage, problem", DAMAGES)
def test_missing_and_cut_shards(folder, damage, problem):
    whole = contents(folder)
    opened = Cache(folder)
    (folder / SHARD).unlink()
    if damage == "cut":
        (folder / SHARD).write_bytes(whole[SHARD][:-1])
    message = rf"^teacher.path=\S+: {SHARD} {problem}"
    assert re.search(message, refusal(Cache, folder))
    assert re.search(message, refusal(opened.read, "train", [5]))
    assert capture(folder)  # what the line says helps
    assert contents(folder) == whole


FOREIGN = "not one of a cache of sparse targets"
MANIFESTS = [
    (r"(?s).*", "[1, 2]", FOREIGN),
    (r"(?s).*", "\udcff", FOREIGN),
    ("sparse targets", "lineage", FOREIGN),
    (f'"version": {VERSION}', '"version": 1', f"of version 1, this code reads {VERSION}; capture"),
    ('"block_size": 8', '"block_size": 9', "manifest.json is damaged"),
]


@pytest.mark.parametrize("old, new, problem", MANIFESTS)
def test_foreign_and_damaged_manifests(folder, old, new, problem):
    path = folder / "manifest.json"
    text = re.sub(old, new, path.read_text(), count=1)
    path.write_bytes(text.encode(errors="surrogateescape"))
    line = refusal(Cache, folder, "path")
    assert problem in line
    assert line.startswith(f"path={folder}: ")


# ---- what a cache serves

OWN = {
    "tokenizer": "b" * 64,
    "tokens": "c" * 64,
    "vocab_size": 40,
    "block_size": 8,
    "temperature": 1.0,
}
SERVED = ""
CASES = [  # the cache's access; the student's access; other settings; the line, if it is refused
    ("topk", {}, {"tokenizer": "x"}, "data.tokenizer: .*set data.tokenizer to .*bbb"),
    ("topk", {}, {"tokens": "x"}, "data: .*set data to the capture's .*ccc"),
    ("topk", {}, {"block_size": 16}, "model.block_size=16: .*set model.block_size to 8"),
    ("topk", {}, {"vocab_size": 39}, "model.vocab_size=39: .*set model.vocab_size to 40"),
    ("topk", {}, {"temperature": 3.0}, "loss.temperature=3.0: .* to 1.0 or 2.0"),
    ("stratified", {}, {"temperature": 2.0}, "loss.temperature=2.0: .* to 1.0"),
    ("topk", {"k": 7}, {}, "access.k=7: .*set access.k to 6 or less"),
    ("stratified", {"k": 5}, {}, "access.k=5: .*set access.k to 6,"),
    ("stratified", {"n": 5}, {}, "access.n=5: .*set access.n to 4 or less"),
    ("unbiased", {"kind": "stratified"}, {}, "access=stratified: .* greedy or text or sampled or"),
    ("stratified", {"kind": "unbiased"}, {}, "access=unbiased: "),
    ("full", {"kind": "unbiased"}, {}, "access=unbiased: .* residual_to_label or full"),
    ("topk", {"kind": "residual_to_label", "k": 3}, {"temperature": 2.0}, SERVED),
    ("topk", {"kind": "greedy", "k": 99, "n": 99}, {"vocab_size": None}, SERVED),
    ("topk", {"k": 6}, {"vocab_size": 41, "temperature": None}, SERVED),
    ("unbiased", {"k": 2}, {}, SERVED),
    ("stratified", {"n": 2}, {}, SERVED),
    ("sampled", {"kind": "text"}, {}, SERVED),
]


@pytest.mark.parametrize("kind, access, settings, message", CASES)
def test_what_a_cache_serves(kind, access, settings, message, tmp_path):
    spec = cache_spec(kind, vocab_size=40, temperatures=(2.0,), blocks={"train": 3})
    capture(tmp_path, spec)
    cache = Cache(tmp_path)
    access = AccessConfig(**({"kind": kind, "k": 6, "n": 4} | access))
    settings = OWN | settings
    if message == SERVED:
        cache.check(access, **settings)
    else:
        line = refusal(cache.check, access, **settings)
        assert re.match(message, line), line
        assert line.endswith("or capture again")


def test_command_line(folder, capsys, monkeypatch):
    def call(command):
        monkeypatch.setattr(sys, "argv", ["cache", command, str(folder)])
        cache_module.main()
        return capsys.readouterr().out

    info = call("info")
    total = sum(path.stat().st_size for path in folder.glob("*.bin"))
    for line in (
        "access       topk k=6 n=0, seed 0, vocabulary 151,936",
        "rows         112 in 4 shards (train 11 blocks, val 3 blocks of 8)",
        f"bytes        28 a token, {total:,} in all",
        "a" * 64,
    ):
        assert line in info
    assert call("verify") == f"{folder}: whole, 4 shards\n"
    flip(folder / SHARD, 5)
    with pytest.raises(SystemExit) as caught:
        call("verify")
    assert caught.value.code == 2
    line = refusal(Cache(folder, "path").verify)
    assert capsys.readouterr() == ("", f"error: {line}\n")


if __name__ == "__main__":
    killed_captures(Path(sys.argv[1]))
