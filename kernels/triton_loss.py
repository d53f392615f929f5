"""The losses in Triton: a program reads a row of logits twice and leaves its losses and gradient.

C rows of a chunk, V vocabulary, K teacher entries a row (S = their ids), T temperature.

    1. take_support   the K logits of S are gathered, and MASKED stands in their place
    2. scan_row       largest logit and sums of exp(z/T), exp(z) over the tokens off S: the tail is
                      a sum of its own and never 1 - sum p, so that 1e-30 is as exact as .3
    3. row_divergence K+1 outcomes: the value, and the slopes g = df/dl of l = log softmax(z/T)
    4. write_row      off S: coef_kl * softmax(z/T) + coef_ce * softmax(z) + uniform_grad
    5. on S           scale * (g - sum(g) * p) + share * p(T=1), less `share` at the label

The softmaxes of step 4 are over the tokens off S. `topk_kl` reads logits of any type and writes the
gradient elsewhere; the chunked ops let a bf16 or fp16 gradient overwrite the fp32 tile that it
comes from. All arithmetic is fp32. No atomics: the same bits in every run.
"""

import math

import torch
from torch import Tensor

from .backends import jit, tl, triton
from .checks import LossSpec
from .divergence import FAR, TEACHER_FLOOR
from .torch_loss import LogProbsSpec, Targets

LOG2E = tl.constexpr(math.log2(math.e))
MINUS_INF = tl.constexpr(-math.inf)
FAR_AWAY = tl.constexpr(FAR)
LOWEST = tl.constexpr(-1e29)  # a lane's maximum before its first token: above MASKED and -inf
FLOOR = tl.constexpr(TEACHER_FLOOR)
ROUNDING = tl.constexpr(256 * 1.1920929e-07)  # of tv: 256 eps of fp32


@jit
def softcapped(z, softcap):
    """c * tanh(z/c); a series below .2, where 1 - exp would lose its digits."""
    if softcap is not None:
        x = z / softcap
        x2 = x * x
        series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 - x2 * (17 / 315))))
        e = tl.exp2(tl.abs(x) * -2 * LOG2E)
        tanh = (1 - e) / (1 + e)
        tanh = tl.where(x < 0, -tanh, tanh)
        z = softcap * tl.where(tl.abs(x) < 0.2, series, tanh)
    return z


@jit
def softcap_slope(z, softcap):
    """The softcap's derivative where it gave z."""
    slope = 1.0
    if softcap is not None:
        slope = 1 - (z / softcap) * (z / softcap)
    return slope


@jit
def log_add(one, other):
    """log(exp(one) + exp(other)), -inf where both are."""
    top = tl.maximum(tl.maximum(one, other), FAR_AWAY)
    return top + tl.log(tl.exp(one - top) + tl.exp(other - top))


@jit
def merge_slots(ids, has_id, values, ids_row, values_row, slots, count, LOGS: tl.constexpr):
    """Adds the values of equal ids (LOGS: as logs); tells the first slot of each id."""
    first = slots
    nothing = MINUS_INF if LOGS else 0.0
    total = tl.where(count > 0, nothing, values)
    for other in range(0, count):
        same = has_id & (ids == tl.load(ids_row + other).to(tl.int32))
        value = tl.load(values_row + other).to(tl.float32)
        added = log_add(total, value) if LOGS else total + value
        total = tl.where(same, added, total)
        first = tl.where(same & (other < first), other, first)
    is_first = has_id & (first == slots)
    return is_first, tl.where(is_first, total, nothing)


