"""What a teacher reveals as sparse targets: their weights, their bytes, and the cache that keeps them.

    python -m data.targets info PATH      what a cache is, its rows, bytes a token and fingerprints
    python -m data.targets verify PATH    hashes every byte again; exit status 2 and one line on a fault

N rows (positions), B blocks of T positions, K the teacher's top entries a row, n its draws, V vocabulary, M = the teacher's
mass on the K entries. Row number = block * T + place. A cache is a folder of shards of whole blocks, SPLIT-00000.bin, and
manifest.json, written last. A shard: its rows (`Facts.row`), a CRC32 for each block, then TRAILER.

One byte an entry. Stored is the depth x = log p_top - log p of an entry below the row's top one, rounded to a value of
`grid`, and 2 bytes a row for each temperature: the logit of M there, in float16. Decoded entries are scaled to that M, so
that neither mass nor tail is touched and M stays below 1; only the shape within S errs, by e_i, and costs 1/2 Var(e) nats
to second order. At worst all K-1 others lie at one depth x: together they weigh m = sigmoid(log(K-1) - x), and steps of
D/sqrt(m) there cost at most D^2/8. As the integral of sqrt(sigmoid(log(K-1) - x)) is about log(4(K-1)), D = .028 and thus
1e-4 nats at worst hold up to K=256 at T=1. At another temperature x/T stands for x, and steps of T*D do. full: float16.
"""

import argparse
import hashlib
import json
import math
import mmap
import os
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine import UserError
from engine.checkpoint import MANIFEST, fsync, sha256, write_atomic

FORMAT, VERSION = "nanodistill sparse targets", 1
LIMIT = 1e-4  # nats of KL that the quantisation of a row may cost, at each stored temperature
STEP, CODES, NOTHING = 0.028, 255, 255  # D in nats; how many depths a byte tells apart; the code of -inf
SHARD_BYTES = 2**24  # about; what a killed capture does again
TRAILER = struct.Struct("<Qff32s32s")  # rows, their mean and worst KL, SHA-256 of the facts and of the tokens [blocks,T] u32


class Kind(NamedTuple):
    """One access to a teacher."""

    stored: tuple[str, ...]  # token (its top one) | top (k, with log-probs) | draws | tail_draws (outside the top) | all (V)
    k: bool = False  # whether access.k is asked for
    n: bool = False  # whether access.n is asked for; else a kind with draws has one
    tail: str | None = "truncate"  # the weights are final and for T=1 only; None = loss.tail and the temperature are free


KINDS = {
    "greedy": Kind(("token",)),
    "text": Kind(("draws",)),
    "sampled": Kind(("draws",), n=True),
    "topk": Kind(("top",), k=True, tail=None),
    "residual_to_label": Kind(("top",), k=True),
    "unbiased": Kind(("top", "draws"), k=True),
    "stratified": Kind(("top", "tail_draws"), k=True, n=True),
    "full": Kind(("all",), tail=None),
}


