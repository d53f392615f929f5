"""Hidden states and a head's weight to the top-k distillation loss and its gradients; logits never exist whole.

N rows (positions), D width, V vocabulary, K teacher entries a row, z = hidden @ weight^T, T = temperature, S = the ids.

    loss = (1 - kl_weight) * CE(label; softmax(z)) + kl_weight * T^2 * divergence(t, softmax(z/T))

over S and, with tail="ghost", one more outcome that holds all the rest. With l = log softmax(z/T), any such loss has
the logit gradient 1/T * (-(sum_k g_k) * softmax(z/T) + scatter_add(g)), g_k = df/dl_k: a few lines on [N,K] make a
divergence. The ghost KL is exact for these K+1 outcomes and a lower bound of the full KL. `topk_kl` starts from logits and
`linear_cross_entropy` has no entries (K = 0). `linear_log_probs` returns l and lse = logsumexp(z/T) for losses of one's own:

    dz = 1/T * ((g_lse - sum_k g_k) * softmax(z/T) + scatter_add(g))

What g is, only its backward pass knows, so that the logits are made again there: four products in all, as with
reduction="none".
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import exp_kernel, row_kernel, tile
from .common import (
    LossOutput,
    Spec,
    check_backend,
    check_ids,
    check_linear,
    check_tensor,
    checked_targets,
    compute_dtype,
    computing,
    counted,
    integers,
    scaled,
    whole_logits,
)
from .divergence import divergence, sides, smooth_part
from .tile import Head, Logits, Targets


def reference(inputs, dtype: torch.dtype, targets: Targets, spec: Spec) -> LossOutput:
    """The plain form: logits z [N,V] whole, log_softmax, a mask for S, autograd for gradients."""
    (source, weight), T = inputs, spec.temperature
    with computing(source):
        kept, weights = counted(source, weight, targets.ids, targets.labels, spec, compute_dtype(dtype))
        source = source if kept is None else torch.where(kept[:, None], source, 0.0)
        z = whole_logits(source, weight, dtype, spec.softcap)
        ids, lt, labels, _ = targets._replace(weights=weights).merged(T)
        log_p = torch.log_softmax(z / T, dim=1)  # [N,V]
        ls = log_p.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)  # [N,K]
        on = torch.zeros_like(z).scatter_add(1, ids.clamp(min=0), (ids >= 0).to(z.dtype)) > 0  # [N,V]
        outside = (~on).sum(1)
        all_on = on.all(1, keepdim=True)  # logsumexp of nothing has no gradient: a dummy stands in
        log_tail = torch.where(on & ~all_on, -torch.inf, log_p).logsumexp(1)
        kl, _ = divergence(*sides(lt, ls, log_tail, outside, spec.tail), spec.divergence, spec.beta)
        if spec.tail == "smooth":
            kl = kl + smooth_part(lt, torch.where(on, 0.0, log_p).sum(1) / outside.clamp(min=1), outside)
        ce = torch.zeros_like(kl) if labels is None else F.cross_entropy(z, labels, reduction="none")
        loss = (1 - spec.kl_weight) * ce + spec.kl_weight * T * T * kl
        fields = torch.stack([loss, kl, ce, lt.exp().sum(1), ls.exp().sum(1)], 1)
        loss, *rest = reduced(fields, weights, spec.reduction)
        return LossOutput(loss, *(part.detach() for part in rest))


def reduced(rows: Tensor, weights: Tensor, reduction: str) -> Tensor:
    """[N,5] fields to what `reduction` asks for, [5] or [5,N]; an ignored row (weight 0) reads 0 whatever stood there."""
    rows = torch.where(weights[:, None] > 0, rows * weights[:, None], 0.0)
    return rows.t().contiguous() if reduction == "none" else rows.sum(0)


def run_triton(source: Tensor, weight: Tensor | None, targets: Targets, spec: Spec, fields: Tensor, path: int | None, options):
    """`tile.run` by the kernels: at once over logits, chunk by chunk over those of a head."""
    if weight is None:
        as_it_is = source.is_contiguous() and source.data_ptr() % 16 == 0
        z = source if as_it_is else source.clone(memory_format=torch.contiguous_format)
        grad = torch.empty_like(z) if options["need"][0] else None
        row_kernel.launch(z, fields, targets, spec, grad, own=not as_it_is)
        return grad, None
    head = Head(source, weight, **options, aligned=True)
    fits = head.wanted and head.narrow != torch.float16 and spec.softcap is None and spec.tail not in ("smooth", "given")
    fits = fits and (spec.temperature == 1 or targets.labels is None)
    if spec.temperature < 0.5:  # z/T spreads beyond the range of path 2, which would do most rows twice
        path = path or 1
    path = exp_kernel.path_of(path, head, fits)
    for place in head.places():
        if path == 2:
            head.sink(place, *exp_kernel.launch(head, place, targets.rows(place), spec, fields[place]))
            continue
        z = head.logits(place)
        grad = row_kernel.narrowed(z, head.narrow) if head.wanted else None
        row_kernel.launch(z, fields[place], targets.rows(place), spec, grad)
        if head.wanted:
            head.sink(place, grad)
    return head.gradients


@torch.library.custom_op("nanodistill::fused", mutates_args=())
def fused_op(
    source: Tensor, weight: Tensor | None, ids: Tensor, log_probs: Tensor | None, labels: Tensor | None,
    upstream: Tensor | None, kl_weight: float, temperature: float, tail: str, divergence: str, beta: float,
    softcap: float | None, ignore_index: int, reduction: str, backend: str, dtype: torch.dtype, rows: int | None,
    path: int | None, need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """source = hidden with a weight, logits without -> loss, the other fields [4(,N)], d_source, d_weight and their factor.

    The gradients, empty where not needed, are those of the scalar loss; with reduction="none" those of sum(upstream *
    loss), where `upstream` [N] is given. tail="log_probs" has [N,K+1], l at the ids and lse, for the loss and for upstream.
    In fp16 1/N of a small probability would vanish: gradients are kept large there, and times `factor` [] they are right.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    with computing(source):
        kept, weights = counted(source, weight, ids, labels, spec, compute_dtype(dtype))
        shares, given = weights, tail == "log_probs" and upstream is not None
        if upstream is not None:
            shares = upstream.to(weights.dtype).contiguous()
            shares = shares if given else torch.where(weights > 0, shares, 0.0)
        factor = None
        if dtype == torch.float16:
            factor = torch.cat([shares.abs().flatten(), shares.new_tensor([1e-30])]).max()
            if not given:  # an entry is at most 62 T, by reverse_kl: no more than fp16 holds
                factor = factor / 2.0 ** math.floor(math.log2(1000 / max(1, temperature)))
            shares = shares / factor
        targets = Targets(ids, log_probs, labels, shares)
        if given:
            spec, targets = spec._replace(tail="given"), targets._replace(log_probs=shares, weights=weights)
        need = need if reduction != "none" or upstream is not None else (False, False)
        options = {"dtype": dtype, "rows": rows, "softcap": softcap is not None, "kept": kept, "need": need}
        fields = weights.new_empty(len(source), ids.shape[1] + 1 if tail == "log_probs" else len(LossOutput._fields))
        if backend == "triton":
            gradients = run_triton(source, weight, targets, spec, fields, path, options)
        else:
            chunks = Logits(source, **options) if weight is None else Head(source, weight, **options)
            gradients = tile.run(chunks, targets, spec, fields)
        if tail == "log_probs":
            made = fields.zero_() if given else fields, None, *gradients, factor
        else:
            fields = reduced(fields, weights, reduction)
            made = fields[0].clone(), fields[1:].clone(), *gradients, factor
    return tuple(weights.new_empty(0) if part is None else part for part in made)


