"""Divergences on the few outcomes that a teacher names, and their gradients in closed form.

A row has the outcomes S (its K token ids) and, under tail="ghost", one more: everything else. lt, ls [N,K(+1)] are the
teacher's and the student's log-probabilities of them, t and p their exponentials; an empty slot is -inf on both sides
and counts nowhere.

    forward_kl  sum t (lt - ls)                    df/dls = -t
    reverse_kl  sum p (ls - max(lt,-30))           df/dls = p (ls - max(lt,-30) + 1)
    jsd         beta KL(t|m) + (1-beta) KL(p|m)    df/dls = (1-beta) p (ls - lm)      m = beta t + (1-beta) p
    skew_kl     KL(t|m)                            df/dls = -(1-beta) t p / m
    tv          1/2 sum |t - p|                    df/dls = 1/2 sign(p - t) p

Sources: Hinton et al. 2015 (forward), Gu et al. 2024 (reverse), Agarwal et al. 2024 (jsd), Ko et al. 2024 (skew).
"""

import math

import torch
from torch import Tensor

FLOOR = -30.0  # reverse_kl: a teacher's zero costs at most 30 nats
FAR = -1e30  # stands for -inf where a difference of two infinities would be no number


def merge_duplicates(ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """One slot an outcome: the weights of equal ids in a row add (at T=1, before any other temperature).

    Returns ids [N,K] int64, ascending, -1 = empty (as duplicates become), and log_probs [N,K], -inf in empty slots. An
    id that stands alone keeps its log-probability to the bit.
    """
    ids = ids.clamp(min=-1)
    log_probs = log_probs.masked_fill(ids < 0, -math.inf)
    if ids.shape[1] < 2:
        return ids, log_probs
    ids, order = ids.sort(dim=1, stable=True)
    log_probs = log_probs.gather(1, order)
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[:, 1:] = ids[:, 1:] == ids[:, :-1]
    if repeated.device.type == "cpu" and not repeated.logical_and(ids >= 0).any():
        return ids, log_probs
    run = (~repeated).cumsum(dim=1) - 1  # the place of each slot's run of equal ids
    top = torch.full_like(log_probs, -math.inf).scatter_reduce(1, run, log_probs, "amax")
    total = torch.zeros_like(top).scatter_add(1, run, (log_probs - top.clamp(min=FAR).gather(1, run)).exp())
    merged = torch.where(total > 1, top + total.log(), top)
    return ids.masked_fill(repeated, -1), merged.gather(1, run).masked_fill(repeated, -math.inf)


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value where weight > 0, else 0 (0 log 0 = 0), with a gradient that is 0 there too."""
    return weight * torch.where(weight > 0, value, 0.0)


def divergence(lt: Tensor, ls: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """[N,K] log-probabilities on both sides -> the divergence of each row [N], differentiable, and df/dls [N,K]."""
    t, p = lt.exp(), ls.exp()
    if kind == "forward_kl":
        return weighted(t, lt - ls).sum(1), -t
    if kind == "reverse_kl":
        gap = ls - lt.clamp(min=FLOOR)
        return weighted(p, gap).sum(1), weighted(p, gap + 1)
    if kind == "tv":  # its gradient is a sign: none where the two agree but for rounding (of z/T, at T = .1 too)
        noise = 256 * torch.finfo(p.dtype).eps * torch.maximum(t, p)
        gap = torch.where((p - t).abs() <= noise, 0.0, p - t)
        return 0.5 * gap.abs().sum(1), 0.5 * gap.sign() * p
    left, right = math.log(beta) + lt, math.log1p(-beta) + ls
    lm = torch.logaddexp(left.clamp(min=FAR), right.clamp(min=FAR))
    if kind == "skew_kl":
        return weighted(t, lt - lm).sum(1), -weighted(t, (right - lm).exp())
    value = beta * weighted(t, lt - lm) + (1 - beta) * weighted(p, ls - lm)
    return value.sum(1), (1 - beta) * weighted(p, ls - lm)


def tail_of(lt: Tensor, outside: Tensor) -> Tensor:
    """[N] the teacher's probability outside S: max(0, 1-M), and 0 where no token is outside (S = V)."""
    return torch.where(outside > 0, (1 - lt.exp().sum(1)).clamp(min=0), 0.0)


def sides(lt: Tensor, ls: Tensor, log_tail: Tensor, outside: Tensor, tail: str) -> tuple[Tensor, Tensor]:
    """The outcomes that `tail` compares, on both sides."""
    if tail == "ghost":
        ls_tail = torch.where(outside > 0, log_tail, -math.inf)
        return torch.cat([lt, tail_of(lt, outside).log()[:, None]], 1), torch.cat([ls, ls_tail[:, None]], 1)
    if tail.startswith("renormalize"):
        lt = normalized(lt)
    if tail == "renormalize_both":
        ls = torch.where(lt.isneginf().all(1, keepdim=True), -math.inf, normalized(ls))
    return lt, ls


def normalized(log_probs: Tensor) -> Tensor:
    """log_probs - logsumexp over the row; a row without mass stays without."""
    return log_probs - log_probs.clamp(min=FAR).logsumexp(1, keepdim=True)


def smooth_part(lt: Tensor, off_mean: Tensor, outside: Tensor) -> Tensor:
    """[N] the tail's share of tail="smooth": the teacher's residual spread evenly over the `outside` tokens off S.

    off_mean [N]: the student's mean log-probability over those tokens.
    """
    residual = tail_of(lt, outside)
    return weighted(residual, residual.log() - outside.clamp(min=1).to(lt.dtype).log() - off_mean)