def weigh(kind: str, ids, log_probs, draws, labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse targets (ids, log-weights) [N,slots] from what `kind` reveals (DESIGN.md section 3); -1 = empty, duplicates add.

    Args: ids, log_probs [N,K], the teacher's top at T=1, descending; draws [N,n], from softmax(z) or (stratified) from its
    part outside ids; labels [N], -100 = none. What a kind does not use may be None. Weights but topk's and full's are final.
    """
    if kind in ("topk", "full"):
        return ids, log_probs
    if kind == "greedy":
        return ids[:, :1], torch.zeros_like(ids[:, :1], dtype=torch.float32)
    if kind in ("text", "sampled"):
        draws = draws[:, :1] if kind == "text" else draws
        return draws, torch.full_like(draws, -math.log(draws.shape[1]), dtype=torch.float32)
    mass = log_probs.masked_fill(ids < 0, -torch.inf).exp().sum(1, keepdim=True)
    log_tail = (1 - mass).clamp(min=0).log()  # [N,1]
    if kind == "unbiased":
        extra, log_weights = draws[:, :1], torch.zeros_like(log_tail)
        extra = extra.masked_fill((ids == extra).any(1, keepdim=True), -1)
    elif kind == "stratified":
        extra, log_weights = draws, (log_tail - math.log(draws.shape[1])).expand(-1, draws.shape[1])
    else:
        assert kind == "residual_to_label", kind
        extra, log_weights = labels[:, None].clamp(min=-1), log_tail
    return torch.cat([ids, extra.to(ids.dtype)], 1), torch.cat([log_probs, log_weights], 1)


@dataclass
class Facts:
    """What a cache holds and what it was made from; caches of equal facts are equal to the byte."""

    kind: str
    vocab_size: int  # of the teacher, at most 2^24
    block_size: int
    blocks: dict[str, int]  # of each split
    teacher: str  # fingerprints: SHA-256
    tokenizer: str
    tokens: str
    k: int = 0  # entries stored, whatever was asked for where the kind itself says how many
    n: int = 0  # draws, likewise
    seed: int = 0  # of the draws
    temperatures: tuple[float, ...] = ()  # whose normaliser is known: 1.0, then the others, ascending
    blocks_a_shard: int = 0  # 0: about SHARD_BYTES

    def __post_init__(self):
        kind = KINDS[self.kind]
        self.k = self.vocab_size if self.kind == "full" else self.k if kind.k else int(self.kind == "greedy")
        self.n = self.n if kind.n else int("draws" in kind.stored)
        others = {float(T) for T in self.temperatures if T != 1 and kind.tail is None}
        self.temperatures = (1.0, *sorted(others))
        self.blocks_a_shard = self.blocks_a_shard or max(1, SHARD_BYTES // (self.block_size * self.row.itemsize))
        assert self.k <= self.vocab_size <= 2**24, self

    @property
    def row(self) -> np.dtype:
        """The bytes of one row."""
        stored, width = KINDS[self.kind].stored, id_bytes(self.vocab_size)
        if "all" in stored:
            return np.dtype([("log_probs", "<f2", (self.k,))])
        codes = [("mass", "<f2", (len(self.temperatures),)), ("codes", "u1", (self.k,))] if "top" in stored else []
        ids = {"ids": self.k, "draws": self.n}
        return np.dtype(codes + [(name, "u1", (count, width)) for name, count in ids.items() if count])

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def shards(self) -> dict[str, range]:
        """File name -> the numbers of its blocks; split by split."""
        step, spans = self.blocks_a_shard, {}
        for split, count in self.blocks.items():
            for start in range(0, count, step):
                spans[f"{split}-{start // step:05d}.bin"] = range(start, min(start + step, count))
        return spans

    def fault(self, file: Path, blocks: range) -> str | None:
        """What is wrong with a shard's size, or None."""
        size = len(blocks) * (self.block_size * self.row.itemsize + 4) + TRAILER.size
        try:
            there = os.path.getsize(file)
        except OSError as error:
            return f"is missing ({error.strerror})"
        return None if there == size else f"has {there} bytes, not {size}"


class Rows(NamedTuple):
    """Stored rows, read back; None where the kind has no such part."""

    ids: np.ndarray | None  # [N,k] int64, -1 = empty
    log_probs: np.ndarray | None  # [N,k] fp32, at T=1
    draws: np.ndarray | None  # [N,n] int64, -1 = empty
    log_norm: np.ndarray | None  # [N,temperatures] fp32: logsumexp(z/T) - logsumexp(z)/T


def id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 2**16 else 3


def pack_ids(ids, vocab_size: int) -> np.ndarray:
    """[N,K] -> [N,K,2 or 3] uint8, little-endian; -1 becomes the largest number, which must then be no id."""
    ids, width = np.asarray(ids), id_bytes(vocab_size)
    low = -1 if vocab_size < 256**width else 0
    assert ids.size == 0 or low <= ids.min() <= ids.max() < vocab_size, f"ids {ids.min()}..{ids.max()}, V={vocab_size}"
    return ids.astype("<i4")[..., None].view("u1")[..., :width]


def unpack_ids(packed: np.ndarray, vocab_size: int) -> np.ndarray:
    ids = sum(packed[..., byte].astype(np.int64) << 8 * byte for byte in range(packed.shape[-1]))
    return np.where(ids < vocab_size, ids, -1)


@lru_cache
def grid(k: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """The depths [256] in nats that codes stand for, ascending, the last infinite; the deepest is 30 T at the largest T."""
    depths = np.linspace(0, 30 * max(temperatures), 30001)
    needed = [np.exp(-np.logaddexp(0, depths / T - math.log(max(k - 1, 1))) / 2) / T for T in temperatures]
    density = np.max(needed, 0)  # of codes, times D
    spent = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * depths[1]))
    spent += max(STEP * (CODES - 1) - spent[-1], 0.15) * depths / depths[-1]  # what is to spare goes evenly over all depths
    return np.append(np.interp(np.linspace(0, spent[-1], CODES), spent, depths), np.inf)


