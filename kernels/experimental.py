"""Experimental, never taken by `auto`: the logits' product stores exp(z - m) in the inputs' dtype.

No fp32 logits exist, which saves four bytes an element written and eight read. C rows of a chunk, V
vocabulary, K teacher entries a row (S), m = one offset a row: the logit of a likely token.

    product_kernel   E = exp(z - m), rounded, and the sums of what each block stored
    finish_kernel    the tail (the sums less S), the losses, a factor f of the row, and over the K+1
                     special entries value/f: E is then gradient/f

d_hidden = f * (E @ weight) and d_weight = E^T @ (f * hidden) follow as plain products. In bf16 a
row's loss is off by 2^-9 nats, without bias, and its gradient by .4%. A logit of S or of the label
more than 69 below m counts as 69 below, and one 88 above m makes the loss inf.
"""

import math

import torch
from torch import Tensor

from .backends import computing, jit, tl, triton
from .checks import LossOutput, LossSpec
from .chunks import ALIGNMENT, add_product, chunk_rows, slices
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
    hidden_rows = (rows % C).to(tl.int64)
    weight_rows = (cols % V).to(tl.int64)
    left = hidden_ptr + hidden_rows[:, None] * D + width[None, :]
    right = weight_ptr + weight_rows[:, None] * D + width[None, :]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = (start + width < D)[None, :]
        a = tl.load(left, mask=inside, other=0.0)
        b = tl.load(right, mask=inside, other=0.0)
        z = tl.dot(a, tl.trans(b), z, input_precision="ieee")
        left += BLOCK_D
        right += BLOCK_D
    offset = tl.load(offset_ptr + rows, mask=rows < C, other=0.0)
    z = z - offset[:, None]
    z = tl.where(cols[None, :] < V, z, MINUS_INF)
    e = tl.exp2(z * LOG2E)
    e = e.to(out_ptr.dtype.element_ty)
    out_rows = rows.to(tl.int64)[:, None] * V_padded
    inside_rows = (rows < C)[:, None]
    inside_cols = (cols < V_padded)[None, :]  # a width that 16 divides: 16-byte stores
    tl.store(out_ptr + out_rows + cols[None, :], e, mask=inside_rows & inside_cols)
    stored = e.to(tl.float32)
    sums = sums_ptr + rows * tl.cdiv(V, BLOCK_N) + block_n
    tl.store(sums, tl.sum(stored, 1), mask=rows < C)


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
    through_softmax = (share - scale * slope_sum) * tl.exp(ls)
    on_support = scale * slopes + through_softmax
    is_label = ids == label
    on_support -= tl.where(is_label, share, 0.0)
    on_support = on_support / factor
    in_support = tl.max((has_id & is_label).to(tl.int32), 0)
    on_label = e_label - share / factor
    dtype: tl.constexpr = e_ptr.dtype.element_ty
    tl.debug_barrier()
    tl.store(e_row + ids, on_support.to(dtype), mask=is_first)
    tl.store(e_row + label, on_label.to(dtype), mask=in_support == 0)
    tl.store(factor_ptr + row, factor)


def exponentials(hidden: Tensor, weight: Tensor, offset: Tensor, e: Tensor) -> Tensor:
    """E = exp(hidden @ weight^T - offset) into e [C,V_padded]; returns block sums [C,blocks]."""
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


def finish(
    e: Tensor,
    sums: Tensor,
    V: int,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    spec: LossSpec,
    fields: Tensor,
) -> Tensor:
    """Fills fields [C,5]; e [C,V_padded] becomes gradient/factor; returns the factors [C,1]."""
    C, K = ids.shape
    constants = constants_of(e, None, K, simple=True)
    factor = torch.empty(C, 1, dtype=torch.float32, device=e.device)
    finish_kernel[(C,)](
        e,
        sums,
        factor,
        ids,
        log_probs,
        labels,
        row_weights,
        fields,
        e.stride(0),
        V,
        K,
        sums.shape[1],
        spec.kl_weight,
        spec.beta,
        TAIL=spec.tail,
        DIVERGENCE=spec.divergence,
        SLOT_INT=constants["SLOT_INT"],
        BLOCK_K=constants["BLOCK_K"],
    )
    return factor


class ExpLoss(torch.autograd.Function):
    """The mean loss of rows that all count; its gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        log_probs: Tensor,
        labels: Tensor,
        spec: LossSpec,
        rows: int | None,
    ):
        N, D = hidden.shape
        V = len(weight)
        dtype = hidden.dtype
        if rows is None:
            rows = chunk_rows(N, D, 4 * V, hidden.device)
        mixed = {} if dtype == torch.float32 else {"out_dtype": torch.float32}
        options = {"dtype": torch.float32, "device": hidden.device}
        padded = math.ceil(V / ALIGNMENT) * ALIGNMENT
        tile = torch.empty(min(rows, N), padded, dtype=dtype, device=hidden.device)
        d_hidden = torch.empty(N, D, **options)
        d_weight = torch.empty(V, D, **options)
        fields = torch.empty(N, 5, **options)
        weights = torch.full((N,), 1 / N, **options)
        likely = ids[:, 0].long().clamp(min=0) if ids.shape[1] else labels
        for place in slices(N, rows):
            part = hidden[place]
            e = tile[: len(part)]
            products = part * weight[likely[place]]
            offset = products.sum(1, dtype=torch.float32)
            sums = exponentials(part, weight, offset, e)
            factor = finish(
                e,
                sums,
                V,
                ids[place],
                log_probs[place],
                labels[place],
                weights[place],
                spec,
                fields[place],
            )
            e = e[:, :V]
            add_product(d_hidden[place], e, weight, False, mixed)
            d_hidden[place].mul_(factor)
            scaled = (part * factor).to(dtype)
            add_product(d_weight, e.t(), scaled, place.start > 0, mixed)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = dtype
        loss, *rest = fields.mean(0)
        rest = torch.stack(rest)
        ctx.mark_non_differentiable(rest)
        return loss.clone(), rest

    @staticmethod
    def backward(ctx, d_loss, _):
        scaled = [scale_gradient(part, d_loss, ctx.dtype) for part in ctx.saved_tensors]
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
