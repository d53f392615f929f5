"""The losses against a teacher that is known whole, in Triton: one program reads both sides' rows
three times.

    1. normalisers    logsumexp of the student's z/T and z, and of the teacher's scores/T
    2. value          sum of the outcomes, and of their slopes g = df/dl
    3. gradient       scale * (g - sum(g) * softmax(z/T)) + share * (softmax(z) - onehot(label))

V tokens of the student, V_teacher <= V of the teacher: the others have teacher probability 0. Rows
are read to a width that 16 divides, where they have it: else every access would be of one number.
"""

import math

from torch import Tensor

from .backends import jit, tl
from .checks import LossSpec
from .chunks import ALIGNMENT
from .torch_loss import DenseTargets
from .triton_loss import (
    FAR_AWAY,
    LOG2E,
    MINUS_INF,
    constants_of,
    masked_value,
    outcome,
    scan_row,
    softcap_slope,
    softcapped,
    store_fields,
    store_zeros,
)


@jit
def load_pair(
    z_row,
    teacher_row,
    cols,
    V,
    V_teacher,
    width,
    width_teacher,
    temperature,
    softcap,
    teacher_softcap,
    lse,
    teacher_norm,
):
    """A block of softcapped logits, and of both sides' log-probabilities at T."""
    z = tl.load(z_row + cols, mask=cols < width, other=MINUS_INF).to(tl.float32)
    z = tl.where(cols < V, softcapped(z, softcap), MINUS_INF)
    scores = tl.load(teacher_row + cols, mask=cols < width_teacher, other=MINUS_INF).to(tl.float32)
    scores = tl.where(cols < V_teacher, softcapped(scores, teacher_softcap), MINUS_INF)
    return z, scores / temperature - teacher_norm, z / temperature - lse


@jit
def dense_kernel(
    logits_ptr,
    grad_ptr,
    scores_ptr,
    log_norm_ptr,
    labels_ptr,
    row_weights_ptr,
    fields_ptr,
    stride,
    grad_stride,
    scores_stride,
    V,
    V_teacher,
    width,
    width_teacher,
    temperature,
    kl_weight,
    beta,
    softcap,
    teacher_softcap,
    RENORMALIZE: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    OVERLAPS: tl.constexpr,
    MASKED: tl.constexpr,
    SCORES_MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program = row. Without log_norm_ptr the scores are logits, and their mass is 1."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    z_row = logits_ptr + row * stride
    teacher_row = scores_ptr + row * scores_stride
    fields_row = fields_ptr + row * 5
    log2e_T = 1 / temperature * LOG2E
    weight = tl.load(row_weights_ptr + row).to(tl.float32)
    if weight == 0:
        if grad_ptr is not None:
            store_zeros(grad_ptr + row * grad_stride, V, lanes)
        store_fields(fields_row, 0.0, 0.0, 0.0, 0.0, kl_weight, temperature)
        return

    # Read before any gradient is written over it.
    label = -1
    z_label = 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row).to(tl.int32)
        z_label = softcapped(tl.load(z_row + label).to(tl.float32), softcap)

    # First pass: normalisers.
    _, largest, sum_T, sum_1, _ = scan_row(
        z_row, V, lanes, softcap, log2e_T, MASKED, TWO_TEMPERATURES, False
    )
    lse = largest / temperature + tl.log(sum_T)
    lse_1 = largest + tl.log(sum_1) if TWO_TEMPERATURES else lse
    _, largest, teacher_sum, _, _ = scan_row(
        teacher_row, V_teacher, lanes, teacher_softcap, log2e_T, SCORES_MASKED, False, False
    )
    teacher_norm = largest / temperature + tl.log(teacher_sum)
    teacher_norm = tl.where(teacher_sum > 0, teacher_norm, FAR_AWAY)
    teacher_mass = tl.where(teacher_sum > 0, 1.0, 0.0)
    if log_norm_ptr is not None:
        log_norm = tl.load(log_norm_ptr + row).to(tl.float32)
        teacher_mass = tl.exp(teacher_norm - log_norm)
        if not RENORMALIZE:
            teacher_norm = log_norm

    # Second pass: the loss.
    values = tl.zeros([BLOCK], tl.float32)
    slope_sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        z, lt, ls = load_pair(
            z_row, teacher_row, start + lanes, V, V_teacher, width, width_teacher,
            temperature, softcap, teacher_softcap, lse, teacher_norm,
        )  # fmt: skip
        value, slope = outcome(lt, ls, beta, DIVERGENCE)
        values += value
        slope_sums += slope
    kl = tl.sum(values, 0)
    slope_sum = tl.sum(slope_sums, 0)
    ce = 0.0
    if labels_ptr is not None:
        ce = lse_1 - z_label
    store_fields(fields_row, kl, ce, teacher_mass, 1.0, kl_weight, temperature)

    # Third pass: the gradient.
    if grad_ptr is not None:
        grad_row = grad_ptr + row * grad_stride
        scale = weight * kl_weight * temperature
        share = 0.0
        if labels_ptr is not None:
            share = weight * (1 - kl_weight)
        for start in range(0, V, BLOCK):
            cols = start + lanes
            z, lt, ls = load_pair(
                z_row, teacher_row, cols, V, V_teacher, width, width_teacher,
                temperature, softcap, teacher_softcap, lse, teacher_norm,
            )  # fmt: skip
            value, slope = outcome(lt, ls, beta, DIVERGENCE)
            grad = scale * (slope - slope_sum * tl.exp(ls))
            if labels_ptr is not None:
                grad += share * (tl.exp(z - lse_1) - tl.where(cols == label, 1.0, 0.0))
            grad *= softcap_slope(z, softcap)
            if OVERLAPS:
                tl.debug_barrier()
            tl.store(grad_row + cols, grad.to(grad_ptr.dtype.element_ty), mask=cols < width)


def readable_width(rows: Tensor) -> int:
    """V of rows [C,V], or with the padding that the rows of a chunk's tile have in memory."""
    C, V = rows.shape
    padded = math.ceil(V / ALIGNMENT) * ALIGNMENT
    end = rows.storage_offset() + (C - 1) * rows.stride(0) + padded
    in_memory = end * rows.element_size() <= rows.untyped_storage().nbytes()
    return padded if padded <= rows.stride(0) and in_memory else V


def dense_losses(
    z: Tensor,
    targets: DenseTargets,
    spec: LossSpec,
    fields: Tensor,
    grad: Tensor | None,
) -> None:
    """`triton_loss.sparse_losses` for a teacher that is known whole; z stays as it is but for
    `grad`.
    """
    C, V = z.shape
    if C == 0:
        return
    width = readable_width(z)
    if grad is not None:
        width = min(width, readable_width(grad))
    constants = constants_of(z, grad, 0, simple=spec.softcap is None)
    del constants["SLOT_INT"], constants["BLOCK_K"]
    dense_kernel[(C,)](
        z,
        grad,
        targets.scores,
        targets.log_norm,
        targets.labels,
        targets.row_weights,
        fields,
        z.stride(0),
        0 if grad is None else grad.stride(0),
        targets.scores.stride(0),
        V,
        targets.scores.shape[1],
        width,
        readable_width(targets.scores),
        spec.temperature,
        spec.kl_weight,
        spec.beta,
        spec.softcap,
        spec.teacher_softcap,
        RENORMALIZE=spec.renormalizes,
        DIVERGENCE=spec.divergence,
        TWO_TEMPERATURES=spec.temperature != 1 and targets.labels is not None,
        SCORES_MASKED=masked_value(targets.scores.dtype),
        **constants,
    )