@fused_op.register_fake
def _(source, weight, ids, log_probs, labels, upstream, kl_weight, temperature, tail, *rest):
    *_, reduction, _, dtype, _, _, need = rest
    shape = (len(source),) if reduction == "none" else ()
    loss = source.new_empty((*shape, ids.shape[1] + 1) if tail == "log_probs" else shape, dtype=compute_dtype(dtype))
    wanted = need if reduction != "none" or upstream is not None else (False, False)
    shapes = [part.shape if part is not None and want else (0,) for part, want in zip((source, weight), wanted, strict=True)]
    shapes = [0 if tail == "log_probs" else (4, *shape), *shapes, () if dtype == torch.float16 else 0]
    return loss, *(loss.new_empty(shape) for shape in shapes)


def keep_for_backward(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or each backward would make zeros of d_weight's size
    ctx.rest, ctx.dtypes = inputs[6:], [None if part is None else part.dtype for part in inputs[:2]]
    ctx.save_for_backward(*(inputs[:5] if ctx.rest[7] == "none" else output[2:]))


def backward(ctx, grad, *_):
    """Scales the gradient that the forward made; makes it here where the loss is of rows."""
    if torch.is_grad_enabled():  # create_graph=True would go through as through a constant
        raise RuntimeError("the kernels' losses have no second derivative: create_graph=True cannot pass through them")
    made, need, half = ctx.saved_tensors, ctx.rest[-1], ctx.rest[9] == torch.float16
    if ctx.rest[7] == "none":
        made, grad = fused_op(*made, grad, *ctx.rest)[2:], None
    *made, factor = made
    if half:
        grad = factor if grad is None else grad * factor
    gradients = [scaled(part, grad, own) if want else None for part, own, want in zip(made, ctx.dtypes, need, strict=True)]
    return *gradients, *[None] * 17


fused_op.register_autograd(backward, setup_context=keep_for_backward)


def needed(*inputs: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and part is not None and part.requires_grad for part in inputs]


def topk_loss(inputs, dtype, ids, log_probs, labels, log_norm, spec: Spec, backend: str, rows, path=None) -> LossOutput:
    """The losses behind their checked inputs: (hidden, weight), or (logits, None); `dtype` enters the products."""
    ids, log_probs, labels = checked_targets(spec, ids, log_probs, labels, log_norm, inputs[0], compute_dtype(dtype))
    backend = check_backend(backend, dtype, inputs[0].device, ids.shape[1])
    if backend == "reference":
        return reference(inputs, dtype, Targets(ids, log_probs, labels, None), spec)
    arguments = (*spec, backend, dtype, rows, path, needed(*inputs))
    loss, rest, *_ = fused_op(*inputs, ids, log_probs, labels, None, *arguments)
    return LossOutput(loss, *rest.unbind())


def linear_topk_kl(
    hidden: Tensor, weight: Tensor, ids: Tensor, log_probs: Tensor, *, labels: Tensor | None = None, kl_weight: float = 1.0,
    temperature: float = 1.0, log_norm: Tensor | None = None, tail: str = "ghost", divergence: str = "forward_kl",
    beta: float = 0.5, softcap: float | None = None, ignore_index: int = -100, reduction: str = "mean",
    backend: str = "auto", _rows: int | None = None, _path: int | None = None,
) -> LossOutput:  # fmt: skip
    """Distillation loss from a teacher's K entries a row, with the label's cross-entropy mixed in.

    Args:
        hidden: [N,D] and weight [V,D], fp32, bf16 or fp16 (fp64 too), of one dtype unless under autocast.
        ids: [N,K] integer token ids, a negative one is an empty slot; equal ids in a row add their probabilities.
        log_probs: [N,K] the teacher's, nats, at T=1; -inf is allowed.
        labels: [N]; rows of `ignore_index` count nowhere, in no field and no gradient.
        kl_weight: share of the divergence in 0..1; below 1 labels are needed.
        temperature: T > 0 of both sides of the divergence; the cross-entropy is always at T=1.
        log_norm: [N] logsumexp(z/T) - logsumexp(z)/T of the teacher; needed at T != 1, but where a renormalize cancels it.
        tail: ghost, truncate, renormalize, renormalize_both or smooth; all but ghost take forward_kl only.
        divergence: forward_kl, reverse_kl, jsd, skew_kl or tv; beta: the teacher's share in jsd's and skew_kl's mixture.
        softcap: c replaces z by c*tanh(z/c) first.
        reduction: mean over the kept rows, sum, or none ([N] fields, 0 in ignored rows).
        backend: auto (triton on CUDA, torch elsewhere), triton, torch (chunked, any device) or reference (whole logits).
    Returns: LossOutput in fp32 (fp64 for fp64); `loss` alone carries a gradient, for hidden and weight. It is made in the
        forward, three products in all; with reduction="none" in the backward: four, and nothing of weight's size is kept.
    Raises: ValueError with the value and the rule; RuntimeError at a second derivative, and at a second backward that
        would scale the same gradient twice.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    dtype = check_linear(hidden, weight)
    return topk_loss((hidden, weight), dtype, ids, log_probs, labels, log_norm, spec, backend, _rows, _path)


def topk_kl(
    logits: Tensor, ids: Tensor, log_probs: Tensor, *, labels: Tensor | None = None, kl_weight: float = 1.0,
    temperature: float = 1.0, log_norm: Tensor | None = None, tail: str = "ghost", divergence: str = "forward_kl",
    beta: float = 0.5, softcap: float | None = None, ignore_index: int = -100, reduction: str = "mean",
    backend: str = "auto", _rows: int | None = None,
) -> LossOutput:  # fmt: skip
    """`linear_topk_kl` on logits [N,V] (fp32, bf16, fp16 or fp64), which stay as they are; all else is as there.

    The Triton kernel marks the teacher's entries in the logits while it runs and puts them back bit for bit: no other CUDA
    stream may read them meanwhile.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    check_tensor("logits", logits, "[N,V]")
    return topk_loss((logits, None), logits.dtype, ids, log_probs, labels, log_norm, spec, backend, _rows)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, ignore_index: int = -100,
    reduction: str = "mean", backend: str = "auto", _rows: int | None = None, _path: int | None = None,
) -> LossOutput:  # fmt: skip
    """-log softmax(hidden @ weight^T)[label], nats, in fp32; kl and both masses of the result are 0.

    Args: hidden [N,D], weight [V,D], labels [N] (`ignore_index` rows count nowhere); the rest as in linear_topk_kl.
    Raises: ValueError with the value and the rule.
    """
    if labels is None:
        raise ValueError("labels=None: cross-entropy needs them")
    spec = Spec(kl_weight=0.0, softcap=softcap, ignore_index=ignore_index, reduction=reduction)
    dtype = check_linear(hidden, weight)
    ids = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    return topk_loss((hidden, weight), dtype, ids, ids.float(), labels, None, spec, backend, _rows, _path)