def rounded_down(values: np.ndarray) -> np.ndarray:
    """fp64 -> fp32, never above: so the mass stays within 1."""
    narrow = values.astype(np.float32)
    return np.where(narrow > values, np.nextafter(narrow, np.float32(-np.inf)), narrow)


def decode(facts: Facts, rows: np.ndarray) -> Rows:
    """rows [N] of facts.row -> what `encode` was given, but quantised; full in the vocabulary's order, its ids a view."""
    names, T = rows.dtype.names, np.array(facts.temperatures)
    ids, draws = (unpack_ids(rows[name], facts.vocab_size) if name in names else None for name in ("ids", "draws"))
    log_probs = log_norm = None
    if "codes" in names:
        depths, codes = grid(facts.k, facts.temperatures), rows["codes"]
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            log_mass = -np.log1p(np.exp(-rows["mass"].astype(np.float64)))  # [N,temperatures]
            sums = np.stack([np.exp(-depths / each)[codes].sum(1) for each in T], 1)
            sums = np.log(np.where(sums > 0, sums, 1))
            top = log_mass[:, :1] - sums[:, :1]  # [N,1] the top entry's
            log_norm = np.where(np.isfinite(log_mass), top / T + sums - log_mass, 0)
            log_probs = rounded_down(top - depths[codes])
    elif "log_probs" in names:
        stored = rows["log_probs"].astype(np.float32)
        sums = [np.log(np.exp(stored / np.float32(each)).sum(1, dtype=np.float64)) for each in T]
        sums = np.stack(sums, 1)
        log_probs, log_norm = stored - sums[:, :1].astype(np.float32), sums - sums[:, :1] / T
        ids = np.broadcast_to(np.arange(facts.k), stored.shape)
    return Rows(ids, log_probs, draws, log_norm if log_norm is None else log_norm.astype(np.float32))


def cost(facts: Facts, rows: np.ndarray, log_probs: np.ndarray, log_norm: np.ndarray) -> np.ndarray:
    """[N] KL(t || t stored) over the entries and the tail outcome, the largest over temperatures; NaN where M > 1."""
    stored, found = decode(facts, rows), []
    for place, T in enumerate(facts.temperatures):
        log_t = log_probs.astype(np.float64) / T - log_norm[:, place, None]
        log_q = stored.log_probs.astype(np.float64) / T - stored.log_norm[:, place, None]
        t = np.exp(log_t)
        tail, tail_q = (np.maximum(1 - side.sum(1), 1e-9) for side in (t, np.exp(log_q)))  # fp32 tells tails to 1e-7
        with np.errstate(invalid="ignore"):
            inside = np.where(t > 0, t * (log_t - log_q), 0).sum(1)
        found.append(np.where(t.sum(1) <= 1 + 1e-4, inside + tail * np.log(tail / tail_q), np.nan))
    return np.max(found, 0)


def quantise(facts: Facts, rows: np.ndarray, log_probs: np.ndarray, log_norm: np.ndarray) -> np.ndarray:
    """Fills in the rows' masses and codes; returns what that costs [N]."""
    wide, depths = log_probs.astype(np.float64), grid(facts.k, facts.temperatures)
    bounds = (depths[1:CODES] + depths[: CODES - 1]) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        masses = [np.exp(wide / T - log_norm[:, place, None]).sum(1) for place, T in enumerate(facts.temperatures)]
        masses = np.minimum(np.stack(masses, 1), 1)
        rows["mass"] = np.log(masses) - np.log1p(-masses)
        below = np.where(np.isneginf(wide), np.inf, wide.max(1, keepdims=True) - wide)
    paid = np.full(len(rows), np.inf)
    for shift in np.arange(8) / 8 * depths[1]:  # a row may move as a whole: another rounding, the same meaning
        poor = np.flatnonzero(~(paid <= LIMIT / 2))
        if len(poor) == 0:
            break
        trial = rows[poor]
        trial["codes"] = np.where(np.isinf(below[poor]), NOTHING, np.searchsorted(bounds, below[poor] + shift))
        spent = cost(facts, trial, log_probs[poor], log_norm[poor])
        better = ~(spent >= paid[poor])
        rows[poor[better]], paid[poor[better]] = trial[better], spent[better]
    return paid


