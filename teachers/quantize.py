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
PIECE = 2**20  # entries that are decoded at a time
WIDEST_STEP = 0.032  # the largest D with codes of one byte


def row_dtype(spec) -> np.dtype:
    """The fields of one row of a teachers.cache.CacheSpec."""
    kind = ACCESS_KINDS[spec.kind]
    fields = []
    if kind.entries == "all":
        fields.append(("log_probs", "<f2", (spec.k,)))
    if kind.entries == "top_k":
        grid = depth_grid(spec.k, spec.temperatures)
        code_type = "u1" if len(grid) == 2**8 else "<u2"
        num_temperatures = len(spec.temperatures)
        fields.append(("mass", "<f2", (num_temperatures,)))
        fields.append(("codes", code_type, (spec.k,)))
    if kind.entries in ("token", "top_k"):
        fields += id_fields("ids", spec.k, spec.vocab_size)
    if kind.draws is not None:
        fields += id_fields("draws", spec.n, spec.vocab_size)
    return np.dtype(fields)


def id_fields(name, count, vocab_size):
    low = (name, "<u2", (count,))
    high = (f"{name}_high", "u1", (count,))
    if vocab_size < 2**16:
        return [low]
    return [low, high]


def store_ids(rows, name, ids, vocab_size):
    """Writes ids [N,K], -1 = empty, into a field of the rows [N]."""
    assert ids.min(initial=0) >= -1
    assert ids.max(initial=0) < vocab_size, f"id {ids.max()}, V={vocab_size}"
    rows[name] = ids & 0xFFFF
    if vocab_size >= 2**16:
        rows[f"{name}_high"] = ids >> 16 & 0xFF


def load_ids(rows, name, vocab_size):
    """[N,K] int32 ids of the rows [N], -1 = empty."""
    ids = rows[name].astype(np.int32)
    if vocab_size >= 2**16:
        high = rows[f"{name}_high"].astype(np.int32)
        ids |= high << 16
    ids[ids >= vocab_size] = -1
    return ids


