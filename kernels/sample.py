"""Draws from the teacher straight from hidden states: independent, with replacement, exact.

N rows, V vocabulary, n draws a row, K excluded ids a row, R = the tokens that are not excluded. A
draw is the token of R at which the row's running sum of exp(z - max) passes u * (the whole sum), in
fp64, with

    u   53 bits: output `draw` of splitmix64 seeded by output `row` of splitmix64 seeded by the
    seed's hash

u is integer arithmetic, the same bits on any device: a row's draws are a function of the seed, its
number and its logits. Devices, which round exp and sums differently, differ only where u * sum lies
within that rounding of a boundary. Draws are made once, at capture: plain PyTorch serves every
device.
"""

import math

import torch
from torch import Tensor

from .backends import choose_backend, computing, wide_dtype
from .checks import as_indices, check_ids, check_linear, check_softcap
from .chunks import Head, for_each_chunk, row_blocks
from .reference import whole_logits
from .torch_loss import softcap_

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # splitmix64's constants, as signed numbers
FIRST = 0xBF58476D1CE4E5B9 - 2**64
SECOND = 0x94D049BB133111EB - 2**64


def shift_right(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned 64-bit numbers, which int64 holds."""
    without_sign = 2 ** (64 - bits) - 1
    return (x >> bits) & without_sign


def mix(x: Tensor) -> Tensor:
    """splitmix64's output for a state x; int64 products wrap as unsigned ones do."""
    x = x ^ shift_right(x, 30)
    x = x * FIRST
    x = x ^ shift_right(x, 27)
    x = x * SECOND
    return x ^ shift_right(x, 31)


def uniforms(
    seed: int,
    row_numbers: Tensor,
    n: int,
) -> Tensor:
    """[C,n] fp64 in [0,1), multiples of 2^-53, from the seed and the rows' numbers [C] int64."""
    state = row_numbers.new_full((), seed + GOLDEN)
    key = mix(state)
    rows = mix(key + (row_numbers + 1) * GOLDEN)
    draws = torch.arange(1, n + 1, device=row_numbers.device)
    bits = mix(rows[:, None] + draws * GOLDEN)
    bits = shift_right(bits, 11)
    return bits.double() * 2.0**-53


def running_sum(mass: Tensor) -> Tensor:
    """fp64 running sums of a row that never fall, nor rise where the mass is 0."""
    sums = mass.cumsum(1, dtype=torch.float64)
    if mass.device.type == "cpu":
        return sums
    sums = sums.masked_fill_(mass == 0, 0)
    return sums.cummax(1).values


def draw(
    z: Tensor,
    u: Tensor,
    exclude: Tensor,
) -> tuple[Tensor, Tensor]:
    """ids, log_probs [B,n] of softcapped logits z [B,V] (overwritten), u [B,n], exclude [B,K]."""
    B, V = z.shape
    lowest = torch.finfo(z.dtype).min
    peak = z.amax(1, keepdim=True)
    broken = ~(peak < math.inf)  # NaN or +inf
    z.sub_(peak.clamp(min=lowest))  # large logits have not the digits of a log-probability
    lse = z.logsumexp(1, keepdim=True)

    # An extra column absorbs the writes of empty slots.
    columns = torch.where(exclude < 0, V, exclude.long())
    excluded = torch.zeros(B, V + 1, dtype=torch.bool, device=z.device)
    excluded.scatter_(1, columns, True)
    z.masked_fill_(excluded[:, :V], -math.inf)
    largest = z.amax(1, keepdim=True).clamp(min=lowest)
    mass = (z - largest).exp()
    sums = running_sum(mass)
    total = sums[:, -1:]
    ids = torch.searchsorted(sums, u * total, right=True)
    ids = ids.clamp_(max=V - 1)
    log_probs = z.gather(1, ids) - lse

    nothing = (total == 0) & ~broken
    log_probs = log_probs.masked_fill(nothing, -math.inf)
    log_probs = log_probs.masked_fill(broken, math.nan)
    ids = ids.masked_fill(nothing | broken, -1)
    return ids.int(), log_probs


@torch.library.custom_op("nanodistill::sample", mutates_args=())
def sample_op(
    hidden: Tensor,
    weight: Tensor,
    n: int,
    seed: int,
    exclude: Tensor,
    row_numbers: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """ids and log_probs [N,n], chunk by chunk."""
    with computing(hidden):
        check_ids(exclude, len(weight), "exclude")
        head = Head(hidden, weight, dtype)
        N = len(hidden)
        ids = torch.empty(N, n, dtype=torch.int32, device=hidden.device)
        log_probs = hidden.new_empty(N, n, dtype=head.wide)
        widest = max(len(weight), n, exclude.shape[1])

        def fill(z: Tensor, rows: slice) -> None:
            for block in row_blocks(len(z), 2 * widest, z.device):
                start = rows.start + block.start
                stop = rows.start + block.stop
                place = slice(start, stop)
                numbers = row_numbers[place].long()
                u = uniforms(seed, numbers, n)
                softcap_(z[block], softcap)
                drawn = draw(z[block], u, exclude[place])
                ids[place], log_probs[place] = drawn

        for_each_chunk(head, fill)
    return ids, log_probs


@sample_op.register_fake
def fake_sample(hidden, weight, n, seed, exclude, row_numbers, softcap, dtype):
    wide = wide_dtype(dtype)
    log_probs = hidden.new_empty(len(hidden), n, dtype=wide)
    return log_probs.to(torch.int32), log_probs


def linear_sample(
    hidden: Tensor,
    weight: Tensor,
    n: int,
    *,
    seed: int,
    exclude: Tensor | None = None,
    rows: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """n independent draws a row from softmax(hidden @ weight^T), or its part outside `exclude`.

    Args: hidden [N,D], weight [V,D]; n at least 1; seed in 0..2^63-1; exclude [N,K] ids below V, a
        negative one an empty slot, repeats allowed; rows [N] integers, the numbers that tell rows
        apart (0..N-1 unless given): the same seed, number and logits give the same draws, so give
        positions in the corpus where batches are cut in more than one way; softcap c replaces z by
        c*tanh(z/c) first; backend: reference makes whole logits, all others are one code.
    Returns: ids [N,n] int32, with replacement, and log_probs [N,n] nats, fp32 (fp64 for fp64):
        those under the whole softmax, `exclude` notwithstanding. A row with nothing to draw (all of
        V excluded, or no logit above -inf left) has ids -1 and log_probs -inf; one that holds NaN
        or +inf, ids -1 and log_probs NaN. No gradient.
    Raises: ValueError with the value and the rule.
    """
    dtype = check_linear(hidden, weight)
    check_softcap(softcap)
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n={n!r}: must be an integer of at least 1")
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed!r}: must be an integer in 0..2^63-1")
    if exclude is None:
        exclude = hidden.new_empty(len(hidden), 0, dtype=torch.int64)
    if rows is None:
        rows = torch.arange(len(hidden), device=hidden.device)
    exclude = as_indices("exclude", exclude, "[N,K]", hidden)
    rows = as_indices("rows", rows, "[N]", hidden)
    backend = choose_backend(backend, dtype, hidden.device)
    hidden, weight = hidden.detach(), weight.detach()
    if backend != "reference":
        return sample_op(hidden, weight, n, seed, exclude, rows, softcap, dtype)
    check_ids(exclude, len(weight), "exclude")
    with computing(hidden):
        z = whole_logits(hidden, weight, dtype, softcap)
        u = uniforms(seed, rows.long(), n)
        return draw(z, u, exclude)