def encode(facts: Facts, ids=None, log_probs=None, log_norm=None, draws=None) -> tuple[np.ndarray, np.ndarray]:
    """What a teacher revealed at N positions -> rows [N] of facts.row, and the KL [N] that each lost, asserted <= LIMIT.

    ids, log_probs [N,k] and draws [N,n] as in `weigh`, log_norm [N,temperatures] (None: T=1 alone): arrays or CPU tensors.
    """
    N = len(next(part for part in (draws, ids, log_probs) if part is not None))
    rows = np.zeros(N, facts.row)
    for name, part in (("ids", ids), ("draws", draws)):
        if name in rows.dtype.names:
            rows[name] = pack_ids(part, facts.vocab_size)
    if not {"codes", "log_probs"} & set(rows.dtype.names):
        return rows, np.zeros(N)
    log_norm = np.zeros((N, 1), np.float32) if log_norm is None else np.asarray(log_norm)
    assert log_norm.shape == (N, len(facts.temperatures)), f"log_norm {log_norm.shape} for {facts.temperatures}"
    ids, log_probs = np.asarray(ids).astype(np.int64), np.asarray(log_probs)
    if facts.kind == "full":
        log_probs = np.take_along_axis(log_probs, np.argsort(ids, 1), 1)
        rows["log_probs"] = log_probs
        paid = cost(facts, rows, log_probs, log_norm)
    else:
        log_probs = np.where(ids < 0, -np.inf, log_probs)
        paid = quantise(facts, rows, log_probs, log_norm)
    rule = "store fewer temperatures or a smaller k (nan: no log-probabilities, or a mass above 1)"
    assert (paid <= LIMIT).all(), f"a row's quantisation costs {paid.max():.1e} nats of KL, {LIMIT} is the limit; {rule}"
    return rows, paid


def hash_tokens(tokens) -> str:
    """SHA-256 of ids [blocks,T], as a shard's trailer has it."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(tokens), "<u4")).hexdigest()


def seal(content: dict) -> str:
    """SHA-256 over a manifest's other entries."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_trailer(file: Path) -> dict:
    with open(file, "rb") as stream:
        stream.seek(-TRAILER.size, os.SEEK_END)
        return dict(zip(("rows", "mean_kl", "worst_kl", "facts", "tokens"), TRAILER.unpack(stream.read()), strict=True))


