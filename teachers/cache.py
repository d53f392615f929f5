"""The cache of sparse targets: what teachers.capture records of a teacher, for many students.

    python -m teachers.cache info PATH      access, size, quantisation and fingerprints
    python -m teachers.cache verify PATH    hashes every byte again; exit status 2 on a fault

A cache is a folder of shards, SPLIT-00000.bin, and manifest.json, which is written last. A shard
holds whole blocks of T positions each, and all of its parts have a size that CacheSpec determines:

    rows         blocks * T rows of CacheSpec.row (teachers/quantize.py)
    checksums    the CRC32 of each block's rows, as uint32
    trailer      TRAILER
"""

import argparse
import hashlib
import json
import os
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine import UserError
from engine.checkpoint import MANIFEST, fsync, report_os_errors, sha256, write_atomic
from engine.cli import report_user_errors
from teachers.access import ACCESS_KINDS, AccessConfig, TeacherOutput
from teachers.quantize import decode, encode, row_dtype

FORMAT = "nanodistill sparse targets"
VERSION = 2
SHARD_BYTES = 2**24  # about; what a killed capture does again
SHARD_NAME = re.compile(r"\.?(train|val)-\d{5}\.bin")
# Rows, their mean and worst KL, SHA-256 of the CacheSpec and of the tokens [blocks,T] as uint32.
TRAILER = struct.Struct("<Qff32s32s")


@dataclass
class CacheSpec:
    """What a cache holds and what it was made from; caches of equal specs are equal to the byte."""

    kind: str  # a key of ACCESS_KINDS
    vocab_size: int  # of the teacher, below 2^24
    block_size: int  # T, in tokens
    blocks: dict[str, int]  # of each split
    teacher: str  # fingerprints: SHA-256
    tokenizer: str
    tokens: str
    k: int = 0  # entries of a row; derived where the kind has no access.k
    n: int = 0  # draws of a row; derived where the kind has no access.n
    seed: int = 0  # of the draws
    temperatures: tuple[float, ...] = ()  # becomes 1.0, then the others, ascending
    blocks_per_shard: int = 0  # 0: about SHARD_BYTES

    def __post_init__(self):
        kind = ACCESS_KINDS[self.kind]
        self.k = kind.num_entries(self.k, self.vocab_size)
        self.n = kind.num_draws(self.n)
        others = set()
        if not kind.final_weights:
            others = {float(T) for T in self.temperatures if T != 1}
        self.temperatures = (1.0, *sorted(others))
        if self.blocks_per_shard == 0:
            block_bytes = self.block_size * self.row.itemsize
            self.blocks_per_shard = max(1, SHARD_BYTES // block_bytes)
        assert self.k <= self.vocab_size < 2**24, self

    @property
    def row(self) -> np.dtype:
        return row_dtype(self)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the format and of every field."""
        return bytes.fromhex(hash_json([VERSION, asdict(self)]))

    def shard_name(self, split: str, block: int) -> str:
        number = block // self.blocks_per_shard
        return f"{split}-{number:05d}.bin"

    def shards(self) -> dict[str, range]:
        """File name -> the numbers of its blocks; split by split."""
        shards = {}
        for split, count in self.blocks.items():
            for start in range(0, count, self.blocks_per_shard):
                stop = min(start + self.blocks_per_shard, count)
                name = self.shard_name(split, start)
                shards[name] = range(start, stop)
        return shards

    def shard_bytes(self, num_blocks: int) -> int:
        block_bytes = self.block_size * self.row.itemsize
        return num_blocks * (block_bytes + 4) + TRAILER.size


def hash_json(content) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokens(tokens) -> str:
    """SHA-256 of ids [blocks,T], as a shard's trailer has it."""
    tokens = np.ascontiguousarray(tokens, "<u4")
    return hashlib.sha256(tokens).hexdigest()


def size_error(path: Path, expected: int) -> str | None:
    """What is wrong with a shard's size, or None."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"is missing ({error.strerror})"
    if size != expected:
        return f"has {size} bytes, not {expected}"
    return None


def read_trailer(path: Path) -> dict:
    with open(path, "rb") as stream:
        stream.seek(-TRAILER.size, os.SEEK_END)
        trailer = stream.read()
    rows, mean_kl, worst_kl, spec, tokens = TRAILER.unpack(trailer)
    return {
        "rows": rows,
        "mean_kl": mean_kl,
        "worst_kl": worst_kl,
        "spec": spec.hex(),
        "tokens": tokens.hex(),
    }


def read_manifest(folder: Path, key: str) -> dict:
    """UserError naming `key` where there is no whole cache of this version."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        problem = f"no {MANIFEST}"
        if any(folder.glob("*-*.bin")):
            problem = "an unfinished one, run the same teachers.capture command again"
        raise UserError(f"{key}={folder}: no cache of sparse targets ({problem})") from None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{key}={folder}: {MANIFEST} is not one of a cache of sparse targets;"
            " give a folder that teachers.capture made"
        )
    version = content.get("version")
    if version != VERSION:
        raise UserError(
            f"{key}={folder}: a cache of version {version}, this code reads {VERSION};"
            " capture it again"
        )
    seal = content.pop("seal", None)
    if seal != hash_json(content):
        raise UserError(
            f"{key}={folder}: {MANIFEST} is damaged;"
            " delete it and run the same teachers.capture command again"
        )
    return content


