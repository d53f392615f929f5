"""The cache: what is written is read, whatever killed the writer, and every damage is refused.

python -m tests.test_teachers_cache FOLDER    captures that are killed, each at another line
"""

import errno
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import UserError, checkpoint
from teachers import cache as cache_module
from teachers.access import ACCESS_KINDS, AccessConfig
from teachers.cache import TRAILER, VERSION, Cache, CacheWriter
from teachers.quantize import decode, encode, log_sums
from tests.recording import cache_spec

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


def contents(folder):
    files = Path(folder).iterdir()
    return {file.name: file.read_bytes() for file in files}


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


TEN_GB = """
import resource, sys, time
from teachers.cache import Cache
cache = Cache(sys.argv[1])
cache.read("train", [0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
cache = Cache(sys.argv[1])
count = cache.spec.blocks["train"]
for block in range(0, count, count // 100):
    cache.read("train", [block])
assert time.perf_counter() - start < 5, time.perf_counter() - start
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
"""


def test_ten_gigabytes_open_at_once_and_stay_on_disk(tmp_path):
    spec = cache_spec(block_size=1024)
    block = np.zeros(1024, spec.row)
    count = 10 * 2**30 // block.nbytes
    spec = replace(spec, blocks={"train": count}, blocks_per_shard=count)
    checksums = np.full(count, cache_module.zlib.crc32(block), "<u4")
    trailer = TRAILER.pack(count * 1024, 0, 0, spec.digest, bytes(32))
    with open(tmp_path / "train-00000.bin", "wb") as stream:
        stream.seek(count * block.nbytes)  # rows of zeros: a hole
        stream.write(checksums.tobytes() + trailer)
    writer = CacheWriter(tmp_path, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "sha256", lambda path: "")
        assert writer.finish()
    command = [sys.executable, "-c", TEN_GB, str(tmp_path)]
    subprocess.run(command, check=True)


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


