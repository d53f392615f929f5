"""The torch backend of every op: row chunks of logits, each made, used and overwritten. N*V elements never exist.

A chunk's tile z [c,V] goes through one softmax. With S a row's K ids, b = max(1,T) and o = min(1,T):

    E = softmax(z/b) over the tokens off S, 0 on S      m = max of z off S      so off S: logsumexp(z/b) = m/b - log max E

S is put back from its K gathered logits, so a tail of 1e-30 is as exact as one of .3. The other temperature, where both
the divergence's T and the cross-entropy's 1 are wanted, is the power (E / max E)^(b/o). With G = sum of df/dl over all
outcomes, the gradient of the logits is, off S, E times a factor of the row (plus that power times another, plus a constant
under smooth). The tile is never scaled: the factor f goes on the rows of d_hidden and of hidden, and the K+1 special entries
are written as value/f.
"""

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from .common import LossOutput, Spec, compute_dtype
from .divergence import FAR, divergence, merge_duplicates, sides, smooth_part, tail_of

TILE_BYTES = 136 * 2**20  # a chunk of logits on a CPU; all scratch stays within 256 MiB
BLOCK_BYTES = 4 * 2**20  # rows worked on at a time: they stay in the CPU's cache from the first pass to the last
UPCAST_BYTES = 16 * 2**20  # a narrower weight is widened on a CPU in blocks of this size
PAD = 16  # rows of an aligned tile start at multiples of so many columns: 16-byte loads, whatever V is
TINY = 1e-20  # least magnitude of a row factor; what it adds to a gradient is below any dtype's notice


class Targets(NamedTuple):
    """What the teacher and the data say of some rows."""

    ids: Tensor  # [N,K] int64, negative = empty
    log_probs: Tensor  # [N,K] the teacher's times T: those at T=1 less T*log_norm; those at T once `merged`
    labels: Tensor | None  # [N] int64
    weights: Tensor  # [N] share of each row in the loss (0 = ignored)

    def rows(self, place: slice) -> "Targets":
        return Targets(*(None if part is None else part[place] for part in self))

    def merged(self, temperature: float) -> "Targets":
        """ids unique in a row, log_probs at `temperature`; nothing of an ignored row is left, whatever it held."""
        kept = (self.weights != 0)[:, None]
        ids = torch.where(kept, self.ids.long(), -1)
        ids, log_probs = merge_duplicates(ids, self.log_probs.to(self.weights.dtype))
        labels = None if self.labels is None else torch.where(kept[:, 0], self.labels, 0)
        return self._replace(ids=ids, log_probs=log_probs / temperature, labels=labels)


class Sums(NamedTuple):
    """What one pass over a tile leaves of each row. Logits and normalisers are relative to its largest logit `peak`."""

    peak: Tensor  # [c]
    zs: Tensor  # [c,K] logits on S, -inf in empty slots
    z_label: Tensor | None  # [c]
    off: dict[float, Tensor]  # temperature -> [c] logsumexp(z/T) over the tokens off S
    lse: dict[float, Tensor]  # temperature -> [c] the same over the whole row
    largest: Tensor  # [c] max E
    power: dict[float, Tensor]  # the other temperatures o -> [c] sum of (E / max E)^(b/o)
    off_mean: Tensor | None  # [c] mean of z off S (smooth)
    cap_slope: Tensor | None  # [c,V] derivative of the softcap, where a gradient is wanted
    outside: Tensor  # [c] how many tokens are off S


def put(tile: Tensor, ids: Tensor, values: Tensor) -> None:
    """tile[row, id] = value for every slot with an id; empty slots change nothing."""
    if ids.shape[1] == 0:
        return
    last = ids.argmax(1, keepdim=True)  # a slot with an id, if the row has one: empty slots repeat its write
    slot = torch.where(ids >= 0, torch.arange(ids.shape[1], device=ids.device), last)
    places, values = ids.gather(1, slot).clamp(min=0), values.gather(1, slot)
    tile.scatter_(1, places, torch.where(ids.gather(1, last) >= 0, values, tile[:, :1]))


