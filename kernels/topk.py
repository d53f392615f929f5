"""The teacher's side: its k likeliest tokens and exact normalisers, straight from hidden states.

N rows, D width, V vocabulary, C rows of a chunk, T temperature. log_norm(T) = logsumexp(z/T) -
logsumexp(z)/T turns a stored log-probability at T=1 into the exact one at T: log_prob/T -
log_norm(T), tail included.

The Triton kernel reads a row of logits once. Lane i of a program sees the columns i, i + BLOCK,
...: a group, whose maximum the log-sum-exp needs anyway. The k largest logits lie in the k groups
of the largest maxima, so that k * V/BLOCK candidates are left of V.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .backends import choose_backend, computing, jit, tl, triton, wide_dtype
from .checks import check_linear, check_positive, check_softcap
from .chunks import Head, for_each_chunk, row_blocks
from .reference import whole_logits
from .torch_loss import softcap_
from .triton_loss import LOG2E, masked_value, scan_row, softcapped

MAX_SELECTED = 256  # k of the Triton kernel; beyond it torch.topk chooses


@jit
def ordered(z):
    """fp32 -> uint32 of the same order; 0 is below every number's."""
    bits = z.to(tl.int32, bitcast=True)
    flip = (bits >> 31) | (-2147483648)
    return (bits ^ flip).to(tl.uint32, bitcast=True)


@jit
def largest_keys(keys, k):
    """A mask of the k largest of the keys; of equal ones the first."""
    bound = tl.sum(tl.zeros_like(keys), 0).to(tl.uint32)
    bit = (bound + 1) << 31
    reached = bound.to(tl.int32)  # how many keys reach the bound
    while (bit > 0) & (reached != k):  # bit by bit
        higher = bound | bit
        count = tl.sum((keys >= higher).to(tl.int32), 0)
        reached = tl.where(count >= k, count, reached)
        bound = tl.where(count >= k, higher, bound)
        bit = bit >> 1
    above = keys > bound
    ties = keys == bound
    room = k - tl.sum(above.to(tl.int32), 0)
    return above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))