class CacheWriter:
    """Writes shards, each whole or not at all; after a kill the same run ends in the same bytes."""

    def __init__(self, folder: str | Path, spec: CacheSpec):
        """UserError where the folder cannot be written, or holds anything but this cache."""
        self.folder = Path(folder)
        self.spec = spec
        self.shards = spec.shards()
        with self.writing("there"):
            self.folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.folder)
        ours = [name for name in names if SHARD_NAME.match(name) or name == MANIFEST]
        if names and not ours:
            raise UserError(
                f"out={folder}: a folder of other files, {min(names)} among them;"
                " give a new or an empty one"
            )
        if MANIFEST in names:
            manifest = read_manifest(self.folder, "out")
            self.check_same(CacheSpec(**manifest["spec"]))

    def check_same(self, stored: CacheSpec) -> None:
        for name, value in vars(self.spec).items():
            if getattr(stored, name) != value:
                raise UserError(
                    f"out={self.folder}: a cache with another {name} is there;"
                    " give another folder, or delete it"
                )

    def writing(self, name: str):
        """A context in which an OSError ends as one line that names the file."""
        fix = "make room or give another folder and run the same command again"
        return report_os_errors(f"out={self.folder}", f"{fix}; finished shards are kept", name)

    def missing(self, rank: int = 0, world: int = 1) -> list[str]:
        """The shards still to do, of those that are `rank`'s.

        UserError where another capture's shard lies there.
        """
        names = list(self.shards)
        return [name for name in names[rank::world] if not self.is_finished(name)]

    def is_finished(self, name: str) -> bool:
        path = self.folder / name
        size = self.spec.shard_bytes(len(self.shards[name]))
        if size_error(path, size):
            return False
        trailer = read_trailer(path)
        if trailer["spec"] != self.spec.digest.hex():
            raise UserError(
                f"out={self.folder}: {name} is of another teacher, other data or another access;"
                " give another folder, or delete this one"
            )
        return True

    @contextmanager
    def shard(self, name: str):
        """Gives add(tokens [b,T], ids, log_probs, log_norm, draws) for the shard's blocks in order.

        Arrays or CPU tensors. Leaving the context writes the shard, all at once.
        """
        all_tokens = []
        jobs = []

        def add(tokens, *output):
            all_tokens.append(np.asarray(tokens))
            arrays = [None if field is None else np.asarray(field) for field in output]
            jobs.append(pool.submit(encode, self.spec, *arrays))

        # Quantisation goes on beside the teacher's next batch.
        with ThreadPoolExecutor() as pool:
            yield add
        results = [job.result() for job in jobs]
        rows = np.concatenate([rows for rows, _ in results])
        kl = np.concatenate([kl for _, kl in results])
        tokens = np.concatenate(all_tokens)
        self.write_shard(name, tokens, rows, kl)

    def write_shard(self, name: str, tokens: np.ndarray, rows: np.ndarray, kl: np.ndarray) -> None:
        """tokens [blocks,T], rows and kl [blocks*T]."""
        shape = (len(self.shards[name]), self.spec.block_size)
        assert tokens.shape == shape, f"{name}: tokens {tokens.shape}, not {shape}"
        blocks = rows.reshape(shape)
        checksums = [zlib.crc32(block) for block in blocks]
        trailer = TRAILER.pack(
            len(rows),
            kl.mean(),
            kl.max(),
            self.spec.digest,
            bytes.fromhex(hash_tokens(tokens)),
        )
        content = rows.tobytes() + np.array(checksums, "<u4").tobytes() + trailer
        with self.writing(name):
            write_atomic(self.folder / name, content)
            fsync(self.folder)

    def finish(self, names: dict[str, str] | None = None) -> bool:
        """Writes the manifest and removes what killed writers left, if every shard is there.

        names: what people call the tokenizer and the tokens that the spec knows by fingerprint.
        """
        if self.missing():
            return False
        shards = {}
        for name in self.shards:
            shards[name] = read_trailer(self.folder / name)
            shards[name]["sha256"] = sha256(self.folder / name)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "spec": asdict(self.spec),
            "names": names or {},
            "shards": shards,
        }
        content["seal"] = hash_json(content)
        with self.writing(MANIFEST):
            for stale in self.folder.glob(".*.tmp"):
                stale.unlink()
            write_atomic(self.folder / MANIFEST, json.dumps(content, indent=1))
            fsync(self.folder)
        return True


