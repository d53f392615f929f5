"""Path 2 of the chunked losses: the logits' product stores exp(z/T - m) in the inputs' type, and no fp32 logits exist.

c rows, V vocabulary, K teacher entries a row (S), m = one rough offset a row: a likely token's own z/T. Where one
temperature serves the whole row the gradient is a row factor times these numbers, but for K+1 entries:

    product_kernel E = exp(z/T - m), rounded, and each block's sums of what was stored
    finish_kernel  off = sum of E off S (the blocks' sums less S; summed again where that leaves under a thousandth),
                   the losses, the factor f, and the K+1 special entries as value/f: E is then gradient/f
    fill_kernel    the few rows where a number left E's range are given their fp32 logits, and row_kernel does them anew

d_hidden = f * (E @ weight) and d_weight = E^T @ (f * hidden) follow as plain products. bf16 costs a row's loss about
2^-9 nats, without bias, and its gradient .4%; fp32 logits would cost four more bytes an element written and eight read.
"""

import torch
from torch import Tensor

from .common import Spec, tl, triton
from .row_kernel import LOG2E, LOW, MINUS_INF, capped, divergence, narrowed, record, take_slots
from .row_kernel import launch as launch_rows
from .tile import TINY, Head, Targets

HUGE = tl.constexpr(1e15)
SMALL = tl.constexpr(1e-30)
LEAST_FACTOR = tl.constexpr(TINY)

# (bytes of an element, E or logits) -> (BLOCK_M, BLOCK_N, BLOCK_D, warps, stages). Predicted: not measured on any GPU.
TUNING = {
    (2, True): (128, 256, 64, 8, 3),
    (2, False): (128, 128, 64, 8, 3),
    (4, True): (64, 64, 32, 4, 2),
    (4, False): (64, 64, 32, 4, 2),
}
GROUP = 32  # columns whose maximum the teacher's side keeps
# width up to which a path is taken -> path. Predicted from the bytes that each moves, not measured.
PATHS = ((2048, 2), (2**31, 1))


@triton.jit
def rounded(e, DTYPE: tl.constexpr):
    """fp32 e >= 0 to the nearest number of DTYPE, still fp32. By bits for bf16: a conversion there and back is 128 unpacked
    instructions a thread, on the unit of the exponentials. Half rounds up; inf and NaN stay."""
    if tl.bfloat16 == DTYPE:
        bits = e.to(tl.int32, bitcast=True)
        e = (tl.maximum(bits, bits + 0x8000) & -65536).to(tl.float32, bitcast=True)
    else:
        e = e.to(DTYPE).to(tl.float32)
    return e


