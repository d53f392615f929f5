"""The torch backend of every op: row chunks of logits, each made, used and overwritten. N*V elements never exist.

A chunk's tile z [c,V] goes through one exponential. With S a row's K ids, b = max(1,T) and o = min(1,T):

    m = max of z off S        E = exp((z - m)/b), 0 on S       s = sum E       so off S: logsumexp(z/b) = m/b + log s

S is put back from its K gathered logits, so a tail of 1e-30 is as exact as one of .3. The other temperature, where both
the divergence's T and the cross-entropy's 1 are wanted, is the power E^(b/o). With G = sum of df/dl over all outcomes,
the gradient of the logits is, off S, E times a factor of the row (plus E^(b/o) times another, plus a constant under
smooth). The tile is never scaled: the factor f goes on the rows of d_hidden and of hidden, and the K+1 special entries
are written as value/f.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .common import LossOutput, Spec, compute_dtype, reduce
from .divergence import divergence, merge_duplicates, sides, slope, smooth_part, tail_of, teacher_log_probs

TILE_BYTES = 112 * 2**20  # a chunk's logits on a CPU; all scratch stays within 256 MiB
BLOCK_BYTES = 4 * 2**20  # rows worked on at a time: they stay in the CPU's cache from the product to the last sum
TINY = 1e-20  # least magnitude of a row factor; what it adds to a gradient is below any dtype's notice


class Targets(NamedTuple):
    """One chunk's targets, or all rows'."""

    ids: Tensor  # [N,K] int64, unique in a row, -1 = empty
    lt: Tensor  # [N,K] teacher log-probabilities at T
    labels: Tensor | None  # [N]
    weights: Tensor  # [N] share of each row in the loss (0 = ignored)

    def rows(self, rows: slice) -> "Targets":
        return Targets(*(None if part is None else part[rows] for part in self))


class Sums(NamedTuple):
    """What one pass over a tile leaves of each row. Logits and normalisers are relative to the row's largest logit `peak`."""

    peak: Tensor  # [c]
    top: Tensor  # [c] m - peak, <= 0
    zs: Tensor  # [c,K] logits on S, -inf in empty slots
    z_label: Tensor | None  # [c]
    log_s: dict[float, Tensor]  # temperature -> [c] log of the sum over the tokens off S of exp((z-m)/T)
    lse: dict[float, Tensor]  # temperature -> [c] logsumexp(z/T) over the whole row
    off_mean: Tensor | None  # [c] mean of z off S (smooth)
    cap_slope: Tensor | None  # [c,V] derivative of the softcap
    outside: Tensor  # [c] how many tokens are off S


def make_targets(ids, log_probs, labels, log_norm, spec: Spec, dtype: torch.dtype, weights: Tensor) -> Targets:
    ids, log_probs = merge_duplicates(ids, log_probs.to(dtype))
    log_norm = None if log_norm is None else log_norm.to(dtype)
    return Targets(ids, teacher_log_probs(log_probs, log_norm, spec.temperature), labels, weights)


def kept_rows(labels: Tensor | None, like: Tensor, ignore_index: int) -> Tensor:
    """[N] 1 in rows that count, 0 in ignored ones."""
    dtype = compute_dtype(like)
    if labels is None:
        return torch.ones(len(like), dtype=dtype, device=like.device)
    return (labels != ignore_index).to(dtype)


def put(tile: Tensor, ids: Tensor, values: Tensor) -> None:
    """tile[row, id] = value for every slot with an id; empty slots change nothing."""
    if ids.shape[1] == 0:
        return
    best = ids.argmax(1, keepdim=True)  # a slot with an id, if the row has one: empty slots repeat its write
    slot = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    slot = torch.where(ids >= 0, slot, best)
    places, values = ids.gather(1, slot).clamp(min=0), values.gather(1, slot)
    tile.scatter_(1, places, torch.where(ids.gather(1, best) >= 0, values, tile[:, :1]))


