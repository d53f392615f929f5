"""The cache of sparse targets: what teachers.capture records of a teacher, for many students.

    python -m teachers.cache info PATH      what a cache is, its rows, bytes a token and fingerprints
    python -m teachers.cache verify PATH    hashes every byte again; exit status 2 and one line on a fault

B blocks of T positions; row number = block * T + place. A cache is a folder of shards of whole blocks, SPLIT-00000.bin, and
manifest.json, written last. A shard: its rows (`CacheSpec.row`, see teachers/rows.py), a CRC32 for each block, then TRAILER.
"""

import argparse
import hashlib
import json
import mmap
import os
import re
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np

from engine import UserError
from engine.checkpoint import MANIFEST, fsync, report_os_errors, sha256, write_atomic
from teachers.rows import ACCESS_KINDS, CacheSpec, TeacherOutput, decode, encode

FORMAT, VERSION = "nanodistill sparse targets", 1
PRINTS = {
    "teacher": "another teacher",
    "tokenizer": "another tokenizer",
    "tokens": "other text or another data.document_mask",
}
SHARD = re.compile(r"\.?(train|val)-\d{5}\.bin")
TRAILER = struct.Struct(
    "<Qff32s32s"
)  # rows, their mean and worst KL, SHA-256 of the facts and of the tokens [blocks,T] u32


def hash_tokens(tokens) -> str:
    """SHA-256 of ids [blocks,T], as a shard's trailer has it."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(tokens), "<u4")).hexdigest()


def seal(content: dict) -> str:
    """SHA-256 over a manifest's other entries."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def size_fault(file: Path, blocks: range, facts: CacheSpec) -> str | None:
    """What is wrong with a shard's size, or None."""
    size = len(blocks) * (facts.block_size * facts.row.itemsize + 4) + TRAILER.size
    try:
        there = os.path.getsize(file)
    except OSError as error:
        return f"is missing ({error.strerror})"
    return None if there == size else f"has {there} bytes, not {size}"


def read_trailer(file: Path) -> dict:
    with open(file, "rb") as stream:
        stream.seek(-TRAILER.size, os.SEEK_END)
        return dict(
            zip(
                ("rows", "mean_kl", "worst_kl", "facts", "tokens"),
                TRAILER.unpack(stream.read()),
                strict=True,
            )
        )