@pytest.mark.parametrize("step", ["encode", "write", "fsync", "replace", "manifest"])
def test_an_error_at_each_step_leaves_nothing_half(step, tmp_path, folder, monkeypatch):
    out = tmp_path / "out"
    calls = 0

    def fail_third_time(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call

    with monkeypatch.context() as patch:
        if step == "write":
            out.mkdir()
            (out / ".train-00001.bin.tmp").symlink_to("/dev/full")
        elif step == "manifest":
            real = cache_module.sha256
            patch.setattr(cache_module, "sha256", fail_third_time(real))
        else:
            module = {"encode": cache_module, "fsync": checkpoint, "replace": os}[step]
            patch.setattr(module, step, fail_third_time(getattr(module, step)))
        ours = step not in ("encode", "manifest")
        error = UserError if ours else OSError
        with pytest.raises(error, match="No space left") as caught:
            capture(out)
    if ours:
        message = r"out=\S+: cannot write \S+ \(No space left .*finished shards are kept"
        assert re.fullmatch(message, str(caught.value))
    assert not (out / "manifest.json").exists()
    assert "unfinished" in refusal(Cache, out)
    for scratch in out.glob(".*.tmp"):
        scratch.unlink()
    assert capture(out)
    assert contents(out) == contents(folder)


def test_rows_that_do_not_fill_a_shard_are_a_bug(tmp_path):
    writer = CacheWriter(tmp_path, SPEC)
    message = r"tokens \(2, 8\), not \(4, 8\)"
    with pytest.raises(AssertionError, match=message), writer.shard(SHARD) as add:
        add_blocks(add, "train", [4, 5], SPEC)


def test_read_only_and_foreign_folders_are_refused(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    line = refusal(CacheWriter, tmp_path / "file", SPEC)
    assert "cannot write there (File exists)" in line
    line = refusal(CacheWriter, tmp_path, SPEC)
    assert "a folder of other files, cache among them" in line
    other = replace(SPEC, seed=1)
    line = refusal(CacheWriter, folder, other)
    assert "a cache with another seed is there; give another folder" in line
    (folder / "manifest.json").unlink()
    line = refusal(CacheWriter(folder, other).missing)
    assert "train-00000.bin is of another teacher, other data or another access" in line
    (folder / "manifest.json").write_text('{"step": 3, "sha256": {}}')
    assert "not one of a cache" in refusal(CacheWriter, folder, SPEC)


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
    places += rng.integers(0, size, 20).tolist()
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
        cache = Cache(folder)
        cache.read("train", [0, 1, 8])  # the other shards serve on
        flip(shard, place, bit)
    read_all(folder)
    Cache(folder).verify()


DAMAGES = {
    "cut": (lambda data: data[:-1], r"has \d+ bytes, not \d+; delete"),
    "emptied": (lambda data: b"", r"has 0 bytes"),
    "missing": (lambda data: None, r"is missing \(No such file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_missing_and_cut_shards(folder, damage):
    change, problem = DAMAGES[damage]
    whole = contents(folder)
    opened = Cache(folder)
    data = change(whole[SHARD])
    (folder / SHARD).unlink()
    if data is not None:
        (folder / SHARD).write_bytes(data)
    message = rf"^teacher.path=\S+: {SHARD} {problem}"
    assert re.search(message, refusal(Cache, folder))
    assert re.search(message, refusal(opened.read, "train", [5]))
    assert capture(folder)  # what the line says helps
    assert contents(folder) == whole


def test_swapped_shards(folder):
    other = folder / "train-00000.bin"
    (folder / SHARD).write_bytes(other.read_bytes())
    cache = Cache(folder)
    line = refusal(cache.read, "train", [5])
    assert f"{SHARD} is not the shard that manifest.json names" in line


FOREIGN = "not one of a cache of sparse targets"
MANIFESTS = [
    (r"(?s)^(.{50}).*", r"\1", FOREIGN),
    (r"(?s).*", "[1, 2]", FOREIGN),
    (r"(?s).*", '{"step": 3}', FOREIGN),
    (r"(?s).*", "\udcff", FOREIGN),
    ("sparse targets", "lineage", FOREIGN),
    (f'"version": {VERSION}', '"version": 1', f"of version 1, this code reads {VERSION}; capture"),
    ('"block_size": 8', '"block_size": 9', "manifest.json is damaged"),
    ('"teacher": "aaa', '"teacher": "baa', "manifest.json is damaged"),
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
REFUSED = [  # the cache's access; the student's access; other settings; the line
    ("topk", {}, {"tokenizer": "x"}, "data.tokenizer: .*set data.tokenizer to .*bbb"),
    ("topk", {}, {"tokens": "x"}, "data: .*set data to the capture's .*ccc"),
    ("topk", {}, {"tokens": "c" * 64 + "+documents"}, "data.document_mask=True: .* to False"),
    ("topk", {}, {"block_size": 16}, "model.block_size=16: .*set model.block_size to 8"),
    ("topk", {}, {"vocab_size": 39}, "model.vocab_size=39: .*set model.vocab_size to 40"),
    ("topk", {}, {"temperature": 3.0}, "loss.temperature=3.0: .* to 1.0 or 2.0"),
    ("stratified", {}, {"temperature": 2.0}, "loss.temperature=2.0: .* to 1.0"),
    ("topk", {"k": 7}, {}, "access.k=7: .*set access.k to 6 or less"),
    ("full", {"kind": "topk", "k": 41}, {}, "access.k=41: .*set access.k to 40 or less"),
    ("stratified", {"k": 5}, {}, "access.k=5: .*set access.k to 6,"),
    ("stratified", {"n": 5}, {}, "access.n=5: .*set access.n to 4 or less"),
    ("topk", {"kind": "unbiased"}, {}, "access=unbiased: .* to greedy or topk or residual_to_l"),
    ("unbiased", {"kind": "stratified"}, {}, "access=stratified: .* greedy or text or sampled or"),
    ("stratified", {"kind": "unbiased"}, {}, "access=unbiased: "),
    ("full", {"kind": "unbiased"}, {}, "access=unbiased: .* residual_to_label or full"),
    ("greedy", {"kind": "text"}, {}, "access=text: .*set access to greedy"),
]
SERVED = [
    ("topk", {"kind": "residual_to_label", "k": 3}, {"temperature": 2.0}),
    ("topk", {"kind": "greedy", "k": 99, "n": 99}, {"vocab_size": None, "temperature": None}),
    ("topk", {"k": 6}, {"vocab_size": 41}),
    ("unbiased", {"kind": "topk", "k": 2}, {}),
    ("unbiased", {"k": 2}, {}),
    ("stratified", {"kind": "topk", "k": 2}, {}),
    ("stratified", {"n": 2}, {}),
    ("sampled", {"kind": "text"}, {}),
]


def check(kind, access, settings, folder):
    spec = cache_spec(kind, vocab_size=40, temperatures=(2.0,))
    capture(folder, spec)
    access = AccessConfig(**({"kind": kind, "k": 6, "n": 4} | access))
    Cache(folder).check(access, **(OWN | settings))


@pytest.mark.parametrize("kind, access, settings, message", REFUSED)
def test_what_a_cache_cannot_serve_is_refused(kind, access, settings, message, tmp_path):
    line = refusal(check, kind, access, settings, tmp_path)
    assert re.match(message, line), line
    assert line.endswith("or capture again")


@pytest.mark.parametrize("kind, access, settings", SERVED)
def test_what_a_cache_serves_besides(kind, access, settings, tmp_path):
    check(kind, access, settings, tmp_path)


def test_command_line(folder):
    command = [sys.executable, "-m", "teachers.cache"]
    options = {"capture_output": True, "text": True}
    info = subprocess.run([*command, "info", folder], **options).stdout
    total = sum(path.stat().st_size for path in folder.glob("*.bin"))
    for line in (
        "access       topk k=6 n=0, seed 0, vocabulary 151,936",
        "rows         112 in 4 shards (train 11 blocks, val 3 blocks of 8)",
        f"bytes        28 a token, {total:,} in all",
    ):
        assert line in info
    assert "a" * 64 in info
    verify = [*command, "verify", folder]
    assert subprocess.run(verify, **options).stdout == f"{folder}: whole, 4 shards\n"
    flip(folder / SHARD, 5)
    result = subprocess.run(verify, **options)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {refusal(Cache(folder, 'path').verify)}\n"


if __name__ == "__main__":
    killed_captures(Path(sys.argv[1]))
