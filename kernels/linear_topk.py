"""The teacher's side: its k likeliest tokens and exact normalisers, straight from hidden states.

N rows, D width, V vocabulary. log_norm(T) = logsumexp(z/T) - logsumexp(z)/T turns a stored log-probability at T=1 into
the exact one at T: log_prob/T - log_norm(T), tail included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import exp_kernel, row_kernel
from .common import Spec, check_backend, check_linear, compute_dtype, computing, tl, triton, whole_logits
from .exp_kernel import GROUP
from .row_kernel import LOG2E, LOW, MINUS_INF, capped, first_pass
from .tile import Head, Targets, cap, scan

# most k that a setting holds for -> (lanes = groups, warps). Predicted: no row was measured on a GPU.
TUNING = ((64, 4096, 8), (256, 8192, 16))


def reference(z: Tensor, k: int, temperatures: tuple[float, ...]):
    """The plain form on whole logits z [N,V]."""
    log_probs, ids = z.log_softmax(1).topk(k, dim=1)
    norms = [(z / T).logsumexp(1) - z.logsumexp(1) / T for T in temperatures]
    return ids.int(), log_probs, torch.stack(norms, dim=1) if norms else z[:, :0]


@triton.jit
def ordered(z):
    """fp32 -> uint32 of the same order; 0 is below every number's."""
    bits = z.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | (-2147483648))).to(tl.uint32, bitcast=True)


@triton.jit
def largest(keys, k):
    """A mask of exactly k of the keys: none left out is larger than one taken, equal ones by place."""
    bound = tl.sum(tl.zeros_like(keys), 0).to(tl.uint32)
    bit = bound + 1 << 31
    for _ in range(32):  # the k-th largest key, bit by bit
        bound = tl.where(tl.sum((keys >= (bound | bit)).to(tl.int32), 0) >= k, bound | bit, bound)
        bit = bit >> 1
    above, ties = keys > bound, keys == bound
    room = k - tl.sum(above.to(tl.int32), 0)
    return above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))


