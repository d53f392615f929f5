"""The row kernel: one program reads a row of logits twice and leaves its losses and, over them, their gradient.

c rows, V vocabulary, K teacher entries a row (S = their ids), T temperature, z the softcapped logits.

    off   log-sum-exp of z/T over the tokens off S      each lane keeps its own running maximum and sum: no exchange
    lse   logaddexp(off, logsumexp of z/T over S)       between lanes, and no tail from 1 - sum p: 1e-30 is as exact as .3
    l     z/T - lse on S, off - lse on the tail         one divergence of K+1 outcomes: its value, and g = df/dl
    dz    A * softmax(z/T off S) + B * softmax(z off S) + u, and on S: scale * (g - sum(g) * p) + share * p(T=1)

A and B are a row's two coefficients (of the divergence at T and of the cross-entropy at 1; one where T = 1), u is
smooth's constant. S leaves the row for the first pass: its K logits are gathered, marked with their slots (equal ids
show, whatever their number) and set to MARK, the least number but one of their type; a caller's are put back in the end.
`topk_kl` reads bf16, fp16 or fp32 and writes the same type elsewhere; the chunked ops let bf16 or fp16 gradients
overwrite the fp32 tile they come from. All arithmetic is fp32. No atomics: the same bits in every run.
"""

import math

import torch
from torch import Tensor

from .common import Spec, tl, triton
from .divergence import FAR, FLOOR

LOG2E = tl.constexpr(1.4426950408889634)
LOW = tl.constexpr(-1e29)  # a lane's maximum before its first token: -inf and fp32's MARK stay below it, and count nothing
NOTHING = tl.constexpr(FAR)
LEAST = tl.constexpr(FLOOR)
MINUS_INF = tl.constexpr(float("-inf"))

# bytes of a row up to which a setting holds -> (columns of a block, warps): larger rows, fewer of them at work at once,
# so that the second pass still finds them in an H100's 50 MB of L2. Predicted: no setting was measured on a GPU.
TUNING = ((2**16, 2048, 4), (3 * 2**16, 4096, 8), (2**40, 8192, 16))


@triton.jit
def capped(z, softcap):
    """c * tanh(z/c): a series below .2, where 1 - exp would lose its digits."""
    if softcap is not None:
        x = z / softcap
        e, x2 = tl.exp2(tl.abs(x) * (-2 * LOG2E)), x * x
        series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 - x2 * (17 / 315))))
        z = softcap * tl.where(tl.abs(x) < 0.2, series, tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e))
    return z


@triton.jit
def slope_of(z, softcap):
    """Derivative of the softcap where it gave z."""
    return 1 - (z / softcap) * (z / softcap) if softcap is not None else 1.0


@triton.jit
def take_slots(row_ptr, entries_ptr, ids_ptr, slots, K, WORD: tl.constexpr, LOGS: tl.constexpr, OUT: tl.constexpr):
    """Gathers S of a row and puts OUT in its place. Equal ids become one outcome, their entries added (LOGS: as logs).

    Returns ids [BLOCK_K], real (slots with an id), keep (the first slot of each id), raw (what stood there), entries.
    """
    ids = tl.load(ids_ptr + slots, mask=slots < K, other=-1).to(tl.int32)
    real = ids >= 0
    entries = tl.load(entries_ptr + slots, mask=real, other=MINUS_INF if LOGS else 0.0).to(tl.float32)
    place = row_ptr + tl.where(real, ids, 0)
    marks = row_ptr.to(tl.pointer_type(WORD), bitcast=True) + tl.where(real, ids, 0)
    raw = tl.load(place, mask=real, other=0.0)
    tl.debug_barrier()
    tl.store(marks, slots.to(WORD), mask=real)
    tl.debug_barrier()
    lost = real & (tl.load(marks, mask=real, other=0) != slots.to(WORD))
    tl.debug_barrier()
    tl.store(place, OUT, mask=real)
    tl.debug_barrier()
    repeats = tl.where(tl.sum(lost.to(tl.int32), 0) > 0, K, 0)  # no slot lost its mark: nothing to merge
    first = slots
    total = tl.where(repeats > 0, MINUS_INF if LOGS else 0.0, entries)
    for j in range(0, repeats):
        same = real & (ids == tl.load(ids_ptr + j).to(tl.int32))
        entry = tl.load(entries_ptr + j).to(tl.float32)
        if LOGS:
            top = tl.maximum(tl.maximum(total, entry), NOTHING)
            total = tl.where(same, top + tl.log(tl.exp(total - top) + tl.exp(entry - top)), total)
        else:
            total = tl.where(same, total + entry, total)
        first = tl.where(same & (j < first), j, first)
    keep = real & (first == slots)
    return ids, real, keep, raw, tl.where(keep, total, MINUS_INF if LOGS else 0.0)


