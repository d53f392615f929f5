"""Distillation losses from hidden states to gradients, without the [N,V] logits.

N rows (positions), D width, V vocabulary, K teacher entries a row, z = hidden @ weight^T, T =
temperature.

    loss = (1 - kl_weight) * CE(label; softmax(z)) + kl_weight * T^2 * divergence(t, softmax(z/T))

over the teacher's K tokens and, with tail="ghost", one more outcome for all the rest: exact for
these K+1 outcomes, a lower bound of the full KL. With l = log softmax(z/T) any such loss has the
logit gradient

    dz = 1/T * (scatter_add(g) - sum(g) * softmax(z/T)),    g = df/dl

so that a divergence is a few lines on [N,K]. The gradient is made in the forward pass, chunk by
chunk: three matrix products in all. What a row's loss is multiplied by, with reduction="none", and
what g is, in `linear_log_probs`, only the backward pass knows: there the logits are made again,
four products in all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, torch_loss, triton_dense, triton_loss
from .backends import choose_backend, computing, wide_dtype
from .checks import (
    LossOutput,
    LossSpec,
    as_indices,
    check_ids,
    check_labels,
    check_linear,
    check_spec,
    check_tensor,
)
from .chunks import Head, for_each_chunk
from .torch_loss import DenseTargets, Targets


class LossInputs(NamedTuple):
    """What the custom op is given. The teacher is sparse, dense, or a head."""

    source: Tensor  # hidden states [N,D], or logits [N,V] where weight is None
    weight: Tensor | None = None  # [V,D]
    ids: Tensor | None = None  # sparse: [N,K]
    log_probs: Tensor | None = None  # sparse: [N,K] at T, times T; dense: [N,V] at T=1
    log_norm: Tensor | None = None  # dense: [N]
    teacher_hidden: Tensor | None = None  # a head: [N,Dt]
    teacher_weight: Tensor | None = None  # [Vt,Dt]
    labels: Tensor | None = None  # [N]
    upstream: Tensor | None = None  # [N] the gradient of each row's loss, with reduction="none"
    spec: LossSpec = LossSpec()
    backend: str = "torch"
    dtype: torch.dtype = torch.float32  # that enters the products
    needs: Sequence[bool] = ()  # gradients of source and weight

    @classmethod
    def of_arguments(cls, arguments: Sequence) -> "LossInputs":
        """From the op's arguments, in which the spec's fields stand one by one."""
        end = NUM_TENSORS + len(LossSpec._fields)
        spec = LossSpec(*arguments[NUM_TENSORS:end])
        return cls(*arguments[:NUM_TENSORS], spec, *arguments[end:])

    @property
    def arguments(self) -> tuple:
        return *self[:NUM_TENSORS], *self.spec, *self[NUM_TENSORS + 1 :]

    @property
    def made_now(self) -> tuple[bool, bool]:
        """The gradients that this call makes: none of rows whose upstream is not known."""
        if self.spec.reduction == "none" and self.upstream is None:
            return False, False
        return tuple(self.needs)


NUM_TENSORS = LossInputs._fields.index("spec")
SCHEMA = """(
    Tensor source, Tensor? weight, Tensor? ids, Tensor? log_probs, Tensor? log_norm,
    Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? labels, Tensor? upstream,
    float kl_weight, float temperature, str tail, str divergence, float beta,
    float? softcap, float? teacher_softcap, int ignore_index, str reduction,
    str backend, ScalarType dtype, bool[] needs
) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


def row_shares(inputs: LossInputs) -> tuple[Tensor | None, Tensor]:
    """Which rows count [N] (None = all), and each one's share of the loss [N]."""
    N, V = len(inputs.source), vocabulary(inputs)
    if inputs.ids is not None:
        check_ids(inputs.ids, V)
    kept = None
    if inputs.labels is not None:
        check_labels(inputs.labels, V, inputs.spec.ignore_index)
        kept = inputs.labels != inputs.spec.ignore_index
    shares = inputs.source.new_ones(N, dtype=wide_dtype(inputs.dtype))
    if kept is not None:
        shares = kept.to(shares.dtype)
    if inputs.spec.reduction == "mean":
        shares = shares / shares.sum().clamp(min=1)
    return kept, shares


def vocabulary(inputs: LossInputs) -> int:
    return inputs.source.shape[1] if inputs.weight is None else len(inputs.weight)


