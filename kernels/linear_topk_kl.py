"""Hidden states and a head's weight to the top-k distillation loss and its gradients; logits never exist whole.

N rows (positions), D width, V vocabulary, K teacher entries a row, z = hidden @ weight^T, T = temperature, S = the ids.

    loss = (1 - kl_weight) * CE(label; softmax(z)) + kl_weight * T^2 * divergence(t, softmax(z/T))

over S and, with tail="ghost", one more outcome that holds all the rest. With l = log softmax(z/T), any such loss has
the logit gradient 1/T * (-(sum_k g_k) * softmax(z/T) + scatter_add(g)), g_k = df/dl_k: a few lines on [N,K] make a
divergence. The ghost KL is exact for these K+1 outcomes and a lower bound of the full KL.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exp_kernel, row_kernel
from .common import (
    LossOutput,
    Spec,
    check_backend,
    check_ids,
    check_integers,
    check_linear,
    check_range,
    check_spec,
    check_teacher,
    compute_dtype,
    computing,
    refuse_second_derivative,
    scaled,
    widened,
)
from .divergence import divergence, sides, smooth_part
from .tile import Head, Logits, Targets, run


def reference_rows(z: Tensor, targets: Targets, spec: Spec) -> LossOutput:
    """The plain form: logits z [N,V] whole, log_softmax, a mask for S, autograd for gradients. Returns [N] fields."""
    z = z if spec.softcap is None else spec.softcap * torch.tanh(z / spec.softcap)
    ids, lt, T = targets.ids, targets.log_probs, spec.temperature
    log_p = torch.log_softmax(z / T, dim=1)  # [N,V]
    ls = log_p.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)  # [N,K]
    on = torch.zeros_like(z).scatter_add(1, ids.clamp(min=0), (ids >= 0).to(z.dtype)) > 0  # [N,V]
    outside = (~on).sum(1)
    all_on = on.all(1, keepdim=True)  # logsumexp of nothing has no gradient: a dummy stands in
    log_tail = torch.where(on & ~all_on, -torch.inf, log_p).logsumexp(1)
    kl, _ = divergence(*sides(lt, ls, log_tail, outside, spec.tail), spec.divergence, spec.beta)
    if spec.tail == "smooth":
        kl = kl + smooth_part(lt, torch.where(on, 0.0, log_p).sum(1) / outside.clamp(min=1), outside)
    ce = torch.zeros_like(kl)
    if targets.labels is not None:
        ce = F.cross_entropy(z, targets.labels, reduction="none")
    loss = (1 - spec.kl_weight) * ce + spec.kl_weight * T * T * kl
    return LossOutput(loss, kl, ce, lt.exp().sum(1), ls.exp().sum(1))


def counted(source: Tensor, ids: Tensor, labels: Tensor | None, V: int, spec: Spec, wide: torch.dtype):
    """Checks the ranges of ids and labels; which rows count (None = all) and each one's share of the loss [N]."""
    check_ids(ids, V)
    kept = None
    if labels is not None:
        kept = labels != spec.ignore_index
        rule = f"a label must be in 0..{V - 1}, or ignore_index={spec.ignore_index}"
        check_range("labels", labels, ((labels < 0) | (labels >= V)) & kept, rule)
        if kept.device.type == "cpu" and kept.all():
            kept = None
    weights = source.new_ones(len(source), dtype=wide) if kept is None else kept.to(wide)
    return kept, weights / weights.sum().clamp(min=1) if spec.reduction == "mean" else weights