@triton.jit
def outcome(lt, ls, beta, KIND: tl.constexpr):
    """An outcome's share of the divergence, and its slope df/dls; divergence.py has the table."""
    t, p = tl.exp(lt), tl.exp(ls)
    if KIND == "forward_kl":
        value, slope = tl.where(t > 0, t * (lt - ls), 0.0), -t
    elif KIND == "reverse_kl":
        gap = ls - tl.maximum(lt, LEAST)
        value, slope = tl.where(p > 0, p * gap, 0.0), tl.where(p > 0, p * (gap + 1), 0.0)
    elif KIND == "tv":
        gap = tl.where(tl.abs(p - t) <= 256 * 1.1920929e-7 * tl.maximum(t, p), 0.0, p - t)
        value, slope = 0.5 * tl.abs(gap), 0.5 * p * tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
    else:
        left, right = tl.log(beta) + lt, tl.log(1 - beta) + ls
        top = tl.maximum(tl.maximum(left, right), NOTHING)
        lm = top + tl.log(tl.exp(left - top) + tl.exp(right - top))
        value = tl.where(t > 0, t * (lt - lm), 0.0)
        if KIND == "skew_kl":
            slope = tl.where(t > 0, -t * tl.exp(right - lm), 0.0)
        else:
            slope = (1 - beta) * tl.where(p > 0, p * (ls - lm), 0.0)
            value = beta * value + slope
    return value, slope


@triton.jit
def normalizer(log_probs):
    """logsumexp over the slots; 0 where all are -inf."""
    top = tl.maximum(tl.max(log_probs, 0), NOTHING)
    return tl.where(top > NOTHING, top + tl.log(tl.sum(tl.exp(log_probs - top), 0)), 0.0)


@triton.jit
def divergence(lt, ls, ls_tail, off_mean, outside, beta, TAIL: tl.constexpr, KIND: tl.constexpr):
    """The row's divergence -> (value, g [BLOCK_K], g_tail, u, teacher's mass, student's mass); see divergence.sides."""
    mass, student_mass = tl.sum(tl.exp(lt), 0), tl.sum(tl.exp(ls), 0)
    tau = tl.where(outside > 0, tl.maximum(1 - mass, 0.0), 0.0)
    if TAIL == "renormalize" or TAIL == "renormalize_both":
        lt = lt - normalizer(lt)
    if TAIL == "renormalize_both":
        ls = tl.where(tl.max(lt, 0) > MINUS_INF, ls - normalizer(ls), MINUS_INF)
    value, g = outcome(lt, ls, beta, KIND)
    value, g_tail, u = tl.sum(value, 0), 0.0, 0.0
    if TAIL == "ghost":
        more, g_tail = outcome(tl.log(tau), ls_tail, beta, KIND)
        value += more
    elif TAIL == "smooth":
        value += tl.where(tau > 0, tau * (tl.log(tau) - tl.log(tl.maximum(outside, 1).to(tl.float32)) - off_mean), 0.0)
        g_tail, u = -tau, -tau / tl.maximum(outside, 1)
    elif TAIL == "renormalize_both":
        g -= tl.exp(ls) * tl.sum(g, 0)  # through the student's own normaliser
    return value, g, g_tail, u, mass, student_mass