def read_manifest(folder: Path, key: str) -> dict:
    """UserError naming `key` where there is no whole cache of this version."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        sealed, version = content.pop("seal"), content["format"] == FORMAT and content["version"]
    except FileNotFoundError:
        rule = (
            "an unfinished one, run the same teachers.capture command again"
            if any(folder.glob("*-*.bin"))
            else f"no {MANIFEST}"
        )
        raise UserError(f"{key}={folder}: no cache of sparse targets ({rule})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        version = False
    if not version:
        rule = f"{MANIFEST} is not one of a cache of sparse targets; give a folder that teachers.capture made"
    elif version != VERSION:
        rule = f"a cache of version {version}, this code reads {VERSION}; capture it again"
    elif sealed != seal(content):
        rule = f"{MANIFEST} is damaged; delete it and run the same teachers.capture command again"
    else:
        return content
    raise UserError(f"{key}={folder}: {rule}")


class CacheWriter:
    """Writes shards, each whole or not at all; after a kill the same run ends in the same bytes."""

    def __init__(self, folder: str | Path, facts: CacheSpec):
        self.folder, self.facts = Path(folder), facts
        with self.writing("there"):
            self.folder.mkdir(parents=True, exist_ok=True)
            names = os.listdir(self.folder)
        if names and not any(SHARD.match(name) or name == MANIFEST for name in names):
            raise UserError(
                f"out={folder}: a folder of other files, {min(names)} among them; give a new or an empty one"
            )
        if (self.folder / MANIFEST).exists():
            stored = CacheSpec(**read_manifest(self.folder, "out")["facts"])
            for name, value in vars(facts).items():
                if getattr(stored, name) != value:
                    rule = f"a cache is there with {name}={getattr(stored, name)}, not {value}"
                    rule = f"a cache of {PRINTS[name]} is there" if name in PRINTS else rule
                    raise UserError(f"out={folder}: {rule}; give another folder, or delete it")

    def writing(self, name: str):
        rule = "make room or give another folder and run the same command again; finished shards are kept"
        return report_os_errors(f"out={self.folder}", rule, name)

    def missing(self, rank: int = 0, world: int = 1) -> list[str]:
        """The shards still to do, of those that are `rank`'s; UserError where another capture's lies there."""
        return [name for name in list(self.facts.shards())[rank::world] if not self.stands(name)]

    def stands(self, name: str) -> bool:
        if size_fault(self.folder / name, self.facts.shards()[name], self.facts):
            return False
        if read_trailer(self.folder / name)["facts"] != self.facts.digest:
            rule = "is of another teacher, other data or another access; give another folder, or delete this one"
            raise UserError(f"out={self.folder}: {name} {rule}")
        return True

    @contextmanager
    def shard(self, name: str):
        """Gives add(tokens [b,T], ids, log_probs, log_norm, draws) for the shard's blocks, in order; leaving it writes them."""
        blocks, tokens, jobs = self.facts.shards()[name], [], []

        def add(inputs, *revealed):
            tokens.append(np.asarray(inputs))
            assert tokens[-1].shape[1] == self.facts.block_size, tokens[-1].shape
            jobs.append(pool.submit(encode, self.facts, *revealed))

        with ThreadPoolExecutor() as pool:  # rounding goes on beside the teacher's next batch
            yield add
        rows, paid = (
            np.concatenate(parts) for parts in zip(*(job.result() for job in jobs), strict=True)
        )
        assert sum(part.size for part in tokens) == len(rows), (
            f"{sum(part.size for part in tokens)} tokens, {len(rows)} rows"
        )
        assert len(rows) == len(blocks) * self.facts.block_size, (
            f"{len(rows)} rows for {len(blocks)} blocks"
        )
        sums = np.array([zlib.crc32(block) for block in rows.reshape(len(blocks), -1)], "<u4")
        digest = bytes.fromhex(hash_tokens(np.concatenate(tokens)))
        trailer = TRAILER.pack(len(rows), paid.mean(), paid.max(), self.facts.digest, digest)
        scratch = self.folder / f".{name}.tmp"
        with self.writing(name):
            try:
                with open(scratch, "wb") as stream:
                    stream.write(rows.tobytes() + sums.tobytes() + trailer)
                fsync(scratch)
                os.replace(scratch, self.folder / name)
            finally:
                scratch.unlink(missing_ok=True)
            fsync(self.folder)

    def finish(self, names: dict[str, str] | None = None) -> bool:
        """Writes the manifest, and removes what killed writers left, if every shard is there.

        names: what people call the tokenizer and the tokens that the facts know by fingerprint.
        """
        if self.missing():
            return False
        records = {}
        for name in self.facts.shards():
            found = read_trailer(self.folder / name)
            prints = {"tokens": found["tokens"].hex(), "sha256": sha256(self.folder / name)}
            records[name] = {part: found[part] for part in ("rows", "mean_kl", "worst_kl")} | prints
        content = {
            "format": FORMAT,
            "version": VERSION,
            "bytes_a_row": self.facts.row.itemsize,
            "facts": asdict(self.facts),
        }
        content = json.loads(json.dumps(content | {"names": names or {}, "shards": records}))
        with self.writing(MANIFEST):
            for stale in self.folder.glob(".*.tmp"):
                stale.unlink()
            write_atomic(
                self.folder / MANIFEST, json.dumps(content | {"seal": seal(content)}, indent=1)
            )
            fsync(self.folder)
        return True


