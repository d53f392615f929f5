"""Divergences of teacher and student over a row's outcomes, with gradients in closed form.

A row has the outcomes S (its K token ids) and, under tail="ghost", one more: everything else. A
dense row has all V tokens. lt, ls are the teacher's and the student's log-probabilities of the
outcomes, t and p their exponentials; an empty slot is -inf on both sides and counts nowhere.

    forward_kl  sum t (lt - ls)                    df/dls = -t
    reverse_kl  sum p (ls - max(lt,-30))           df/dls = p (ls - max(lt,-30) + 1)
    jsd         beta KL(t|m) + (1-beta) KL(p|m)    df/dls = (1-beta) p (ls - lm)
    skew_kl     KL(t|m)                            df/dls = -(1-beta) t p / m
    tv          1/2 sum |t - p|                    df/dls = 1/2 sign(p - t) p
    where m = beta t + (1-beta) p

Sources: Hinton et al. 2015 (forward), Gu et al. 2024 (reverse), Agarwal et al. 2024 (jsd),
Ko et al. 2024 (skew).
"""

import math

import torch
from torch import Tensor

TEACHER_FLOOR = -30.0  # reverse_kl: a teacher's zero costs at most 30 nats
FAR = -1e30  # stands for -inf where a difference of two infinities would be NaN


def merge_duplicates(
    ids: Tensor,
    log_probs: Tensor,
) -> tuple[Tensor, Tensor]:
    """One slot an outcome: the weights of equal ids in a row add (at T=1, before any temperature).

    Args: ids [N,K] int64, negative = empty; log_probs [N,K].
    Returns ids [N,K], -1 = empty (as duplicates become), and log_probs [N,K], -inf in empty slots.
    An id that stands alone keeps its log-probability to the bit.
    """
    ids = ids.clamp(min=-1)
    log_probs = log_probs.masked_fill(ids < 0, -math.inf)
    if ids.shape[1] < 2:
        return ids, log_probs
    ids, order = ids.sort(dim=1, stable=True)
    log_probs = log_probs.gather(1, order)
    repeats = torch.zeros_like(ids, dtype=torch.bool)
    same_as_before = ids[:, 1:] == ids[:, :-1]
    repeats[:, 1:] = same_as_before
    # The first slot of each id takes the sum. `outcome` numbers the different ids of a row.
    outcome = (~repeats).cumsum(dim=1) - 1
    nothing = torch.full_like(log_probs, -math.inf)
    largest = nothing.scatter_reduce(1, outcome, log_probs, "amax")
    reference = largest.clamp(min=FAR).gather(1, outcome)
    relative = (log_probs - reference).exp()
    total = torch.zeros_like(largest).scatter_add(1, outcome, relative)
    merged = torch.where(total > 1, largest + total.log(), largest)
    merged = merged.gather(1, outcome)
    merged = merged.masked_fill(repeats, -math.inf)
    ids = ids.masked_fill(repeats, -1)
    return ids, merged


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, and 0 where the weight is 0 (0 log 0 = 0), for the gradient too."""
    return weight * torch.where(weight > 0, value, 0.0)


def divergence(
    lt: Tensor,
    ls: Tensor,
    kind: str,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Each row's divergence [N], differentiable, and its slopes df/dls [N,K], from lt, ls [N,K]."""
    t = lt.exp()
    if kind == "forward_kl":
        value = weighted(t, lt - ls)
        return value.sum(1), -t
    p = ls.exp()
    if kind == "reverse_kl":
        gap = ls - lt.clamp(min=TEACHER_FLOOR)
        value = weighted(p, gap)
        slope = weighted(p, gap + 1)
        return value.sum(1), slope
    if kind == "tv":
        # The slope is a sign: 0 where the two agree but for rounding.
        rounding = 256 * torch.finfo(p.dtype).eps * torch.maximum(t, p)
        gap = p - t
        gap = torch.where(gap.abs() <= rounding, 0.0, gap)
        value = 0.5 * gap.abs()
        return value.sum(1), 0.5 * gap.sign() * p
    teacher_part = math.log(beta) + lt
    student_part = math.log1p(-beta) + ls
    lm = torch.logaddexp(
        teacher_part.clamp(min=FAR),
        student_part.clamp(min=FAR),
    )
    value = weighted(t, lt - lm)
    if kind == "skew_kl":
        student_share = (student_part - lm).exp()
        return value.sum(1), -weighted(t, student_share)
    assert kind == "jsd", kind
    slope = (1 - beta) * weighted(p, ls - lm)
    value = beta * value + slope
    return value.sum(1), slope


def teacher_tail(lt: Tensor, num_outside: Tensor) -> Tensor:
    """[N] the teacher's mass off S: max(0, 1-M), and 0 where no token is off S."""
    tail = 1 - lt.exp().sum(1)
    return torch.where(num_outside > 0, tail.clamp(min=0), 0.0)


def normalized(log_probs: Tensor) -> Tensor:
    """log_probs - logsumexp over the row; a row without mass stays without."""
    lse = log_probs.clamp(min=FAR).logsumexp(1, keepdim=True)
    return log_probs - lse


def outcomes(
    lt: Tensor,
    ls: Tensor,
    ls_tail: Tensor,
    num_outside: Tensor,
    tail: str,
) -> tuple[Tensor, Tensor]:
    """The log-probabilities that `tail` compares on both sides: [N,K], or [N,K+1] under ghost.

    Args: lt, ls [N,K]; ls_tail [N] the student's log-mass off S; num_outside [N] tokens off S.
    """
    if tail == "ghost":
        lt_tail = teacher_tail(lt, num_outside).log()
        ls_tail = torch.where(num_outside > 0, ls_tail, -math.inf)
        lt = torch.cat([lt, lt_tail[:, None]], dim=1)
        ls = torch.cat([ls, ls_tail[:, None]], dim=1)
        return lt, ls
    if tail in ("renormalize", "renormalize_both"):
        lt = normalized(lt)
    if tail == "renormalize_both":
        no_mass = lt.isneginf().all(1, keepdim=True)
        ls = torch.where(no_mass, -math.inf, normalized(ls))
    return lt, ls


def smooth_kl(
    lt: Tensor,
    mean_ls_outside: Tensor,
    num_outside: Tensor,
) -> Tensor:
    """[N] what tail="smooth" adds: the teacher's tail mass spread evenly over the tokens off S.

    mean_ls_outside [N]: the student's mean log-probability over those tokens.
    """
    tail = teacher_tail(lt, num_outside)
    count = num_outside.clamp(min=1).to(lt.dtype)
    log_share = tail.log() - count.log()
    return weighted(tail, log_share - mean_ls_outside)