class Cache:
    """A finished cache: opened without reading a row, then read block by block in any order."""

    def __init__(self, folder: str | Path, key: str = "teacher.path"):
        """Raises UserError naming `key`: no cache, an unfinished one, a shard missing or cut."""
        self.folder = Path(folder)
        self.key = key
        manifest = read_manifest(self.folder, key)
        self.spec = CacheSpec(**manifest["spec"])
        self.names = manifest["names"]
        self.records = manifest["shards"]  # file name -> its trailer and its SHA-256
        self.shards = self.spec.shards()
        for name in self.shards:
            self.check_size(name)

    def check_size(self, name: str) -> None:
        size = self.spec.shard_bytes(len(self.shards[name]))
        problem = size_error(self.folder / name, size)
        if problem:
            raise self.damage(name, problem)

    def damage(self, name: str, problem: str) -> UserError:
        return UserError(
            f"{self.key}={self.folder}: {name} {problem}; delete that file and run the same"
            " teachers.capture command again, which keeps the others"
        )

    def read(self, split: str, blocks, k: int | None = None, n: int | None = None) -> TeacherOutput:
        """What was recorded at those blocks.

        Args:
            blocks: [B] numbers of blocks, in any order.
            k, n: how many entries and draws to give of each row, its first; None = all.

        Returns: arrays of N = B*T rows.

        Raises: UserError where a block does not match its CRC32, or a shard the manifest.
        """
        blocks = np.asarray(blocks)
        shape = (len(blocks), self.spec.block_size)
        rows = np.empty(shape, self.spec.row)  # [B,T]
        names = np.array([self.spec.shard_name(split, block) for block in blocks])
        for name in set(names.tolist()):
            here = names == name
            rows[here] = self.read_shard(name, blocks[here])

        ids, log_probs, log_norm, draws = decode(self.spec, rows.ravel())
        if ids is not None:
            ids = ids[:, :k]
        if log_probs is not None:
            log_probs = log_probs[:, :k]
        if draws is not None:
            draws = draws[:, :n]
        return TeacherOutput(ids, log_probs, log_norm, draws)

    def read_shard(self, name: str, blocks: np.ndarray) -> np.ndarray:
        """The rows [B,T] of those blocks of a shard, which is mapped meanwhile and no longer."""
        self.check_size(name)
        path = self.folder / name
        trailer = read_trailer(path)
        for part in ("spec", "tokens"):
            if trailer[part] != self.records[name][part]:
                raise self.damage(name, f"is not the shard that {MANIFEST} names")

        num_blocks = len(self.shards[name])
        shape = (num_blocks, self.spec.block_size)
        mapped = np.memmap(path, self.spec.row, "r", shape=shape)
        checksums = np.memmap(path, "<u4", "r", offset=mapped.nbytes, shape=num_blocks)
        places = blocks - self.shards[name].start
        rows = np.array(mapped[places])
        for row, block, place in zip(rows, blocks, places, strict=True):
            if zlib.crc32(row) != checksums[place]:
                raise self.damage(name, f"is damaged: block {block} does not match its CRC32")
        return rows

    def check_tokens(self, name: str, tokens) -> None:
        """UserError unless `tokens` [blocks,T] are the inputs that the shard covers."""
        if hash_tokens(tokens) != self.records[name]["tokens"]:
            raise UserError(
                f"{self.key}={self.folder}: {name} covers other tokens than the data at"
                " its blocks; set data as it was there, or capture again"
            )

    def check(
        self,
        access: AccessConfig,
        *,
        tokenizer: str,
        tokens: str,
        block_size: int,
        vocab_size: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """UserError for the first of a run's settings that the cache cannot serve.

        Args:
            access: what the student is to learn from.
            tokenizer, tokens: the fingerprints of the run's data.
            vocab_size: the student's, which may have more rows than the teacher; None = any.
            temperature: the loss's; None = any.
        """
        spec = self.spec
        if tokenizer != spec.tokenizer:
            self.refuse("data.tokenizer", None, f"the capture's ({self.source('tokenizer')})")
        text, _, mask = tokens.partition("+")
        recorded_text, _, recorded_mask = spec.tokens.partition("+")
        if text != recorded_text:
            self.refuse("data", None, f"the capture's ({self.source('tokens')})")
        if mask != recorded_mask:
            self.refuse("data.document_mask", bool(mask), bool(recorded_mask))
        if vocab_size is not None and vocab_size < spec.vocab_size:
            self.refuse("model.vocab_size", vocab_size, f"{spec.vocab_size}, its teacher's")
        if block_size != spec.block_size:
            self.refuse("model.block_size", block_size, spec.block_size)

        recorded = ACCESS_KINDS[spec.kind]
        served = [name for name, kind in ACCESS_KINDS.items() if recorded.includes(kind)]
        if access.kind not in served:
            self.refuse("access", access.kind, " or ".join(served))
        kind = ACCESS_KINDS[access.kind]
        if kind.draws == "tail" and access.k != spec.k:  # they lie outside exactly these entries
            self.refuse("access.k", access.k, spec.k)
        if kind.uses_k and access.k > spec.k:
            self.refuse("access.k", access.k, f"{spec.k} or less")
        if kind.uses_n and access.n > spec.n:
            self.refuse("access.n", access.n, f"{spec.n} or less")
        if temperature not in (None, *spec.temperatures):
            known = " or ".join(map(str, spec.temperatures))
            self.refuse("loss.temperature", temperature, known)

    def refuse(self, key: str, value, allowed) -> None:
        setting = key if value is None else f"{key}={value}"
        raise UserError(
            f"{setting}: not what the cache {self.folder} holds;"
            f" set {key} to {allowed}, or capture again"
        )

    def source(self, name: str) -> str:
        """What people call the teacher, tokenizer or tokens, or else their fingerprint."""
        return self.names.get(name, f"SHA-256 {getattr(self.spec, name)}")

    def verify(self) -> None:
        """Hashes every shard again; UserError for the first that is not as it was written."""
        for name, record in self.records.items():
            if sha256(self.folder / name) != record["sha256"]:
                raise self.damage(name, "does not match its SHA-256")

    def describe(self) -> str:
        """What the cache is and costs, in a few lines."""
        spec = self.spec
        splits = [f"{split} {count:,} blocks" for split, count in spec.blocks.items()]
        records = self.records.values()
        rows = sum(record["rows"] for record in records)
        total_kl = sum(record["rows"] * record["mean_kl"] for record in records)
        worst_kl = max(record["worst_kl"] for record in records)
        total_bytes = sum(os.path.getsize(self.folder / name) for name in self.shards)
        lines = [
            f"access       {spec.kind} k={spec.k} n={spec.n}, seed {spec.seed},"
            f" vocabulary {spec.vocab_size:,}",
            f"temperatures {', '.join(map(str, spec.temperatures))}",
            f"rows         {rows:,} in {len(self.shards)} shards"
            f" ({', '.join(splits)} of {spec.block_size})",
            f"bytes        {spec.row.itemsize} a token, {total_bytes:,} in all",
            f"quantisation {total_kl / rows:.1e} nats of KL a row, {worst_kl:.1e} at most",
        ]
        for name in ("teacher", "tokenizer", "tokens"):
            called = self.names.get(name, "")
            lines.append(f"{name:<12} {called} {getattr(spec, name)}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m teachers.cache")
    parser.add_argument("command", choices=("info", "verify"))
    parser.add_argument("path")
    arguments = parser.parse_args()
    with report_user_errors():
        cache = Cache(arguments.path, "path")
        if arguments.command == "info":
            print(cache.describe())
        else:
            cache.verify()
            print(f"{arguments.path}: whole, {len(cache.shards)} shards")


if __name__ == "__main__":
    main()
