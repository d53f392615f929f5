"""The top-k distillation loss on logits that exist already; linear_topk_kl.py has the maths.

N rows (positions), V vocabulary, K teacher entries a row.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import Targets, chunk_rows, kept_rows, make_targets, reduced, run
from .common import (
    LossOutput,
    Spec,
    check_backend,
    check_floats,
    check_labels,
    check_spec,
    check_targets,
    compute_dtype,
    row_weights,
)
from .divergence import divergence as divergence_of
from .divergence import sides, smooth_part
from .linear import scaled


def reference_rows(z: Tensor, targets: Targets, spec: Spec) -> LossOutput:
    """The plain form: logits z [N,V] whole, log_softmax, a mask for S, autograd for the gradient. Returns [N] fields."""
    if spec.softcap is not None:
        z = spec.softcap * torch.tanh(z / spec.softcap)
    T = spec.temperature
    log_p = torch.log_softmax(z / T, dim=1)  # [N,V]
    valid = targets.ids >= 0
    ls = log_p.gather(1, targets.ids.clamp(min=0)).masked_fill(~valid, -math.inf)  # [N,K]
    on = torch.zeros_like(z).scatter_add(1, targets.ids.clamp(min=0), valid.to(z.dtype)) > 0  # [N,V]
    outside = (~on).sum(1)
    all_on = on.all(1, keepdim=True)  # logsumexp of nothing has no gradient: a dummy stands in
    log_tail = torch.where(on & ~all_on, -math.inf, log_p).logsumexp(1)
    teacher, student = sides(targets.lt, ls, log_tail, outside, spec.tail)
    kl = divergence_of(teacher, student, spec.divergence, spec.beta)
    if spec.tail == "smooth":
        kl = kl + smooth_part(targets.lt, torch.where(on, 0.0, log_p).sum(1) / outside.clamp(min=1), outside)
    ce = torch.zeros_like(kl)
    if targets.labels is not None:
        ce = -torch.log_softmax(z, dim=1).gather(1, targets.labels.long().clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    loss = (1 - spec.kl_weight) * ce + spec.kl_weight * T * T * kl
    return LossOutput(loss, kl, ce, targets.lt.exp().sum(1), ls.exp().sum(1))


class LogitLoss(torch.autograd.Function):
    """The gradient [N,V] is made in the forward pass into its own buffer (a second pass with reduction="none")."""

    @staticmethod
    def forward(ctx, logits, targets, spec: Spec, need: bool, rows):
        scalar = spec.reduction != "none"
        ctx.state, ctx.dtype = (targets, spec, rows), logits.dtype
        gradient = torch.empty_like(logits) if need and scalar else None
        losses = LogitLoss.run(logits, gradient, targets, spec, rows)
        ctx.gradient = gradient
        if not scalar:
            ctx.save_for_backward(logits)
        out = reduced(losses, targets.weights, spec.reduction)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    def run(logits, gradient, targets, spec, rows):
        dtype = compute_dtype(logits)
        rows = rows or chunk_rows(*logits.shape, logits.shape[1], dtype, logits.device, spec.softcap is not None)

        def sink(place, tile, factor):
            gradient[place] = tile.mul_(factor)

        def tile(place):
            return logits[place].to(dtype, copy=True)

        return run(tile, None if gradient is None else sink, targets, spec, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        targets, spec, rows = ctx.state
        if spec.reduction == "none":
            (logits,) = ctx.saved_tensors
            gradient = torch.empty_like(logits)
            LogitLoss.run(logits, gradient, targets._replace(weights=targets.weights * grad), spec, rows)
            return gradient, None, None, None, None
        if ctx.gradient is None:
            raise RuntimeError("this loss's gradient was handed over by its first backward; compute the loss again")
        gradient, ctx.gradient = ctx.gradient, None
        return scaled(gradient, grad, ctx.dtype), None, None, None, None


@torch.compiler.disable
def topk_kl(
    logits: Tensor,
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
    """`linear_topk_kl` on logits [N,V] (fp32, bf16, fp16 or fp64), which stay as they are; the other arguments are its own."""
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    backend = check_backend(backend)
    check_spec(spec, labels, log_norm)
    check_floats("logits", logits, 2, backend)
    N, V = logits.shape
    check_targets(ids, log_probs, log_norm, N, V)
    check_labels(labels, N, V, ignore_index)
    with torch.autocast(logits.device.type, enabled=False):
        with torch.no_grad():
            weights = row_weights(kept_rows(labels, logits, ignore_index), reduction)
            targets = make_targets(ids, log_probs, labels, log_norm, spec, compute_dtype(logits), weights)
        if backend == "reference":
            out = reduced(reference_rows(logits.to(compute_dtype(logits)), targets, spec), weights, reduction)
            return LossOutput(out.loss, *(part.detach() for part in out[1:]))
        need = torch.is_grad_enabled() and logits.requires_grad
        return LossOutput(*LogitLoss.apply(logits, targets, spec, need, _rows))
