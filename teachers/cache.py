"""The cache of sparse targets: what teachers.capture records of a teacher, for many students.

    python -m teachers.cache info PATH      access, size, quantisation and fingerprints
    python -m teachers.cache verify PATH    hashes every byte again; one line and status 2 on a fault

A cache is a folder of shards, SPLIT-00000.bin, and manifest.json, which is written last. A shard
holds whole blocks of T positions each, and all of its parts have a size that CacheSpec determines:

    rows         blocks * T rows of CacheSpec.row (teachers/quantize.py)
    checksums    the CRC32 of each block's rows, as uint32
    trailer      TRAILER
"""

import argparse
import hashlib
import json
import mmap
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
    temperatures: tuple[float, ...] = ()  # derived: 1.0, then the others, ascending
    blocks_per_shard: int = 0  # 0: about SHARD_BYTES

    def __post_init__(self):
        kind = ACCESS_KINDS[self.kind]
        self.k = kind.num_entries(self.k, self.vocab_size)
        self.n = kind.num_draws(self.n)
        others = {float(T) for T in self.temperatures if T != 1}
        self.temperatures = (1.0,) if kind.final_weights else (1.0, *sorted(others))
        if self.blocks_per_shard == 0:
            block_bytes = self.block_size * self.row.itemsize
            self.blocks_per_shard = max(1, SHARD_BYTES // block_bytes)
        assert self.k <= self.vocab_size < 2**24, self

    @property
    def row(self) -> np.dtype:
        return row_dtype(self)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps([VERSION, asdict(self)], sort_keys=True).encode()).digest()

    def shard_name(self, split: str, block: int) -> str:
        return f"{split}-{block // self.blocks_per_shard:05d}.bin"

    def shards(self) -> dict[str, range]:
        """File name -> the numbers of its blocks; split by split."""
        shards = {}
        for split, count in self.blocks.items():
            for start in range(0, count, self.blocks_per_shard):
                stop = min(start + self.blocks_per_shard, count)
                shards[self.shard_name(split, start)] = range(start, stop)
        return shards

    def size_error(self, folder: Path, name: str) -> str | None:
        """What is wrong with a shard's size, or None."""
        block_bytes = self.block_size * self.row.itemsize + 4
        expected = len(self.shards()[name]) * block_bytes + TRAILER.size
        try:
            size = os.path.getsize(folder / name)
        except OSError as error:
            return f"is missing ({error.strerror})"
        return None if size == expected else f"has {size} bytes, not {expected}"


def hash_tokens(tokens) -> str:
    """SHA-256 of ids [blocks,T], as a shard's trailer has it."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(tokens), "<u4")).hexdigest()


def seal(content: dict) -> str:
    """SHA-256 over a manifest's other entries."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_trailer(path: Path) -> dict:
    with open(path, "rb") as stream:
        stream.seek(-TRAILER.size, os.SEEK_END)
        return parse_trailer(stream.read())


def parse_trailer(trailer: bytes) -> dict:
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
    place = f"{key}={folder}"
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        problem = f"no {MANIFEST}"
        if any(folder.glob("*-*.bin")):
            problem = "an unfinished one, run the same teachers.capture command again"
        raise UserError(f"{place}: no cache of sparse targets ({problem})") from None
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{place}: {MANIFEST} is not one of a cache of sparse targets;"
            " give a folder that teachers.capture made"
        )
    version = content.get("version")
    if version != VERSION:
        raise UserError(
            f"{place}: a cache of version {version}, this code reads {VERSION}; capture it again"
        )
    if content.pop("seal", None) != seal(content):
        raise UserError(
            f"{place}: {MANIFEST} is damaged;"
            " delete it and run the same teachers.capture command again"
        )
    return content