class Cache:
    """A finished cache: opened without reading a row, then read block by block in any order."""

    def __init__(self, folder: str | Path, key: str = "teacher.path"):
        """UserError naming `key` for no, a foreign or an unfinished cache, or a shard that is missing or cut."""
        self.folder, self.key = Path(folder), key
        content = read_manifest(self.folder, key)
        self.facts, self.records, self.names = (
            CacheSpec(**content["facts"]),
            content["shards"],
            content.get("names", {}),
        )
        self.shards, self.row = self.facts.shards(), self.facts.row
        for name in self.shards:
            self.check_size(name)

    def fault(self, name: str, what: str) -> UserError:
        rule = "delete that file and run the same teachers.capture command again, which keeps the others"
        return UserError(f"{self.key}={self.folder}: {name} {what}; {rule}")

    def check_size(self, name: str) -> None:
        if wrong := size_fault(self.folder / name, self.shards[name], self.facts):
            raise self.fault(name, wrong)

    def read(self, split: str, blocks, k: int | None = None, n: int | None = None) -> TeacherOutput:
        """The rows of those blocks [B], in their order: N = B*T; of each the first k entries and n draws, or all.

        UserError where a block does not match its CRC32, or a shard the manifest.
        """
        blocks = np.asarray(blocks, np.int64)
        assert len(blocks) == 0 or 0 <= blocks.min() <= blocks.max() < self.facts.blocks[split], (
            f"{split} {blocks}"
        )
        rows = np.empty((len(blocks), self.facts.block_size), self.row)
        homes = blocks // self.facts.blocks_a_shard
        for home in np.unique(homes).tolist():
            self.read_shard(
                f"{split}-{home:05d}.bin", blocks, np.flatnonzero(homes == home).tolist(), rows
            )
        found, widths = decode(self.facts, rows.ravel()), (k, k, None, n)
        return TeacherOutput(
            *(
                part if part is None else part[:, :width]
                for part, width in zip(found, widths, strict=True)
            )
        )

    def read_shard(
        self, name: str, blocks: np.ndarray, places: list[int], rows: np.ndarray
    ) -> None:
        """Fills rows[place] with the shard's block number blocks[place]; the file is mapped meanwhile and no longer."""
        self.check_size(name)
        span, size = self.shards[name], self.facts.block_size * self.row.itemsize
        with (
            open(self.folder / name, "rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as shard,
        ):
            *_, facts, tokens = TRAILER.unpack(shard[-TRAILER.size :])
            if facts != self.facts.digest or tokens.hex() != self.records[name]["tokens"]:
                raise self.fault(name, f"is not the shard that {MANIFEST} names")
            for place in places:
                inside = int(blocks[place]) - span[0]
                data = shard[inside * size : (inside + 1) * size]
                if struct.unpack_from("<I", shard, len(span) * size + 4 * inside)[0] != zlib.crc32(
                    data
                ):
                    raise self.fault(
                        name, f"is damaged: block {blocks[place]} does not match its CRC32"
                    )
                rows[place] = np.frombuffer(data, self.row)

    def check_tokens(self, name: str, tokens) -> None:
        """UserError unless `tokens` [blocks,T] are the inputs that the shard of that name covers."""
        if hash_tokens(tokens) != self.records[name]["tokens"]:
            rule = "covers other tokens than the data hold at its blocks"
            raise UserError(
                f"{self.key}={self.folder}: {name} {rule}; set data as it was there, or capture again"
            )

    def check(
        self,
        *,
        tokenizer=None,
        tokens=None,
        vocab_size=None,
        block_size=None,
        kind=None,
        k=None,
        n=None,
        temperature=None,
    ):
        """UserError for the first of these that the cache cannot serve; what is None is not asked.

        tokenizer, tokens: fingerprints. vocab_size: the student's, which may have more rows. kind, k, n: the access wanted.
        """
        facts, held = self.facts, ACCESS_KINDS[self.facts.kind].stored
        tells = {*held, *{"top": ["token"], "all": ["token", "top"]}.get(held[0], [])}
        kinds = [name for name in ACCESS_KINDS if set(ACCESS_KINDS[name].stored) <= tells]
        asked = ACCESS_KINDS[kind if kind in kinds else facts.kind]
        lowest = (
            facts.k if "tail_draws" in asked.stored else 1
        )  # its draws are from outside exactly these entries
        fewer = f"{facts.k}" if lowest == facts.k else f"{facts.k} or less"
        made = {
            name: f"the capture's ({self.names.get(name, 'SHA-256 ' + getattr(facts, name))})"
            for name in PRINTS
        }
        ours, theirs = ((each or "").partition("+") for each in (tokens, facts.tokens))
        rules = (
            ("data.tokenizer", tokenizer, [facts.tokenizer], made["tokenizer"]),
            ("data", tokens and ours[0], theirs[:1], made["tokens"]),
            ("data.document_mask", tokens and bool(ours[1]), [bool(theirs[1])], bool(theirs[1])),
            (
                "model.vocab_size",
                vocab_size,
                range(facts.vocab_size, 2**31),
                f"{facts.vocab_size}, its teacher's",
            ),
            ("model.block_size", block_size, [facts.block_size], f"{facts.block_size}"),
            ("access", kind, kinds, " or ".join(kinds)),
            ("access.k", k if asked.k else None, range(lowest, facts.k + 1), fewer),
            ("access.n", n if asked.n else None, range(1, facts.n + 1), f"{facts.n} or less"),
            (
                "loss.temperature",
                temperature,
                facts.temperatures,
                " or ".join(map(str, facts.temperatures)),
            ),
        )
        for name, value, served, said in rules:
            if value is not None and value not in served:
                other = {"data.tokenizer": "of another tokenizer", "data": "of other text"}.get(
                    name
                )
                rule = f"the cache {self.folder} is {other or 'not of that'}; set {name} to {said}, or capture again"
                raise UserError(f"{name if other else f'{name}={value}'}: {rule}")

    def verify(self) -> None:
        """Hashes every shard again; UserError for the first that is not as it was written."""
        for name, record in self.records.items():
            if sha256(self.folder / name) != record["sha256"]:
                raise self.fault(name, "does not match its SHA-256")

    def describe(self) -> str:
        """What the cache is and costs, in a few lines."""
        facts, records = self.facts, self.records.values()
        asked = "".join(
            f" {name}={getattr(facts, name)}" for name in ("k", "n") if getattr(facts, name)
        )
        splits = ", ".join(f"{split} {count:,} blocks" for split, count in facts.blocks.items())
        rows, worst = (
            sum(record["rows"] for record in records),
            max(record["worst_kl"] for record in records),
        )
        lost = sum(record["mean_kl"] * record["rows"] for record in records) / rows
        total = sum(os.path.getsize(self.folder / name) for name in self.shards)
        lines = {
            "access": f"{facts.kind}{asked}, seed {facts.seed}, vocabulary {facts.vocab_size:,}",
            "temperatures": ", ".join(map(str, facts.temperatures)),
            "rows": f"{rows:,} in {len(self.shards)} shards ({splits} of {facts.block_size})",
            "bytes": f"{self.row.itemsize} a token, {total:,} in all",
            "quantisation": f"{lost:.1e} nats of KL a row, {worst:.1e} at most",
        } | {
            name: ", ".join([*map(self.names.get, {name} & {*self.names}), getattr(facts, name)])
            for name in PRINTS
        }
        return "\n".join(f"{name:<13}{line}" for name, line in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m teachers.cache", description="Looks at a cache of sparse targets."
    )
    parser.add_argument("command", choices=("info", "verify"))
    parser.add_argument("path")
    arguments = parser.parse_args()
    try:
        cache = Cache(arguments.path, "path")
        if arguments.command == "verify":
            cache.verify()
        print(
            cache.describe()
            if arguments.command == "info"
            else f"{arguments.path}: whole, {len(cache.shards)} shards"
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
