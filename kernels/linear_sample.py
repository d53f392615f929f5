"""Draws from the teacher straight from hidden states: independent, with replacement, exact, and without its [N,V] logits.

c rows of a chunk, V vocabulary, n draws a row, K excluded ids a row, R = the tokens that are not excluded. With
m = max of z over R and blocks of WIDTH neighbouring tokens, one pass over a chunk's logits leaves each block's mass:

    mass_b = sum of exp(z - m) over R in block b        C_b = mass_0 + ... + mass_b in fp64, C its last
    draw   block b where C_(b-1) <= u*C < C_b, and in it, looked at again, the token whose running sum passes
           (u*C - C_(b-1)) / mass_b of the block: so the token at which the whole row's running sum passes u*C
    u      53 bits: output `draw` of splitmix64 seeded by output `row` of splitmix64 seeded by the hash of the seed

u is integer arithmetic in PyTorch, the same bits on any device. A row's draws are a function of the seed, its number and
its logits; backends, which round exp and sums differently, part only where u*C lies within that rounding of a boundary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import check_backend, check_ids, check_linear, compute_dtype, computing, integers, tl, triton, whole_logits
from .row_kernel import LOG2E, MINUS_INF, capped, mark_of
from .tile import Head, blocks, cap, put

WIDTH = 128  # tokens of a block
GROUP, SCAN, DRAWS = 32, 512, 16  # blocks looked at and summed, and draws, at a time in the kernel: guesses, not measured
MOST = 2**19  # draws, excluded ids and looked-at tokens worked on at a time: 4 MiB an fp64 tensor
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # splitmix64's
HALF_ULP = tl.constexpr(2.0**-53)  # of 1 in fp64: exact in fp32 too, which a constant of a kernel may pass through
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


def mix(x: Tensor) -> Tensor:
    """splitmix64's output for a state x: int64 products wrap, and the masks make >> a shift of unsigned numbers."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