@triton.jit
def scan(z, top, s, s1, total, softcap, c, MARK: tl.constexpr, TWO: tl.constexpr, MEAN: tl.constexpr):
    """A block of logits into every lane's maximum, sums of exp(z/T) and exp(z) below it, and sum of z."""
    NARROW: tl.constexpr = z.dtype.primitive_bitwidth == 16  # fp16's MARK is a number that a lane's maximum could be
    raw = z.to(tl.float32)
    z = capped(raw, softcap)
    if MEAN:
        total += tl.where(raw == MARK, 0.0, z)
    if NARROW or softcap is not None:
        z = tl.where(raw == MARK, MINUS_INF, z)
    higher = tl.maximum(top, z)
    s = s * tl.exp2((top - higher) * c) + tl.exp2((z - higher) * c)
    if TWO:
        s1 = s1 * tl.exp2((top - higher) * LOG2E) + tl.exp2((z - higher) * LOG2E)
    return higher, s, s1, total


@triton.jit
def first_pass(z_row, lanes, head, last, end, softcap, c, MARK: tl.constexpr, TWO: tl.constexpr, MEAN: tl.constexpr):
    """A row -> its lanes' maxima, the largest, its sums of exp(z/T) and exp(z) below that, and its sum of z."""
    s = tl.zeros_like(lanes).to(tl.float32)
    top, s1, total = s + LOW, s, s
    z = tl.load(z_row + lanes, mask=head, other=MARK)
    top, s, s1, total = scan(z, top, s, s1, total, softcap, c, MARK, TWO, MEAN)
    for start in range(lanes.shape[0], last, lanes.shape[0]):
        z = tl.load(z_row + start + lanes)
        top, s, s1, total = scan(z, top, s, s1, total, softcap, c, MARK, TWO, MEAN)
    z = tl.load(z_row + last + lanes, mask=end, other=MARK)
    top, s, s1, total = scan(z, top, s, s1, total, softcap, c, MARK, TWO, MEAN)
    peak = tl.max(top, 0)
    off1 = tl.sum(s1 * tl.exp2((top - peak) * LOG2E), 0)
    return top, peak, tl.sum(s * tl.exp2((top - peak) * c), 0), off1, tl.sum(total, 0)


@triton.jit
def record(out_row, kl, ce, mass, student_mass, kl_weight, T):
    """LossOutput's fields of a row."""
    tl.store(out_row, (1 - kl_weight) * ce + kl_weight * T * T * kl)
    tl.store(out_row + 1, kl)
    tl.store(out_row + 2, ce)
    tl.store(out_row + 3, mass)
    tl.store(out_row + 4, student_mass)


@triton.jit
def slope(z, A, B, u, top, l2, l2_1, softcap, c, TWO: tl.constexpr):
    """Capped logits to the gradient of their row's loss, the K+1 special entries left aside."""
    dz = A * tl.exp2((z - top) * c - l2) + u
    if TWO:
        dz += B * tl.exp2((z - top) * LOG2E - l2_1)
    return dz * slope_of(z, softcap)


@triton.jit
def emit(z, grads, inside, A, B, u, top, l2, l2_1, softcap, c, TWO: tl.constexpr, RATIO: tl.constexpr):
    """A block of the second pass: z and grads are pointers, `inside` a mask or None."""
    z = tl.load(z) if inside is None else tl.load(z, mask=inside, other=MINUS_INF)
    dz = slope(capped(z.to(tl.float32), softcap), A, B, u, top, l2, l2_1, softcap, c, TWO)
    if RATIO > 1:
        tl.debug_barrier()  # these gradients lie where this block or an earlier one was read
    tl.store(grads, dz.to(grads.dtype.element_ty), mask=inside)


@triton.jit
def second_pass(
    z_row, grad_row, lanes, head, last, end, A, B, u, top, l2, l2_1, softcap, c, TWO: tl.constexpr, RATIO: tl.constexpr
):  # fmt: skip
    """The gradient of a whole row, the K+1 special entries left aside."""
    emit(z_row + lanes, grad_row + lanes, head, A, B, u, top, l2, l2_1, softcap, c, TWO, RATIO)
    for start in range(lanes.shape[0], last, lanes.shape[0]):
        cols = start + lanes
        emit(z_row + cols, grad_row + cols, None, A, B, u, top, l2, l2_1, softcap, c, TWO, RATIO)
    cols = last + lanes
    emit(z_row + cols, grad_row + cols, end, A, B, u, top, l2, l2_1, softcap, c, TWO, RATIO)
    tl.debug_barrier()