@triton.jit
def product_kernel(
    hidden_ptr, weight_ptr, offset_ptr, out_ptr, sums_ptr, c, V, D, stride, T, softcap,
    EXP: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """Program = a block of E (EXP) or of logits. Blocks of one column share the weight's rows, and all the hidden states.

    sums [c,blocks]: the sums of E; of logits [c,blocks,BLOCK_N/GROUP+1]: the maximum of every GROUP columns, then the sum
    of exp(z - the block's maximum).
    """
    row_blocks = tl.cdiv(c, BLOCK_M)
    m, n = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    rows, cols, width = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    left = hidden_ptr + (rows % c).to(tl.int64)[:, None] * D + width[None, :]  # rows past the last: any row, left out below
    right = weight_ptr + (cols % V).to(tl.int64)[:, None] * D + width[None, :]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            inside = (start + width < D)[None, :]
            a, b = tl.load(left, mask=inside, other=0.0), tl.load(right, mask=inside, other=0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
        left += BLOCK_D
        right += BLOCK_D
    out = out_ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    inside, blocks = (rows < c)[:, None] & (cols < V)[None, :], tl.cdiv(V, BLOCK_N)
    if EXP:
        offset = tl.load(offset_ptr + rows, mask=rows < c, other=0.0)
        z = tl.where(cols[None, :] < V, (z - offset[:, None]) * (1 / T * LOG2E), MINUS_INF)
        stored = rounded(tl.exp2(z), out_ptr.dtype.element_ty)
        tl.store(out, stored.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(sums_ptr + rows * blocks + n, tl.sum(stored, 1), mask=rows < c)
    else:
        z = capped(z, softcap)
        tl.store(out, z, mask=inside)
        GROUPS: tl.constexpr = BLOCK_N // GROUP
        z = tl.where(cols[None, :] < V, z, MINUS_INF)
        tops = tl.max(tl.reshape(z, [BLOCK_M, GROUPS, GROUP]), 2)
        sums = sums_ptr + (rows * blocks + n)[:, None] * (GROUPS + 1)
        tl.store(sums + tl.arange(0, GROUPS)[None, :], tops, mask=(rows < c)[:, None])
        top = tl.maximum(tl.max(tops, 1), LOW)
        total = tl.sum(tl.exp2((z - top[:, None]) * LOG2E), 1)
        tl.store(sums_ptr + (rows * blocks + n) * (GROUPS + 1) + GROUPS, total, mask=rows < c)


@triton.jit
def finish_kernel(
    e_ptr, sums_ptr, verdict_ptr, ids_ptr, entries_ptr, labels_ptr, weights_ptr, out_ptr, stride, V, K, T, kl_weight, beta,
    TAIL: tl.constexpr, KIND: tl.constexpr, WORD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program = row. verdict [3,c]: the row's factor, its weight, and 1 where the row must be done anew, else 0."""
    LABELS: tl.constexpr = labels_ptr is not None
    row, c = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    e_row, ids_row, out_row, slots = e_ptr + row * stride, ids_ptr + row * K, out_ptr + row * 5, tl.arange(0, BLOCK_K)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    tl.store(verdict_ptr + c + row, weight)
    tl.store(verdict_ptr + 2 * c + row, 0.0)
    if weight == 0:
        tl.store(verdict_ptr + row, 0.0)
        record(out_row, 0.0, 0.0, 0.0, 0.0, 0.0, T)
        return
    label, e_label = 0, 1.0
    if LABELS:
        label = tl.load(labels_ptr + row).to(tl.int32)
        e_label = tl.load(e_row + label).to(tl.float32)
    ids, real, keep, raw, lt = take_slots(e_row, entries_ptr + row * K, ids_row, slots, K, WORD, True, 0.0)
    e = tl.where(keep, raw.to(tl.float32), 0.0)
    blocks, lanes, parts = tl.cdiv(V, COLUMNS), tl.arange(0, BLOCK), tl.zeros([BLOCK], tl.float32)
    for start in range(0, blocks, BLOCK):
        parts += tl.load(sums_ptr + row * blocks + start + lanes, mask=start + lanes < blocks, other=0.0)
    total, parts = tl.sum(parts, 0), tl.zeros([BLOCK], tl.float32)
    off = total - tl.sum(e, 0)
    again = tl.where(off < 1e-3 * total, V, 0)  # the difference has lost its digits: S is 0 in the row by now
    for start in range(0, again, BLOCK):
        parts += tl.load(e_row + start + lanes, mask=start + lanes < V, other=0.0).to(tl.float32)
    off = tl.where(again > 0, tl.sum(parts, 0), off)
    lse, outside = tl.log(off + tl.sum(e, 0)), V - tl.sum(keep.to(tl.int32), 0)
    ls, ls_tail = tl.log(e) - lse, tl.where(outside > 0, tl.log(off) - lse, MINUS_INF)
    kl, g, g_tail, _, mass, student_mass = divergence(lt / T, ls, ls_tail, 0.0, outside, beta, TAIL, KIND)
    record(out_row, kl, lse - tl.log(e_label) if LABELS else 0.0, mass, student_mass, kl_weight, T)
    least = tl.minimum(tl.min(tl.where(keep, e, 1.0), 0), tl.where(outside > 0, off, 1.0))
    if (total < HUGE) & (tl.minimum(least, e_label) > SMALL):
        scale, share = weight * kl_weight * T, weight * (1 - kl_weight) if LABELS else 0.0
        G = tl.sum(g, 0) + g_tail
        A = (share - scale * G) * tl.exp(ls_tail) + (scale * g_tail if TAIL == "ghost" else 0.0)
        f = tl.where(tl.abs(A) < LEAST_FACTOR, LEAST_FACTOR, A) / tl.maximum(off, SMALL)
        at = scale * g + (share - scale * G) * tl.exp(ls) - tl.where(ids == label, share, 0.0)
        alone = share * (1 - tl.max((real & (ids == label)).to(tl.float32), 0)) != 0
        tl.debug_barrier()
        tl.store(e_row + ids, (at / f).to(e_ptr.dtype.element_ty), mask=keep)
        tl.store(e_row + label, (e_label - share / f).to(e_ptr.dtype.element_ty), mask=alone)
        tl.store(verdict_ptr + row, f)
    else:
        tl.store(verdict_ptr + row, 1.0)
        tl.store(verdict_ptr + 2 * c + row, 1.0)


@triton.jit
def fill_kernel(
    hidden_ptr, weight_ptr, todo_ptr, z_ptr, stride, V, D, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Program = row; rows that are to be done anew get their logits in fp32, by plain dot products."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(todo_ptr + row) != 0:
        for first in range(0, V, BLOCK_V):
            cols = first + tl.arange(0, BLOCK_V)
            z = tl.zeros([BLOCK_V], tl.float32)
            for start in range(0, D, BLOCK_D):
                width = start + tl.arange(0, BLOCK_D)
                h = tl.load(hidden_ptr + row * D + width, mask=width < D, other=0.0).to(tl.float32)
                inside = (cols < V)[:, None] & (width < D)[None, :]
                w = tl.load(weight_ptr + cols.to(tl.int64)[:, None] * D + width[None, :], mask=inside, other=0.0)
                z += tl.sum(w.to(tl.float32) * h[None, :], 1)
            tl.store(z_ptr + row * stride + cols, z, mask=cols < V)


def path_of(path: int | None, head: Head, fits: bool) -> int:
    """The path asked for, or the table's; 1 where path 2 cannot serve."""
    if path == 2 and not fits:
        rule = "needs a gradient, one temperature a row, no softcap, a tail other than smooth, and bf16 or fp32"
        raise ValueError(f"_path=2: {rule}")
    D = head.hidden.shape[1]
    table = next(path for width, path in PATHS if width >= D)
    return path or (table if fits and head.narrow == torch.bfloat16 and D % 16 == 0 else 1)


def product(hidden: Tensor, weight: Tensor, out: Tensor, temperature=1.0, offset=None, softcap=None) -> Tensor:
    """E (with an offset [c]) or logits of hidden [c,D] and weight [V,D] into out [c,V]; what `product_kernel` sums of it."""
    (c, D), V, exp = hidden.shape, len(weight), offset is not None
    block_m, block_n, block_d, warps, stages = TUNING[hidden.element_size(), exp]
    shape = (c, triton.cdiv(V, block_n)) if exp else (c, triton.cdiv(V, block_n), block_n // GROUP + 1)
    sums = torch.empty(shape, dtype=torch.float32, device=hidden.device)
    product_kernel[(triton.cdiv(c, block_m) * shape[1],)](
        hidden, weight, offset, out, sums, c, V, D, out.stride(0), temperature, softcap,
        EXP=exp, GROUP=GROUP, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d,
        EVEN=D % block_d == 0, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return sums


def launch(head: Head, place: slice, targets: Targets, spec: Spec, out: Tensor) -> tuple[Tensor, Tensor]:
    """A chunk's fields into out [c,5]; returns E [c,V] in the inputs' type and the row factors [c,1]."""
    (hidden, weight), tile = head.operands(place), head.tile
    (c, D), V, (ids, entries, labels, weights) = hidden.shape, len(weight), targets
    token = ids.new_zeros(c) if labels is None else labels
    if ids.shape[1]:
        likely = ids.gather(1, entries.masked_fill(ids < 0, -torch.inf).argmax(1, keepdim=True)).squeeze(1)
        token = torch.where(likely < 0, token, likely)
    token = token.long().clamp(0, V - 1)  # an ignored label is any number
    offset = (hidden * weight[token]).sum(1, dtype=torch.float32)
    e = narrowed(tile[:c], head.narrow)
    sums, verdict = product(hidden, weight, e, spec.temperature, offset), offset.new_empty(3, c)
    finish_kernel[(c,)](
        e, sums, verdict, ids, entries, labels, weights, out,
        e.stride(0), V, ids.shape[1], spec.temperature, spec.kl_weight, spec.beta,
        TAIL=spec.tail, KIND=spec.divergence,
        WORD=tl.int16 if e.element_size() == 2 else tl.int32, COLUMNS=TUNING[e.element_size(), True][1], BLOCK=512,
        BLOCK_K=triton.next_power_of_2(max(1, ids.shape[1])), num_warps=4,
    )  # fmt: skip
    fill_kernel[(c,)](hidden, weight, verdict[2], tile, tile.stride(0), V, D, BLOCK_V=32, BLOCK_D=128, num_warps=4)
    launch_rows(tile[:c], out, targets._replace(weights=verdict[1]), spec, e, redo=True)
    return e, verdict[0][:, None]
