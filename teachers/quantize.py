"""The bytes of a cache's row: what an access shows of one position, in fields of fixed size.

N rows (positions), K entries a row, V vocabulary, x the depth of an entry: how many nats its
log-probability lies below the row's likeliest one; M the teacher's mass on the K entries.

| field | bytes | what |
|---|---|---|
| mass | 2 for each temperature | float16 logit of M at that temperature |
| codes | 1 for each entry (2: see below) | number of the entry's depth on a grid; the last: -inf |
| ids, draws | 2 for each; a third in ids_high, draws_high from V=65,536 | all bits set: empty |
| log_probs | 2 V | access=full: float16, in the vocabulary's order |

Decoded entries are scaled so that they sum to the stored M: the mass and the tail stay what they
were, and only the shape within the K entries has an error.

**How wide the grid's steps may be.** If entry i's depth is off by e_i, then the row costs
KL = Var(e)/2 to second order, where the variance is taken over the entries' probabilities. Steps of
width s leave |e| <= s/2, so that entries of probability m together cost at most m s^2/8. If all K-1
entries below the top one lie at depth x, their probability is m(x) = sigmoid(log(K-1) - x). A step
of s(x) = D/sqrt(m(x)) there costs D^2/8 whatever x is, and the same bound holds for entries spread
over many depths. So D = 0.028 keeps every row below 1e-4 nats. The number of steps is the integral
of 1/s(x) = sqrt(m(x))/D, which is about log(4(K-1))/D: 255 codes are enough up to K=256 at T=1.
At another temperature x/T takes the place of x, and steps of T D/sqrt(m(x/T)) do; with several
temperatures the grid has the narrowest of these steps everywhere.

Errors are spread evenly over a step, unless a row is made to be bad, and then cost a third of the
bound. One byte therefore serves up to D = 0.032, for instance K=64 with temperatures 1 and 2.
Beyond that (K=128 with 1 and 2) a code takes two bytes. `encode` checks every row.
"""

import math
from functools import lru_cache

import numpy as np

from engine import UserError
from teachers.access import ACCESS_KINDS, TeacherOutput

KL_LIMIT = 1e-4  # nats that quantisation may cost a row, at each stored temperature
STEP = 0.028  # D, in nats
WIDEST_STEP = 0.032  # the largest D with codes of one byte


def row_dtype(spec) -> np.dtype:
    """The fields of one row of a teachers.cache.CacheSpec."""
    kind = ACCESS_KINDS[spec.kind]
    if kind.entries == "all":
        return np.dtype([("log_probs", "<f2", spec.k)])
    fields = []
    if kind.entries == "top_k":
        code_bytes = 1 if len(depth_grid(spec.k, spec.temperatures)) == 2**8 else 2
        fields.append(("mass", "<f2", len(spec.temperatures)))
        fields.append(("codes", f"<u{code_bytes}", spec.k))
    for name, count in (("ids", spec.k), ("draws", spec.n)):
        if count > 0:
            fields.append((name, "<u2", count))
        if count > 0 and spec.vocab_size >= 2**16:
            fields.append((f"{name}_high", "u1", count))
    return np.dtype([(name, code, (count,)) for name, code, count in fields])