def linear_log_probs(
    hidden: Tensor, weight: Tensor, ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None,
    backend: str = "auto", _rows: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """log softmax(z/T) at the ids, z = hidden @ weight^T, without its [N,V] logits.

    Args: hidden [N,D], weight [V,D]; ids [N,K] integer, negative = empty slot (reads 0.0, sends no gradient; duplicates
        read alike and their gradients add); temperature T > 0; softcap c replaces z by c*tanh(z/c) first.
    Returns: log_probs [N,K] and lse [N] = logsumexp(z/T), nats, fp32 (fp64 for fp64), both differentiable.
    Raises: ValueError with the value and the rule.
    """
    dtype = check_linear(hidden, weight, softcap, temperature)
    ids = integers("ids", ids, "[N,K]", hidden)
    backend = check_backend(backend, dtype, hidden.device, ids.shape[1])
    if backend == "reference":
        check_ids(ids, len(weight))
        with computing(hidden):
            z = whole_logits(hidden, weight, dtype, softcap) / temperature  # [N,V]
            return torch.where(ids < 0, 0.0, z.log_softmax(1).gather(1, ids.long().clamp(min=0))), z.logsumexp(1)
    spec = Spec(temperature=temperature, tail="log_probs", softcap=softcap, reduction="none")
    arguments = (*spec, backend, dtype, _rows, None, needed(hidden, weight))
    out, *_ = fused_op(hidden, weight, ids, None, None, None, *arguments)
    return out[:, :-1], out[:, -1]
