"""The losses in plain PyTorch, on any device: a chunk's logits z [C,V] become their own gradient.

A chunk is worked on in blocks of rows that stay in a CPU's cache. With S a row's K ids and l = log
softmax(z/T), a loss f of l on S and of the tail has the logit gradient

    dz = 1/T * (scatter_add(g) - sum(g) * softmax(z/T)),    g = df/dl

S is taken out of the row (-1e30) before the softmax E, so that the tail is a sum of its own and
never 1 - sum p: off S the gradient is E times one number a row, and the K+1 special entries are
written over it.

B rows of a block, K entries a row, V vocabulary, T temperature.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import LossSpec
from .chunks import row_blocks, scratch_like
from .divergence import (
    FAR,
    divergence,
    merge_duplicates,
    normalized,
    outcomes,
    smooth_kl,
    teacher_tail,
)


class Targets(NamedTuple):
    """What the teacher and the data say of some rows."""

    ids: Tensor  # [N,K], negative = empty
    log_probs: Tensor  # [N,K] the teacher's at T, times T
    labels: Tensor | None  # [N]
    row_weights: Tensor  # [N] factor of a row's gradient; 0 = ignored

    def select(self, rows: slice) -> "Targets":
        return Targets(*(None if part is None else part[rows] for part in self))

    def merged(self, temperature: float) -> "Targets":
        """ids unique in a row, log_probs at T; nothing is left of ignored rows."""
        kept = self.row_weights != 0
        ids = torch.where(kept[:, None], self.ids.long(), -1)
        log_probs = self.log_probs.to(self.row_weights.dtype)
        ids, log_probs = merge_duplicates(ids, log_probs)
        labels = self.labels
        if labels is not None:
            labels = torch.where(kept, labels, 0)
        return Targets(ids, log_probs / temperature, labels, self.row_weights)


def softcap_(z: Tensor, softcap: float | None) -> None:
    """z -> c*tanh(z/c) in place."""
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)


def softcap_slope(z: Tensor, softcap: float) -> Tensor:
    """The softcap's derivative where it gave z."""
    return 1 - (z / softcap).square()


def write(z: Tensor, ids: Tensor, values: Tensor) -> None:
    """z[row, id] = value for every slot [B,K] that has an id; waits for a CUDA device."""
    slots = ids >= 0
    rows = slots.nonzero()[:, 0]
    columns = ids[slots]
    z[rows, columns] = values[slots]