def fp16_factor(bounds: Tensor) -> Tensor:
    """What numbers of these bounds [N] are divided by [], to be large and still fit fp16.

    A power of two, or they would be rounded twice. No tensor is made of a Python number: on CUDA
    that is a copy that waits for the device.
    """
    largest = F.pad(bounds.abs(), (0, 1), value=1e-26).max()
    return torch.exp2(largest.log2().ceil() - 15)


def gradient_weights(inputs: LossInputs, shares: Tensor) -> tuple[Tensor, Tensor]:
    """What each row's gradient is multiplied by [N], divided by one factor [] (1 except in fp16).

    In fp16 1/N of a small probability would vanish. So gradients are kept as large as they fit (an
    entry is at most 62 T, by reverse_kl), and the backward pass multiplies by the factor.
    """
    weights = shares
    if inputs.upstream is not None:
        upstream = inputs.upstream.to(shares.dtype)
        weights = torch.where(shares > 0, upstream, 0.0)
    if inputs.dtype != torch.float16:
        return weights, shares.new_ones(())
    factor = fp16_factor(weights * 62 * max(1, inputs.spec.temperature))
    return weights / factor, factor


def run_rows(
    inputs: LossInputs,
    z: Tensor,
    targets: Targets | DenseTargets,
    fields: Tensor,
    grad: Tensor | None,
    keep_logits: bool = False,
) -> None:
    """Fills fields [C,5] and grad [C,V] of logits z [C,V], by the backend that was chosen."""
    if inputs.backend == "torch":
        torch_loss.row_losses(z, targets, inputs.spec, fields, grad, keep_logits)
    elif isinstance(targets, Targets):
        triton_loss.sparse_losses(z, targets, inputs.spec, fields, grad, keep_logits)
    else:
        triton_dense.dense_losses(z, targets, inputs.spec, fields, grad)


def losses_of_logits(
    inputs: LossInputs,
    targets: Targets | DenseTargets,
    fields: Tensor,
) -> Tensor | None:
    """Fills fields [N,5]; returns the gradient [N,V] of logits that stay as they are."""
    z = inputs.source
    keep_logits = True
    if inputs.backend == "triton":
        z = z.contiguous()
        keep_logits = z.data_ptr() == inputs.source.data_ptr()
    grad = None
    if inputs.made_now[0]:
        grad = torch.empty_like(z, memory_format=torch.contiguous_format)
    run_rows(inputs, z, targets, fields, grad, keep_logits)
    return grad


