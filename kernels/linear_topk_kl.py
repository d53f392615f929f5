"""Hidden states and a head's weight to the top-k distillation loss and its gradients; logits never exist whole.

N rows (positions), D width, V vocabulary, K teacher entries a row, z = hidden @ weight^T, T = temperature, S = the ids.

    loss = (1 - kl_weight) * CE(label; softmax(z)) + kl_weight * T^2 * divergence(t, softmax(z/T))

over S and, with tail="ghost", one more outcome that holds all the rest. With l = log softmax(z/T), any such loss has
the logit gradient 1/T * (-(sum_k g_k) * softmax(z/T) + scatter_add(g)), g_k = df/dl_k: a few lines on [N,K] make a
divergence. The ghost KL is exact for these K+1 outcomes and a lower bound of the full KL.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import (
    LossOutput,
    Spec,
    check_backend,
    check_ids,
    check_labels,
    check_linear,
    check_spec,
    check_teacher,
    compute_dtype,
    reduce,
)
from .divergence import divergence, sides, smooth_part
from .tile import Head, Logits, Targets, run, scaled


def reference_rows(z: Tensor, targets: Targets, spec: Spec) -> LossOutput:
    """The plain form: logits z [N,V] whole, log_softmax, a mask for S, autograd for gradients. Returns [N] fields."""
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    ids, lt, T = targets.ids, targets.log_probs, spec.temperature
    log_p = torch.log_softmax(z / T, dim=1)  # [N,V]
    ls = log_p.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)  # [N,K]
    on = torch.zeros_like(z).scatter_add(1, ids.clamp(min=0), (ids >= 0).to(z.dtype)) > 0  # [N,V]
    outside = (~on).sum(1)
    all_on = on.all(1, keepdim=True)  # logsumexp of nothing has no gradient: a dummy stands in
    log_tail = torch.where(on & ~all_on, -math.inf, log_p).logsumexp(1)
    kl, _ = divergence(*sides(lt, ls, log_tail, outside, spec.tail), spec.divergence, spec.beta)
    if spec.tail == "smooth":
        kl = kl + smooth_part(lt, torch.where(on, 0.0, log_p).sum(1) / outside.clamp(min=1), outside)
    ce = torch.zeros_like(kl)
    if targets.labels is not None:
        ce = F.cross_entropy(z, targets.labels, reduction="none")
    loss = (1 - spec.kl_weight) * ce + spec.kl_weight * T * T * kl
    return LossOutput(loss, kl, ce, lt.exp().sum(1), ls.exp().sum(1))


class TopkLoss(torch.autograd.Function):
    """The gradient is made in the forward pass where the loss is a scalar, by a second pass where it is [N]."""

    @staticmethod
    def forward(ctx, spec: Spec, kind: type, options: dict, need: tuple, ids, log_probs, log_norm, labels, weights, *inputs):
        targets, scalar = Targets(ids, log_probs, log_norm, labels, weights), spec.reduction != "none"
        source = kind(*inputs, need if scalar else (False, False), **options)
        out = reduce(run(source, targets, spec), weights, spec.reduction)
        ctx.spec, ctx.make, ctx.dtypes = spec, (kind, options, need), [part.dtype for part in inputs]
        ctx.gradients = source.gradients if scalar else None
        if not scalar:
            ctx.save_for_backward(*targets, *inputs)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if ctx.spec.reduction == "none":
            (kind, options, need), saved = ctx.make, ctx.saved_tensors
            targets, inputs = Targets(*saved[:5]), saved[5:]
            weights = torch.where(targets.weights != 0, targets.weights * grad, 0.0)
            source, grad = kind(*inputs, need, **options), grad.new_ones(())
            run(source, targets._replace(weights=weights), ctx.spec)
            gradients = source.gradients
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError("this loss's gradient went to its first backward; compute the loss again")
        return *(None,) * 9, *(scaled(part, grad, own) for part, own in zip(gradients, ctx.dtypes, strict=True))


def topk_loss(inputs, dtype, V: int, ids, log_probs, labels, log_norm, spec: Spec, backend: str, rows) -> LossOutput:
    """Both top-k losses behind their checked inputs: (hidden, weight), or (logits,); `dtype` enters the products."""
    backend, N = check_backend(backend), len(inputs[0])
    check_spec(spec, labels, log_norm)
    spec = spec._replace(temperature=float(spec.temperature))
    ids = check_ids(ids, N, V, inputs[0])
    check_teacher(log_probs, log_norm, ids)
    labels = check_labels(labels, N, V, spec.ignore_index, inputs[0])
    wide, kept = compute_dtype(dtype), None if labels is None else labels != spec.ignore_index
    if kept is not None and kept.device.type == "cpu" and kept.all():
        kept = None
    weights = torch.ones(N, dtype=wide, device=ids.device) if kept is None else kept.to(wide)
    if spec.reduction == "mean":
        weights = weights / weights.sum().clamp(min=1)
    with torch.autocast(ids.device.type, enabled=False):
        if backend == "reference":
            z = [part.to(dtype).to(wide) for part in inputs]
            z[0] = z[0] if kept is None else torch.where(kept[:, None], z[0], 0.0)
            targets = Targets(ids, log_probs.detach(), log_norm, labels, weights).merged(spec.temperature)
            out = reduce(reference_rows(F.linear(*z) if len(z) == 2 else z[0], targets, spec), weights, spec.reduction)
            return LossOutput(out.loss, *(part.detach() for part in out[1:]))
        options = {"dtype": dtype, "rows": rows, "softcap": spec.softcap is not None, "kept": kept}
        need = tuple(torch.is_grad_enabled() and part.requires_grad for part in inputs)
        kind = Head if len(inputs) == 2 else Logits
        return LossOutput(*TopkLoss.apply(spec, kind, options, need, ids, log_probs, log_norm, labels, weights, *inputs))


@torch.compiler.disable
def linear_topk_kl(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    *,
    labels: Tensor | None = None,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    log_norm: Tensor | None = None,
    tail: str = "ghost",
    divergence: str = "forward_kl",
    beta: float = 0.5,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    _rows: int | None = None,
) -> LossOutput:
    """Distillation loss from a teacher's K entries a row, with the label's cross-entropy mixed in.

    Args:
        hidden: [N,D] and weight [V,D], fp32, bf16 or fp16 (fp64 too), of one dtype unless under autocast.
        ids: [N,K] integer token ids, a negative one is an empty slot; equal ids in a row add their probabilities.
        log_probs: [N,K] the teacher's, nats, at T=1; -inf is allowed.
        labels: [N]; rows of `ignore_index` count nowhere, in no field and no gradient.
        kl_weight: share of the divergence in 0..1; below 1 labels are needed.
        temperature: T > 0 of both sides of the divergence; the cross-entropy is always at T=1.
        log_norm: [N] logsumexp(z/T) - logsumexp(z)/T of the teacher's logits; needed at T != 1, but where a renormalize
            cancels it.
        tail: ghost, truncate, renormalize, renormalize_both or smooth; all but ghost take forward_kl only.
        divergence: forward_kl, reverse_kl, jsd, skew_kl or tv; beta: the teacher's share in jsd's and skew_kl's mixture.
        softcap: c replaces z by c*tanh(z/c) first.
        reduction: mean over the kept rows, sum, or none ([N] fields, 0 in ignored rows).
        backend: auto, torch (chunked) or reference (materialises [N,V]; for tests).
    Returns: LossOutput in fp32 (fp64 for fp64); `loss` alone carries a gradient, for hidden and weight.
    Raises: ValueError with the value and the rule; RuntimeError at a second backward through a scalar loss.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    dtype = check_linear(hidden, weight)
    return topk_loss((hidden, weight), dtype, len(weight), ids, log_probs, labels, log_norm, spec, backend, _rows)