@jit
def take_support(
    z_row,
    ids_row,
    values_row,
    slots,
    K,
    LOGS: tl.constexpr,
    SLOT_INT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Gathers S of a row and puts MASKED in its place. Equal ids become one outcome, their values
    added.

    Each slot writes its number where its logit was and reads it back: where another's number
    stands, two slots have one id, and only then are slots compared with each other.
    Returns ids [BLOCK_K], has_id, is_first (the first slot of each id), the raw logits, the values.
    """
    ids = tl.load(ids_row + slots, mask=slots < K, other=-1).to(tl.int32)
    has_id = ids >= 0
    nothing = MINUS_INF if LOGS else 0.0
    values = tl.load(values_row + slots, mask=has_id, other=nothing).to(tl.float32)
    places = z_row + tl.where(has_id, ids, 0)
    raw = tl.load(places, mask=has_id, other=0.0)
    marks = places.to(tl.pointer_type(SLOT_INT), bitcast=True)
    tl.debug_barrier()
    tl.store(marks, slots.to(SLOT_INT), mask=has_id)
    tl.debug_barrier()
    overwritten = has_id & (tl.load(marks, mask=has_id, other=0) != slots.to(SLOT_INT))
    tl.debug_barrier()
    tl.store(places, MASKED, mask=has_id)
    tl.debug_barrier()
    count = tl.where(tl.sum(overwritten.to(tl.int32), 0) > 0, K, 0)
    is_first, values = merge_slots(ids, has_id, values, ids_row, values_row, slots, count, LOGS)
    return ids, has_id, is_first, raw, values


@jit
def scan_block(
    raw,
    largest,
    sum_T,
    sum_1,
    total,
    softcap,
    log2e_T,
    MASKED: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    SUM_LOGITS: tl.constexpr,
):
    """Takes a block of logits into every lane's maximum and sums."""
    z = softcapped(raw.to(tl.float32), softcap)
    if SUM_LOGITS:
        total += tl.where(raw == MASKED, 0.0, z)
    z = tl.where(raw == MASKED, MINUS_INF, z)
    higher = tl.maximum(largest, z)
    sum_T = sum_T * tl.exp2((largest - higher) * log2e_T) + tl.exp2((z - higher) * log2e_T)
    if TWO_TEMPERATURES:
        sum_1 = sum_1 * tl.exp2((largest - higher) * LOG2E) + tl.exp2((z - higher) * LOG2E)
    return higher, sum_T, sum_1, total


@jit
def scan_row(
    z_row,
    V,
    lanes,
    softcap,
    log2e_T,
    MASKED: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    SUM_LOGITS: tl.constexpr,
):
    """One pass over a row, MASKED left out; lanes that no token reaches have LOWEST and 0.

    Returns each lane's maximum [BLOCK], the largest of them, sum exp((z - largest)/T), the same sum
    at T=1 (equal unless TWO_TEMPERATURES), and sum z.
    """
    BLOCK: tl.constexpr = lanes.shape[0]
    zeros = tl.zeros([BLOCK], tl.float32)
    lane_max = zeros + LOWEST
    sum_T, sum_1, total = zeros, zeros, zeros
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        raw = tl.load(z_row + start + lanes, eviction_policy="evict_last")  # to be read again
        lane_max, sum_T, sum_1, total = scan_block(
            raw, lane_max, sum_T, sum_1, total, softcap, log2e_T,
            MASKED, TWO_TEMPERATURES, SUM_LOGITS,
        )  # fmt: skip
    for start in range(whole, V, BLOCK):  # once or never: a loop takes fewer registers
        raw = tl.load(z_row + start + lanes, mask=start + lanes < V, other=MASKED)
        lane_max, sum_T, sum_1, total = scan_block(
            raw, lane_max, sum_T, sum_1, total, softcap, log2e_T,
            MASKED, TWO_TEMPERATURES, SUM_LOGITS,
        )  # fmt: skip
    largest = tl.max(lane_max, 0)
    row_sum_T = tl.sum(sum_T * tl.exp2((lane_max - largest) * log2e_T), 0)
    row_sum_1 = row_sum_T
    if TWO_TEMPERATURES:
        row_sum_1 = tl.sum(sum_1 * tl.exp2((lane_max - largest) * LOG2E), 0)
    return lane_max, largest, row_sum_T, row_sum_1, tl.sum(total, 0)


@jit
def outcome(lt, ls, beta, DIVERGENCE: tl.constexpr):
    """An outcome's share of the divergence and its slope df/dls; divergence.py has the table."""
    t = tl.exp(lt)
    p = tl.exp(ls)
    if DIVERGENCE == "forward_kl":
        value = tl.where(t > 0, t * (lt - ls), 0.0)
        slope = -t
    elif DIVERGENCE == "reverse_kl":
        gap = ls - tl.maximum(lt, FLOOR)
        value = tl.where(p > 0, p * gap, 0.0)
        slope = tl.where(p > 0, p * (gap + 1), 0.0)
    elif DIVERGENCE == "tv":
        gap = p - t
        gap = tl.where(tl.abs(gap) <= tl.maximum(t, p) * ROUNDING, 0.0, gap)
        sign = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
        value = 0.5 * tl.abs(gap)
        slope = 0.5 * p * sign
    else:
        student_part = tl.log(1 - beta) + ls
        lm = log_add(tl.log(beta) + lt, student_part)
        value = tl.where(t > 0, t * (lt - lm), 0.0)
        if DIVERGENCE == "skew_kl":
            slope = tl.where(t > 0, -t * tl.exp(student_part - lm), 0.0)
        else:
            tl.static_assert(DIVERGENCE == "jsd")
            slope = (1 - beta) * tl.where(p > 0, p * (ls - lm), 0.0)
            value = beta * value + slope
    return value, slope


@jit
def normalizer(log_probs):
    """logsumexp over the slots; 0 where all are -inf."""
    top = tl.max(log_probs, 0)
    lse = top + tl.log(tl.sum(tl.exp(log_probs - tl.maximum(top, FAR_AWAY)), 0))
    return tl.where(top > MINUS_INF, lse, 0.0)


@jit
def row_divergence(
    lt,
    ls,
    ls_tail,
    mean_ls_outside,
    num_outside,
    beta,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
):
    """A row's divergence from lt, ls [BLOCK_K]; divergence.py has the same in PyTorch.

    Returns its value, the slopes on S [BLOCK_K], of the tail and of each token off S alike, and the
    masses of teacher and student on S.
    """
    teacher_mass = tl.sum(tl.exp(lt), 0)
    student_mass = tl.sum(tl.exp(ls), 0)
    tail = tl.where(num_outside > 0, tl.maximum(1 - teacher_mass, 0.0), 0.0)
    if TAIL == "renormalize" or TAIL == "renormalize_both":
        lt = lt - normalizer(lt)
    if TAIL == "renormalize_both":
        ls = tl.where(tl.max(lt, 0) > MINUS_INF, ls - normalizer(ls), MINUS_INF)
    values, slopes = outcome(lt, ls, beta, DIVERGENCE)
    value = tl.sum(values, 0)
    tail_slope = 0.0
    uniform_slope = 0.0
    if TAIL == "ghost":
        tail_value, tail_slope = outcome(tl.log(tail), ls_tail, beta, DIVERGENCE)
        value += tail_value
    elif TAIL == "smooth":
        count = tl.maximum(num_outside, 1).to(tl.float32)
        log_share = tl.log(tail) - tl.log(count)
        value += tl.where(tail > 0, tail * (log_share - mean_ls_outside), 0.0)
        tail_slope = -tail
        uniform_slope = -tail / count
    elif TAIL == "renormalize_both":
        slopes -= tl.exp(ls) * tl.sum(slopes, 0)  # through the student's own normaliser
    return value, slopes, tail_slope, uniform_slope, teacher_mass, student_mass


@jit
def gradient_of(
    z,
    largest,
    log2_sum_T,
    log2_sum_1,
    coef_kl,
    coef_ce,
    uniform_grad,
    softcap,
    log2e_T,
    TWO_TEMPERATURES: tl.constexpr,
):
    """Softcapped logits to the gradient of their row's loss, except on S and at the label."""
    grad = coef_kl * tl.exp2((z - largest) * log2e_T - log2_sum_T) + uniform_grad
    if TWO_TEMPERATURES:
        grad += coef_ce * tl.exp2((z - largest) * LOG2E - log2_sum_1)
    return grad * softcap_slope(z, softcap)


@jit
def write_row(
    z_row,
    grad_row,
    V,
    lanes,
    largest,
    log2_sum_T,
    log2_sum_1,
    coef_kl,
    coef_ce,
    uniform_grad,
    softcap,
    log2e_T,
    TWO_TEMPERATURES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The gradient of a whole row, except on S and at the label.

    OVERLAPS: it is narrower than the logits and lies over them, so that it is written behind where
    they are read, and in each block only when all its threads have read.
    """
    BLOCK: tl.constexpr = lanes.shape[0]
    whole = V // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        z = softcapped(tl.load(z_row + start + lanes).to(tl.float32), softcap)
        grad = gradient_of(
            z, largest, log2_sum_T, log2_sum_1, coef_kl, coef_ce, uniform_grad, softcap, log2e_T,
            TWO_TEMPERATURES,
        )  # fmt: skip
        if OVERLAPS:
            tl.debug_barrier()
        tl.store(grad_row + start + lanes, grad.to(grad_row.dtype.element_ty))
    inside = whole + lanes < V
    z = tl.load(z_row + whole + lanes, mask=inside, other=0.0).to(tl.float32)
    grad = gradient_of(
        softcapped(z, softcap), largest, log2_sum_T, log2_sum_1, coef_kl, coef_ce, uniform_grad,
        softcap, log2e_T, TWO_TEMPERATURES,
    )  # fmt: skip
    tl.debug_barrier()
    tl.store(grad_row + whole + lanes, grad.to(grad_row.dtype.element_ty), mask=inside)
    tl.debug_barrier()


@jit
def store_fields(fields_row, kl, ce, teacher_mass, student_mass, kl_weight, temperature):
    """LossOutput's fields of a row."""
    # A term of weight 0 may be inf, and 0 * inf would be NaN.
    loss = tl.where(kl_weight > 0, kl_weight * temperature * temperature * kl, 0.0)
    loss += tl.where(kl_weight < 1, (1 - kl_weight) * ce, 0.0)
    tl.store(fields_row, loss)
    tl.store(fields_row + 1, kl)
    tl.store(fields_row + 2, ce)
    tl.store(fields_row + 3, teacher_mass)
    tl.store(fields_row + 4, student_mass)


@jit
def store_zeros(grad_row, V, lanes):
    """The gradient of an ignored row."""
    zeros = (lanes * 0).to(grad_row.dtype.element_ty)
    for start in range(0, V, lanes.shape[0]):
        tl.store(grad_row + start + lanes, zeros, mask=start + lanes < V)


@jit
def loss_kernel(
    logits_ptr,
    grad_ptr,
    ids_ptr,
    log_probs_ptr,
    labels_ptr,
    row_weights_ptr,
    fields_ptr,
    stride,
    grad_stride,
    V,
    K,
    temperature,
    kl_weight,
    beta,
    softcap,
    TAIL: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TWO_TEMPERATURES: tl.constexpr,
    OVERLAPS: tl.constexpr,
    RESTORE: tl.constexpr,
    SLOT_INT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program = row. Without labels_ptr there is no cross-entropy, without grad_ptr no gradient."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    slots = tl.arange(0, BLOCK_K)
    z_row = logits_ptr + row * stride
    fields_row = fields_ptr + row * 5
    log2e_T = 1 / temperature * LOG2E
    weight = tl.load(row_weights_ptr + row).to(tl.float32)
    if weight == 0:  # ignored: nothing of it is read
        if grad_ptr is not None:
            store_zeros(grad_ptr + row * grad_stride, V, lanes)
        store_fields(fields_row, 0.0, 0.0, 0.0, 0.0, kl_weight, temperature)
        return

    # The logits of S and of the label.
    label = -1
    z_label = 0.0
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row).to(tl.int32)
        z_label = softcapped(tl.load(z_row + label).to(tl.float32), softcap)
    ids, has_id, is_first, raw, lt = take_support(
        z_row, ids_ptr + row * K, log_probs_ptr + row * K, slots, K, True, SLOT_INT, MASKED
    )
    z_support = softcapped(raw.to(tl.float32), softcap)
    z_support = tl.where(is_first, z_support, MINUS_INF)

    # First pass: normalisers, relative to the row's largest logit `peak`.
    _, largest, sum_T, sum_1, total = scan_row(
        z_row, V, lanes, softcap, log2e_T, MASKED, TWO_TEMPERATURES, TAIL == "smooth"
    )
    peak = tl.maximum(largest, tl.max(z_support, 0))
    gap = largest - peak
    support_sum = tl.sum(tl.exp2((z_support - peak) * log2e_T), 0)
    lse = tl.log(sum_T * tl.exp2(gap * log2e_T) + support_sum)
    lse_1 = lse
    if TWO_TEMPERATURES:
        support_sum = tl.sum(tl.exp2((z_support - peak) * LOG2E), 0)
        lse_1 = tl.log(sum_1 * tl.exp2(gap * LOG2E) + support_sum)

    # The loss.
    num_outside = V - tl.sum(is_first.to(tl.int32), 0)
    log_tail = tl.where(num_outside > 0, gap / temperature + tl.log(sum_T) - lse, MINUS_INF)
    ls = (z_support - peak) / temperature - lse
    mean_ls_outside = (total / tl.maximum(num_outside, 1) - peak) / temperature - lse
    kl, slopes, tail_slope, uniform_slope, teacher_mass, student_mass = row_divergence(
        lt / temperature, ls, log_tail, mean_ls_outside, num_outside, beta, TAIL, DIVERGENCE
    )
    ce = 0.0
    if labels_ptr is not None:
        ce = lse_1 - (z_label - peak)
    store_fields(fields_row, kl, ce, teacher_mass, student_mass, kl_weight, temperature)

    # Second pass: the gradient.
    if grad_ptr is not None:
        grad_row = grad_ptr + row * grad_stride
        scale = weight * kl_weight * temperature  # T^2 of the loss times 1/T of z/T
        share = 0.0
        if labels_ptr is not None:
            share = weight * (1 - kl_weight)
        slope_sum = tl.sum(slopes, 0) + tail_slope
        coef_kl = -scale * slope_sum * tl.exp(log_tail)
        if TAIL == "ghost":
            coef_kl += scale * tail_slope
        coef_ce = share * tl.exp(gap + tl.log(sum_1) - lse_1)
        if not TWO_TEMPERATURES:
            coef_kl += coef_ce
        uniform_grad = scale * uniform_slope
        log2_sum_T = tl.where(sum_T > 0, tl.log2(sum_T), 0.0)
        log2_sum_1 = tl.where(sum_1 > 0, tl.log2(sum_1), 0.0)
        write_row(
            z_row, grad_row, V, lanes, largest, log2_sum_T, log2_sum_1, coef_kl, coef_ce,
            uniform_grad, softcap, log2e_T, TWO_TEMPERATURES, OVERLAPS,
        )  # fmt: skip
        p_T = tl.exp2((z_support - peak) * log2e_T - lse * LOG2E)
        on_support = scale * (slopes - slope_sum * p_T)
        p_1 = tl.exp2((z_support - peak - lse_1) * LOG2E)
        on_support += share * (p_1 - tl.where(ids == label, 1.0, 0.0))
        on_support *= softcap_slope(z_support, softcap)
        tl.store(grad_row + ids, on_support.to(grad_ptr.dtype.element_ty), mask=is_first)
        if labels_ptr is not None:
            on_label = gradient_of(
                z_label, largest, log2_sum_T, log2_sum_1, coef_kl, coef_ce, uniform_grad,
                softcap, log2e_T, TWO_TEMPERATURES,
            )  # fmt: skip
            on_label -= share * softcap_slope(z_label, softcap)
            in_support = tl.max((has_id & (ids == label)).to(tl.int32), 0)
            on_label = on_label.to(grad_ptr.dtype.element_ty)
            tl.store(grad_row + label, on_label, mask=in_support == 0)
    if RESTORE:
        tl.debug_barrier()
        tl.store(z_row + ids, raw, mask=has_id)


@jit
def log_probs_kernel(
    logits_ptr,
    ids_ptr,
    log_probs_ptr,
    lse_ptr,
    stride,
    V,
    K,
    temperature,
    softcap,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program = row: log softmax(z/T) at the ids, 0 in empty slots, and logsumexp(z/T)."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    slots = tl.arange(0, BLOCK_K)
    z_row = logits_ptr + row * stride
    _, largest, row_sum, _, _ = scan_row(
        z_row, V, lanes, softcap, 1 / temperature * LOG2E, MASKED, False, False
    )
    log_sum = tl.log(row_sum)
    ids = tl.load(ids_ptr + row * K + slots, mask=slots < K, other=-1)
    z = tl.load(z_row + ids, mask=ids >= 0, other=0.0).to(tl.float32)
    log_probs = (softcapped(z, softcap) - largest) / temperature - log_sum
    log_probs = tl.where(ids >= 0, log_probs, 0.0)
    tl.store(log_probs_ptr + row * K + slots, log_probs, mask=slots < K)
    tl.store(lse_ptr + row, largest / temperature + log_sum)


@jit
def log_probs_grad_kernel(
    logits_ptr,
    grad_ptr,
    ids_ptr,
    d_log_probs_ptr,
    d_lse_ptr,
    stride,
    grad_stride,
    V,
    K,
    temperature,
    softcap,
    OVERLAPS: tl.constexpr,
    SLOT_INT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Program = row: dz = 1/T * ((d_lse - sum g) * softmax(z/T) + scatter_add(g)), g =
    d_log_probs.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    slots = tl.arange(0, BLOCK_K)
    z_row = logits_ptr + row * stride
    grad_row = grad_ptr + row * grad_stride
    log2e_T = 1 / temperature * LOG2E
    ids, _, is_first, raw, g = take_support(
        z_row, ids_ptr + row * K, d_log_probs_ptr + row * K, slots, K, False, SLOT_INT, MASKED
    )
    z_support = softcapped(raw.to(tl.float32), softcap)
    z_support = tl.where(is_first, z_support, MINUS_INF)
    _, largest, row_sum, _, _ = scan_row(z_row, V, lanes, softcap, log2e_T, MASKED, False, False)
    peak = tl.maximum(largest, tl.max(z_support, 0))
    support_sum = tl.sum(tl.exp2((z_support - peak) * log2e_T), 0)
    log2_sum = tl.log2(row_sum * tl.exp2((largest - peak) * log2e_T) + support_sum)
    coef = (tl.load(d_lse_ptr + row) - tl.sum(g, 0)) / temperature
    write_row(
        z_row, grad_row, V, lanes, peak, log2_sum, log2_sum, coef, 0.0, 0.0, softcap, log2e_T,
        False, OVERLAPS,
    )  # fmt: skip
    probs = tl.exp2((z_support - peak) * log2e_T - log2_sum)
    on_support = (coef * probs + g / temperature) * softcap_slope(z_support, softcap)
    tl.store(grad_row + ids, on_support.to(grad_ptr.dtype.element_ty), mask=is_first)


def masked_value(dtype: torch.dtype) -> float:
    """The second-lowest finite number: the lowest may stand in logits that a caller has masked."""
    info = torch.finfo(dtype)
    exponent = math.frexp(info.max)[1] - 1
    return -(2 - 2 * info.eps) * 2.0**exponent


def launch_shape(row_bytes: int, K: int, simple: bool) -> tuple[int, int, int]:
    """BLOCK, num_warps and maxnreg for rows of this size [measured: results/*_chunk.txt].

    maxnreg is all the registers that so many warps can have: left alone, ptxas may take fewer and
    spill. 32 warps leave room for one program an SM, so that few rows are at work at once and the
    second pass still finds them in 50 MB of L2; rows beyond 256 KiB do not stay there. What is not
    `simple`, or has many entries, needs more registers.
    """
    if K > 256:
        return 4096, 16, 128
    if row_bytes <= 2**16:
        return 2048, 4, 255
    if row_bytes <= 2**18:
        return (4096, 32, 64) if simple else (4096, 16, 128)
    return 2048, 8, 255


def constants_of(z: Tensor, grad: Tensor | None, K: int, simple: bool) -> dict:
    """What the kernels are compiled for: the row's type and size."""
    size = z.element_size()
    simple = simple and z.shape[1] % 16 == 0
    block, num_warps, maxnreg = launch_shape(z.shape[1] * size, K, simple)
    return {
        "OVERLAPS": grad is not None and grad.element_size() < size,
        "SLOT_INT": tl.int32 if size == 4 else tl.int16,
        "MASKED": masked_value(z.dtype),
        "BLOCK": block,
        "BLOCK_K": triton.next_power_of_2(max(1, K)),
        "num_warps": num_warps,
        "maxnreg": maxnreg,
    }


def sparse_losses(
    z: Tensor,
    targets: Targets,
    spec: LossSpec,
    fields: Tensor,
    grad: Tensor | None,
    keep_logits: bool = False,
) -> None:
    """Fills fields [C,5] of logits z [C,V] and, where given, grad [C,V] of row_weights * loss.

    grad may be `narrowed(z)`. z is left changed in the K places of each row unless keep_logits.
    """
    (C, V), K = z.shape, targets.ids.shape[1]
    if C == 0:
        return
    two_temperatures = spec.temperature != 1 and targets.labels is not None
    simple = spec.softcap is None and spec.tail != "smooth" and not two_temperatures
    loss_kernel[(C,)](
        z,
        grad,
        targets.ids,
        targets.log_probs,
        targets.labels,
        targets.row_weights,
        fields,
        z.stride(0),
        0 if grad is None else grad.stride(0),
        V,
        K,
        spec.temperature,
        spec.kl_weight,
        spec.beta,
        spec.softcap,
        TAIL=spec.tail,
        DIVERGENCE=spec.divergence,
        TWO_TEMPERATURES=two_temperatures,
        RESTORE=keep_logits,
        **constants_of(z, grad, K, simple),
    )


def log_probs_of(
    z: Tensor,
    ids: Tensor,
    spec: LogProbsSpec,
    log_probs: Tensor,
    lse: Tensor,
) -> None:
    """Fills log_probs [C,K], 0 in empty slots, and lse [C] of logits z [C,V]."""
    (C, V), K = z.shape, ids.shape[1]
    constants = constants_of(z, None, K, spec.softcap is None)
    del constants["OVERLAPS"], constants["SLOT_INT"]
    log_probs_kernel[(C,)](
        z, ids, log_probs, lse, z.stride(0), V, K, spec.temperature, spec.softcap, **constants
    )


def log_probs_gradient(
    z: Tensor,
    ids: Tensor,
    spec: LogProbsSpec,
    d_log_probs: Tensor,
    d_lse: Tensor,
    grad: Tensor,
) -> None:
    """Fills grad [C,V], which may be `narrowed(z)`, from logits z [C,V], which it overwrites."""
    (C, V), K = z.shape, ids.shape[1]
    log_probs_grad_kernel[(C,)](
        z,
        grad,
        ids,
        d_log_probs,
        d_lse,
        z.stride(0),
        grad.stride(0),
        V,
        K,
        spec.temperature,
        spec.softcap,
        **constants_of(z, grad, K, spec.softcap is None),
    )


def narrowed(tile: Tensor, dtype: torch.dtype) -> Tensor:
    """tile [C,V] fp32 read as `dtype`: each row lies in the first bytes of its row of the tile."""
    if dtype == tile.dtype:
        return tile
    return tile.view(dtype)[:, : tile.shape[1]]