def read_manifest(folder: Path, key: str) -> dict:
    """UserError naming `key` where there is no whole cache of this version."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
        found = (content.pop("seal"), content["format"] == FORMAT and content["version"])
    except FileNotFoundError:
        rule = "an unfinished one, run the same data.capture command again" if any(folder.glob("*-*.bin")) else f"no {MANIFEST}"
        raise UserError(f"{key}={folder}: no cache of sparse targets ({rule})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        found = (None, False)
    if not found[1]:
        raise UserError(
            f"{key}={folder}: {MANIFEST} is not one of a cache of sparse targets; give a folder that data.capture made"
        )
    if found[1] != VERSION:
        raise UserError(f"{key}={folder}: a cache of version {found[1]}, this code reads {VERSION}; capture it again")
    if found[0] != seal(content):
        raise UserError(f"{key}={folder}: {MANIFEST} is damaged; delete it and run the same data.capture command again")
    return content


class CacheWriter:
    """Writes the shards of one split, each whole or not at all; after a kill the same run ends in the same bytes."""

    def __init__(self, folder: str | Path, facts: Facts, split: str):
        self.folder, self.facts, self.split = Path(folder), facts, split
        with self.writing("there"):
            self.folder.mkdir(parents=True, exist_ok=True)
        if (self.folder / MANIFEST).exists():
            stored = Facts(**read_manifest(self.folder, "out")["facts"])
            for name, value in vars(facts).items():
                if getattr(stored, name) != value:
                    rule = f"a cache is there with {name}={getattr(stored, name)}, not {value}"
                    raise UserError(f"out={folder}: {rule}; give another folder, or delete it")

    @contextmanager
    def writing(self, name: str):
        """An OSError as one line."""
        try:
            yield
        except OSError as error:
            rule = "make room or give another folder and run the same command again; finished shards are kept"
            raise UserError(f"out={self.folder}: cannot write {name} ({error.strerror}); {rule}") from None

    def missing(self, rank: int = 0, world: int = 1) -> list[str]:
        """The shards of this split still to do, of those that are `rank`'s; UserError where another capture's lies there."""
        names = [name for name in self.facts.shards() if name.rsplit("-", 1)[0] == self.split]
        return [name for name in names[rank::world] if not self.stands(name)]

    def stands(self, name: str) -> bool:
        if self.facts.fault(self.folder / name, self.facts.shards()[name]):
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
        rows, paid = (np.concatenate(parts) for parts in zip(*(job.result() for job in jobs), strict=True))
        assert sum(part.size for part in tokens) == len(rows), f"{sum(part.size for part in tokens)} tokens, {len(rows)} rows"
        assert len(rows) == len(blocks) * self.facts.block_size, f"{len(rows)} rows for {len(blocks)} blocks"
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

    def finish(self) -> bool:
        """Writes the manifest, and removes what killed writers left, if every shard of every split is there."""
        records = {}
        for name in self.facts.shards():
            if not self.stands(name):
                return False
            trailer = read_trailer(self.folder / name)
            del trailer["facts"]
            records[name] = trailer | {"tokens": trailer["tokens"].hex(), "sha256": sha256(self.folder / name)}
        content = {"format": FORMAT, "version": VERSION, "bytes_a_row": self.facts.row.itemsize, "facts": asdict(self.facts)}
        content = json.loads(json.dumps(content | {"shards": records}))
        with self.writing(MANIFEST):
            for stale in self.folder.glob(".*.tmp"):
                stale.unlink()
            write_atomic(self.folder / MANIFEST, json.dumps(content | {"seal": seal(content)}, indent=1))
            fsync(self.folder)
        return True


class Cache:
    """A finished cache: opened without reading a row, then read block by block in any order."""

    def __init__(self, folder: str | Path, key: str = "teacher.path"):
        """UserError naming `key` for no, a foreign or an unfinished cache, or a shard that is missing or cut."""
        self.folder, self.key = Path(folder), key
        content = read_manifest(self.folder, key)
        self.facts, self.records = Facts(**content["facts"]), content["shards"]
        self.shards, self.row = self.facts.shards(), self.facts.row
        for name in self.shards:
            self.check_size(name)

    def fault(self, name: str, what: str) -> UserError:
        rule = "delete that file and run the same data.capture command again, which keeps the others"
        return UserError(f"{self.key}={self.folder}: {name} {what}; {rule}")

    def check_size(self, name: str) -> None:
        wrong = self.facts.fault(self.folder / name, self.shards[name])
        if wrong:
            raise self.fault(name, wrong)

    def read(self, split: str, blocks, k: int | None = None, n: int | None = None) -> Rows:
        """The rows of those blocks [B], in their order: N = B*T; of each the first k entries and n draws, or all.

        UserError where a block does not match its CRC32, or a shard the manifest.
        """
        blocks = np.asarray(blocks, np.int64)
        assert len(blocks) == 0 or 0 <= blocks.min() <= blocks.max() < self.facts.blocks[split], f"{split} {blocks}"
        rows = np.empty((len(blocks), self.facts.block_size), self.row)
        homes = blocks // self.facts.blocks_a_shard
        for home in np.unique(homes).tolist():
            self.read_shard(f"{split}-{home:05d}.bin", blocks, np.flatnonzero(homes == home).tolist(), rows)
        found = decode(self.facts, rows.ravel())
        widths = (k, k, n, None)
        return Rows(*(part if part is None else part[:, :width] for part, width in zip(found, widths, strict=True)))

    def read_shard(self, name: str, blocks: np.ndarray, places: list[int], rows: np.ndarray) -> None:
        """Fills rows[place] with the shard's block number blocks[place]; the file is mapped meanwhile and no longer."""
        self.check_size(name)
        span, size = self.shards[name], self.facts.block_size * self.row.itemsize
        with open(self.folder / name, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as shard:
            *_, facts, tokens = TRAILER.unpack(shard[-TRAILER.size :])
            if facts != self.facts.digest or tokens.hex() != self.records[name]["tokens"]:
                raise self.fault(name, f"is not the shard that {MANIFEST} names")
            for place in places:
                inside = int(blocks[place]) - span[0]
                data = shard[inside * size : (inside + 1) * size]
                if struct.unpack_from("<I", shard, len(span) * size + 4 * inside)[0] != zlib.crc32(data):
                    raise self.fault(name, f"is damaged: block {blocks[place]} does not match its CRC32")
                rows[place] = np.frombuffer(data, self.row)

    def check_tokens(self, name: str, tokens) -> None:
        """UserError unless `tokens` [blocks,T] are the inputs that the shard of that name covers."""
        if hash_tokens(tokens) != self.records[name]["tokens"]:
            rule = "covers other tokens than the data hold at its blocks"
            raise UserError(f"{self.key}={self.folder}: {name} {rule}; set data as it was there, or capture again")

    def check(
        self, *, tokenizer=None, tokens=None, vocab_size=None, block_size=None, kind=None, k=None, n=None, temperature=None
    ):
        """UserError for the first of these that the cache cannot serve; what is None is not asked.

        tokenizer, tokens: fingerprints. vocab_size: the student's, which may have more rows. kind, k, n: the access wanted.
        """
        facts, held = self.facts, KINDS[self.facts.kind].stored
        tells = {*held, "token"} if "top" in held else set(held)
        kinds = [name for name in KINDS if set(KINDS[name].stored) <= tells]
        asked = KINDS[kind if kind in kinds else facts.kind]
        lowest = facts.k if "tail_draws" in asked.stored else 1  # its draws are from outside exactly these entries
        fewer = f"{facts.k}" if lowest == facts.k else f"{facts.k} or less"
        rules = (
            ("data.tokenizer", tokenizer, [facts.tokenizer], f"the one of fingerprint {facts.tokenizer}"),
            ("data", tokens, [facts.tokens], f"what gives the tokens of fingerprint {facts.tokens}"),
            ("model.vocab_size", vocab_size, range(facts.vocab_size, 2**31), f"{facts.vocab_size}, its teacher's"),
            ("model.block_size", block_size, [facts.block_size], f"{facts.block_size}"),
            ("access", kind, kinds, " or ".join(kinds)),
            ("access.k", k if asked.k else None, range(lowest, facts.k + 1), fewer),
            ("access.n", n if asked.n else None, range(1, facts.n + 1), f"{facts.n} or less"),
            ("loss.temperature", temperature, facts.temperatures, " or ".join(map(str, facts.temperatures))),
        )
        for name, value, served, said in rules:
            if value is not None and value not in served:
                raise UserError(
                    f"{name}={value}: the cache {self.folder} is not of that; set {name} to {said}, or capture again"
                )

    def verify(self) -> None:
        """Hashes every shard again; UserError for the first that is not as it was written."""
        for name, record in self.records.items():
            if sha256(self.folder / name) != record["sha256"]:
                raise self.fault(name, "does not match its SHA-256")

    def describe(self) -> str:
        """What the cache is and costs, in a few lines."""
        facts, records = self.facts, self.records.values()
        asked = "".join(f" {name}={getattr(facts, name)}" for name in ("k", "n") if getattr(facts, name))
        splits = [f"{split} {count:,} blocks" for split, count in facts.blocks.items()]
        rows, total = (
            sum(record["rows"] for record in records),
            sum(os.path.getsize(self.folder / name) for name in self.shards),
        )
        lost = sum(record["mean_kl"] * record["rows"] for record in records) / max(rows, 1)
        worst = max((record["worst_kl"] for record in records), default=0)
        lines = {
            "access": f"{facts.kind}{asked}, seed {facts.seed}, vocabulary {facts.vocab_size:,}",
            "temperatures": ", ".join(map(str, facts.temperatures)),
            "rows": f"{rows:,} in {len(self.shards)} shards ({', '.join(splits)} of {facts.block_size})",
            "bytes": f"{self.row.itemsize} a token, {total:,} in all",
            "quantisation": f"{lost:.1e} nats of KL a row, {worst:.1e} at most",
        } | {name: getattr(facts, name) for name in ("teacher", "tokenizer", "tokens")}
        return "\n".join(f"{name:<13}{line}" for name, line in lines.items())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m data.targets", description="Looks at a cache of sparse targets.")
    parser.add_argument("command", choices=("info", "verify"))
    parser.add_argument("path")
    arguments = parser.parse_args()
    try:
        cache = Cache(arguments.path, "path")
        if arguments.command == "verify":
            cache.verify()
        print(cache.describe() if arguments.command == "info" else f"{arguments.path}: whole, {len(cache.shards)} shards")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
