"""Hidden states and a head's weight to the top-k distillation loss and its gradients; logits never exist whole.

N rows (positions), D width, V vocabulary, K teacher entries a row, z = hidden @ weight^T, T = temperature, S = a row's K ids.

    loss = (1 - kl_weight) * CE(label; softmax(z)) + kl_weight * T^2 * divergence(t, softmax(z/T))

over S and, with tail="ghost", one more outcome that holds all the rest. With l = log softmax(z/T), any such loss has the logit
gradient 1/T * (-(sum_k g_k) * softmax(z/T) + scatter_add(g)), g_k = df/dl_k: a few lines on [N,K] make a divergence.
The ghost KL is exact for these K+1 outcomes and a lower bound of the full KL.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import kept_rows, make_targets, reduced, run
from .common import (
    LossOutput,
    Spec,
    check_backend,
    check_labels,
    check_linear,
    check_spec,
    check_targets,
    compute_dtype,
    row_weights,
)
from .linear import Head, scaled
from .topk_kl import reference_rows


class LinearLoss(torch.autograd.Function):
    """The gradient is made in the forward pass where the loss is a scalar, by a second pass where it is [N]."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, spec: Spec, need: tuple[bool, bool], dtype: torch.dtype, rows):
        ctx.dtypes, ctx.state = (hidden.dtype, weight.dtype), (targets, spec, need, dtype, rows)
        scalar = spec.reduction != "none"
        wanted = need if scalar else (False, False)
        head = Head(hidden.to(dtype), weight.to(dtype), wanted, rows, spec.softcap is not None)
        losses = run(head.logits, head.sink if any(wanted) else None, targets, spec, head.rows)
        ctx.gradients = (head.d_hidden, head.d_weight) if scalar else None
        if not scalar:
            ctx.save_for_backward(hidden, weight)
        out = reduced(losses, targets.weights, spec.reduction)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        targets, spec, need, dtype, rows = ctx.state
        if spec.reduction == "none":
            hidden, weight = ctx.saved_tensors
            head = Head(hidden.to(dtype), weight.to(dtype), need, rows, spec.softcap is not None)
            run(head.logits, head.sink, targets._replace(weights=targets.weights * grad), spec, head.rows)
            gradients, grad = (head.d_hidden, head.d_weight), grad.new_ones(())
        else:
            if ctx.gradients is None:
                raise RuntimeError("this loss's gradient was handed over by its first backward; compute the loss again")
            gradients, ctx.gradients = ctx.gradients, None
        pairs = zip(gradients, ctx.dtypes, strict=True)
        return *(scaled(gradient, grad, own) for gradient, own in pairs), None, None, None, None, None


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
        log_norm: [N] logsumexp(z/T) - logsumexp(z)/T of the teacher's logits; needed at T != 1 (renormalize cancels it).
        tail: ghost, truncate, renormalize, renormalize_both or smooth; all but ghost take forward_kl only.
        divergence: forward_kl, reverse_kl, jsd, skew_kl or tv; beta is the teacher's share of the mixture in jsd and skew_kl.
        softcap: c replaces z by c*tanh(z/c) first.
        reduction: mean over the kept rows, sum, or none ([N] fields, 0 in ignored rows).
        backend: auto, torch (chunked) or reference (materialises [N,V]; for tests).
    Returns: LossOutput in fp32 (fp64 for fp64); `loss` alone carries a gradient, for hidden and weight.
    Raises: ValueError with the value and the rule; RuntimeError at a second backward through a scalar loss.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    backend = check_backend(backend)
    check_spec(spec, labels, log_norm)
    dtype = check_linear(hidden, weight, backend)
    check_targets(ids, log_probs, log_norm, len(hidden), len(weight))
    check_labels(labels, len(hidden), len(weight), ignore_index)
    with torch.autocast(hidden.device.type, enabled=False), torch.no_grad():
        weights = row_weights(kept_rows(labels, hidden, ignore_index), reduction)
        targets = make_targets(ids, log_probs, labels, log_norm, spec, compute_dtype(hidden), weights)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            wide = compute_dtype(hidden)
            rows = reference_rows(F.linear(hidden.to(dtype).to(wide), weight.to(dtype).to(wide)), targets, spec)
            out = reduced(rows, weights, reduction)
            return LossOutput(out.loss, *(part.detach() for part in out[1:]))
        grads = torch.is_grad_enabled()
        need = (grads and hidden.requires_grad, grads and weight.requires_grad)
        return LossOutput(*LinearLoss.apply(hidden, weight, targets, spec, need, dtype, _rows))