@lru_cache
def depth_grid(k: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """The depths in nats that codes stand for, ascending: 255 or 65,535 up to 30 T, then inf."""
    depths = np.linspace(0, 30 * max(temperatures), 30001)

    # How many steps a nat are needed at each depth, times D, and how many down to it.
    needed = np.zeros_like(depths)
    for T in temperatures:
        log_mass = -np.logaddexp(0, depths / T - math.log(max(k - 1, 1)))
        needed = np.maximum(needed, np.exp(log_mass / 2) / T)
    areas = (needed[1:] + needed[:-1]) / 2 * depths[1]
    steps_to_depth = np.append(0, np.cumsum(areas))

    # What is left over goes evenly to all depths, at least enough to keep the deep steps small.
    num_steps = 2**8 - 2
    if steps_to_depth[-1] > WIDEST_STEP * num_steps:
        num_steps = 2**16 - 2
    left_over = max(STEP * num_steps - steps_to_depth[-1], 0.15)
    steps_to_depth += left_over * depths / depths[-1]
    steps = np.linspace(0, steps_to_depth[-1], num_steps + 1)
    return np.append(np.interp(steps, steps_to_depth, depths), np.inf)


def store_ids(rows: np.ndarray, name: str, ids: np.ndarray, vocab_size: int) -> None:
    """ids [N,K] below V, or -1 = empty, into a field of the rows."""
    assert ids.min(initial=0) >= -1, f"id {ids.min()}"
    assert ids.max(initial=0) < vocab_size, f"id {ids.max()}, V={vocab_size}"
    rows[name] = ids & 0xFFFF
    if vocab_size >= 2**16:
        rows[f"{name}_high"] = ids >> 16 & 0xFF


def load_ids(rows: np.ndarray, name: str, vocab_size: int) -> np.ndarray:
    """[N,K] int32, -1 = empty."""
    ids = rows[name].astype(np.int32)
    if vocab_size >= 2**16:
        ids |= rows[f"{name}_high"].astype(np.int32) << 16
    ids[ids >= vocab_size] = -1
    return ids


@np.errstate(divide="ignore", invalid="ignore", over="ignore")  # an empty row, and M = 0 or 1
def to_codes(spec, log_probs: np.ndarray, log_norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log_probs [N,K], log_norm [N,temperatures] -> codes [N,K], logits of M [N,temperatures]."""
    log_probs = log_probs.astype(np.float64)
    grid = depth_grid(spec.k, spec.temperatures)
    midpoints = (grid[1:-1] + grid[:-2]) / 2
    depths = log_probs.max(1, keepdims=True) - log_probs
    codes = np.searchsorted(midpoints, depths)
    codes[np.isneginf(log_probs)] = len(grid) - 1

    logits = np.empty(log_norm.shape)
    for place, T in enumerate(spec.temperatures):
        mass = np.exp(log_probs / T - log_norm[:, place, None]).sum(1)
        mass = np.minimum(mass, 1)
        logits[:, place] = np.log(mass) - np.log1p(-mass)
    return codes, logits.astype(np.float16)


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def from_codes(spec, codes: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """codes [N,K], logits of M [N,temperatures] -> log_probs [N,K], log_norm [N,temperatures]."""
    grid = depth_grid(spec.k, spec.temperatures)
    codes = codes.astype(np.intp)  # the fastest index
    log_mass = -np.log1p(np.exp(-logits.astype(np.float64)))  # [N,temperatures]

    # The sum of a row's entries, relative to the top one. An empty row's is 0; others' at least 1.
    T = np.array(spec.temperatures)
    sums = [np.exp(-grid / each)[codes].sum(1) for each in T]
    log_sums = np.log(np.maximum(np.stack(sums, 1), 1))  # [N,temperatures]

    # The top entry follows from M at T=1, the normalisers from M at each temperature.
    top = log_mass[:, :1] - log_sums[:, :1]  # [N,1]
    log_norm = top / T + log_sums - log_mass
    log_norm[np.isneginf(top[:, 0])] = 0

    # Rounded down, so that the mass stays within 1: where it was rounded up, the next lower float.
    exact = top - grid[codes]
    log_probs = exact.astype(np.float32)
    log_probs.view(np.int32)[...] += log_probs > exact
    return log_probs, log_norm.astype(np.float32)


def normalise(spec, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float16 log-probs [N,V] -> log_probs [N,V] that sum to 1, log_norm [N,temperatures]."""
    stored = stored.astype(np.float32)
    T = np.array(spec.temperatures)
    sums = [np.exp(stored / np.float32(each)).sum(1, dtype=np.float64) for each in T]
    log_sums = np.log(np.stack(sums, 1))  # [N,temperatures]
    log_probs = stored - log_sums[:, :1].astype(np.float32)
    log_norm = log_sums - log_sums[:, :1] / T
    return log_probs, log_norm.astype(np.float32)


@np.errstate(invalid="ignore")  # 0 log 0 = 0
def quantization_kl(
    spec, log_probs: np.ndarray, log_norm: np.ndarray, stored: TeacherOutput
) -> np.ndarray:
    """[N] KL(teacher || stored) in nats over the entries and the tail outcome.

    The largest over the stored temperatures; NaN where the teacher's mass exceeds 1.
    """
    largest = np.zeros(len(log_probs))
    for place, T in enumerate(spec.temperatures):
        log_t = log_probs.astype(np.float64) / T - log_norm[:, place, None]
        log_q = stored.log_probs.astype(np.float64) / T - stored.log_norm[:, place, None]
        t = np.exp(log_t)
        mass = t.sum(1)
        tail = np.maximum(1 - mass, 1e-9)  # fp32 knows tails to 1e-7
        stored_tail = np.maximum(1 - np.exp(log_q).sum(1), 1e-9)
        inside = np.where(t > 0, t * (log_t - log_q), 0).sum(1)
        kl = inside + tail * np.log(tail / stored_tail)
        kl[~(mass <= 1 + 1e-4)] = np.nan
        largest = np.maximum(largest, kl)
    return largest


def encode(
    spec, ids=None, log_probs=None, log_norm=None, draws=None
) -> tuple[np.ndarray, np.ndarray]:
    """What a teacher revealed at N positions as the rows of a cache.

    Args:
        spec: the teachers.cache.CacheSpec.
        ids, log_probs, log_norm, draws: the fields of a TeacherOutput, as arrays or CPU tensors.
            Entries that do not descend are sorted, and an empty slot goes last.

    Returns: rows [N] of spec.row, and the KL [N] in nats that quantisation costs each.

    Raises: UserError where a row costs more than KL_LIMIT.
    """
    kind = ACCESS_KINDS[spec.kind]
    num_rows = len(draws) if ids is None else len(ids)
    rows = np.zeros(num_rows, spec.row)
    if kind.draws is not None:
        store_ids(rows, "draws", np.asarray(draws), spec.vocab_size)
    if kind.entries is None:
        return rows, np.zeros(num_rows)
    ids = np.asarray(ids)
    if kind.entries == "token":
        store_ids(rows, "ids", ids, spec.vocab_size)
        return rows, np.zeros(num_rows)

    # Entries in their order on disk: the whole vocabulary by id, a support by probability.
    log_norm = np.asarray(log_norm)
    log_probs = np.where(ids < 0, -np.inf, np.asarray(log_probs)).astype(np.float32)
    order = np.argsort(ids if kind.entries == "all" else -log_probs, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    log_probs = np.take_along_axis(log_probs, order, axis=1)

    if kind.entries == "all":
        rows["log_probs"] = log_probs
    else:
        store_ids(rows, "ids", ids, spec.vocab_size)
        rows["codes"], rows["mass"] = to_codes(spec, log_probs, log_norm)
    kl = quantization_kl(spec, log_probs, log_norm, decode(spec, rows))
    if not (kl <= KL_LIMIT).all():
        raise UserError(
            f"access.k={spec.k} temperatures={list(spec.temperatures)}: a row's quantisation costs"
            f" {kl.max():.1e} nats of KL, {KL_LIMIT} is the limit; set a smaller access.k, or fewer"
            " temperatures nearer 1 (nan: too far from it, or no finite logits)"
        )
    return rows, kl


def decode(spec, rows: np.ndarray) -> TeacherOutput:
    """rows [N] of spec.row -> what `encode` was given, in arrays and with quantised log_probs."""
    kind = ACCESS_KINDS[spec.kind]
    ids = None
    log_probs = None
    log_norm = None
    draws = None
    if kind.entries in ("token", "top_k"):
        ids = load_ids(rows, "ids", spec.vocab_size)
    if kind.entries == "top_k":
        log_probs, log_norm = from_codes(spec, rows["codes"], rows["mass"])
    if kind.entries == "all":
        log_probs, log_norm = normalise(spec, rows["log_probs"])
        ids = np.broadcast_to(np.arange(spec.k, dtype=np.int32), log_probs.shape)
    if kind.draws is not None:
        draws = load_ids(rows, "draws", spec.vocab_size)
    return TeacherOutput(ids, log_probs, log_norm, draws)