@lru_cache
def depth_grid(k: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """The depths in nats that codes stand for, ascending: 255 or 65,535 up to 30 T, then inf."""
    deepest = 30 * max(temperatures)
    depths = np.linspace(0, deepest, 30001)

    # How many steps a nat are needed at each depth, times D.
    log_others = math.log(max(k - 1, 1))
    needed = np.zeros_like(depths)
    for T in temperatures:
        log_mass = -np.logaddexp(0, depths / T - log_others)
        needed = np.maximum(needed, np.exp(log_mass / 2) / T)

    # How many down to each depth: the integral, by trapezoids.
    heights = (needed[1:] + needed[:-1]) / 2
    steps_to_depth = np.append(0, np.cumsum(heights * depths[1]))
    total = steps_to_depth[-1]

    # What is left over goes evenly to all depths, at least enough to keep the deep steps small.
    num_steps = 2**8 - 2
    if total > WIDEST_STEP * num_steps:
        num_steps = 2**16 - 2
    left_over = max(STEP * num_steps - total, 0.15)
    steps_to_depth += left_over * depths / deepest
    steps = np.linspace(0, steps_to_depth[-1], num_steps + 1)
    grid = np.interp(steps, steps_to_depth, depths)
    return np.append(grid, np.inf)


def log_sums(log_probs, temperatures, codes=None):
    """[N,temperatures] fp64: the log of each row's sum over exp(log_probs / T).

    log_probs: [N,K], or a table of them for codes [N,K].
    """
    columns = []
    for T in temperatures:
        powers = np.exp(log_probs / T)
        if codes is not None:
            powers = powers[codes]
        sums = powers.sum(axis=1, dtype=np.float64)
        columns.append(np.log(sums))
    return np.stack(columns, axis=1)


def quantise(spec, log_probs, log_norm):
    """log_probs [N,K], log_norm [N,temperatures] -> codes [N,K], logits of M [N,temperatures]."""
    log_probs = log_probs.astype(np.float64)
    grid = depth_grid(spec.k, spec.temperatures)
    finite = grid[:-1]
    middles = (finite[:-1] + finite[1:]) / 2
    top = log_probs.max(axis=1, keepdims=True)
    codes = np.searchsorted(middles, top - log_probs)
    codes[np.isneginf(log_probs)] = len(grid) - 1

    log_mass = log_sums(log_probs, spec.temperatures) - log_norm
    log_mass = np.minimum(log_mass, 0)
    log_tail = np.log(-np.expm1(log_mass))
    return codes, log_mass - log_tail


def dequantise(spec, rows, k=None):
    """rows [N] with log-probabilities -> log_probs [N,k], log_norm [N,temperatures], both fp32.

    A few rows at a time: of a whole vocabulary the steps between would be five times the result.
    """
    num_rows = len(rows)
    log_probs = np.empty((num_rows, spec.k), np.float32)[:, :k]
    log_norm = np.empty((num_rows, len(spec.temperatures)), np.float32)

    step = max(1, PIECE // spec.k)
    for start in range(0, num_rows, step):
        piece = slice(start, start + step)
        unquantised, log_norm[piece] = dequantise_piece(spec, rows[piece])
        log_probs[piece] = unquantised[:, :k]
    return log_probs, log_norm


def dequantise_piece(spec, rows):
    """`dequantise` of all entries at once."""
    temperatures = np.array(spec.temperatures)
    if spec.kind == "full":
        unscaled = rows["log_probs"].astype(np.float32)  # [N,V]
        sums = log_sums(unscaled, spec.temperatures)
        log_mass = np.zeros_like(sums)
    else:
        grid = depth_grid(spec.k, spec.temperatures)
        codes = rows["codes"].astype(np.intp)
        unscaled = -grid[codes]  # [N,K]
        sums = log_sums(-grid, spec.temperatures, codes)
        logits = rows["mass"].astype(np.float64)
        log_mass = -np.log1p(np.exp(-logits))  # [N,temperatures]

    # Scaled to M at T=1; the normalisers follow from M at each temperature.
    empty = np.isneginf(log_mass[:, 0])
    sums[empty] = 0
    shift = (log_mass - sums)[:, :1]  # [N,1]
    log_norm = shift / temperatures + sums - log_mass
    log_norm[empty] = 0

    # Where rounding to fp32 went up, the next lower float: the mass stays within 1.
    exact = unscaled + shift.astype(unscaled.dtype)
    log_probs = exact.astype(np.float32)
    bits = log_probs.view(np.int32)
    bits += log_probs > exact
    return log_probs, log_norm.astype(np.float32)


def quantization_kl(
    spec,
    log_probs,  # [N,K]
    log_norm,  # [N,temperatures]
    stored,  # the TeacherOutput that a cache gives
):
    """[N] KL(teacher || stored) in nats over the entries and the tail outcome.

    The largest over the stored temperatures; NaN where the teacher's mass exceeds 1.
    """
    log_probs = log_probs.astype(np.float64)
    stored_log_probs = stored.log_probs.astype(np.float64)
    largest = np.zeros(len(log_probs))
    for place, T in enumerate(spec.temperatures):
        log_t = log_probs / T - log_norm[:, place, None]
        log_q = stored_log_probs / T - stored.log_norm[:, place, None]
        t = np.exp(log_t)
        mass = t.sum(axis=1)
        stored_mass = np.exp(log_q).sum(axis=1)
        terms = t * (log_t - log_q)
        terms[t == 0] = 0
        kl = terms.sum(axis=1)

        tail = np.maximum(1 - mass, 1e-9)  # fp32 knows tails to 1e-7
        stored_tail = np.maximum(1 - stored_mass, 1e-9)
        kl += tail * np.log(tail / stored_tail)
        kl[mass > 1 + 1e-4] = np.nan
        largest = np.maximum(largest, kl)
    return largest


@np.errstate(all="ignore")  # entries of probability 0, a tail of 0
def encode(
    spec,  # the teachers.cache.CacheSpec
    ids,  # this and the following: the arrays of a TeacherOutput
    log_probs,
    log_norm,
    draws,
):
    """What a teacher revealed at N positions as the rows of a cache.

    Entries may come in any order: the likeliest is stored first, an empty slot last.

    Returns: rows [N] of spec.row, and the KL [N] in nats that quantisation costs each.

    Raises: UserError where a row costs more than KL_LIMIT.
    """
    kind = ACCESS_KINDS[spec.kind]
    num_rows = len(draws if ids is None else ids)
    rows = np.zeros(num_rows, spec.row)
    kl = np.zeros(num_rows)
    if kind.draws is not None:
        store_ids(rows, "draws", draws, spec.vocab_size)
    if kind.entries == "token":
        store_ids(rows, "ids", ids, spec.vocab_size)
    if kind.entries in (None, "token"):
        return rows, kl

    # Entries in their order on disk: the whole vocabulary by id, a support by probability.
    log_probs = np.where(ids < 0, -np.inf, log_probs)
    sort_by = ids if kind.entries == "all" else -log_probs
    order = np.argsort(sort_by, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    log_probs = np.take_along_axis(log_probs, order, axis=1)

    if kind.entries == "all":
        rows["log_probs"] = log_probs
    else:
        store_ids(rows, "ids", ids, spec.vocab_size)
        rows["codes"], rows["mass"] = quantise(spec, log_probs, log_norm)

    stored = decode(spec, rows)
    kl = quantization_kl(spec, log_probs, log_norm, stored)
    if not (kl <= KL_LIMIT).all():
        raise UserError(
            f"access.k={spec.k} temperatures={list(spec.temperatures)}: quantisation costs a row"
            f" {kl.max():.1e} nats, over {KL_LIMIT} (nan: the teacher's probabilities are not"
            " finite or exceed 1); set a smaller access.k, or fewer temperatures nearer 1"
        )
    return rows, kl


@np.errstate(all="ignore")
def decode(
    spec,
    rows: np.ndarray,
    k: int | None = None,
    n: int | None = None,
) -> TeacherOutput:
    """rows [N] of spec.row -> the first k entries and n draws of what `encode` was given, or all.

    log_probs are quantised.
    """
    output = {}
    for name, width in (("ids", k), ("draws", n)):
        if name in spec.row.names:
            output[name] = load_ids(rows, name, spec.vocab_size)[:, :width]
    if spec.kind == "full":
        vocabulary = np.arange(spec.k, dtype=np.int32)
        output["ids"] = np.broadcast_to(vocabulary, (len(rows), spec.k))[:, :k]
    if ACCESS_KINDS[spec.kind].entries in ("top_k", "all"):
        output["log_probs"], output["log_norm"] = dequantise(spec, rows, k)
    return TeacherOutput(**output)