@jit
def topk_kernel(
    logits_ptr,
    ids_ptr,
    top_ptr,
    lse_ptr,
    lse_1_ptr,
    stride,
    V,
    k,
    temperature,
    softcap,
    TWO_TEMPERATURES: tl.constexpr,
    SELECT: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Program = row: logsumexp(z/T) and logsumexp(z), if SELECT the k largest logits in any order.

    All of them relative to the row's largest logit.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    z_row = logits_ptr + row * stride
    lane_max, largest, sum_T, sum_1, _ = scan_row(
        z_row, V, lanes, softcap, 1 / temperature * LOG2E, MASKED, TWO_TEMPERATURES, False
    )
    tl.store(lse_ptr + row, tl.log(sum_T))
    if TWO_TEMPERATURES:
        tl.store(lse_1_ptr + row, tl.log(sum_1))
    if SELECT:
        ids_row = ids_ptr + row * k
        keys = tl.where(lanes < V, ordered(lane_max), 0)
        chosen = largest_keys(keys, k)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(ids_row + place, lanes, mask=chosen)
        tl.debug_barrier()
        candidate = tl.arange(0, CANDIDATES)
        inside = candidate < k * GROUP
        lane = tl.load(ids_row + candidate // GROUP, mask=inside, other=0)
        cols = lane + candidate % GROUP * BLOCK
        inside = inside & (cols < V)
        z = softcapped(tl.load(z_row + cols, mask=inside, other=0.0), softcap)
        chosen = largest_keys(tl.where(inside, ordered(z), 0), k)
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.debug_barrier()
        tl.store(ids_row + place, cols, mask=chosen)
        tl.store(top_ptr + row * k + place, z - largest, mask=chosen)


def launch_shape(k: int) -> tuple[int, int, int | None]:
    """BLOCK (lanes = groups), num_warps and maxnreg [k = 64 measured:
    results/kernels_h100_chunk.txt].

    At 128 registers two programs of eight warps share an SM. More entries would spill there.
    """
    if k <= 64:
        return 4096, 8, 128
    return 8192, 16, None


def scan_logits(
    z: Tensor,
    temperature: float,
    softcap: float | None,
    ids: Tensor,
    top: Tensor,
    select: bool,
) -> tuple[Tensor, Tensor]:
    """What the kernel says of z [C,V]: the two log-sum-exps [C], and if `select` ids and top
    [C,k].
    """
    (C, V), k = z.shape, ids.shape[1]
    block, num_warps, maxnreg = launch_shape(k)
    group = triton.next_power_of_2(triton.cdiv(V, block))
    lse = top.new_empty(C)
    lse_1 = lse if temperature == 1 else top.new_empty(C)
    topk_kernel[(C,)](
        z,
        ids,
        top,
        lse,
        lse_1,
        z.stride(0),
        V,
        k,
        temperature,
        softcap,
        TWO_TEMPERATURES=temperature != 1,
        SELECT=select,
        MASKED=masked_value(z.dtype),
        BLOCK=block,
        CANDIDATES=triton.next_power_of_2(k) * group,
        GROUP=group,
        num_warps=num_warps,
        maxnreg=maxnreg,
    )
    return lse, lse_1


def triton_chunk(
    z: Tensor,
    k: int,
    temperatures: Sequence[float],
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log_probs [C,k] descending and log_norm [C,temperatures] of a chunk's logits z [C,V]."""
    ids = torch.empty(len(z), k, dtype=torch.int32, device=z.device)
    top = torch.empty(len(z), k, dtype=z.dtype, device=z.device)
    log_norm = z.new_zeros(len(z), len(temperatures))
    select = k <= MAX_SELECTED
    lse_1 = None
    for place, T in enumerate(temperatures):
        if T != 1:  # one pass serves T, T=1 and the selection; each further T reads z again
            lse, lse_1 = scan_logits(z, T, softcap, ids, top, select)
            log_norm[:, place] = lse - lse_1 / T
            select = False
    if lse_1 is None:
        _, lse_1 = scan_logits(z, 1.0, softcap, ids, top, select)
    if k > MAX_SELECTED:
        top, places = z.topk(k, dim=1)
        softcap_(top, softcap)
        return places.int(), top - top[:, :1] - lse_1[:, None], log_norm
    top, order = top.sort(dim=1, descending=True)
    return ids.gather(1, order), top - lse_1[:, None], log_norm


def torch_chunk(
    z: Tensor,
    k: int,
    temperatures: Sequence[float],
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in PyTorch, on any device; overwrites z."""
    ids = torch.empty(len(z), k, dtype=torch.int32, device=z.device)
    log_probs = z.new_empty(len(z), k)
    log_norm = z.new_zeros(len(z), len(temperatures))
    for rows in row_blocks(*z.shape, z.device):
        block = z[rows]
        top, places = block.topk(k, dim=1)
        softcap_(block, softcap)
        softcap_(top, softcap)
        largest = top[:, :1].clone()
        block.sub_(largest)
        lse = block.logsumexp(1)
        ids[rows] = places.int()
        log_probs[rows] = top - largest - lse[:, None]
        for place, T in enumerate(temperatures):
            if T != 1:
                log_norm[rows, place] = (block / T).logsumexp(1) - lse / T
    return ids, log_probs, log_norm


@torch.library.custom_op("nanodistill::topk", mutates_args=())
def topk_op(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    temperatures: Sequence[float],
    softcap: float | None,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, log_probs [N,k] and log_norm [N,temperatures], chunk by chunk."""
    with computing(hidden):
        head = Head(hidden, weight, dtype)
        ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
        log_probs = hidden.new_empty(len(hidden), k, dtype=head.wide)
        log_norm = hidden.new_empty(len(hidden), len(temperatures), dtype=head.wide)
        chunk = triton_chunk if backend == "triton" else torch_chunk

        def fill(z: Tensor, rows: slice) -> None:
            ids[rows], log_probs[rows], log_norm[rows] = chunk(z, k, temperatures, softcap)

        for_each_chunk(head, fill)
    return ids, log_probs, log_norm


@topk_op.register_fake
def fake_topk(hidden, weight, k, temperatures, softcap, backend, dtype):
    log_probs = hidden.new_empty(len(hidden), k, dtype=wide_dtype(dtype))
    log_norm = log_probs.new_empty(len(hidden), len(temperatures))
    return log_probs.to(torch.int32), log_probs, log_norm


def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperatures: tuple[float, ...] = (1.0,),
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of softmax(hidden @ weight^T) with exact log-probabilities, without its [N,V] logits.

    Args: hidden [N,D], weight [V,D]; k in 1..V; temperatures: those whose normaliser is wanted,
        each above 0; softcap c replaces z by c*tanh(z/c) first.
    Returns: ids [N,k] int32, by descending probability (ties in any order), log_probs [N,k] nats at
        T=1, and log_norm [N,len(temperatures)], both fp32 (fp64 for fp64). No gradient.
    Raises: ValueError with the value and the rule.
    """
    dtype = check_linear(hidden, weight)
    check_softcap(softcap)
    for T in temperatures:
        check_positive("temperature", T)
    if not isinstance(k, int) or not 1 <= k <= len(weight):
        raise ValueError(f"k={k}: must be an integer in 1..V={len(weight)}")
    backend = choose_backend(backend, dtype, hidden.device)
    hidden, weight = hidden.detach(), weight.detach()
    temperatures = [float(T) for T in temperatures]
    if backend == "reference":
        with computing(hidden):
            z = whole_logits(hidden, weight, dtype, softcap)
            return torch_chunk(z, k, temperatures, None)
    return topk_op(hidden, weight, k, temperatures, softcap, backend, dtype)