def softmax_and_sum(
    z: Tensor,
    temperature: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """softmax(z/T) [B,V], in `out` if given, and logsumexp((z - max)/T) [B]."""
    if out is None:
        out = scratch_like(z)
    if temperature != 1:
        z = torch.div(z, temperature, out=out)
    probs = torch.softmax(z, 1, out=out)
    return probs, -probs.amax(1).log()


class Student(NamedTuple):
    """A block's logits taken apart, relative to each row's largest: those on S, the rest."""

    support: Tensor  # [B,K] logits on S, -inf in empty slots
    label: Tensor | None  # [B] the label's logit
    num_outside: Tensor  # [B] tokens off S
    mean_outside: Tensor | None  # [B] mean logit off S, for smooth
    probs: Tensor  # [B,V] softmax(z/T) over the tokens off S, 0 on S
    lse: Tensor  # [B] logsumexp(z/T)
    log_tail: Tensor  # [B] log of the student's mass off S, at T
    probs_1: Tensor  # the same three at T = 1, for the cross-entropy
    lse_1: Tensor
    log_tail_1: Tensor


def take_apart(z: Tensor, targets: Targets, spec: LossSpec) -> Student:
    """Overwrites z [B,V], softcapped logits: its memory holds one of the results."""
    ids = targets.ids
    support = z.gather(1, ids.clamp(min=0))
    support = support.masked_fill(ids < 0, -math.inf)
    label = None
    if targets.labels is not None:
        label = z.gather(1, targets.labels[:, None])[:, 0]
    num_outside = z.shape[1] - (ids >= 0).sum(1)
    mean_outside = None
    if spec.tail == "smooth":
        write(z, ids, torch.zeros_like(support))
        mean_outside = z.sum(1) / num_outside.clamp(min=1)
    write(z, ids, torch.full_like(support, FAR))

    # At logits of 1e4 a difference of two has digits that the logits themselves have not.
    largest = z.amax(1)
    peak = largest
    if ids.shape[1]:
        peak = torch.maximum(largest, support.amax(1))
    support = support - peak[:, None]
    if label is not None:
        label = label - peak
    if mean_outside is not None:
        mean_outside = mean_outside - peak

    def normalizers(
        T: float,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs, log_sum = softmax_and_sum(z, T, out)
        log_outside = (largest - peak) / T + log_sum
        log_outside = torch.where(largest > FAR, log_outside, -math.inf)
        log_support = (support / T).logsumexp(1)
        lse = torch.logaddexp(log_outside, log_support)
        return probs, lse, log_outside - lse

    two_temperatures = spec.temperature != 1 and label is not None
    at_T = normalizers(spec.temperature, None if two_temperatures else z)
    at_1 = at_T
    if two_temperatures:
        at_1 = normalizers(1.0, z)
    return Student(
        support,
        label,
        num_outside,
        mean_outside,
        *at_T,
        *at_1,
    )


class Slopes(NamedTuple):
    """df/dl of a row's divergence."""

    support: Tensor  # [B,K]
    tail: Tensor  # [B]
    uniform: Tensor | None  # [B] for each token off S alike (smooth)


def divergence_of(
    student: Student,
    lt: Tensor,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Slopes]:
    """Each row's divergence [B], its log-probabilities on S [B,K], and the slopes; lt [B,K]."""
    T = spec.temperature
    num_outside = student.num_outside
    ls = student.support / T - student.lse[:, None]
    sides = outcomes(lt, ls, student.log_tail, num_outside, spec.tail)
    kl, g = divergence(*sides, spec.divergence, spec.beta)
    tail_slope = torch.zeros_like(kl)
    uniform_slope = None
    if spec.tail == "ghost":
        tail_slope = g[:, -1]
        g = g[:, :-1]
    elif spec.tail == "renormalize_both":
        student_share = sides[1].exp()
        g = g - student_share * g.sum(1, keepdim=True)  # through the student's normaliser
    elif spec.tail == "smooth":
        mean_ls = student.mean_outside / T - student.lse
        kl = kl + smooth_kl(lt, mean_ls, num_outside)
        tail_slope = -teacher_tail(lt, num_outside)
        uniform_slope = tail_slope / num_outside.clamp(min=1)
    return kl, ls, Slopes(g, tail_slope, uniform_slope)


def write_gradient(
    z: Tensor,
    student: Student,
    ls: Tensor,
    slopes: Slopes,
    targets: Targets,
    spec: LossSpec,
    cap_slope: Tensor | None,
) -> None:
    """The gradient of row_weights * loss into z [B,V]."""
    # T^2 of the loss times 1/T of z/T
    scale = targets.row_weights * spec.kl_weight * spec.temperature  # [B]
    share = torch.zeros_like(scale)
    if student.label is not None:
        share = targets.row_weights * (1 - spec.kl_weight)

    # On S, and what multiplies the softmaxes off S.
    slope_sum = slopes.support.sum(1) + slopes.tail
    through_softmax = slope_sum[:, None] * ls.exp()
    on_support = scale[:, None] * (slopes.support - through_softmax)
    coef_kl = -scale * slope_sum * student.log_tail.exp()
    if spec.tail == "ghost":
        coef_kl = coef_kl + scale * slopes.tail
    coef_ce = share * student.log_tail_1.exp()
    if student.label is not None:
        ls_1 = student.support - student.lse_1[:, None]
        on_support = on_support + share[:, None] * ls_1.exp()

    if student.probs is student.probs_1:
        coef = coef_kl + coef_ce
        torch.mul(student.probs, coef[:, None], out=z)
    else:
        torch.mul(student.probs_1, coef_ce[:, None], out=z)
        z.addcmul_(student.probs, coef_kl[:, None])
    if slopes.uniform is not None:
        uniform_grad = scale * slopes.uniform
        z.add_(uniform_grad[:, None])
    write(z, targets.ids, on_support)
    if student.label is not None:
        z.scatter_add_(1, targets.labels[:, None], -share[:, None])
    if cap_slope is not None:
        z.mul_(cap_slope)


def fields_of(
    kl: Tensor,
    ce: Tensor,
    teacher_mass: Tensor,
    student_mass: Tensor,
    spec: LossSpec,
) -> Tensor:
    """LossOutput's fields as the columns of [B,5]."""
    loss = torch.zeros_like(kl)  # a term of weight 0 may be inf, and 0 * inf would be NaN
    if spec.kl_weight > 0:
        loss = spec.kl_weight * spec.temperature**2 * kl
    if spec.kl_weight < 1:
        loss = loss + (1 - spec.kl_weight) * ce
    return torch.stack([loss, kl, ce, teacher_mass, student_mass], dim=1)


def sparse_block(
    z: Tensor,
    targets: Targets,
    spec: LossSpec,
    grad: bool,
) -> Tensor:
    """LossOutput's fields [B,5] of rows z [B,V], which become their gradient if `grad`."""
    targets = targets.merged(spec.temperature)
    lt = targets.log_probs
    softcap_(z, spec.softcap)
    cap_slope = None
    if grad and spec.softcap is not None:
        cap_slope = softcap_slope(z, spec.softcap)
    student = take_apart(z, targets, spec)
    kl, ls, slopes = divergence_of(student, lt, spec)
    ce = torch.zeros_like(kl)
    if student.label is not None:
        ce = student.lse_1 - student.label
    if grad:
        write_gradient(z, student, ls, slopes, targets, spec, cap_slope)
    teacher_mass = lt.exp().sum(1)
    student_mass = ls.exp().sum(1)
    return fields_of(kl, ce, teacher_mass, student_mass, spec)


def row_losses(
    z: Tensor,
    targets: "Targets | DenseTargets",
    spec: LossSpec,
    fields: Tensor,
    grad: Tensor | None,
    keep_logits: bool = False,
) -> None:
    """Fills fields [C,5] of logits z [C,V] and, where given, grad [C,V] of row_weights * loss.

    z is overwritten, and grad is z itself, unless keep_logits.
    """
    loss_block, width = sparse_block, z.shape[1]
    if isinstance(targets, DenseTargets):
        loss_block, width = dense_block, 4 * width  # with its temporaries
    for rows in row_blocks(len(z), width, z.device):
        block, part = z[rows], targets.select(rows)
        if keep_logits:
            block = block.to(fields.dtype, copy=True)
            block.masked_fill_((part.row_weights == 0)[:, None], 0)
        fields[rows] = loss_block(block, part, spec, grad is not None)
        if keep_logits and grad is not None:
            grad[rows] = block


class DenseTargets(NamedTuple):
    """A teacher's whole distribution at some rows."""

    scores: Tensor | None  # [N,Vt] logits, or log-probabilities at T=1; Vt <= V; None: not made yet
    log_norm: Tensor | None  # [N] of log-probabilities at T; None: scores are logits
    labels: Tensor | None  # [N]
    row_weights: Tensor  # [N]
    overwrite: bool = False  # whether scores may be

    def select(self, rows: slice) -> "DenseTargets":
        tensors = [None if part is None else part[rows] for part in self[:4]]
        return DenseTargets(*tensors, self.overwrite)


def teacher_log_probs(
    targets: DenseTargets,
    V: int,
    spec: LossSpec,
) -> tuple[Tensor, Tensor]:
    """The teacher's log-probabilities at T [B,V], renormalised where asked, and its mass [B]."""
    wide = targets.row_weights.dtype
    lt = targets.scores.to(wide, copy=not targets.overwrite)
    ignored = (targets.row_weights == 0).nonzero()[:, 0]
    lt[ignored] = 0  # such a row may hold anything
    softcap_(lt, spec.teacher_softcap)
    if spec.temperature != 1:
        lt.div_(spec.temperature)
    if targets.log_norm is None:
        nothing = lt.amax(1) == -math.inf
        mass = (~nothing).to(wide)
        lt = lt.log_softmax(1)
        lt[nothing.nonzero()[:, 0]] = -math.inf
    else:
        log_norm = torch.where(targets.row_weights == 0, 0.0, targets.log_norm)
        lt.sub_(log_norm[:, None])
        mass = lt.exp().sum(1)
        if spec.renormalizes:
            lt = normalized(lt)
    missing = V - lt.shape[1]  # tokens that the teacher does not have
    if missing:
        lt = F.pad(lt, (0, missing), value=-math.inf)
    return lt, mass


def dense_block(
    z: Tensor,
    targets: DenseTargets,
    spec: LossSpec,
    grad: bool,
) -> Tensor:
    """`sparse_block` for a teacher that is known whole: S = V, nothing is sorted, no tail."""
    T = spec.temperature
    row_weights = targets.row_weights
    softcap_(z, spec.softcap)
    cap_slope = None
    if grad and spec.softcap is not None:
        cap_slope = softcap_slope(z, spec.softcap)
    lt, teacher_mass = teacher_log_probs(targets, z.shape[1], spec)
    ls = (z if T == 1 else z / T).log_softmax(1)
    kl, slopes = divergence(lt, ls, spec.divergence, spec.beta)

    ce = torch.zeros_like(kl)
    ls_1 = None
    if targets.labels is not None:
        labels = torch.where(row_weights != 0, targets.labels, 0)[:, None]
        ls_1 = ls if T == 1 else z.log_softmax(1)
        ce = -ls_1.gather(1, labels)[:, 0]

    if grad:
        scale = row_weights * spec.kl_weight * T
        coef_kl = -scale * slopes.sum(1)
        torch.mul(slopes, scale[:, None], out=z)
        share = torch.zeros_like(scale)
        if ls_1 is not None:
            share = row_weights * (1 - spec.kl_weight)
        if ls_1 is ls:
            coef_kl = coef_kl + share
        z.addcmul_(ls.exp(), coef_kl[:, None])
        if ls_1 is not None and ls_1 is not ls:
            z.addcmul_(ls_1.exp(), share[:, None])
        if ls_1 is not None:
            z.scatter_add_(1, labels, -share[:, None])
        if cap_slope is not None:
            z.mul_(cap_slope)
    student_mass = torch.ones_like(kl)
    return fields_of(kl, ce, teacher_mass, student_mass, spec)


class LogProbsSpec(NamedTuple):
    """What `linear_log_probs` was asked for."""

    temperature: float
    softcap: float | None


def log_probs_of(
    z: Tensor,
    ids: Tensor,
    spec: LogProbsSpec,
    log_probs: Tensor,
    lse: Tensor,
) -> None:
    """Fills log_probs [C,K], 0 in empty slots, and lse [C] of logits z [C,V] (overwritten)."""
    for rows in row_blocks(*z.shape, z.device):
        block = z[rows]
        slots = ids[rows].long()
        softcap_(block, spec.softcap)
        largest = block.amax(1, keepdim=True)
        block.sub_(largest).div_(spec.temperature)
        log_sum = block.logsumexp(1, keepdim=True)
        chosen = block.gather(1, slots.clamp(min=0)) - log_sum
        log_probs[rows] = chosen.masked_fill(slots < 0, 0.0)
        lse[rows] = (largest / spec.temperature + log_sum)[:, 0]


def log_probs_gradient(
    z: Tensor,
    ids: Tensor,
    spec: LogProbsSpec,
    d_log_probs: Tensor,
    d_lse: Tensor,
) -> Tensor:
    """Logits z [C,V] become their gradient, given that of log_probs [C,K] and of lse [C]."""
    T = spec.temperature
    for rows in row_blocks(*z.shape, z.device):
        block = z[rows]
        slots = ids[rows].long()
        softcap_(block, spec.softcap)
        cap_slope = None
        if spec.softcap is not None:
            cap_slope = softcap_slope(block, spec.softcap)
        probs, _ = softmax_and_sum(block, T, block)
        g = d_log_probs[rows] / T
        coef = d_lse[rows] / T - g.sum(1)
        probs.mul_(coef[:, None])
        probs.scatter_add_(1, slots.clamp(min=0), g)
        if cap_slope is not None:
            probs.mul_(cap_slope)
    return z
