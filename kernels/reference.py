"""The losses as one would write them down: whole logits [N,V], log_softmax, a mask for S, autograd.

Any device and dtype, float64 too. Every other form is tested against this one.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import wide_dtype
from .checks import LossSpec
from .divergence import FAR, divergence, outcomes, smooth_kl
from .torch_loss import Targets, fields_of


def whole_logits(
    source: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    softcap: float | None,
) -> Tensor:
    """[N,V] softcapped logits of inputs rounded to `dtype`; without weight, source is logits."""
    wide = wide_dtype(dtype)
    z = source.to(dtype).to(wide)
    if weight is not None:
        weight = weight.to(dtype).to(wide)
        z = F.linear(z, weight)
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    return z


def sparse_kl(
    z: Tensor,
    targets: Targets,
    spec: LossSpec,
) -> tuple[Tensor, Tensor, Tensor]:
    """[N] divergence, teacher's mass and student's mass on S, from softcapped logits z [N,V]."""
    lt = targets.log_probs
    has_id = targets.ids >= 0
    ids = targets.ids.clamp(min=0)
    log_p = torch.log_softmax(z / spec.temperature, dim=1)  # [N,V]
    ls = log_p.gather(1, ids)  # [N,K]
    ls = ls.masked_fill(~has_id, -math.inf)
    counts = torch.zeros_like(z)
    counts = counts.scatter_add(1, ids, has_id.to(z.dtype))
    on_support = counts > 0  # [N,V]
    num_outside = (~on_support).sum(1)
    # logsumexp of nothing has no gradient: a row that is all S keeps its numbers, unused.
    masked = on_support & (num_outside > 0)[:, None]
    log_tail = log_p.masked_fill(masked, -math.inf).logsumexp(1)
    sides = outcomes(lt, ls, log_tail, num_outside, spec.tail)
    kl, _ = divergence(*sides, spec.divergence, spec.beta)
    if spec.tail == "smooth":
        total = log_p.masked_fill(on_support, 0.0).sum(1)
        mean = total / num_outside.clamp(min=1)
        kl = kl + smooth_kl(lt, mean, num_outside)
    return kl, lt.exp().sum(1), ls.exp().sum(1)


def all_tokens(inputs) -> tuple[Tensor, Tensor]:
    """A teacher that is known whole as sparse targets: ids [N,V], log_probs [N,V] at T, times T.

    Tokens that it does not have are of no probability. inputs: losses.LossInputs.
    """
    T = inputs.spec.temperature
    log_norm = inputs.log_norm
    V = inputs.source.shape[1] if inputs.weight is None else len(inputs.weight)
    scores = inputs.log_probs
    if scores is None:
        hidden, weight = inputs.teacher_hidden, inputs.teacher_weight
        scores = whole_logits(hidden, weight, hidden.dtype, inputs.spec.teacher_softcap)
    scores = scores.to(wide_dtype(inputs.dtype))
    if log_norm is None:
        log_norm = (scores / T).clamp(min=FAR).logsumexp(1)
    log_probs = scores - T * log_norm[:, None]
    missing = V - log_probs.shape[1]
    log_probs = F.pad(log_probs, (0, missing), value=-math.inf)
    ids = torch.arange(V, device=scores.device)
    return ids.expand_as(log_probs), log_probs


def losses(
    source: Tensor,
    weight: Tensor | None,
    targets: Targets,
    spec: LossSpec,
    dtype: torch.dtype,
) -> Tensor:
    """LossOutput's fields [N,5], whose first column has a gradient for source and weight."""
    kept = targets.row_weights != 0
    source = torch.where(kept[:, None], source, 0.0)
    z = whole_logits(source, weight, dtype, spec.softcap)
    targets = targets.merged(spec.temperature)
    kl, *masses = sparse_kl(z, targets, spec)
    ce = torch.zeros_like(kl)
    if targets.labels is not None:
        labels = torch.where(kept, targets.labels, 0)
        ce = F.cross_entropy(z, labels.long(), reduction="none")
    return fields_of(kl, ce, *masses, spec)