class CacheWriter:
    """Writes shards, each whole or not at all; after a kill the same run ends in the same bytes."""

    def __init__(self, folder: str | Path, spec: CacheSpec):
        """UserError where the folder cannot be written, or holds anything but this cache."""
        self.folder = Path(folder)
        self.spec = spec
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
            self.check_same(CacheSpec(**read_manifest(self.folder, "out")["spec"]))

    def check_same(self, stored: CacheSpec) -> None:
        for name, value in vars(self.spec).items():
            there = getattr(stored, name)
            if there == value:
                continue
            problem = f"a cache is there with {name}={there}, not {value}"
            if name in ("teacher", "tokenizer"):
                problem = f"a cache of another {name} is there"
            if name == "tokens":
                problem = "a cache of other text or another data.document_mask is there"
            raise UserError(f"out={self.folder}: {problem}; give another folder, or delete it")

    def writing(self, name: str):
        """A context in which an OSError ends as one line that names the file."""
        fix = "make room or give another folder and run the same command again"
        return report_os_errors(f"out={self.folder}", f"{fix}; finished shards are kept", name)

    def missing(self, rank: int = 0, world: int = 1) -> list[str]:
        """The shards still to do, of those that are `rank`'s.

        UserError where another capture's shard lies there.
        """
        names = list(self.spec.shards())[rank::world]
        return [name for name in names if not self.is_finished(name)]

    def is_finished(self, name: str) -> bool:
        if self.spec.size_error(self.folder, name):
            return False
        if read_trailer(self.folder / name)["spec"] != self.spec.digest.hex():
            raise UserError(
                f"out={self.folder}: {name} is of another teacher, other data or another access;"
                " give another folder, or delete this one"
            )
        return True

    @contextmanager
    def shard(self, name: str):
        """Gives add(tokens [b,T], ids, log_probs, log_norm, draws) for the shard's blocks in order.

        Leaving the context writes the shard, all at once.
        """
        all_tokens = []
        jobs = []

        def add(tokens, ids, log_probs, log_norm, draws):
            tokens = np.asarray(tokens)
            assert tokens.shape[1] == self.spec.block_size, tokens.shape
            all_tokens.append(tokens)
            jobs.append(pool.submit(encode, self.spec, ids, log_probs, log_norm, draws))

        # Quantisation goes on beside the teacher's next batch.
        with ThreadPoolExecutor() as pool:
            yield add
        encoded = [job.result() for job in jobs]
        rows = np.concatenate([rows for rows, _ in encoded])
        kl = np.concatenate([kl for _, kl in encoded])
        self.write_shard(name, np.concatenate(all_tokens), rows, kl)

    def write_shard(self, name: str, tokens: np.ndarray, rows: np.ndarray, kl: np.ndarray) -> None:
        """tokens [blocks,T], rows and kl [blocks*T]."""
        num_blocks = len(self.spec.shards()[name])
        assert tokens.shape == (num_blocks, self.spec.block_size), f"{name}: tokens {tokens.shape}"
        assert len(rows) == tokens.size, f"{name}: {len(rows)} rows for {tokens.shape}"
        blocks = rows.reshape(num_blocks, -1)
        checksums = np.array([zlib.crc32(block) for block in blocks], "<u4")
        tokens_hash = bytes.fromhex(hash_tokens(tokens))
        trailer = TRAILER.pack(len(rows), kl.mean(), kl.max(), self.spec.digest, tokens_hash)

        scratch = self.folder / f".{name}.tmp"
        with self.writing(name):
            try:
                scratch.write_bytes(rows.tobytes() + checksums.tobytes() + trailer)
                fsync(scratch)
                os.replace(scratch, self.folder / name)
            finally:
                scratch.unlink(missing_ok=True)
            fsync(self.folder)

    def finish(self, names: dict[str, str] | None = None) -> bool:
        """Writes the manifest and removes what killed writers left, if every shard is there.

        names: what people call the tokenizer and the tokens that the spec knows by fingerprint.
        """
        if self.missing():
            return False
        shards = {}
        for name in self.spec.shards():
            shards[name] = read_trailer(self.folder / name)
            shards[name]["sha256"] = sha256(self.folder / name)
        content = {
            "format": FORMAT,
            "version": VERSION,
            "bytes_per_row": self.spec.row.itemsize,
            "spec": asdict(self.spec),
            "names": names or {},
            "shards": shards,
        }
        content["seal"] = seal(content)
        with self.writing(MANIFEST):
            for stale in self.folder.glob(".*.tmp"):
                stale.unlink()
            write_atomic(self.folder / MANIFEST, json.dumps(content, indent=1))
            fsync(self.folder)
        return True


