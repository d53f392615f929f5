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
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from engine import UserError
from engine.checkpoint import MANIFEST, fsync, name_in_errors, sha256, write_atomic
from engine.cli import report_user_errors
from teachers.access import ACCESS_KINDS, TeacherOutput
from teachers.quantize import decode, encode, row_dtype

VERSION = 2
SHARD_BYTES = 2**24  # about; what a killed capture does again
OWN_FILES = re.compile(rf"\.|(train|val)-\d{{5}}\.bin|{MANIFEST}")
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
        others = {float(T) for T in self.temperatures if T != 1 and not kind.final_weights}
        self.temperatures = (1.0, *sorted(others))
        if self.blocks_per_shard == 0:
            block_bytes = self.block_size * self.row.itemsize
            self.blocks_per_shard = max(1, SHARD_BYTES // block_bytes)
        assert self.vocab_size < 2**24, self

    @property
    def row(self) -> np.dtype:
        return row_dtype(self)

    @property
    def digest(self) -> str:
        """SHA-256 of the format and of every field."""
        return hash_json([VERSION, asdict(self)])

    def shards(self) -> dict[str, range]:
        """File name -> the numbers of its blocks; split by split."""
        shards = {}
        for split, count in self.blocks.items():
            for number, start in enumerate(range(0, count, self.blocks_per_shard)):
                blocks = range(count)[start : start + self.blocks_per_shard]
                shards[shard_name(split, number)] = blocks
        return shards


def shard_name(split: str, number: int) -> str:
    return f"{split}-{number:05d}.bin"


def hash_json(content) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_tokens(tokens) -> str:
    """SHA-256 of ids [blocks,T], as a shard's trailer has it."""
    tokens = np.ascontiguousarray(tokens, "<u4")
    return hashlib.sha256(tokens).hexdigest()


def read_trailer(path: Path) -> dict:
    with name_in_errors(path), open(path, "rb") as stream:
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


def read_manifest(folder: Path) -> dict:
    """UserError where there is no whole cache of this version."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        content = json.loads((folder / MANIFEST).read_text())
        seal = content.pop("seal")
        if content["version"] == VERSION and seal == hash_json(content):
            return content
    raise UserError(
        f"cache {folder}: {MANIFEST} is missing (an unfinished capture), damaged or not of version"
        f" {VERSION}; run the teachers.capture command (again)"
    )


class CacheWriter:
    """Writes shards, each whole or not at all; after a kill the same run ends in the same bytes."""

    def __init__(self, folder: str | Path, spec: CacheSpec):
        """UserError where the folder holds other files."""
        self.folder = Path(folder)
        self.spec = spec
        self.shards = spec.shards()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(folder):
            if not OWN_FILES.match(name):
                raise UserError(f"out={folder}: {name} is there; remove it, or give another folder")

    def missing(self, rank: int = 0, world: int = 1) -> list[str]:
        """The shards still to do, of those that are `rank`'s.

        UserError where another capture's shard lies there.
        """
        missing = []
        for number, name in enumerate(self.shards):
            path = self.folder / name
            if not path.is_file():
                if number % world == rank:
                    missing.append(name)
            elif read_trailer(path)["spec"] != self.spec.digest:
                raise UserError(
                    f"out={self.folder}: {name} is another capture's, or damaged;"
                    " give another folder, or delete it"
                )
        return missing

    @contextmanager
    def shard(self, name: str):
        """Gives add(tokens [b,T], ids, log_probs, log_norm, draws) for the shard's blocks in order.

        Arrays or CPU tensors. Leaving the context writes the shard, all at once.
        """
        # Made beforehand: small results that are kept one by one would pin the heap around them.
        num_blocks = len(self.shards[name])
        T = self.spec.block_size
        all_tokens = np.empty((num_blocks, T), "<u4")
        rows = np.empty(num_blocks * T, self.spec.row)
        kl = np.empty(num_blocks * T)
        jobs = []
        added = 0  # blocks

        def store(place: slice, *output) -> None:
            rows[place], kl[place] = encode(self.spec, *output)

        def add(tokens, *output):
            nonlocal added
            end = added + len(tokens)
            all_tokens[added:end] = tokens
            arrays = [None if field is None else np.asarray(field) for field in output]
            jobs.append(pool.submit(store, slice(added * T, end * T), *arrays))
            added = end

        # Quantisation goes on beside the teacher's next batch.
        with ThreadPoolExecutor() as pool:
            yield add
        for job in jobs:
            job.result()  # or its error
        assert added == num_blocks, f"{name}: {added} blocks, not {num_blocks}"

        checksums = [zlib.crc32(block) for block in rows.reshape(num_blocks, T)]
        trailer = TRAILER.pack(
            len(rows),
            kl.mean(),
            kl.max(),
            bytes.fromhex(self.spec.digest),
            bytes.fromhex(hash_tokens(all_tokens)),
        )
        content = rows.tobytes() + np.array(checksums, "<u4").tobytes() + trailer
        write_atomic(self.folder / name, content)
        fsync(self.folder)

    def finish(self, names: dict[str, str]) -> None:
        """Writes the manifest and removes what killed writers left; every shard must be there.

        names: what people call the tokenizer and the tokens that the spec knows by fingerprint.
        """
        assert not self.missing()
        shards = {}
        for name in self.shards:
            path = self.folder / name
            shards[name] = read_trailer(path) | {"sha256": sha256(path)}
        content = {
            "format": "nanodistill sparse targets",
            "version": VERSION,
            "spec": asdict(self.spec),
            "names": names,
            "shards": shards,
        }
        content["seal"] = hash_json(content)
        for stale in self.folder.glob(".*.tmp"):
            stale.unlink()
        write_atomic(self.folder / MANIFEST, json.dumps(content, indent=1))
        fsync(self.folder)


class Cache:
    """A finished cache: opened without reading a row, then read block by block in any order."""

    def __init__(self, folder: str | Path):
        """Raises UserError: no cache, an unfinished one, a shard cut or replaced."""
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        self.spec = CacheSpec(**manifest["spec"])
        self.names = manifest["names"]
        self.records = manifest["shards"]  # file name -> its trailer and its SHA-256
        self.shards = self.spec.shards()
        for name in self.shards:
            self.check_trailer(name)

    def check_trailer(self, name: str) -> None:
        trailer = read_trailer(self.folder / name)
        if not trailer.items() <= self.records[name].items():
            raise self.damage(name)

    def damage(self, name: str) -> UserError:
        return UserError(
            f"cache {self.folder}: {name} is not what was written; delete it and run the same"
            " teachers.capture command again, which keeps the other shards"
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
        rows = np.empty((len(blocks), self.spec.block_size), self.spec.row)  # [B,T]
        shards = blocks // self.spec.blocks_per_shard
        for number in np.unique(shards):
            here = shards == number
            rows[here] = self.read_shard(shard_name(split, number), blocks[here])
        return decode(self.spec, rows.ravel(), k, n)

    def read_shard(self, name: str, blocks: np.ndarray) -> np.ndarray:
        """The rows [B,T] of those blocks of a shard, which is mapped meanwhile and no longer."""
        self.check_trailer(name)
        path = self.folder / name
        shard = self.shards[name]
        shape = (len(shard), self.spec.block_size)
        mapped = np.memmap(path, self.spec.row, "r", shape=shape)
        checksums = np.memmap(path, "<u4", "r", offset=mapped.nbytes, shape=len(shard))
        places = blocks - shard.start
        rows = np.asarray(mapped[places])  # a copy already
        for row, checksum in zip(rows, checksums[places], strict=True):
            if zlib.crc32(row) != checksum:
                raise self.damage(name)
        return rows

    def verify(self) -> None:
        """Hashes every shard again; UserError for the first that is not as it was written."""
        for name, record in self.records.items():
            if sha256(self.folder / name) != record["sha256"]:
                raise self.damage(name)

    def describe(self) -> str:
        """What the cache is and costs, a line each."""
        worst_kl = max(record["worst_kl"] for record in self.records.values())
        facts = asdict(self.spec) | {
            "bytes a token": self.spec.row.itemsize,
            "quantisation": f"{worst_kl:.1e} nats of KL a token at most",
        }
        for name, called in self.names.items():
            facts[name] += f" ({called})"
        return "\n".join(f"{name:<16} {value}" for name, value in facts.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m teachers.cache")
    parser.add_argument("command", choices=("info", "verify"))
    parser.add_argument("path")
    arguments = parser.parse_args()
    with report_user_errors():
        cache = Cache(arguments.path)
        if arguments.command == "info":
            print(cache.describe())
        else:
            cache.verify()
            print(f"{arguments.path}: whole, {len(cache.shards)} shards")


if __name__ == "__main__":
    main()
