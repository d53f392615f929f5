"""`linear_log_probs`: a student's log-probabilities at chosen tokens, for losses of one's own.

N rows, D width, V vocabulary, K ids a row, z = hidden @ weight^T, T temperature. With l = log
softmax(z/T) and lse = logsumexp(z/T), a loss f(l, lse) has the logit gradient

    dz = 1/T * ((df/dlse - sum(g)) * softmax(z/T) + scatter_add(g)),    g = df/dl

which only its backward pass knows, so that the logits are made again there: four products in all.
"""

import torch
from torch import Tensor

from . import torch_loss, triton_loss
from .backends import choose_backend, computing, wide_dtype
from .checks import as_indices, check_ids, check_linear, check_positive, check_softcap
from .chunks import Head, for_each_chunk
from .losses import fp16_factor, refuse_second_derivative
from .reference import whole_logits
from .torch_loss import LogProbsSpec


@torch.library.custom_op("nanodistill::log_probs", mutates_args=())
def log_probs_op(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    backend: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """log_probs [N,K] and lse [N], chunk by chunk."""
    spec = LogProbsSpec(temperature, softcap)
    module = triton_loss if backend == "triton" else torch_loss
    with computing(hidden):
        check_ids(ids, len(weight))
        head = Head(hidden, weight, dtype)
        log_probs = hidden.new_empty(ids.shape, dtype=head.wide)
        lse = hidden.new_empty(len(ids), dtype=head.wide)

        def fill(z: Tensor, rows: slice) -> None:
            module.log_probs_of(z, ids[rows], spec, log_probs[rows], lse[rows])

        for_each_chunk(head, fill)
    return log_probs, lse


@log_probs_op.register_fake
def fake_log_probs(hidden, weight, ids, temperature, softcap, backend, dtype):
    log_probs = hidden.new_empty(ids.shape, dtype=wide_dtype(dtype))
    return log_probs, log_probs.new_empty(len(ids))


@torch.library.custom_op("nanodistill::log_probs_backward", mutates_args=())
def log_probs_backward_op(
    d_log_probs: Tensor,
    d_lse: Tensor,
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float,
    softcap: float | None,
    backend: str,
    dtype: torch.dtype,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    """d_hidden [N,D] and d_weight [V,D], each empty where not needed."""
    spec = LogProbsSpec(temperature, softcap)
    with computing(hidden):
        head = Head(hidden, weight, dtype, needs=tuple(needs))
        d_log_probs = d_log_probs.masked_fill(ids < 0, 0.0).contiguous()
        d_lse = d_lse.contiguous()
        if dtype == torch.float16:  # small slopes would vanish: their size goes on the sums
            slopes = d_lse.abs() + d_log_probs.abs().sum(1)
            factor = fp16_factor(slopes / min(1, temperature))
            d_log_probs = d_log_probs / factor
            d_lse = d_lse / factor

        def gradient(z: Tensor, rows: slice) -> Tensor:
            slopes = d_log_probs[rows], d_lse[rows]
            if backend == "torch":
                return torch_loss.log_probs_gradient(z, ids[rows], spec, *slopes)
            grad = triton_loss.narrowed(z, dtype)
            triton_loss.log_probs_gradient(z, ids[rows], spec, *slopes, grad)
            return grad

        for_each_chunk(head, gradient)
        gradients = [head.d_hidden, head.d_weight]
        for place, leaf in enumerate((hidden, weight)):
            if gradients[place] is None:
                gradients[place] = leaf.new_empty(0)
            elif dtype == torch.float16:
                gradients[place] = (gradients[place] * factor).to(leaf.dtype)
            else:
                gradients[place] = gradients[place].to(leaf.dtype)
    return tuple(gradients)


@log_probs_backward_op.register_fake
def fake_log_probs_backward(d_log_probs, d_lse, hidden, weight, *options):
    *_, needs = options
    leaves = (hidden, weight)
    return tuple(
        leaf.new_empty(leaf.shape if need else 0) for leaf, need in zip(leaves, needs, strict=True)
    )


def keep_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def backward_of_log_probs(ctx, d_log_probs, d_lse):
    refuse_second_derivative()
    tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    gradients = log_probs_backward_op(d_log_probs, d_lse, *tensors, *ctx.options, needs)
    kept = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    return *kept, *[None] * (1 + len(ctx.options))


log_probs_op.register_autograd(backward_of_log_probs, setup_context=keep_for_backward)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """log softmax(z/T) at the ids, z = hidden @ weight^T, without its [N,V] logits.

    Args: hidden [N,D], weight [V,D]; ids [N,K] integer, negative = empty slot (reads 0.0, sends no
        gradient; duplicates read alike and their gradients add); temperature T > 0; softcap c
        replaces z by c*tanh(z/c) first.
    Returns: log_probs [N,K] and lse [N] = logsumexp(z/T), nats, fp32 (fp64 for fp64), both
        differentiable.
    Raises: ValueError with the value and the rule; RuntimeError at a second derivative.
    """
    dtype = check_linear(hidden, weight)
    check_softcap(softcap)
    check_positive("temperature", temperature)
    ids = as_indices("ids", ids, "[N,K]", hidden)
    backend = choose_backend(backend, dtype, hidden.device, ids.shape[1])
    if backend != "reference":
        return log_probs_op(hidden, weight, ids, temperature, softcap, backend, dtype)
    check_ids(ids, len(weight))
    with computing(hidden):
        log_p = whole_logits(hidden, weight, dtype, softcap) / temperature  # [N,V]
        lse = log_p.logsumexp(1)
        chosen = log_p.log_softmax(1).gather(1, ids.long().clamp(min=0))
        return chosen.masked_fill(ids < 0, 0.0), lse
