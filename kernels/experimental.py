"""Experimental, never taken by `auto`: the logits' product stores exp(z - m) in the inputs' dtype.

No fp32 logits exist, which saves four bytes an element written and eight read. C rows of a chunk, V
vocabulary, K teacher entries a row (S), m = one offset a row: the logit of a likely token.

    product_kernel   E = exp(z - m), rounded, and the sums of what each block stored
    finish_kernel    the tail (the sums less S), the losses, a factor f of the row, and over the K+1
                     special entries value/f: E is then gradient/f

d_hidden = f * (E @ weight) and d_weight = E^T @ (f * hidden) follow as plain products. In bf16 a row's
loss is off by 2^-9 nats, without bias, and its gradient by .4%. A logit of S or of the label more than 69
below m counts as 69 below, and one 88 above m makes the loss inf.
"""

import torch
from torch import Tensor

from .backends import computing, jit, tl, triton
from .checks import LossOutput, LossSpec
from .chunks import ALIGNMENT, chunk_rows, slices
from .losses import scale_gradient
from .triton_loss import LOG2E, MINUS_INF, constants_of, row_divergence, store_fields, take_support

SMALL = tl.constexpr(1e-30)
LEAST_FACTOR = tl.constexpr(1e-20)
SUM_BLOCK = tl.constexpr(512)


