"""What a teacher reveals at a position: as sparse targets with weights, and as the bytes of a cache's row.

N rows (positions), K the teacher's top entries a row, n its draws, V vocabulary, M = the teacher's mass on the K entries.

An entry is an id, of as many bits as V, and a code of one byte that Elias-Fano coding shortens: entries descend, so the codes
of a row ascend. Their low bits are kept as they are; of their high bits h_i a bitmap in which the bits h_i + i are set.

A code is the depth x = log p_top - log p of an entry below the row's top one, rounded to a value of `grid`; 2 bytes a row for
each temperature are the logit of M there, in float16. Decoded entries are scaled to that M, so that neither mass nor tail is
touched and M stays below 1; only the shape within S errs, by e_i, and costs 1/2 Var(e) nats to second order. At worst all
K-1 others lie at one depth x: together they weigh m = sigmoid(log(K-1) - x), and steps of D/sqrt(m) there cost at most
D^2/8. As the integral of sqrt(sigmoid(log(K-1) - x)) is about log(4(K-1)), D = .028 and thus 1e-4 nats at worst hold up to
K=256 at T=1. At another temperature x/T stands for x, and steps of T*D do. access=full: float16 log-probabilities.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import torch

from engine import UserError

LIMIT = 1e-4  # nats of KL that the quantisation of a row may cost, at each stored temperature
STEP, CODES, NOTHING = (
    0.028,
    255,
    255,
)  # D in nats; how many depths a byte tells apart; the code of -inf
SHARD_BYTES = 2**24  # about; what a killed capture does again


class Kind(NamedTuple):
    """One access to a teacher."""

    stored: tuple[
        str, ...
    ]  # token (its top one) | top (k, with log-probs) | draws | tail_draws (outside the top) | all (V)
    k: bool = False  # whether access.k is asked for
    n: bool = False  # whether access.n is asked for; else a kind with draws has one
    tail: str | None = (
        "truncate"  # the weights are final and for T=1 only; None = loss.tail and the temperature are free
    )


ACCESS_KINDS = {
    "greedy": Kind(("token",)),
    "text": Kind(("draws",)),
    "sampled": Kind(("draws",), n=True),
    "topk": Kind(("top",), k=True, tail=None),
    "residual_to_label": Kind(("top",), k=True),
    "unbiased": Kind(("top", "draws"), k=True),
    "stratified": Kind(("top", "tail_draws"), k=True, n=True),
    "full": Kind(("all",), tail=None),
}


class TeacherOutput(NamedTuple):
    """What an access shows of N positions, as arrays or tensors; None where it has no such part."""

    ids: (
        np.ndarray | torch.Tensor | None
    )  # [N,K], the likeliest first (a cache of full: in the vocabulary's order); -1 = empty
    log_probs: np.ndarray | torch.Tensor | None  # [N,K] fp32, at T=1
    log_norm: (
        np.ndarray | torch.Tensor | None
    )  # [N,temperatures] fp32: logsumexp(z/T) - logsumexp(z)/T
    draws: np.ndarray | torch.Tensor | None  # [N,n], -1 = empty


def to_sparse_targets(
    kind: str, ids, log_probs, draws, labels
) -> tuple[torch.Tensor, torch.Tensor]:
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
class CacheSpec:
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
    temperatures: tuple[
        float, ...
    ] = ()  # whose normaliser is known: 1.0, then the others, ascending
    blocks_a_shard: int = 0  # 0: about SHARD_BYTES

    def __post_init__(self):
        kind = ACCESS_KINDS[self.kind]
        self.k = (
            self.vocab_size
            if self.kind == "full"
            else self.k
            if kind.k
            else int(self.kind == "greedy")
        )
        self.n = self.n if kind.n else int("draws" in kind.stored)
        others = {float(T) for T in self.temperatures if T != 1 and kind.tail is None}
        self.temperatures = (1.0, *sorted(others))
        self.blocks_a_shard = self.blocks_a_shard or max(
            1, SHARD_BYTES // (self.block_size * self.row.itemsize)
        )
        assert self.k <= self.vocab_size <= 2**24, self

    @property
    def row(self) -> np.dtype:
        """The bytes of one row."""
        stored = ACCESS_KINDS[self.kind].stored
        if "all" in stored:
            return np.dtype([("log_probs", "<f2", (self.k,))])
        ids = {"ids": self.k, "draws": self.n}
        parts = {
            name: pack_ids(np.zeros((1, count), int), self) for name, count in ids.items() if count
        }
        if "top" in stored:
            mass, codes = (
                np.zeros((1, len(self.temperatures)), "<f2"),
                pack_codes(np.zeros((1, self.k), np.uint8)),
            )
            parts = {"mass": mass, "codes": codes} | parts
        return np.dtype([(name, part.dtype, part.shape[1:]) for name, part in parts.items()])

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


def pack(values: np.ndarray, width: int, more: np.ndarray | None = None) -> np.ndarray:
    """[N,K] of `width` bits -> [N,bytes] uint8: whole low bytes, then a plane for each bit above them, then the bits `more`."""
    (N, K), whole = values.shape, width // 8
    low = values.astype("<i4")[..., None].view("u1")[..., :whole].reshape(N, K * whole)
    planes = [values >> bit & 1 for bit in range(8 * whole, width)] + [
        np.zeros((N, 0), bool) if more is None else more
    ]
    return np.concatenate([low, np.packbits(np.concatenate(planes, 1).astype(bool), 1)], 1)


def unpack(packed: np.ndarray, K: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """What `pack` was given: the values [N,K] (uint8 up to 8 bits, else int32), and the bits that follow them [N,bits] bool."""
    whole, planes, kind = width // 8, width % 8, np.uint8 if width <= 8 else np.int32
    bits = np.unpackbits(packed[:, K * whole :], axis=1)
    parts = [packed[:, byte : K * whole : whole].astype(kind) << 8 * byte for byte in range(whole)]
    parts += [
        bits[:, plane * K : plane * K + K].astype(kind) << 8 * whole + plane
        for plane in range(planes)
    ]
    values = reduce(np.bitwise_or, parts, np.zeros((len(packed), K), kind))
    return values, np.ascontiguousarray(bits[:, planes * K :]).view(bool)


def pack_ids(ids: np.ndarray, facts: CacheSpec) -> np.ndarray:
    """[N,count] -> [N,bytes], of as many bits as V itself: an empty slot, -1, is all ones and thus no id."""
    V = facts.vocab_size
    assert ids.size == 0 or -1 <= ids.min() <= ids.max() < V, f"ids {ids.min()}..{ids.max()}, V={V}"
    return pack(ids, V.bit_length())


def unpack_ids(packed: np.ndarray, count: int, facts: CacheSpec) -> np.ndarray:
    ids = unpack(packed, count, facts.vocab_size.bit_length())[0].astype(np.int32)
    return np.where(ids < facts.vocab_size, ids, -1)


@lru_cache
def elias_fano(k: int) -> tuple[int, int]:
    """How many low bits of k ascending codes are kept as they are, and the length of the bitmap, so that both are least."""
    low = min(range(8), key=lambda low: k * low + (NOTHING >> low))
    return low, k + (NOTHING >> low)


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """[N,K] uint8, ascending -> [N,bytes]."""
    assert (codes[:, 1:] >= codes[:, :-1]).all(), "codes of a row descend"
    (N, K), (low, length) = codes.shape, elias_fano(codes.shape[1])
    bitmap = np.zeros((N, length), bool)
    np.put_along_axis(bitmap, (codes >> low) + np.arange(K), True, 1)
    return pack(codes, low, bitmap)


def unpack_codes(packed: np.ndarray, K: int) -> np.ndarray:
    low, _ = elias_fano(K)
    codes, bitmap = unpack(packed, K, low)
    (N, length), places = bitmap.shape, np.flatnonzero(bitmap)
    assert len(places) == N * K, f"{len(places)} codes in {N} rows of {K}"
    places, starts, own = (
        part.astype(np.uint8) for part in (places, np.arange(N) * length, np.arange(K))
    )  # modulo 256
    high = places.reshape(N, K) - starts[:, None] - own
    return codes | high << low


@lru_cache
def grid(k: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """The depths [256] in nats that codes stand for, ascending, the last infinite; the deepest is 30 T at the largest T."""
    depths = np.linspace(0, 30 * max(temperatures), 30001)
    needed = [
        np.exp(-np.logaddexp(0, depths / T - math.log(max(k - 1, 1))) / 2) / T for T in temperatures
    ]
    density = np.max(needed, 0)  # of codes, times D
    spent = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * depths[1]))
    spent += (
        max(STEP * (CODES - 1) - spent[-1], 0.15) * depths / depths[-1]
    )  # what is to spare goes evenly over all depths
    return np.append(np.interp(np.linspace(0, spent[-1], CODES), spent, depths), np.inf)


def dequantise(
    facts: CacheSpec, codes: np.ndarray, mass: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(log_probs [N,K], log_norm [N,temperatures]) in fp32 of codes [N,K], scaled to the masses of those logits."""
    depths, T = grid(facts.k, facts.temperatures), np.array(facts.temperatures)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        log_mass = -np.log1p(np.exp(-mass.astype(np.float64)))  # [N,temperatures]
        sums = np.stack([np.exp(-depths / each)[codes].sum(1) for each in T], 1)
        sums = np.log(np.where(sums > 0, sums, 1))
        top = log_mass[:, :1] - sums[:, :1]  # [N,1] the top entry's
        log_norm = np.where(np.isfinite(log_mass), top / T + sums - log_mass, 0)
        wide = top - depths[codes]
        log_probs = wide.astype(np.float32)
        below = np.nextafter(log_probs, np.float32(-np.inf))
        log_probs = np.where(
            log_probs > wide, below, log_probs
        )  # rounded down, so that the mass stays within 1
    return log_probs, log_norm.astype(np.float32)