def uniforms(seed: int, numbers: Tensor, n: int) -> Tensor:
    """[c,n] fp64 in [0,1), multiples of 2^-53, from the seed and the row numbers [c] int64."""
    key = mix(numbers.new_full((), seed + GOLDEN))
    rows = mix(key + (numbers + 1) * GOLDEN)
    bits = mix(rows[:, None] + torch.arange(1, n + 1, device=numbers.device) * GOLDEN)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def finished(ids: Tensor, log_probs: Tensor, total: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
    """No draws from rows whose total mass [c,1] is 0 or no number; `highest` [c,1] is inf or NaN where z holds such."""
    total = torch.where(highest < math.inf, total, math.nan)
    log_probs = torch.where(total > 0, log_probs, torch.where(total == 0, -math.inf, math.nan).to(log_probs.dtype))
    return torch.where(total > 0, ids, -1).int(), log_probs


def reference(z: Tensor, u: Tensor, exclude: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form on whole logits z [N,V]: the running sum of a row, in fp64."""
    outside = torch.zeros(len(z), z.shape[1] + 1, dtype=torch.bool, device=z.device)
    outside.scatter_(1, torch.where(exclude < 0, z.shape[1], exclude.long()), True)
    left = z.double().masked_fill(outside[:, :-1], -math.inf)
    sums = (left - left.amax(1, keepdim=True).clamp(min=torch.finfo(torch.float64).min)).exp().cumsum(1)
    ids = torch.searchsorted(sums, u * sums[:, -1:], right=True).clamp(max=z.shape[1] - 1)
    return finished(ids, z.log_softmax(1).gather(1, ids), sums[:, -1:], z.amax(1, keepdim=True))


def running(mass: Tensor) -> Tensor:
    """Running sums along the last dimension that never fall, nor rise where the mass is 0, in whatever order they are made."""
    sums = mass.cumsum(-1)
    return sums if mass.device.type == "cpu" else sums.masked_fill(mass == 0, 0).cummax(-1).values


def draw(z: Tensor, u: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """ids, log_probs [c,n] from capped logits z [c,V], -inf where excluded, which become exp(z - m).

    u: [c,n]; excluded: [c,2] the excluded tokens' largest logit, and the logsumexp of theirs less that.
    """
    (c, V), n, whole = z.shape, u.shape[1], z.shape[1] // WIDTH
    mass, peaks = z.new_zeros(c, -(-V // WIDTH), dtype=torch.float64), z.new_empty(c, 1)
    for part, masses, peak in blocks(z, mass, peaks):
        torch.amax(part, 1, keepdim=True, out=peak).clamp_(min=torch.finfo(z.dtype).min)
        part.sub_(peak).exp_()
        masses[:, :whole] = part[:, : whole * WIDTH].unflatten(1, (whole, WIDTH)).sum(2)
        if V % WIDTH:
            masses[:, whole] = part[:, whole * WIDTH :].sum(1)
    sums = running(mass)
    total = sums[:, -1:]
    block = torch.searchsorted(sums, u * total, right=True).clamp_(max=mass.shape[1] - 1)
    before = F.pad(sums, (1, 0)).gather(1, block)
    share = (u * total - before) / (sums.gather(1, block) - before)
    ids, e = torch.empty_like(block), u.new_empty(c, n, dtype=z.dtype)
    row, width = torch.arange(c, device=z.device)[:, None].expand(c, n), min(WIDTH, V)
    windows, lanes = z.unfold(1, width, 1), torch.arange(width, device=z.device)  # [c,V-width+1,width], nothing copied
    flat = (part.reshape(-1).split(MOST // WIDTH) for part in (row, block, share, ids, e))
    for row, block, share, token, value in zip(*flat, strict=True):
        begin = block * WIDTH
        start = begin.clamp(max=V - width)  # a ragged last block is seen with tokens of the one before it
        seen = windows[row, start].double().masked_fill_(lanes < (begin - start)[:, None], 0)  # [draws,width]
        sums = running(seen)
        passed = torch.minimum(share[:, None] * sums[:, -1:], (1 - 2.0**-53) * sums[:, -1:])
        place = torch.searchsorted(sums, passed, right=True).clamp_(max=width - 1)
        token.copy_(start + place[:, 0])
        value.copy_(seen.gather(1, place)[:, 0])
    lse = torch.logaddexp(total.log().to(z.dtype), excluded[:, :1] - peaks + excluded[:, 1:])
    return finished(ids, e.log() - lse, total, excluded[:, :1])


@triton.jit
def larger(one, other):
    return tl.maximum(one, other)


@triton.jit
def blocks_of(z_row, first, lanes, V, softcap, MARK: tl.constexpr):
    """Capped logits of the blocks that begin at columns `first`, -inf past the last and where excluded; their maxima."""
    cols = first[:, None] + lanes[None, :]
    raw = tl.load(z_row + cols, mask=cols < V, other=MARK)
    z = tl.where(raw == MARK, MINUS_INF, capped(raw, softcap))
    return z, tl.maximum(tl.max(z, 1), LEAST)


@triton.jit
def sample_kernel(
    z_ptr, u_ptr, excluded_ptr, parts_ptr, sums_ptr, ids_ptr, log_probs_ptr, stride, V, n, softcap,
    MARK: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, SCAN: tl.constexpr, DRAWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Program = row: `draw` on logits that stand MARK where excluded. Each block's mass is made relative to its own maximum.

    parts [c,2,blocks] fp32 (maxima, masses) and sums [c,blocks] fp64 (C) are scratch.
    """
    row, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(V, WIDTH)
    z_row, parts_row, sums_row = z_ptr + row * stride, parts_ptr + row * 2 * blocks, sums_ptr + row * blocks
    lanes, high = tl.arange(0, WIDTH), tl.full([GROUP], LEAST, tl.float32)
    for start in range(0, blocks, GROUP):
        block = start + tl.arange(0, GROUP)
        z, top = blocks_of(z_row, block * WIDTH, lanes, V, softcap, MARK)
        high = tl.maximum(high, top)
        tl.store(parts_row + block, top, mask=block < blocks)
        tl.store(parts_row + blocks + block, tl.sum(tl.exp2((z - top[:, None]) * LOG2E), 1), mask=block < blocks)
    tl.debug_barrier()
    peak, check = tl.max(high, 0), tl.zeros([SCAN], tl.float32)
    total = tl.sum(check.to(tl.float64), 0)
    for start in range(0, blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        scale = tl.exp2((tl.load(parts_row + block, mask=block < blocks, other=LEAST) - peak) * LOG2E)
        mass = tl.load(parts_row + blocks + block, mask=block < blocks, other=0.0) * scale
        check += mass
        sums = tl.where(mass > 0, total + tl.cumsum(mass.to(tl.float64), 0), total)
        sums = tl.associative_scan(sums, 0, larger)  # as `running`
        tl.store(sums_row + block, sums, mask=block < blocks)
        total = tl.maximum(total, tl.max(sums, 0))
    tl.debug_barrier()
    excluded = tl.load(excluded_ptr + 2 * row)
    fine = (tl.sum(check, 0) < float("inf")) & (excluded < float("inf"))  # of a NaN no maximum tells
    mine, others = tl.log(total.to(tl.float32)), excluded - peak + tl.load(excluded_ptr + 2 * row + 1)
    top = tl.maximum(mine, others)
    lse = top + tl.log(tl.exp(mine - top) + tl.exp(others - top))
    for start in range(0, n, DRAWS):
        slot = start + tl.arange(0, DRAWS)
        target = tl.load(u_ptr + row * n + slot, mask=slot < n, other=0.0) * total
        block, step = tl.zeros([DRAWS], tl.int32), 1 << STEPS
        for _ in range(0, STEPS + 1):  # how many sums are at most the target, the last one left aside
            passed = tl.load(sums_row + block + step - 1, mask=block + step < blocks, other=float("inf"))
            block += tl.where(passed <= target, step, 0)
            step = step // 2
        before = tl.load(sums_row + block - 1, mask=block > 0, other=0.0)
        share = (target - before) / (tl.load(sums_row + block) - before)
        seen, highest = blocks_of(z_row, block * WIDTH, lanes, V, softcap, MARK)
        e = tl.exp2((seen - highest[:, None]) * LOG2E).to(tl.float64)
        inner = tl.cumsum(e, 1)
        whole = tl.max(tl.where(e > 0, inner, 0.0), 1)
        goal = tl.minimum(share * whole, whole - whole * HALF_ULP)
        place = tl.min(tl.where((inner > goal[:, None]) & (e > 0), lanes[None, :], WIDTH - 1), 1)
        value = tl.sum(tl.where(lanes[None, :] == place[:, None], seen, 0.0), 1) - peak - lse
        value = tl.where(fine, tl.where(total > 0, value, MINUS_INF), float("nan"))
        tl.store(ids_ptr + row * n + slot, tl.where((total > 0) & fine, block * WIDTH + place, -1), mask=slot < n)
        tl.store(log_probs_ptr + row * n + slot, value, mask=slot < n)


def launch(z: Tensor, u: Tensor, excluded: Tensor, ids: Tensor, log_probs: Tensor, softcap: float | None) -> None:
    """Fills ids, log_probs [c,n] from logits z [c,V], MARK where excluded; u, excluded as for `draw`."""
    (c, V), size = z.shape, triton.cdiv(z.shape[1], WIDTH)
    sample_kernel[(c,)](
        z, u, excluded, z.new_empty(c, 2, size), u.new_empty(c, size), ids, log_probs, z.stride(0), V, u.shape[1], softcap,
        MARK=mark_of(z.dtype), WIDTH=WIDTH, GROUP=GROUP, SCAN=SCAN, DRAWS=DRAWS, STEPS=size.bit_length() - 1, num_warps=8,
    )  # fmt: skip


@torch.library.custom_op("nanodistill::sample", mutates_args=())
def sample_op(
    hidden: Tensor, weight: Tensor, n: int, seed: int, exclude: Tensor, numbers: Tensor, softcap: float | None, backend: str,
    dtype: torch.dtype, rows: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """ids, log_probs [N,n], chunk by chunk."""
    with computing(hidden):
        check_ids(exclude, len(weight), "exclude")
        in_triton, most = backend == "triton", max(1, MOST // max(n, exclude.shape[1]))
        head = Head(hidden, weight, dtype=dtype, rows=rows, most=most, aligned=in_triton)
        ids = torch.empty(len(hidden), n, dtype=torch.int32, device=hidden.device)
        log_probs = torch.empty(len(hidden), n, dtype=head.dtype, device=hidden.device)
        for place in head.places():
            z, u, out = head.logits(place), uniforms(seed, numbers[place].long(), n), exclude[place].long().sort(1).values
            out[:, 1:].masked_fill_(out[:, 1:] == out[:, :-1], -1)  # each once
            zs = z.gather(1, out.clamp(min=0))  # [c,K]
            cap(zs, softcap)
            for (part,) in blocks(z) if not in_triton else ():
                cap(part, softcap)
            put(z, out, torch.full_like(zs, mark_of(z.dtype) if in_triton else -math.inf))
            zs = F.pad(zs.masked_fill(out < 0, -math.inf), (1, 0), value=-math.inf)
            highest = zs.amax(1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
            excluded = torch.cat([highest, (zs - highest).logsumexp(1, keepdim=True)], 1)
            if in_triton:
                launch(z, u, excluded, ids[place], log_probs[place], softcap)
            else:
                ids[place], log_probs[place] = draw(z, u, excluded)
    return ids, log_probs


@sample_op.register_fake
def _(hidden, weight, n, *rest):
    log_probs = hidden.new_empty(len(hidden), n, dtype=compute_dtype(rest[-2]))
    return log_probs.to(torch.int32), log_probs


def linear_sample(
    hidden: Tensor, weight: Tensor, n: int, *, seed: int, exclude: Tensor | None = None, rows: Tensor | None = None,
    softcap: float | None = None, backend: str = "auto", _rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """n independent draws a row from softmax(hidden @ weight^T), or from its part outside `exclude`; no gradient.

    Args: hidden [N,D], weight [V,D]; n at least 1; seed in 0..2^63-1; exclude [N,K] ids below V, a negative one an empty
        slot, repeats allowed; rows [N] integers, the numbers that tell rows apart (0..N-1 unless given): the same seed,
        number and logits give the same draws, so give positions in the corpus where batches are cut in more than one way.
    Returns: ids [N,n] int32, with replacement, and log_probs [N,n] nats, fp32 (fp64 for fp64): those under the whole
        softmax, `exclude` notwithstanding. A row with nothing to draw (all of V excluded, or no logit above -inf left) has
        ids -1 and log_probs -inf; one that holds NaN or +inf, ids -1 and log_probs NaN.
    Raises: ValueError with the value and the rule.
    """
    dtype = check_linear(hidden, weight, softcap)
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r}: must be an integer of at least 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: must be an integer in 0..2^63-1")
    if len(weight) == 0:
        raise ValueError("weight has no rows: a draw needs a vocabulary of at least 1")
    exclude = hidden.new_empty(len(hidden), 0, dtype=torch.int64) if exclude is None else exclude
    rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
    exclude, rows = integers("exclude", exclude, "[N,K]", hidden), integers("rows", rows, "[N]", hidden)
    backend, hidden, weight = check_backend(backend, dtype, hidden.device), hidden.detach(), weight.detach()
    if backend == "reference":
        check_ids(exclude, len(weight), "exclude")
        with computing(hidden):
            return reference(whole_logits(hidden, weight, dtype, softcap), uniforms(seed, rows.long(), n), exclude)
    return sample_op(hidden, weight, n, seed, exclude, rows, softcap, backend, dtype, _rows)