def product_shape(element_size: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages."""
    return (128, 128, 64, 8, 3) if element_size == 2 else (16, 32, 16, 4, 2)


@jit
def product_kernel(
    hidden_ptr,
    weight_ptr,
    offset_ptr,
    out_ptr,
    sums_ptr,
    C,
    V,
    V_padded,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program = a block of E [C,V_padded]; blocks of one column share the weight's rows."""
    row_blocks = tl.cdiv(C, BLOCK_M)
    block_m = tl.program_id(0) % row_blocks
    block_n = tl.program_id(0) // row_blocks
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.arange(0, BLOCK_D)
    # Rows and columns past the last are any: they are left out below.
    left = hidden_ptr + (rows % C).to(tl.int64)[:, None] * D + width[None, :]
    right = weight_ptr + (cols % V).to(tl.int64)[:, None] * D + width[None, :]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (start + width < D)[None, :]
        a = tl.load(left, mask=inside, other=0.0)
        b = tl.load(right, mask=inside, other=0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
        left += BLOCK_D
        right += BLOCK_D
    offset = tl.load(offset_ptr + rows, mask=rows < C, other=0.0)
    z = tl.where(cols[None, :] < V, z - offset[:, None], MINUS_INF)
    e = tl.exp2(z * LOG2E).to(out_ptr.dtype.element_ty)
    out = out_ptr + rows.to(tl.int64)[:, None] * V_padded + cols[None, :]
    tl.store(out, e, mask=(rows < C)[:, None] & (cols < V_padded)[None, :])
    sums = sums_ptr + rows * tl.cdiv(V, BLOCK_N) + block_n
    tl.store(sums, tl.sum(e.to(tl.float32), 1), mask=rows < C)


@jit
def finish_kernel(
    e_ptr,
    sums_ptr,
    factor_ptr,
    ids_ptr,
    log_probs_ptr,
    labels_ptr,
    row_weights_ptr,
    fields_ptr,
    stride,
    V,
    K,
    num_sums,
    kl_weight,
    beta,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    SLOT_INT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program = row; every row counts."""
    row = tl.program_id(0).to(tl.int64)
    slots = tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, SUM_BLOCK)
    e_row = e_ptr + row * stride
    weight = tl.load(row_weights_ptr + row)
    label = tl.load(labels_ptr + row).to(tl.int32)
    e_label = tl.load(e_row + label).to(tl.float32)
    ids, has_id, is_first, raw, lt = take_support(
        e_row, ids_ptr + row * K, log_probs_ptr + row * K, slots, K, True, SLOT_INT, 0.0
    )
    e = tl.where(is_first, tl.maximum(raw.to(tl.float32), SMALL), 0.0)
    parts = tl.zeros([SUM_BLOCK], tl.float32)
    for start in range(0, num_sums, SUM_BLOCK):
        inside = start + lanes < num_sums
        parts += tl.load(sums_ptr + row * num_sums + start + lanes, mask=inside, other=0.0)
    total = tl.sum(parts, 0)
    outside_sum = total - tl.sum(e, 0)
    # Where the difference has lost its digits the tail is summed; S is 0 in the row by now.
    again = tl.where(outside_sum < 1e-3 * total, V, 0)
    parts = tl.zeros([SUM_BLOCK], tl.float32)
    for start in range(0, again, SUM_BLOCK):
        inside = start + lanes < V
        parts += tl.load(e_row + start + lanes, mask=inside, other=0.0).to(tl.float32)
    outside_sum = tl.where(again > 0, tl.sum(parts, 0), outside_sum)

    lse = tl.log(outside_sum + tl.sum(e, 0))
    num_outside = V - tl.sum(is_first.to(tl.int32), 0)
    log_tail = tl.log(tl.maximum(outside_sum, SMALL)) - lse
    log_tail = tl.where(num_outside > 0, log_tail, MINUS_INF)
    ls = tl.log(e) - lse
    kl, slopes, tail_slope, _, teacher_mass, student_mass = row_divergence(
        lt, ls, log_tail, 0.0, num_outside, beta, TAIL, DIVERGENCE
    )
    ce = lse - tl.log(tl.maximum(e_label, SMALL))
    store_fields(fields_ptr + row * 5, kl, ce, teacher_mass, student_mass, kl_weight, 1.0)

    scale = weight * kl_weight
    share = weight * (1 - kl_weight)
    slope_sum = tl.sum(slopes, 0) + tail_slope
    coef = (share - scale * slope_sum) * tl.exp(log_tail)
    if TAIL == "ghost":
        coef += scale * tail_slope
    coef = tl.where(tl.abs(coef) < LEAST_FACTOR, LEAST_FACTOR, coef)
    factor = coef / tl.maximum(outside_sum, SMALL)
    on_support = scale * slopes + (share - scale * slope_sum) * tl.exp(ls)
    on_support -= tl.where(ids == label, share, 0.0)
    in_support = tl.max((has_id & (ids == label)).to(tl.int32), 0)
    tl.debug_barrier()
    tl.store(e_row + ids, (on_support / factor).to(e_ptr.dtype.element_ty), mask=is_first)
    on_label = (e_label - share / factor).to(e_ptr.dtype.element_ty)
    tl.store(e_row + label, on_label, mask=in_support == 0)
    tl.store(factor_ptr + row, factor)


def exponentials(hidden: Tensor, weight: Tensor, offset: Tensor, e: Tensor) -> Tensor:
    """E = exp(hidden @ weight^T - offset) into e [C,V_padded]; returns its blocks' sums [C,blocks]."""
    (C, D), V = hidden.shape, len(weight)
    block_m, block_n, block_d, num_warps, num_stages = product_shape(e.element_size())
    num_sums = triton.cdiv(V, block_n)
    sums = torch.empty(C, num_sums, dtype=torch.float32, device=hidden.device)
    product_kernel[(triton.cdiv(C, block_m) * num_sums,)](
        hidden,
        weight,
        offset,
        e,
        sums,
        C,
        V,
        e.shape[1],
        D,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return sums


class ExpLoss(torch.autograd.Function):
    """The mean loss of rows that all count, its other fields, and its gradients made in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, log_probs, labels, spec: LossSpec, rows: int | None):
        (N, D), V = hidden.shape, len(weight)
        rows = rows or chunk_rows(N, D, 4 * V, hidden.device)
        dtype = hidden.dtype
        mixed = {"out_dtype": torch.float32} if dtype != torch.float32 else {}
        options = {"dtype": torch.float32, "device": hidden.device}
        padded = triton.cdiv(V, ALIGNMENT) * ALIGNMENT
        tile = torch.empty(min(rows, N), padded, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty(N, D, **options)
        d_weight = torch.empty(V, D, **options)
        fields = torch.empty(N, 5, **options)
        weights = torch.full((N,), 1 / N, **options)
        likely = ids[:, 0].long().clamp(min=0) if ids.shape[1] else labels
        for place in slices(N, rows):
            part = hidden[place]
            e = tile[: len(part)]
            offset = (part * weight[likely[place]]).sum(1, dtype=torch.float32)
            sums = exponentials(part, weight, offset, e)
            factor = torch.empty(len(part), **options)
            constants = constants_of(e, None, ids.shape[1], simple=True)
            finish_kernel[(len(part),)](
                e,
                sums,
                factor,
                ids[place],
                log_probs[place],
                labels[place],
                weights[place],
                fields[place],
                e.stride(0),
                V,
                ids.shape[1],
                sums.shape[1],
                spec.kl_weight,
                spec.beta,
                TAIL=spec.tail,
                DIVERGENCE=spec.divergence,
                SLOT_INT=constants["SLOT_INT"],
                BLOCK_K=constants["BLOCK_K"],
            )
            e, factor = e[:, :V], factor[:, None]
            torch.mm(e, weight, out=d_hidden[place], **mixed)
            d_hidden[place].mul_(factor)
            scaled = (part * factor).to(dtype)
            beta = int(place.start > 0)
            torch.addmm(d_weight, e.t(), scaled, beta=beta, out=d_weight, **mixed)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = dtype
        fields = fields.mean(0)
        ctx.mark_non_differentiable(rest := fields[1:].clone())
        return fields[0].clone(), rest

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, d_weight = ctx.saved_tensors
        scaled = [scale_gradient(part, d_loss, ctx.dtype) for part in (d_hidden, d_weight)]
        return *scaled, None, None, None, None, None


def linear_topk_kl_exp(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    *,
    kl_weight: float = 0.5,
    tail: str = "ghost",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    _rows: int | None = None,
) -> LossOutput:
    """`linear_topk_kl`'s mean at T=1, of rows that all count; any tail but smooth, no softcap.

    A row's first id is to be a likely one. Args are not checked.
    """
    spec = LossSpec(kl_weight, 1.0, tail, divergence, beta)
    with computing(hidden):
        loss, fields = ExpLoss.apply(hidden, weight, ids, log_probs, labels, spec, _rows)
    return LossOutput(loss, *fields)