def decode(facts: CacheSpec, rows: np.ndarray) -> TeacherOutput:
    """rows [N] of facts.row -> what `encode` was given, but quantised; full in the vocabulary's order, its ids a view."""
    names, log_probs, log_norm = rows.dtype.names, None, None
    counts = (("ids", facts.k), ("draws", facts.n))
    ids, draws = (
        unpack_ids(rows[name], count, facts) if name in names else None for name, count in counts
    )
    if "codes" in names:
        log_probs, log_norm = dequantise(facts, unpack_codes(rows["codes"], facts.k), rows["mass"])
    elif "log_probs" in names:
        stored, T = rows["log_probs"].astype(np.float32), np.array(facts.temperatures)
        sums = np.stack(
            [np.log(np.exp(stored / np.float32(each)).sum(1, dtype=np.float64)) for each in T], 1
        )
        log_probs, log_norm = (
            stored - sums[:, :1].astype(np.float32),
            (sums - sums[:, :1] / T).astype(np.float32),
        )
        ids = np.broadcast_to(np.arange(facts.k, dtype=np.int32), stored.shape)
    return TeacherOutput(ids, log_probs, log_norm, draws)


def quantization_kl(
    facts: CacheSpec, told: tuple[np.ndarray, np.ndarray], stored: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """[N] KL(t || t stored) over the entries and the tail outcome, the largest over temperatures; NaN where M > 1.

    Both sides: log_probs [N,K] and log_norm [N,temperatures].
    """
    found = []
    for place, T in enumerate(facts.temperatures):
        log_t, log_q = (
            log_probs.astype(np.float64) / T - log_norm[:, place, None]
            for log_probs, log_norm in (told, stored)
        )
        t = np.exp(log_t)
        tail, tail_q = (
            np.maximum(1 - side.sum(1), 1e-9) for side in (t, np.exp(log_q))
        )  # fp32 tells tails to 1e-7
        with np.errstate(invalid="ignore"):
            inside = np.where(t > 0, t * (log_t - log_q), 0).sum(1)
        found.append(np.where(t.sum(1) <= 1 + 1e-4, inside + tail * np.log(tail / tail_q), np.nan))
    return np.max(found, 0)


def quantise(
    facts: CacheSpec, log_probs: np.ndarray, log_norm: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The codes [N,K], the masses' logits [N,temperatures] in float16, and what they cost [N]."""
    wide, depths = log_probs.astype(np.float64), grid(facts.k, facts.temperatures)
    bounds = (depths[1:CODES] + depths[: CODES - 1]) / 2
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        masses = [
            np.exp(wide / T - log_norm[:, place, None]).sum(1)
            for place, T in enumerate(facts.temperatures)
        ]
        masses = np.minimum(np.stack(masses, 1), 1)
        mass = (np.log(masses) - np.log1p(-masses)).astype(np.float16)
        below = np.where(np.isneginf(wide), np.inf, wide.max(1, keepdims=True) - wide)
    codes, paid = np.zeros(wide.shape, np.uint8), np.full(len(wide), np.inf)
    for shift in (
        np.arange(8) / 8 * depths[1]
    ):  # a row may move as a whole: another rounding, the same meaning
        poor = np.flatnonzero(~(paid <= LIMIT / 2))
        if len(poor) == 0:
            break
        trial = np.where(
            np.isinf(below[poor]), NOTHING, np.searchsorted(bounds, below[poor] + shift)
        ).astype(np.uint8)
        spent = quantization_kl(
            facts, (log_probs[poor], log_norm[poor]), dequantise(facts, trial, mass[poor])
        )
        better = ~(spent >= paid[poor])
        codes[poor[better]], paid[poor[better]] = trial[better], spent[better]
    return codes, mass, paid


def encode(
    facts: CacheSpec, ids=None, log_probs=None, log_norm=None, draws=None
) -> tuple[np.ndarray, np.ndarray]:
    """What a teacher revealed at N positions -> rows [N] of facts.row, and the KL [N] that each lost; UserError above LIMIT.

    ids, log_probs [N,k] and draws [N,n] as in `weigh`, log_norm [N,temperatures] (None: T=1 alone): arrays or CPU tensors.
    Entries that do not descend are sorted, an empty slot goes last.
    """
    ids, log_probs, log_norm, draws = (
        part if part is None else np.asarray(part) for part in (ids, log_probs, log_norm, draws)
    )
    N = len(next(part for part in (draws, ids, log_probs) if part is not None))
    rows, paid = np.zeros(N, facts.row), np.zeros(N)
    if {"codes", "log_probs"} & set(rows.dtype.names):
        log_norm = np.zeros((N, 1), np.float32) if log_norm is None else log_norm
        assert log_norm.shape == (N, len(facts.temperatures)), (
            f"log_norm {log_norm.shape} for {facts.temperatures}"
        )
        log_probs = np.where(ids < 0, -np.inf, log_probs).astype(np.float32)
        if facts.kind == "full" or (log_probs[:, 1:] > log_probs[:, :-1]).any():
            order = np.argsort(ids if facts.kind == "full" else -log_probs, 1, kind="stable")
            ids, log_probs = (np.take_along_axis(part, order, 1) for part in (ids, log_probs))
        if facts.kind == "full":
            rows["log_probs"] = log_probs
            paid = quantization_kl(facts, (log_probs, log_norm), decode(facts, rows)[1:3])
        else:
            codes, rows["mass"], paid = quantise(facts, log_probs, log_norm)
    if not (paid <= LIMIT).all():
        rule = f"a row's quantisation costs {paid.max():.1e} nats of KL, {LIMIT} is the limit"
        fix = "set a smaller access.k, or fewer temperatures nearer 1 (nan: too far from it, or no finite logits)"
        raise UserError(
            f"access.k={facts.k} temperatures={list(facts.temperatures)}: {rule}; {fix}"
        )
    if "codes" in rows.dtype.names:
        rows["codes"] = pack_codes(codes)
    for name, part in (("ids", ids), ("draws", draws)):
        if name in rows.dtype.names:
            rows[name] = pack_ids(part, facts)
    return rows, paid