class Cache:
    """A finished cache: opened without reading a row, then read block by block in any order."""

    def __init__(self, folder: str | Path, key: str = "teacher.path"):
        """UserError naming `key`: no cache, an unfinished one, or a shard that is missing or cut."""
        self.folder = Path(folder)
        self.key = key
        manifest = read_manifest(self.folder, key)
        self.spec = CacheSpec(**manifest["spec"])
        self.names = manifest["names"]
        self.records = manifest["shards"]  # file name -> its trailer and its SHA-256
        self.shards = self.spec.shards()
        for name in self.shards:
            self.check_size(name)

    def damaged(self, name: str, problem: str) -> UserError:
        return UserError(
            f"{self.key}={self.folder}: {name} {problem}; delete that file and run the same"
            " teachers.capture command again, which keeps the others"
        )

    def check_size(self, name: str) -> None:
        problem = self.spec.size_error(self.folder, name)
        if problem:
            raise self.damaged(name, problem)

    def read(self, split: str, blocks, k: int | None = None, n: int | None = None) -> TeacherOutput:
        """What was recorded at those blocks.

        Args:
            blocks: [B] numbers of blocks, in any order.
            k, n: how many entries and draws to give of each row, its first; None = all.

        Returns: arrays of N = B*T rows.

        Raises: UserError where a block does not match its CRC32, or a shard the manifest.
        """
        blocks = np.asarray(blocks, np.int64)
        rows = np.empty((len(blocks), self.spec.block_size), self.spec.row)  # [B,T]
        shard_numbers = blocks // self.spec.blocks_per_shard
        for number in np.unique(shard_numbers):
            in_shard = np.flatnonzero(shard_numbers == number)
            name = self.spec.shard_name(split, blocks[in_shard[0]])
            rows[in_shard] = self.read_shard(name, blocks[in_shard].tolist())
        ids, log_probs, log_norm, draws = decode(self.spec, rows.ravel())
        return TeacherOutput(
            ids=None if ids is None else ids[:, :k],
            log_probs=None if log_probs is None else log_probs[:, :k],
            log_norm=log_norm,
            draws=None if draws is None else draws[:, :n],
        )

    def read_shard(self, name: str, blocks: list[int]) -> np.ndarray:
        """The rows [B,T] of those blocks; the file is mapped meanwhile and no longer."""
        self.check_size(name)
        shard_blocks = self.shards[name]
        block_bytes = self.spec.block_size * self.spec.row.itemsize
        rows = np.empty((len(blocks), self.spec.block_size), self.spec.row)
        with (
            open(self.folder / name, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as shard,
        ):
            trailer = parse_trailer(shard[-TRAILER.size :])
            recorded = self.records[name]
            if any(trailer[field] != recorded[field] for field in ("spec", "tokens")):
                raise self.damaged(name, f"is not the shard that {MANIFEST} names")
            for place, block in enumerate(blocks):
                index = shard_blocks.index(block)
                data = shard[index * block_bytes : (index + 1) * block_bytes]
                checksum_at = len(shard_blocks) * block_bytes + 4 * index
                (checksum,) = struct.unpack_from("<I", shard, checksum_at)
                if zlib.crc32(data) != checksum:
                    raise self.damaged(name, f"is damaged: block {block} does not match its CRC32")
                rows[place] = np.frombuffer(data, self.spec.row)
        return rows

    def check_tokens(self, name: str, tokens) -> None:
        """UserError unless `tokens` [blocks,T] are the inputs that the shard of that name covers."""
        if hash_tokens(tokens) != self.records[name]["tokens"]:
            raise UserError(
                f"{self.key}={self.folder}: {name} covers other tokens than the data hold at its"
                " blocks; set data as it was there, or capture again"
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
            vocab_size: the student's, which may have more rows than the teacher; None = not checked.
            temperature: the loss's; None = any will do.
        """
        spec = self.spec
        kind = ACCESS_KINDS[access.kind]

        # The data: the same tokens, cut into the same blocks.
        text, _, mask = tokens.partition("+")
        recorded_text, _, recorded_mask = spec.tokens.partition("+")
        if tokenizer != spec.tokenizer:
            fix = f"set data.tokenizer to the capture's ({self.describe_source('tokenizer')})"
            self.refuse("data.tokenizer", "of another tokenizer", fix)
        if text != recorded_text:
            fix = f"set data to the capture's ({self.describe_source('tokens')})"
            self.refuse("data", "of other text", fix)
        if mask != recorded_mask:
            fix = f"set data.document_mask to {bool(recorded_mask)}"
            self.refuse(f"data.document_mask={bool(mask)}", "not of that", fix)
        if block_size != spec.block_size:
            fix = f"set model.block_size to {spec.block_size}"
            self.refuse(f"model.block_size={block_size}", "not of that", fix)

        # The student.
        if vocab_size is not None and vocab_size < spec.vocab_size:
            fix = f"set model.vocab_size to {spec.vocab_size}, its teacher's"
            self.refuse(f"model.vocab_size={vocab_size}", "not of that", fix)

        # What the teacher showed.
        recorded_kind = ACCESS_KINDS[spec.kind]
        served = [name for name, each in ACCESS_KINDS.items() if recorded_kind.includes(each)]
        if access.kind not in served:
            self.refuse(
                f"access={access.kind}", "not of that", f"set access to {' or '.join(served)}"
            )
        if kind.draws == "tail" and access.k != spec.k:
            # Its draws are from outside exactly these entries.
            self.refuse(f"access.k={access.k}", "not of that", f"set access.k to {spec.k}")
        if kind.uses_k and access.k > spec.k:
            self.refuse(f"access.k={access.k}", "not of that", f"set access.k to {spec.k} or less")
        if kind.uses_n and access.n > spec.n:
            self.refuse(f"access.n={access.n}", "not of that", f"set access.n to {spec.n} or less")
        if temperature is not None and temperature not in spec.temperatures:
            known = " or ".join(map(str, spec.temperatures))
            self.refuse(
                f"loss.temperature={temperature}", "not of that", f"set loss.temperature to {known}"
            )

    def refuse(self, setting: str, problem: str, fix: str) -> None:
        raise UserError(f"{setting}: the cache {self.folder} is {problem}; {fix}, or capture again")

    def describe_source(self, source: str) -> str:
        """teacher, tokenizer or tokens: what people call it, else its fingerprint."""
        return self.names.get(source, f"SHA-256 {getattr(self.spec, source)}")

    def verify(self) -> None:
        """Hashes every shard again; UserError for the first that is not as it was written."""
        for name, record in self.records.items():
            if sha256(self.folder / name) != record["sha256"]:
                raise self.damaged(name, "does not match its SHA-256")

    def describe(self) -> str:
        """What the cache is and costs, in a few lines."""
        spec = self.spec
        access = spec.kind
        if spec.k:
            access += f" k={spec.k}"
        if spec.n:
            access += f" n={spec.n}"
        splits = [f"{split} {count:,} blocks" for split, count in spec.blocks.items()]
        records = self.records.values()
        rows = sum(record["rows"] for record in records)
        mean_kl = sum(record["mean_kl"] * record["rows"] for record in records) / rows
        worst_kl = max(record["worst_kl"] for record in records)
        total = sum(os.path.getsize(self.folder / name) for name in self.shards)
        lines = {
            "access": f"{access}, seed {spec.seed}, vocabulary {spec.vocab_size:,}",
            "temperatures": ", ".join(map(str, spec.temperatures)),
            "rows": f"{rows:,} in {len(self.shards)} shards"
            f" ({', '.join(splits)} of {spec.block_size})",
            "bytes": f"{spec.row.itemsize} a token, {total:,} in all",
            "quantisation": f"{mean_kl:.1e} nats of KL a row, {worst_kl:.1e} at most",
        }
        for source in ("teacher", "tokenizer", "tokens"):
            fingerprint = getattr(spec, source)
            name = self.names.get(source)
            lines[source] = f"{name}, {fingerprint}" if name else fingerprint
        return "\n".join(f"{name:<13}{line}" for name, line in lines.items())


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