@triton.jit
def topk_kernel(
    z_ptr, sums_ptr, ids_ptr, log_probs_ptr, norm_ptr, stride, V, k, T, softcap, norm_stride,
    TWO: tl.constexpr, SELECT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, MARK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Program = row. The maxima of groups of columns, the k groups of the largest, the k largest of their members.

    A group is what one lane reads, columns lane, lane + BLOCK, ...: its maximum costs nothing more. With GROUP > 0 it is
    GROUP neighbours, and product_kernel has left maxima and sums of every COLUMNS columns: the row itself is not read.
    """
    row = tl.program_id(0).to(tl.int64)
    z_row, ids_row, out_row = z_ptr + row * stride, ids_ptr + row * k, log_probs_ptr + row * k
    lanes, slots, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K), 1 / T * LOG2E
    if GROUP:
        EACH: tl.constexpr = COLUMNS // GROUP
        blocks = tl.cdiv(V, COLUMNS)
        sums_row = sums_ptr + row * blocks * (EACH + 1)
        top = tl.load(sums_row + lanes // EACH * (EACH + 1) + lanes % EACH, mask=lanes < blocks * EACH, other=MINUS_INF)
        peak, lse = tl.maximum(tl.max(top, 0), LOW), 0.0
        for start in range(0, blocks, BLOCK_K):
            block = start + slots
            mine = sums_row + block * (EACH + 1)
            highest = tl.full([BLOCK_K], LOW, tl.float32)
            for group in range(0, EACH):
                highest = tl.maximum(highest, tl.load(mine + group, mask=block < blocks, other=MINUS_INF))
            part = tl.load(mine + EACH, mask=block < blocks, other=0.0)
            lse += tl.sum(part * tl.exp2((highest - peak) * LOG2E), 0)
        lse = tl.log(lse)
    else:
        last = (V - 1) // BLOCK * BLOCK
        end = (last > 0) & (last + lanes < V)
        top, peak, off, off1, _ = first_pass(z_row, lanes, lanes < V, last, end, softcap, c, MARK, TWO, False)
        lse = tl.log(off)
        if TWO:
            tl.store(norm_ptr + row * norm_stride, lse - tl.log(off1) / T)
            lse = tl.log(off1)
    if not SELECT:
        return
    taken = largest(ordered(top), k)  # the k largest of all lie in the k groups of the largest maxima
    tl.store(ids_row + tl.cumsum(taken.to(tl.int32), 0) - 1, lanes, mask=taken)
    tl.debug_barrier()
    member = tl.arange(0, BLOCK_K * MEMBERS)
    group = tl.load(ids_row + member // MEMBERS, mask=member < k * MEMBERS, other=0)
    cols = group * GROUP + member % MEMBERS if GROUP else group + member % MEMBERS * BLOCK
    inside = (cols < V) & (member < k * MEMBERS)
    z = capped(tl.load(z_row + cols, mask=inside, other=0.0), softcap)
    taken = largest(tl.where(inside, ordered(z), 0), k)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.debug_barrier()
    tl.store(ids_row + place, cols, mask=taken)
    tl.store(out_row + place, z, mask=taken)
    tl.debug_barrier()
    cols, z = tl.load(ids_row + slots, mask=slots < k), tl.load(out_row + slots, mask=slots < k, other=MINUS_INF)
    rank = tl.zeros([BLOCK_K], tl.int32)
    for start in range(0, k, 4):
        other = start + tl.arange(0, 4)
        rival = tl.load(out_row + other, mask=other < k, other=MINUS_INF)
        ahead = (rival[None, :] > z[:, None]) | ((rival[None, :] == z[:, None]) & (other[None, :] < slots[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(ids_row + rank, cols, mask=slots < k)
    tl.store(out_row + rank, z - peak - lse, mask=slots < k)


def launch(z: Tensor, sums: Tensor | None, ids: Tensor, log_probs: Tensor, log_norm: Tensor, temperatures, softcap) -> None:
    """Fills ids, log_probs [c,k] and log_norm [c,len(temperatures)] from a chunk's logits z [c,V], which it may spoil.

    sums: `exp_kernel.product`'s, or None; with them z is capped already.
    """
    (c, V), k = z.shape, ids.shape[1]
    by_kernel = k <= TUNING[-1][0]
    todo = [(column, T, 0) for column, T in enumerate(temperatures) if T != 1]
    if by_kernel:  # one pass serves T=1 and one more; each further one reads z again
        todo = todo or [(0, 1.0, 0)] if sums is None else [(0, 1.0, GROUP), *todo]
    for turn, (column, T, group) in enumerate(todo):
        block, warps = next(((block, warps) for most, block, warps in TUNING if k <= most), TUNING[-1][1:])
        members, columns = triton.next_power_of_2(triton.cdiv(V, block)), 0
        if group:
            columns, members = (sums.shape[2] - 1) * group, group
            block = max(triton.next_power_of_2(sums.shape[1] * (sums.shape[2] - 1)), triton.next_power_of_2(k))
            warps = 8 if max(block, k * group) <= 4096 else 16
        topk_kernel[(c,)](
            z, sums, ids, log_probs, log_norm[:, column:], z.stride(0), V, k, T, softcap, log_norm.stride(0),
            TWO=T != 1, SELECT=by_kernel and turn == 0, COLUMNS=columns, GROUP=group, MARK=row_kernel.mark_of(z.dtype),
            BLOCK=block, BLOCK_K=triton.next_power_of_2(k), MEMBERS=members,
            num_warps=warps, maxnreg=128,  # two or four programs an SM, and no spills
        )  # fmt: skip
    if not by_kernel:
        ids.copy_(z.topk(k, dim=1).indices)
        out = log_probs.new_empty(c, k + 1)
        row_kernel.launch(z, out, Targets(ids, None, None, out), Spec(tail="log_probs", softcap=softcap))
        log_probs.copy_(out[:, :k])


@torch.library.custom_op("nanodistill::topk", mutates_args=())
def topk_op(
    hidden: Tensor, weight: Tensor, k: int, temperatures: Sequence[float], softcap: float | None, backend: str,
    dtype: torch.dtype, rows: int | None, path: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ids, log_probs [N,k], log_norm [N,len(temperatures)], chunk by chunk."""
    with computing(hidden):
        head = Head(hidden, weight, dtype=dtype, rows=rows, aligned=backend == "triton")
        ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
        log_probs = torch.empty(len(hidden), k, dtype=head.dtype, device=hidden.device)
        log_norm = log_probs.new_zeros(len(hidden), len(temperatures))
        fused = backend == "triton" and exp_kernel.path_of(path, head, True) == 2
        for place in head.places():
            if backend == "triton":
                given = (ids[place], log_probs[place], log_norm[place], temperatures)
                z = head.tile[: len(given[0])] if fused else head.logits(place)
                sums = exp_kernel.product(*head.operands(place), z, softcap=softcap) if fused else None
                launch(z, sums, *given, None if fused else softcap)
                continue
            z = head.logits(place)
            top, places = z.topk(k, dim=1)
            sums = scan(z, places[:, :0], None, {1.0, *temperatures}, Spec(softcap=softcap), False)
            cap(top, softcap)
            ids[place], log_probs[place] = places.int(), top - sums.peak[:, None] - sums.lse[1.0][:, None]
            for column, T in enumerate(temperatures):
                log_norm[place, column] = sums.lse[T] - sums.lse[1.0] / T
    return ids, log_probs, log_norm


@topk_op.register_fake
def _(hidden, weight, k, temperatures, *rest):
    log_probs = hidden.new_empty(len(hidden), k, dtype=compute_dtype(rest[-3]))
    return log_probs.to(torch.int32), log_probs, log_probs.new_empty(len(hidden), len(temperatures))


def linear_topk(
    hidden: Tensor, weight: Tensor, k: int, *, temperatures: tuple[float, ...] = (1.0,), softcap: float | None = None,
    backend: str = "auto", _rows: int | None = None, _path: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Top-k of softmax(hidden @ weight^T) with exact log-probabilities, without its [N,V] logits; no gradient.

    Args: hidden [N,D], weight [V,D]; k in 1..V; temperatures: those whose normaliser is wanted, each above 0.
    Returns: ids [N,k] int32, by descending probability (ties in any order), log_probs [N,k] nats at T=1, and
        log_norm [N,len(temperatures)], both fp32 (fp64 for fp64).
    Raises: ValueError with the value and the rule.
    """
    dtype = check_linear(hidden, weight, softcap, *temperatures)
    if not isinstance(k, int) or not 1 <= k <= len(weight):
        raise ValueError(f"k={k}: must be an integer in 1..V={len(weight)}")
    backend = check_backend(backend, dtype, hidden.device, k)
    hidden, weight = hidden.detach(), weight.detach()
    if backend == "reference":
        with computing(hidden):
            return reference(whole_logits(hidden, weight, dtype, softcap), k, temperatures)
    return topk_op(hidden, weight, k, [float(T) for T in temperatures], softcap, backend, dtype, _rows, _path)