def reduced(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """[N,5] fields to what `reduction` asks for, [5] or [5,N]; an ignored row (weight 0) reads 0 whatever stood there."""
    rows = torch.where(weights[:, None] > 0, rows * weights[:, None], 0.0)
    return rows.t().contiguous() if reduction == "none" else rows.sum(0)


@torch.library.custom_op("nanodistill::topk_loss", mutates_args=())
def loss_op(
    source: Tensor, weight: Tensor | None, ids: Tensor, log_probs: Tensor, log_norm: Tensor | None, labels: Tensor | None,
    upstream: Tensor | None, kl_weight: float, temperature: float, tail: str, divergence: str, beta: float,
    softcap: float | None, ignore_index: int, reduction: str, backend: str, dtype: torch.dtype, rows: int | None,
    path: int | None, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """source = hidden with a weight, logits without -> loss, the other fields [4(,N)], d_source, d_weight.

    The gradients, empty where not needed, are those of the scalar loss; with reduction="none" those of sum(upstream *
    loss), where `upstream` [N] is given.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    with computing(source):
        V = source.shape[1] if weight is None else len(weight)
        kept, weights = counted(source, ids, labels, V, spec, compute_dtype(dtype))
        shares = weights if upstream is None else torch.where(weights > 0, upstream, 0.0).to(weights.dtype)
        largest = shares.abs().max().clamp(min=1e-30) if dtype == torch.float16 and len(shares) else None
        if largest is not None:  # 1/N of a small probability would vanish in fp16: it goes on the sums instead
            shares = shares / largest
        targets = Targets(ids, log_probs, log_norm, labels, shares)
        need = need if reduction != "none" or upstream is not None else (False, False)
        options = {"dtype": dtype, "rows": rows, "softcap": softcap is not None, "kept": kept, "need": need}
        run = run_triton if backend == "triton" else run_torch
        fields, gradients = run(source, weight, targets, spec, options, path)
        fields = reduced(fields, weights, reduction)
        for gradient in gradients:
            if gradient is not None and largest is not None:
                gradient.mul_(largest)
    made = (fields[0].clone(), fields[1:].clone(), *gradients, None)[:4]
    return tuple(weights.new_empty(0) if part is None else part for part in made)


@loss_op.register_fake
def _(source, weight, *rest):
    *_, reduction, _, dtype, _, _, need = rest
    loss = source.new_empty((len(source),) if reduction == "none" else (), dtype=compute_dtype(dtype))
    wanted = need if reduction != "none" or rest[4] is not None else (False, False)
    shapes = [part.shape if part is not None and want else (0,) for part, want in zip((source, weight), wanted, strict=True)]
    return loss, loss.new_empty(4, *loss.shape), *(loss.new_empty(shape) for shape in shapes)


def keep_for_backward(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or each backward would make zeros of d_weight's size
    ctx.rest, ctx.dtypes = inputs[7:], [None if part is None else part.dtype for part in inputs[:2]]
    ctx.save_for_backward(*(inputs[:6] if ctx.rest[7] == "none" else output[2:]))


def backward(ctx, grad, *_):
    """Scales the gradient that the forward made; makes it here where the loss is [N]."""
    refuse_second_derivative()
    made, need = ctx.saved_tensors, ctx.rest[-1]
    if ctx.rest[7] == "none":
        made, grad = loss_op(*made, grad, *ctx.rest)[2:], None
    gradients = [scaled(part, grad, own) if want else None for part, own, want in zip(made, ctx.dtypes, need, strict=True)]
    return *gradients, *[None] * 18


loss_op.register_autograd(backward, setup_context=keep_for_backward)


def run_torch(source: Tensor, weight: Tensor | None, targets: Targets, spec: Spec, options: dict, path: int | None):
    """The chunked torch backend -> each row's fields [N,5], and the gradients."""
    source = Logits(source, **options) if weight is None else Head(source, weight, **options)
    return torch.stack(run(source, targets, spec), 1), source.gradients


def run_triton(source: Tensor, weight: Tensor | None, targets: Targets, spec: Spec, options: dict, path: int | None):
    """The same by the kernels: at once over logits, chunk by chunk over those of a head."""
    fields = targets.weights.new_empty(len(source), 5)
    if weight is None:
        as_it_is = source.is_contiguous() and source.data_ptr() % 16 == 0
        z = source if as_it_is else source.clone(memory_format=torch.contiguous_format)
        grad = torch.empty_like(z) if options["need"][0] else None
        row_kernel.launch(z, fields, targets, spec, spec.tail, grad, own=not as_it_is)
        return fields, [grad]
    head = Head(source, weight, **options, aligned=True)
    fits = head.wanted and head.narrow != torch.float16 and spec.softcap is None and spec.tail != "smooth"
    fits = fits and (spec.temperature == 1 or targets.labels is None)
    if spec.temperature < 0.5:  # z/T spreads beyond the range of path 2, which would do most rows twice
        path = path or 1
    path = exp_kernel.path_of(path, head, fits)
    for place in head.places():
        if path == 2:
            head.sink(place, *exp_kernel.launch(head, place, targets.rows(place), spec, fields[place]))
            continue
        tile = head.logits(place)
        grad = row_kernel.narrowed(tile, head.narrow) if head.wanted else None
        row_kernel.launch(tile, fields[place], targets.rows(place), spec, spec.tail, grad)
        if head.wanted:
            head.sink(place, grad)
    return fields, head.gradients


def topk_loss(inputs, dtype, ids, log_probs, labels, log_norm, spec: Spec, backend: str, rows, path=None) -> LossOutput:
    """The losses behind their checked inputs: (hidden, weight), or (logits, None); `dtype` enters the products."""
    check_spec(spec, labels, log_norm)
    check_integers("ids", ids, 2, inputs[0])
    backend = check_backend(backend, dtype, inputs[0].device, ids.shape[1])
    check_teacher(log_probs, log_norm, ids)
    if labels is not None:
        check_integers("labels", labels, 1, inputs[0])
    ids, labels = widened(ids), None if labels is None else widened(labels)
    log_norm = None if log_norm is None else log_norm.detach().contiguous()
    need = [torch.is_grad_enabled() and part is not None and part.requires_grad for part in inputs]
    if backend == "reference":
        return reference(inputs, dtype, Targets(ids, log_probs.detach(), log_norm, labels, None), spec)
    arguments = (*spec, backend, dtype, rows, path, need)
    loss, rest, *_ = loss_op(*inputs, ids, log_probs.detach().contiguous(), log_norm, labels, None, *arguments)
    return LossOutput(loss, *rest.unbind())


def reference(inputs, dtype, targets: Targets, spec: Spec) -> LossOutput:
    """The plain form on whole logits, in the products' dtype widened; autograd makes its gradients."""
    wide, (source, weight) = compute_dtype(dtype), inputs
    with computing(source):
        V = source.shape[1] if weight is None else len(weight)
        kept, weights = counted(source, targets.ids, targets.labels, V, spec, wide)
        z = source.to(dtype).to(wide)
        z = z if kept is None else torch.where(kept[:, None], z, 0.0)
        z = z if weight is None else F.linear(z, weight.to(dtype).to(wide))
        rows = reference_rows(z, targets._replace(weights=weights).merged(spec.temperature), spec)
        loss, *rest = reduced(torch.stack(rows, 1), weights, spec.reduction)
        return LossOutput(loss, *(part.detach() for part in rest))


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
    _path: int | None = None,
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
        backend: auto (triton on CUDA, torch elsewhere), triton, torch (chunked, any device) or reference (materialises
            [N,V]; for tests).
    Returns: LossOutput in fp32 (fp64 for fp64); `loss` alone carries a gradient, for hidden and weight.
    Raises: ValueError with the value and the rule; RuntimeError at a second derivative, and at a second backward that
        would scale the same gradient twice.
    The gradient is made in the forward pass, three products in all; with reduction="none" in the backward, four in all
    and nothing of the weight's size kept between the two.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    dtype = check_linear(hidden, weight)
    return topk_loss((hidden, weight), dtype, ids, log_probs, labels, log_norm, spec, backend, _rows, _path)