def losses_of_head(
    inputs: LossInputs,
    targets: Targets | DenseTargets,
    fields: Tensor,
    kept: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills fields [N,5]; returns the gradients [N,D] and [V,D]."""
    teacher_hidden, teacher_weight = inputs.teacher_hidden, inputs.teacher_weight
    head = Head(
        inputs.source,
        inputs.weight,
        inputs.dtype,
        row_mask=kept,
        needs=inputs.made_now,
        width_beside=0 if teacher_weight is None else len(teacher_weight),
    )
    teacher = None
    if teacher_weight is not None:
        teacher = Head(
            teacher_hidden,
            teacher_weight,
            teacher_hidden.dtype,
            row_mask=kept,
            rows=head.rows,
            name="teacher",
        )

    def row_losses(z: Tensor, rows: slice) -> Tensor | None:
        part = targets.select(rows)
        if teacher is not None:
            part = part._replace(scores=teacher.logits(rows), overwrite=True)
        grad = None
        if head.needs_grad:
            grad = triton_loss.narrowed(z, inputs.dtype) if inputs.backend == "triton" else z
        run_rows(inputs, z, part, fields[rows], grad)
        return grad

    for_each_chunk(head, row_losses)
    return head.d_hidden, head.d_weight


def reduced(fields: Tensor, shares: Tensor, reduction: str) -> Tensor:
    """[N,5] fields to [5], or [5,N] with reduction="none", where ignored rows read 0."""
    fields = torch.where(shares[:, None] > 0, fields * shares[:, None], 0.0)
    if reduction == "none":
        return fields.t().contiguous()
    return fields.sum(0)


def fused_loss(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LossInputs -> loss, the other fields [4(,N)], d_source, d_weight and their factor [].

    Gradients are empty where not needed. They are those of the scalar loss, or of sum(upstream *
    loss).
    """
    inputs = LossInputs.of_arguments(arguments)
    with computing(inputs.source):
        kept, shares = row_shares(inputs)
        weights, factor = gradient_weights(inputs, shares)
        if inputs.ids is not None:
            targets = Targets(inputs.ids, inputs.log_probs, inputs.labels, weights)
        else:
            targets = DenseTargets(inputs.log_probs, inputs.log_norm, inputs.labels, weights)
        fields = shares.new_empty(len(shares), len(LossOutput._fields))
        if inputs.weight is None:
            gradients = losses_of_logits(inputs, targets, fields), None
        else:
            gradients = losses_of_head(inputs, targets, fields, kept)
        fields = reduced(fields, shares, inputs.spec.reduction)
        made = fields[0].clone(), fields[1:].clone(), *gradients, factor
    return tuple(shares.new_empty(0) if part is None else part for part in made)


def fake_loss(*arguments):
    """The shapes and dtypes of `fused_loss`."""
    inputs = LossInputs.of_arguments(arguments)
    wide = wide_dtype(inputs.dtype)
    shape = (len(inputs.source),) if inputs.spec.reduction == "none" else ()
    loss = inputs.source.new_empty(shape, dtype=wide)
    fields = loss.new_empty(4, *shape)
    d_source = loss.new_empty(0)
    d_weight = loss.new_empty(0)
    if inputs.made_now[0]:
        dtype = inputs.source.dtype if inputs.weight is None else wide
        d_source = inputs.source.new_empty(inputs.source.shape, dtype=dtype)
    if inputs.made_now[1]:
        d_weight = loss.new_empty(inputs.weight.shape)
    return loss, fields, d_source, d_weight, loss.new_empty(())


fused_loss_op = torch.library.custom_op(
    "nanodistill::loss",
    fused_loss,
    mutates_args=(),
    schema=SCHEMA,
)
fused_loss_op.register_fake(fake_loss)


def keep_for_backward(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # or each backward would make zeros of d_weight's size
    ctx.num_inputs = len(inputs)
    ctx.dtypes = [None if part is None else part.dtype for part in inputs[:2]]
    ctx.options = inputs[NUM_TENSORS:]
    named = LossInputs.of_arguments(inputs)
    ctx.of_rows = named.spec.reduction == "none"
    ctx.needs = named.needs
    ctx.save_for_backward(*(inputs[:NUM_TENSORS] if ctx.of_rows else output[2:]))


def backward_of_loss(ctx, d_loss, *_):
    """Scales the gradient that the forward made; makes it here where the loss is of rows."""
    refuse_second_derivative()
    if d_loss is None:
        return (None,) * ctx.num_inputs
    if ctx.of_rows:
        *tensors, _ = ctx.saved_tensors
        _, _, *gradients, scale = fused_loss_op(*tensors, d_loss, *ctx.options)
    else:
        *gradients, factor = ctx.saved_tensors
        scale = factor * d_loss
    scaled = [
        scale_gradient(gradient, scale, dtype) if need else None
        for gradient, dtype, need in zip(gradients, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *scaled, *[None] * (ctx.num_inputs - 2)


fused_loss_op.register_autograd(backward_of_loss, setup_context=keep_for_backward)


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():  # create_graph=True would go through as through a constant
        rule = "the kernels' losses have no second derivative"
        raise RuntimeError(f"{rule}: create_graph=True cannot pass through them")


def scale_gradient(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * scale [] in `dtype`, rounded once.

    In place where the dtype allows it: a second backward finds that out, and raises.
    """
    traced = type(gradient) is not Tensor  # by a compiler: no values, and it sees to the memory
    if traced:
        return (gradient.to(scale.dtype) * scale).to(dtype)
    if scale.device.type == "cpu" and scale.item() == 1:
        return gradient.to(dtype)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, scale[None], out=out)


def needed(*inputs: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and part is not None and part.requires_grad for part in inputs]


def call_loss(inputs: LossInputs) -> LossOutput:
    """The losses behind their checked inputs."""
    inputs = inputs._replace(needs=needed(inputs.source, inputs.weight))
    if inputs.backend == "reference":
        return reference_loss(inputs)
    loss, fields, *_ = fused_loss_op(*inputs.arguments)
    return LossOutput(loss, *fields)


def reference_loss(inputs: LossInputs) -> LossOutput:
    """The same by whole logits and autograd."""
    with computing(inputs.source):
        _, shares = row_shares(inputs)
        ids, log_probs = inputs.ids, inputs.log_probs
        if ids is None:
            ids, log_probs = reference.all_tokens(inputs)
        targets = Targets(ids, log_probs, inputs.labels, shares)
        fields = reference.losses(
            inputs.source,
            inputs.weight,
            targets,
            inputs.spec,
            inputs.dtype,
        )
        loss, *rest = reduced(fields, shares, inputs.spec.reduction)
        return LossOutput(loss, *(part.detach() for part in rest))


def topk_loss(
    source: Tensor,
    weight: Tensor | None,
    dtype: torch.dtype,
    ids: Tensor | None,
    log_probs: Tensor,
    log_norm: Tensor | None,
    labels: Tensor | None,
    spec: LossSpec,
    backend: str,
) -> LossOutput:
    """Checks the targets of `linear_topk_kl` and `topk_kl`, and calls the loss."""
    check_spec(spec, labels)
    wide = wide_dtype(dtype)
    if labels is not None:
        labels = as_indices("labels", labels, "[N]", source)
    check_tensor("log_probs", log_probs, "[N,K]" if ids is not None else "[N,V]", like=source)
    log_probs = log_probs.detach().contiguous()
    if log_norm is not None:
        check_tensor("log_norm", log_norm, "[N]", like=source)
        log_norm = log_norm.detach().to(wide).contiguous()
    if ids is None:
        V = source.shape[1] if weight is None else len(weight)
        if log_probs.shape[1] != V:
            shape = tuple(log_probs.shape)
            raise ValueError(
                f"log_probs has shape {shape}: without ids it must be [N,V] with V={V}"
            )
        if log_norm is None and spec.temperature == 1:  # else they are normalised as logits are
            log_norm = torch.zeros(len(source), dtype=wide, device=source.device)
        targets = {"log_probs": log_probs, "log_norm": log_norm}
        backend = choose_backend(backend, dtype, source.device)
    else:
        if spec.temperature != 1 and log_norm is None and not spec.renormalizes:
            rule = "the teacher's normaliser there (linear_topk's temperatures)"
            unless = "unless tail is renormalize or renormalize_both"
            raise ValueError(f"temperature={spec.temperature}: needs log_norm, {rule}, {unless}")
        ids = as_indices("ids", ids, "[N,K]", source)
        if log_probs.shape != ids.shape:
            shapes = f"log_probs has shape {tuple(log_probs.shape)}, ids {tuple(ids.shape)}"
            raise ValueError(f"{shapes}: both must be [N,K]")
        if log_norm is not None:  # log_probs / T are the teacher's at T then
            log_probs = log_probs.to(wide) - spec.temperature * log_norm[:, None]
        targets = {"ids": ids, "log_probs": log_probs}
        backend = choose_backend(backend, dtype, source.device, ids.shape[1])
    options = {"spec": spec, "backend": backend, "dtype": dtype}
    return call_loss(LossInputs(source, weight, labels=labels, **targets, **options))


def linear_topk_kl(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor | None,
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
) -> LossOutput:
    """Distillation loss from a teacher's K entries a row, with the label's cross-entropy mixed in.

    Args:
        hidden: [N,D] and weight [V,D], fp32, bf16 or fp16 (fp64 too), of one dtype unless under
            autocast.
        ids: [N,K] integer token ids; a negative one is an empty slot, equal ids in a row add their
            probabilities. None: log_probs [N,V] is the whole distribution in the vocabulary's
            order (S = V, no tail; nothing is sorted; log_norm is worked out where not given).
        log_probs: [N,K] the teacher's, nats, at T=1; -inf is allowed.
        labels: [N]; rows of `ignore_index` count nowhere, in no field and no gradient.
        kl_weight: share of the divergence in 0..1; below 1 labels are needed.
        temperature: T > 0 of both sides of the divergence; the cross-entropy is always at T=1.
        log_norm: [N] logsumexp(z/T) - logsumexp(z)/T of the teacher; needed at T != 1, but where a
            renormalize cancels it.
        tail: ghost, truncate, renormalize, renormalize_both or smooth; all but ghost take
            forward_kl only.
        divergence: forward_kl, reverse_kl, jsd, skew_kl or tv.
        beta: the teacher's share in the mixture of jsd and skew_kl.
        softcap: c replaces z by c*tanh(z/c) first.
        reduction: mean over the kept rows, sum, or none ([N] fields, 0 in ignored rows).
        backend: auto (triton on CUDA, torch elsewhere), triton, torch (chunked, any device) or
            reference (whole logits).
    Returns: LossOutput in fp32 (fp64 for fp64); `loss` alone carries a gradient, for hidden and
        weight. It is made in the forward, three products in all; with reduction="none" in the
        backward: four, and nothing of weight's size is kept.
    Raises: ValueError with the value and the rule; RuntimeError at a second derivative, and at a
        second backward that would scale the same gradient twice.
    """
    spec = LossSpec(
        kl_weight, temperature, tail, divergence, beta, softcap, None, ignore_index, reduction
    )
    dtype = check_linear(hidden, weight)
    return topk_loss(hidden, weight, dtype, ids, log_probs, log_norm, labels, spec, backend)


def topk_kl(
    logits: Tensor,
    ids: Tensor | None,
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
) -> LossOutput:
    """`linear_topk_kl` on logits [N,V] (fp32, bf16, fp16 or fp64), which stay as they are.

    The Triton kernel masks the teacher's entries in the logits while it runs and puts them back bit
    for bit: no other CUDA stream may read them meanwhile.
    """
    spec = LossSpec(
        kl_weight, temperature, tail, divergence, beta, softcap, None, ignore_index, reduction
    )
    check_tensor("logits", logits, "[N,V]")
    return topk_loss(logits, None, logits.dtype, ids, log_probs, log_norm, labels, spec, backend)


def linear_full_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    labels: Tensor | None = None,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> LossOutput:
    """Full distillation from a teacher's hidden states and head; neither side's [N,V] logits exist.

    Args:
        hidden: [N,D] and weight [V,D], the student's.
        teacher_hidden: [N,Dt] and teacher_weight [Vt,Dt], Vt <= V, of any width and dtype; the
            student's further rows have teacher probability 0. No gradient goes to the teacher.
        teacher_softcap: the teacher's own softcap.
    Returns: LossOutput; both masses are 1. All else is as in `linear_topk_kl`.
    Raises: ValueError with the value and the rule.
    """
    spec = LossSpec(
        kl_weight,
        temperature,
        "ghost",
        divergence,
        beta,
        softcap,
        teacher_softcap,
        ignore_index,
        reduction,
    )
    dtype = check_linear(hidden, weight)
    teacher_dtype = check_linear(teacher_hidden, teacher_weight, "teacher_")
    check_tensor("teacher_hidden", teacher_hidden, "[N,D]", like=hidden)
    check_spec(spec, labels)
    if len(teacher_weight) > len(weight):
        rule = f"must be at most the student's V={len(weight)}"
        raise ValueError(f"teacher_weight has {len(teacher_weight)} rows: {rule}")
    if labels is not None:
        labels = as_indices("labels", labels, "[N]", hidden)
    widest = torch.promote_types(wide_dtype(dtype), teacher_dtype)
    backend = choose_backend(backend, widest, hidden.device)
    inputs = LossInputs(
        hidden,
        weight,
        teacher_hidden=teacher_hidden.detach().to(teacher_dtype),
        teacher_weight=teacher_weight.detach(),
        labels=labels,
        spec=spec,
        backend=backend,
        dtype=dtype,
    )
    return call_loss(inputs)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> LossOutput:
    """-log softmax(hidden @ weight^T)[label], nats, in fp32; kl and both masses are 0.

    Args: hidden [N,D], weight [V,D], labels [N] (`ignore_index` rows count nowhere); the rest as in
        linear_topk_kl.
    Raises: ValueError with the value and the rule.
    """
    if labels is None:
        raise ValueError("labels=None: cross-entropy needs them")
    no_ids = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    return linear_topk_kl(
        hidden,
        weight,
        no_ids,
        no_ids.float(),
        labels=labels,
        kl_weight=0.0,
        tail="truncate",  # nothing is asked of what is not in S: kl is 0
        softcap=softcap,
        ignore_index=ignore_index,
        reduction=reduction,
        backend=backend,
    )