def blocks(tile: Tensor, *others: Tensor | None):
    """The same row blocks of several [c,...] tensors, sized so that a block of the first stays in a CPU's cache."""
    rows = len(tile) if tile.device.type != "cpu" else max(1, BLOCK_BYTES // (tile.shape[1] * tile.element_size()))
    for start in range(0, len(tile), rows):
        yield [None if tensor is None else tensor[start : start + rows] for tensor in (tile, *others)]


def raised(block: Tensor, largest: Tensor, exponent: float, room: Tensor) -> Tensor:
    """(E / max E)^exponent of a block, in `room`: memory new for each block lies in pieces, 118 MiB in all [measured]."""
    return torch.div(block, largest, out=room[: len(block)]).pow_(exponent)


def cap(z: Tensor, softcap: float | None, want_slope: bool = False) -> Tensor | None:
    """z -> c*tanh(z/c) in place; returns its derivative [c,V] if wanted."""
    if softcap is None:
        return None
    z.div_(softcap).tanh_()
    cap_slope = (z * z).neg_().add_(1) if want_slope else None
    z.mul_(softcap)
    return cap_slope


def scan(z: Tensor, ids: Tensor, labels: Tensor | None, temperatures: set[float], spec: Spec, grad: bool) -> Sums:
    """One pass over logits z [c,V], which become E: 0 on S, their softmax at the largest of `temperatures` elsewhere."""
    cap_slope = cap(z, spec.softcap, grad)
    zs = z.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    z_label = None if labels is None else z.gather(1, labels[:, None])[:, 0]
    outside, off_mean = z.shape[1] - (ids >= 0).sum(1), None
    if spec.tail == "smooth":
        put(z, ids, torch.zeros_like(zs))
        off_mean = z.sum(1) / outside.clamp(min=1)
    put(z, ids, torch.full_like(zs, FAR))  # finite, or a row without a token off S would be no number
    base = max(temperatures)
    tops, sums, powers = [], [], {T: [] for T in temperatures - {base}}
    room = torch.empty_like(next(blocks(z))[0]) if powers and len(z) else None
    for (block,) in blocks(z):
        tops.append(block.amax(1))
        torch.softmax(block if base == 1 else block.div_(base), 1, out=block)
        sums.append(block.amax(1))
        for T, parts in powers.items():  # of E itself they would underflow
            parts.append(raised(block, sums[-1][:, None], base / T, room).sum(1))
    top, largest = torch.cat(tops), torch.cat(sums)
    peak = top if ids.shape[1] == 0 else torch.maximum(top, zs.amax(1))
    top, zs = torch.where(outside > 0, top - peak, -math.inf), zs - peak[:, None]
    power = {T: torch.cat(parts) for T, parts in powers.items()}
    off = {base: top / base - largest.log()} | {T: top / T + value.log() for T, value in power.items()}
    lse = {T: torch.logaddexp(value, (zs / T).logsumexp(1)) for T, value in off.items()}
    z_label = None if labels is None else z_label - peak
    off_mean = None if off_mean is None else off_mean - peak
    return Sums(peak, zs, z_label, off, lse, largest, power, off_mean, cap_slope, outside)


def row_losses(sums: Sums, lt: Tensor, spec: Spec) -> tuple[LossOutput, tuple[Tensor, Tensor, Tensor]]:
    """Each row's losses [c], and (g [c,K], g_tail [c], u [c]): df/dl on S, on the tail, and smooth's constant."""
    T, lse = spec.temperature, sums.lse[spec.temperature]
    ls = sums.zs / T - lse[:, None]  # [c,K]
    log_tail = sums.off[T] - lse
    teacher, student = sides(lt, ls, log_tail, sums.outside, spec.tail)
    kl, g = divergence(teacher, student, spec.divergence, spec.beta)
    zero = torch.zeros_like(lse)
    g_tail, u = zero, zero
    if spec.tail == "ghost":
        g, g_tail = g[:, :-1], g[:, -1]
    elif spec.tail == "renormalize_both":
        g = g - student.exp() * g.sum(1, keepdim=True)  # through the student's own normaliser
    elif spec.tail == "smooth":
        kl = kl + smooth_part(lt, sums.off_mean / T - lse, sums.outside)
        g_tail = -tail_of(lt, sums.outside)
        u = g_tail / sums.outside.clamp(min=1)
    ce = zero if sums.z_label is None else sums.lse[1.0] - sums.z_label
    loss = (1 - spec.kl_weight) * ce + spec.kl_weight * T * T * kl
    return LossOutput(loss, kl, ce, lt.exp().sum(1), ls.exp().sum(1)), (g, g_tail, u)


def gradient(z: Tensor, sums: Sums, targets: Targets, spec: Spec, slopes: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Turns E in z [c,V] into the gradient of each row's loss for its logits, but for a row factor, returned [c]."""
    (g, g_tail, u), T, base = slopes, spec.temperature, max(sums.lse)
    share = 0.0 if sums.z_label is None else 1 - spec.kl_weight
    scale = spec.kl_weight * T  # T^2 of the loss times 1/T of z/T
    G = g.sum(1) + g_tail
    tails = {t: (sums.off[t] - lse).exp() for t, lse in sums.lse.items()}  # the student's mass off S
    factors = {T: -scale * G * tails[T]}
    if spec.tail == "ghost":
        factors[T] = factors[T] + scale * g_tail
    if share:
        factors[1.0] = factors.get(1.0, 0.0) + share * tails[1.0]
    f = factors.pop(base, torch.zeros_like(G))
    f = torch.where(f.abs() < TINY, TINY, f)
    other, ratio = next(((base / t, (value / f / sums.power[t])[:, None]) for t, value in factors.items()), (1.0, None))
    constant = (scale * u / f)[:, None] if spec.tail == "smooth" else None
    room = None if ratio is None else torch.empty_like(next(blocks(z))[0])
    for block, largest, times, plus, slope in blocks(z, sums.largest[:, None], ratio, constant, sums.cap_slope):
        if times is not None:
            block.addcmul_(raised(block, largest, other, room), times)
        if plus is not None:
            block.add_(plus)
        if slope is not None:
            block.mul_(slope)
    value = scale * (g - G[:, None] * (sums.zs / T - sums.lse[T][:, None]).exp())  # [c,K]
    if share:
        value = value + share * (sums.zs - sums.lse[1.0][:, None]).exp()
    if sums.cap_slope is not None:
        value = value * sums.cap_slope.gather(1, targets.ids.clamp(min=0))
    put(z, targets.ids, value / f[:, None])
    if share:
        places = targets.labels[:, None]
        slope = 1.0 if sums.cap_slope is None else sums.cap_slope.gather(1, places)
        z.scatter_add_(1, places, -share * slope / f[:, None])
    return f


def log_probs(z: Tensor, targets: Targets, spec: Spec, out: Tensor) -> Tensor | None:
    """l at the ids and lse into out [c,K+1]; or, of their slopes [c,K+1], z's gradient but for a row factor [c,1], returned."""
    ids, T, places = targets.ids, spec.temperature, targets.ids.long().clamp(min=0)
    zs = z.gather(1, places)
    cap(zs, spec.softcap)
    sums = scan(z, places[:, :0], None, {T}, spec, spec.tail == "given")  # S is empty here: E is the softmax itself
    if spec.tail == "log_probs":
        out[:, :-1] = ((zs - sums.peak[:, None]) / T - sums.lse[T][:, None]).masked_fill(ids < 0, 0.0)
        out[:, -1] = sums.peak / T + sums.lse[T]
        return None
    g, g_lse = targets.log_probs[:, :-1].masked_fill(ids < 0, 0.0), targets.log_probs[:, -1]
    f = (g_lse - g.sum(1)) / T
    f = torch.where(f.abs() < TINY, TINY, f)[:, None]
    values = g / T / f
    if sums.cap_slope is not None:
        z.mul_(sums.cap_slope)
        values = values * sums.cap_slope.gather(1, places)
    z.scatter_add_(1, places, values)
    return f


def run(source: "Head | Logits", targets: Targets, spec: Spec, fields: Tensor) -> list[Tensor | None]:
    """Fills every row's fields, chunk by chunk; returns the gradients that the source has gathered on the way, if any."""
    temperatures = {spec.temperature} | (set() if targets.labels is None else {1.0})
    for start in range(0, len(targets.ids), source.rows):
        place = slice(start, start + source.rows)
        part, z = targets.rows(place), source.logits(place)
        if spec.tail in ("log_probs", "given"):
            factor = log_probs(z, part, spec, fields[place])
        else:
            part = part.merged(spec.temperature)
            sums = scan(z, part.ids, part.labels, temperatures, spec, source.wanted)
            losses, slopes = row_losses(sums, part.log_probs, spec)
            fields[place] = torch.stack(losses, 1)
            factor = (gradient(z, sums, part, spec, slopes) * part.weights)[:, None] if source.wanted else None
        if source.wanted:
            source.sink(place, z, factor)
    return source.gradients


def chunk_rows(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device, softcap: bool = False) -> int:
    """Rows of a chunk: on a CPU what TILE_BYTES holds, at most 1,024 unless they fit its cache; on a GPU 4.2M/D."""
    if device.type != "cpu":
        most = min(max(256, -(-N // 4)), max(256, 4_200_000 // D))
    else:
        row = V * (8 if dtype == torch.float64 else 4)
        most = max(16, min(TILE_BYTES // (2 if softcap else 1) // row, max(1024, BLOCK_BYTES // row)))
    return max(1, -(-N // max(1, -(-N // most))))  # even chunks


class Scratch(threading.local):
    """A CPU's tile, kept from call to call: new pages for it would cost 3% of a step [measured]."""

    tile: Tensor | None = None

    def take(self, rows: int, V: int, dtype: torch.dtype) -> Tensor:
        if self.tile is None or self.tile.dtype != dtype or self.tile.numel() < rows * V:
            self.tile = None  # freed before the larger one is made
            self.tile = torch.empty(rows * V, dtype=dtype)
        return self.tile[: rows * V].view(rows, V)


SCRATCH = Scratch()


class Head:
    """Hidden states [N,D] and a head's weight [V,D] as a source of logits, and where their gradient goes.

    Both enter the products rounded to `narrow`; logits and the gradients' sums are fp32 (fp64 for fp64).
    d_hidden = factor * (grads @ weight), d_weight += grads^T @ (factor * hidden).
    """

    def __init__(
        self, hidden, weight, need=(False, False), *, dtype, rows=None, most=2**31, softcap=False, kept=None, aligned=False
    ):  # fmt: skip
        (N, D), V = hidden.shape, len(weight)
        self.hidden, self.kept, self.wanted = hidden, kept, any(need)
        self.narrow, self.dtype = dtype, compute_dtype(dtype)
        self.rows = rows or min(most, chunk_rows(N, D, V, self.dtype, hidden.device, softcap))
        self.mixed = {"out_dtype": self.dtype} if dtype != self.dtype and hidden.device.type == "cuda" else {}
        self.weight = weight.to(dtype).contiguous() if self.mixed else weight
        whole = self.mixed or dtype == weight.dtype == self.dtype
        step = V if whole else max(1, UPCAST_BYTES // (4 * D))
        self.pieces = [slice(start, start + step) for start in range(0, V, step)]
        options = {"dtype": self.dtype, "device": hidden.device}
        shape = (min(self.rows, N), -(-V // PAD) * PAD if aligned else V)
        on_cpu = hidden.device.type == "cpu"
        self.tile = (SCRATCH.take(*shape, self.dtype) if on_cpu else torch.empty(*shape, **options))[:, :V]
        d_hidden = torch.empty(N, D, **options) if need[0] else None
        make = torch.empty if N else torch.zeros  # the first chunk writes d_weight, later ones add to it
        self.gradients = [d_hidden, make(V, D, **options) if need[1] else None]

    def places(self):
        """The rows of each chunk."""
        return (slice(start, start + self.rows) for start in range(0, len(self.hidden), self.rows))

    def part(self, rows: slice) -> Tensor:
        """hidden's rows as they enter the products; an ignored row is 0, whatever it held."""
        hidden = self.hidden[rows].to(self.narrow)
        hidden = hidden if self.kept is None else hidden.masked_fill(~self.kept[rows, None], 0)
        return hidden if self.mixed else hidden.to(self.dtype)

    def operands(self, rows: slice) -> tuple[Tensor, Tensor]:
        """hidden's rows and the weight in their own type and contiguous, for a kernel that makes the product itself."""
        return self.part(rows).to(self.narrow).contiguous(), self.weight.to(self.narrow).contiguous()

    def wide(self, piece: slice) -> Tensor:
        return self.weight if self.mixed else self.weight[piece].to(self.narrow).to(self.dtype)

    def logits(self, rows: slice) -> Tensor:
        """[c,V], fp32 whatever the inputs: half-precision logits cost 3.6% of the gradient."""
        hidden = self.part(rows)
        tile = self.tile[: len(hidden)]
        for piece in self.pieces:
            torch.mm(hidden, self.wide(piece).t(), out=tile[:, piece], **self.mixed)
        return tile

    def sink(self, rows: slice, grads: Tensor, factor: Tensor | None = None) -> None:
        """Adds a chunk's share of d_hidden and d_weight; grads [c,V] is spent, factor [c,1] applies to its rows."""
        (d_hidden, d_weight), hidden = self.gradients, self.part(rows)  # beta=0: what stood there, NaN too, is overwritten
        if self.mixed and grads.dtype == self.dtype:  # fp16 has no room for a row that is still to be scaled
            grads, factor = grads.mul_(factor).to(self.narrow), None
        grads = grads if self.mixed else grads.to(self.dtype)
        if d_hidden is not None:
            out = d_hidden[rows]
            for piece in self.pieces:
                torch.addmm(out, grads[:, piece], self.wide(piece), beta=int(piece.start > 0), out=out, **self.mixed)
            if factor is not None:
                out.mul_(factor)
        if d_weight is not None:
            hidden = hidden if factor is None else (hidden * factor).to(hidden.dtype)
            torch.addmm(d_weight, grads.t(), hidden, beta=int(rows.start > 0), out=d_weight, **self.mixed)


class Logits:
    """Logits [N,V] that exist already, read in row blocks and never written; their gradient has a buffer of its own."""

    def __init__(self, logits, need=(False,), *, dtype, rows=None, softcap=False, kept=None):
        (N, V), self.dtype = logits.shape, compute_dtype(dtype)
        self.source, self.kept, self.wanted = logits, kept, need[0]
        self.rows = rows or chunk_rows(N, V, V, self.dtype, logits.device, softcap)
        self.gradients = [torch.empty_like(logits) if need[0] else None, None]

    def logits(self, rows: slice) -> Tensor:
        tile = self.source[rows].to(self.dtype, copy=True)
        return tile if self.kept is None else tile.masked_fill_(~self.kept[rows, None], 0)

    def sink(self, rows: slice, tile: Tensor, factor: Tensor) -> None:
        self.gradients[0][rows] = tile.mul_(factor)