def blocks(*tensors: Tensor | None):
    """The same row blocks of several [c,...] tensors, sized so that a block of the first stays in a CPU's cache."""
    tile = tensors[0]
    rows = len(tile) if tile.device.type != "cpu" else max(1, BLOCK_BYTES // (tile.shape[1] * tile.element_size()))
    for start in range(0, len(tile), rows):
        yield [None if tensor is None else tensor[start : start + rows] for tensor in tensors]


def scan(z: Tensor, ids: Tensor, labels: Tensor | None, temperatures: set[float], spec: Spec) -> Sums:
    """One pass over logits z [c,V], which become E: 0 on S, exp((z-m)/b) elsewhere, b the largest of `temperatures`."""
    cap_slope = None
    if spec.softcap is not None:
        z.div_(spec.softcap).tanh_()
        cap_slope = 1 - z * z
        z.mul_(spec.softcap)
    zs = z.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    z_label = None if labels is None else z.gather(1, labels.long().clamp(min=0, max=z.shape[1] - 1)[:, None])[:, 0]
    outside, off_mean = z.shape[1] - (ids >= 0).sum(1), None
    if spec.tail == "smooth":
        put(z, ids, torch.zeros_like(zs))
        off_mean = z.sum(1) / outside.clamp(min=1)
    put(z, ids, torch.full_like(zs, -math.inf))
    base, tops, sums = max(temperatures), [], {temperature: [] for temperature in temperatures}
    for (block,) in blocks(z):
        top = block.amax(1, keepdim=True).clamp(min=-1e30)  # finite where nothing is off S
        block.sub_(top)
        (block if base == 1 else block.div_(base)).exp_()
        tops.append(top[:, 0])
        for temperature, parts in sums.items():
            parts.append((block if temperature == base else block.pow(base / temperature)).sum(1))
    top = torch.cat(tops)
    peak = top if ids.shape[1] == 0 else torch.maximum(top, zs.amax(1))
    top, zs, log_s = top - peak, zs - peak[:, None], {T: torch.cat(parts).log() for T, parts in sums.items()}
    lse = {T: torch.logaddexp(top / T + value, (zs / T).logsumexp(1)) for T, value in log_s.items()}
    z_label = None if labels is None else z_label - peak
    off_mean = None if off_mean is None else off_mean - peak
    return Sums(peak, top, zs, z_label, log_s, lse, off_mean, cap_slope, outside)


def row_losses(sums: Sums, targets: Targets, spec: Spec) -> tuple[LossOutput, tuple[Tensor, Tensor, Tensor]]:
    """Each row's losses [c], and (g [c,K], g_tail [c], u [c]): df/dl on S, on the tail, and smooth's constant."""
    T, lse = spec.temperature, sums.lse[spec.temperature]
    ls = sums.zs / T - lse[:, None]  # [c,K]
    log_tail = sums.top / T + sums.log_s[T] - lse
    teacher, student = sides(targets.lt, ls, log_tail, sums.outside, spec.tail)
    kl = divergence(teacher, student, spec.divergence, spec.beta)
    g = slope(teacher, student, spec.divergence, spec.beta)
    zero = torch.zeros_like(lse)
    g_tail, u = zero, zero
    if spec.tail == "ghost":
        g, g_tail = g[:, :-1], g[:, -1]
    elif spec.tail == "renormalize_both":
        g = g - student.exp() * g.sum(1, keepdim=True)  # through the student's own normaliser
    elif spec.tail == "smooth":
        kl = kl + smooth_part(targets.lt, sums.off_mean / T - lse, sums.outside)
        g_tail = -tail_of(targets.lt, sums.outside)
        u = g_tail / sums.outside.clamp(min=1)
    ce = zero if sums.z_label is None else sums.lse[1.0] - sums.z_label
    loss = (1 - spec.kl_weight) * ce + spec.kl_weight * T * T * kl
    return LossOutput(loss, kl, ce, targets.lt.exp().sum(1), ls.exp().sum(1)), (g, g_tail, u)


def gradient(z: Tensor, sums: Sums, targets: Targets, spec: Spec, slopes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Turns E in z [c,V] into the gradient of each row's loss for its logits, but for a row factor that is returned, [c]."""
    (g, g_tail, u), T, base = slopes, spec.temperature, max(sums.lse)
    share = 0.0 if sums.z_label is None else 1 - spec.kl_weight
    scale = spec.kl_weight * T  # T^2 of the loss times 1/T of z/T
    G = g.sum(1) + g_tail
    factors = {T: -scale * G * (sums.top / T - sums.lse[T]).exp()}
    if spec.tail == "ghost":  # g_tail * p/p_tail is g_tail * E/s: no quotient of small numbers
        factors[T] = factors[T] + scale * torch.where(g_tail == 0, 0.0, g_tail * (-sums.log_s[T]).exp())
    if share:
        factors[1.0] = factors.get(1.0, 0.0) + share * (sums.top - sums.lse[1.0]).exp()
    f = factors.pop(base, torch.zeros_like(G))
    f = torch.where(f.abs() < TINY, TINY, f)
    other, ratio = next(((base / T, (value / f)[:, None]) for T, value in factors.items()), (1.0, None))
    constant = (scale * u / f)[:, None] if spec.tail == "smooth" else None
    if ratio is not None or constant is not None or sums.cap_slope is not None:
        for block, times, plus, cap in blocks(z, ratio, constant, sums.cap_slope):
            if times is not None:
                block.addcmul_(block.pow(other), times)
            if plus is not None:
                block.add_(plus)
            if cap is not None:
                block.mul_(cap)
    value = scale * (g - G[:, None] * (sums.zs / T - sums.lse[T][:, None]).exp())  # [c,K]
    if share:
        value = value + share * (sums.zs - sums.lse[1.0][:, None]).exp()
    if sums.cap_slope is not None:
        value = value * sums.cap_slope.gather(1, targets.ids.clamp(min=0))
    put(z, targets.ids, value / f[:, None])
    if share:
        places = targets.labels.long().clamp(min=0, max=z.shape[1] - 1)[:, None]
        cap = 1.0 if sums.cap_slope is None else sums.cap_slope.gather(1, places)[:, 0]
        z.scatter_add_(1, places, (-share * cap / f)[:, None])
    return f


def chunk_rows(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, softcap: bool = False) -> int:
    """Rows of a chunk: on a CPU what TILE_BYTES holds, at most 1,024 unless they fit its cache; on a GPU about 4.2M/D."""
    if device.type != "cpu":
        most = min(max(256, -(-N // 4)), max(256, 4_200_000 // D))
    else:
        row = V * (8 if dtype == torch.float64 else 4)
        most = max(16, min(TILE_BYTES // (2 if softcap else 1) // row, max(1024, BLOCK_BYTES // row)))
    return max(1, -(-N // max(1, -(-N // most))))  # even chunks


def run(make_tile, sink, targets: Targets, spec: Spec, rows: int) -> LossOutput:
    """Every row's losses, [N] each, by chunks: tile = make_tile(slice); sink(slice, tile, row factor [c,1]) unless None."""
    found = []
    temperatures = {float(spec.temperature)} | (set() if targets.labels is None else {1.0})
    for start in range(0, len(targets.ids), rows):
        place = slice(start, start + rows)
        part, z = targets.rows(place), make_tile(place)
        sums = scan(z, part.ids, part.labels, temperatures, spec)
        losses, slopes = row_losses(sums, part, spec)
        found.append(losses)
        if sink is not None:
            factor = gradient(z, sums, part, spec, slopes)
            sink(place, z, (factor * part.weights)[:, None])
    if not found:
        return LossOutput(*(torch.zeros_like(targets.weights) for _ in LossOutput._fields))
    return LossOutput(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def reduced(rows: LossOutput, weights: Tensor, reduction: str) -> LossOutput:
    return LossOutput(*(reduce(part, weights, reduction) for part in rows))
