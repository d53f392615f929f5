"""The teacher's side: its k likeliest tokens and exact normalisers, straight from hidden states.

N rows, D width, V vocabulary. log_norm(T) = logsumexp(z/T) - logsumexp(z)/T turns a stored log-probability at T=1 into
the exact one at T: log_prob/T - log_norm(T), tail included.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exp_kernel, row_kernel
from .common import Spec, check_backend, check_linear, check_scalars, compute_dtype, computing, tl, triton
from .exp_kernel import GROUP
from .row_kernel import LOG2E, LOW, MINUS_INF, capped, scan
from .tile import Head, Targets
from .tile import scan as torch_scan

# most k that a setting holds for -> (lanes = groups, warps). Predicted: no row was measured on a GPU.
TUNING = ((64, 4096, 8), (256, 8192, 16))


def reference(z: Tensor, k: int, temperatures: tuple[float, ...], softcap: float | None):
    """The plain form on whole logits z [N,V]."""
    z = z if softcap is None else softcap * (z / softcap).tanh()
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
    SOFTCAP: tl.constexpr, TWO: tl.constexpr, SELECT: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    MARK: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, MEMBERS: tl.constexpr,
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
        top, s = tl.full([BLOCK], LOW, tl.float32), tl.zeros([BLOCK], tl.float32)
        s1, last = s, V // BLOCK * BLOCK
        for start in range(0, last, BLOCK):
            top, s, s1, _ = scan(tl.load(z_row + start + lanes), top, s, s1, s, softcap, c, MARK, SOFTCAP, TWO, False)
        z = tl.load(z_row + last + lanes, mask=last + lanes < V, other=MARK)
        top, s, s1, _ = scan(z, top, s, s1, s, softcap, c, MARK, SOFTCAP, TWO, False)
        peak = tl.max(top, 0)
        lse = tl.log(tl.sum(s * tl.exp2((top - peak) * c), 0))
        if TWO:
            lse1 = tl.log(tl.sum(s1 * tl.exp2((top - peak) * LOG2E), 0))
            tl.store(norm_ptr + row * norm_stride, lse - lse1 / T)
            lse = lse1
    if not SELECT:
        return
    taken = largest(ordered(top), k)  # the k largest of all lie in the k groups of the largest maxima
    tl.store(ids_row + tl.cumsum(taken.to(tl.int32), 0) - 1, lanes, mask=taken)
    tl.debug_barrier()
    member = tl.arange(0, BLOCK_K * MEMBERS)
    group = tl.load(ids_row + member // MEMBERS, mask=member < k * MEMBERS, other=0)
    cols = group * GROUP + member % MEMBERS if GROUP else group + member % MEMBERS * BLOCK
    inside = (cols < V) & (member < k * MEMBERS)
    z = capped(tl.load(z_row + cols, mask=inside, other=0.0), softcap, SOFTCAP)
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

    def run(column: int, T: float, select: bool, group: int) -> None:
        block, warps = next(((block, warps) for most, block, warps in TUNING if k <= most), TUNING[-1][1:])
        members, columns = triton.next_power_of_2(triton.cdiv(V, block)), 0
        if group:
            columns, members = (sums.shape[2] - 1) * group, group
            block = max(triton.next_power_of_2(sums.shape[1] * (sums.shape[2] - 1)), triton.next_power_of_2(k))
            warps = 8 if max(block, k * group) <= 4096 else 16
        topk_kernel[(c,)](
            z, sums, ids, log_probs, log_norm[:, column:], z.stride(0), V, k, T, softcap or 0.0, log_norm.stride(0),
            SOFTCAP=softcap is not None, TWO=T != 1, SELECT=select, COLUMNS=columns, GROUP=group,
            MARK=row_kernel.mark_of(z.dtype), BLOCK=block, BLOCK_K=triton.next_power_of_2(k), MEMBERS=members,
            num_warps=warps, maxnreg=128,  # two or four programs an SM, and no spills
        )  # fmt: skip

    select = k <= TUNING[-1][0]
    if select and sums is not None:
        run(0, 1.0, True, GROUP)
        select = False
    wanted = [(column, T) for column, T in enumerate(temperatures) if T != 1]
    for column, T in wanted or [(0, 1.0)] * select:  # one pass serves T=1 and one more; each further one reads z again
        run(column, T, select, 0)
        select = False
    if k > TUNING[-1][0]:
        ids.copy_(z.topk(k, dim=1).indices)
        out = log_probs.new_empty(c, k + 1)
        row_kernel.launch(z, out, Targets(ids, out, None, None, out), Spec(softcap=softcap), "log_probs")
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
            top = top if softcap is None else softcap * (top / softcap).tanh()
            sums = torch_scan(z, places[:, :0], None, {1.0, *temperatures}, Spec(softcap=softcap), False)
            ids[place], log_probs[place] = places.int(), top - sums.peak[:, None] - sums.lse[1.0][:, None]
            for column, T in enumerate(temperatures):
                log_norm[place, column] = sums.lse[T] - sums.lse[1.0] / T
    return ids, log_probs, log_norm


@topk_op.register_fake
def _(hidden, weight, k, temperatures, *rest):
    log_probs = hidden.new_empty(len(hidden), k, dtype=compute_dtype(rest[-3]))
    return log_probs.to(torch.int32), log_probs, log_probs.new_empty(len(hidden), len(temperatures))


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperatures: tuple[float, ...] = (1.0,),
    softcap: float | None = None,
    backend: str = "auto",
    _rows: int | None = None,
    _path: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of softmax(hidden @ weight^T) with exact log-probabilities, without its [N,V] logits; no gradient.

    Args: hidden [N,D], weight [V,D]; k in 1..V; temperatures: those whose normaliser is wanted, each above 0.
    Returns: ids [N,k] int32, by descending probability (ties in any order), log_probs [N,k] nats at T=1, and
        log_norm [N,len(temperatures)], both fp32 (fp64 for fp64).
    Raises: ValueError with the value and the rule.
    """
    dtype = check_linear(hidden, weight)
    for temperature in (*temperatures, 1.0):
        check_scalars(temperature, softcap)
    if not isinstance(k, int) or not 1 <= k <= len(weight):
        raise ValueError(f"k={k}: must be an integer in 1..V={len(weight)}")
    backend = check_backend(backend, dtype, hidden.device, k)
    hidden, weight = hidden.detach(), weight.detach()
    if backend == "reference":
        with computing(hidden):
            wide = compute_dtype(dtype)
            z = F.linear(hidden.to(dtype).to(wide), weight.to(dtype).to(wide))
            return reference(z, k, temperatures, softcap)
    return topk_op(hidden, weight, k, [float(T) for T in temperatures], softcap, backend, dtype, _rows, _path)