@triton.jit
def row_kernel(
    z_ptr, grad_ptr, ids_ptr, entries_ptr, labels_ptr, weights_ptr, out_ptr, stride, V, K, T, kl_weight, beta, softcap,
    TAIL: tl.constexpr, KIND: tl.constexpr, TWO: tl.constexpr, GRAD: tl.constexpr, OWN: tl.constexpr, WORD: tl.constexpr,
    ALIGN: tl.constexpr, ALIGNED: tl.constexpr, RATIO: tl.constexpr, REDO: tl.constexpr, MARK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program = row. TAIL is a tail of the loss, or "log_probs" (l and lse, no loss), or "given" (entries are slopes of l)."""
    LABELS: tl.constexpr = labels_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    slots, lanes, c = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK), 1 / T * LOG2E
    # a row of an odd length: blocks start where 16 bytes do, `shift` columns before it
    shift = 0 if ALIGNED else (row * stride % ALIGN).to(tl.int32)
    begin = tl.multiple_of(row * stride - shift, ALIGN)
    z_row, grad_row = z_ptr + begin, grad_ptr + begin * RATIO
    last = (V + shift - 1) // BLOCK * BLOCK
    weight = tl.load(weights_ptr + row).to(tl.float32) if TAIL != "log_probs" and TAIL != "given" else 1.0
    wanted = tl.load(weights_ptr + tl.num_programs(0) + row) != 0 if REDO else True  # flags follow the weights (exp_kernel.py)
    if not wanted:
        return
    if weight == 0:  # an ignored row: nothing of it is read, its gradient is 0
        if GRAD:
            for start in range(0, last + BLOCK, BLOCK):
                inside = (start + lanes >= shift) & (start + lanes < V + shift)
                tl.store(grad_row + start + lanes, (lanes * 0).to(grad_row.dtype.element_ty), mask=inside)
        record(out_ptr + row * 5, 0.0, 0.0, 0.0, 0.0, 0.0, T)
        return
    label = tl.load(labels_ptr + row).to(tl.int32) if LABELS else 0
    z_label = capped(tl.load(z_row + shift + label).to(tl.float32), softcap) if LABELS else 0.0
    entries_row, ids_row = entries_ptr + row * (K + 1 if TAIL == "given" else K), ids_ptr + row * K
    ids, real, keep, raw, entries = take_slots(z_row + shift, entries_row, ids_row, slots, K, WORD, TAIL != "given", MARK)
    zs = tl.where(real, capped(raw.to(tl.float32), softcap), MINUS_INF)

    head, end = lanes < V + shift, (last > 0) & (last + lanes < V + shift)
    head = head if ALIGNED else head & (lanes >= shift)
    _, top_off, off, off1, total = first_pass(z_row, lanes, head, last, end, softcap, c, MARK, TWO, TAIL == "smooth")
    zs_kept, off1 = tl.where(keep, zs, MINUS_INF), off1 if TWO else off
    peak = tl.maximum(top_off, tl.max(zs_kept, 0))  # all that follows is relative to it
    lse = tl.log(off * tl.exp2((top_off - peak) * c) + tl.sum(tl.exp2((zs_kept - peak) * c), 0))
    lse1 = tl.log(off1 * tl.exp2((top_off - peak) * LOG2E) + tl.sum(tl.exp2((zs_kept - peak) * LOG2E), 0)) if TWO else lse
    outside = V - tl.sum(keep.to(tl.int32), 0)
    ls_tail = tl.where(outside > 0, (top_off - peak) / T + tl.log(off) - lse, MINUS_INF)
    if TAIL == "log_probs":
        tl.store(out_ptr + row * (K + 1) + slots, tl.where(real, (zs - peak) / T - lse, 0.0), mask=slots < K)
        tl.store(out_ptr + row * (K + 1) + K, peak / T + lse)
    elif TAIL == "given":
        g, g_tail, u, scale, share = entries, -tl.load(entries_row + K), 0.0, 1 / T, 0.0
    else:
        off_mean = (total / tl.maximum(outside, 1) - peak) / T - lse
        ls = (zs_kept - peak) / T - lse
        kl, g, g_tail, u, mass, student_mass = divergence(entries / T, ls, ls_tail, off_mean, outside, beta, TAIL, KIND)
        record(out_ptr + row * 5, kl, lse1 - (z_label - peak) if LABELS else 0.0, mass, student_mass, kl_weight, T)
        scale, share = weight * kl_weight * T, weight * (1 - kl_weight) if LABELS else 0.0
    if GRAD:
        G = tl.sum(g, 0) + g_tail
        A = -scale * G * tl.exp(ls_tail) + (scale * g_tail if TAIL == "ghost" else 0.0)
        B = share * tl.exp((top_off - peak) + tl.log(off1) - lse1)
        A, u = A if TWO else A + B, u * scale
        l2, l2_1 = tl.where(off > 0, tl.log2(off), 0.0), tl.where(off1 > 0, tl.log2(off1), 0.0)
        at = scale * (g - G * tl.exp2((zs - peak) * c - lse * LOG2E))
        at += share * (tl.exp2((zs - peak - lse1) * LOG2E) - tl.where(ids == label, 1.0, 0.0))
        alone = share * (1 - tl.max((real & (ids == label)).to(tl.float32), 0)) != 0
        at_label = slope(z_label, A, B, u, top_off, l2, l2_1, softcap, c, TWO)
        at_label -= share * slope_of(z_label, softcap)
        second_pass(z_row, grad_row, lanes, head, last, end, A, B, u, top_off, l2, l2_1, softcap, c, TWO, RATIO)
        at = (at * slope_of(zs, softcap)).to(grad_ptr.dtype.element_ty)
        tl.store(grad_row + shift + ids, at, mask=keep)
        tl.store(grad_row + shift + label, at_label.to(grad_ptr.dtype.element_ty), mask=alone)
    if not OWN:
        tl.debug_barrier()
        tl.store(z_row + shift + ids, raw, mask=real)


def launch(z: Tensor, out: Tensor, targets, spec: Spec, grad: Tensor | None = None, own=True, redo=False) -> None:
    """Runs the kernel over rows z [c,V]. out: [c,5] (LossOutput's fields), or [c,K+1] (l and lse) for tail="log_probs".

    targets: tile.Targets; its log_probs are None for that tail, slopes [c,K+1] of l and lse for "given". grad [c,V], if
    given, is written, the row weights in it; it may be `narrowed(z)`. own: z may be left changed. redo: `weights` are
    followed by flags.
    """
    (c, V), (ids, entries, labels, weights), size = z.shape, targets, z.element_size()
    if not c:
        return
    ratio, aligned = 1 if grad is None else size // grad.element_size(), z.stride(0) % (16 // size) == 0
    assert ratio == 1 or aligned, f"stride {z.stride(0)}: a gradient in place needs rows that start at 16 bytes"
    block, warps = next((block, warps) for most, block, warps in TUNING if V * size <= most)
    row_kernel[(c,)](
        z, z if grad is None else grad, ids, out if entries is None else entries, labels, weights, out,
        z.stride(0), V, ids.shape[1], spec.temperature, spec.kl_weight, spec.beta, spec.softcap,
        TAIL=spec.tail, KIND=spec.divergence, TWO=spec.temperature != 1 and labels is not None, GRAD=grad is not None, OWN=own,
        WORD=tl.int32 if size == 4 else tl.int16, ALIGN=16 // size, ALIGNED=aligned, RATIO=ratio, REDO=redo,
        MARK=mark_of(z.dtype), BLOCK=block, BLOCK_K=triton.next_power_of_2(max(1, ids.shape[1])), num_warps=warps,
        maxnreg=128 if warps == 16 else None,  # the most that one program an SM can have; left alone, ptxas may spill
    )  # fmt: skip


def mark_of(dtype: torch.dtype) -> float:
    """The least number but one: the least itself stands in logits that were masked with torch.finfo(dtype).min."""
    return -(2 - 2 * torch.finfo(dtype).eps) * 2.0 ** (math.frexp(torch.finfo(dtype).max)[1] - 1)


def narrowed(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """tile [c,V] fp32 read as `dtype`: each row of the result lies in the first bytes of its row of the tile."""
    return tile if dtype == tile.dtype else tile.view(dtype)[:, : tile.shape[1]]
