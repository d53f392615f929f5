"""The primitive for losses of one's own: the student's log-probabilities of a few ids, straight from hidden states.

N rows, D width, V vocabulary, K ids a row. With l = log softmax(z/T) at the ids and lse = logsumexp(z/T):

    dz = 1/T * ((g_lse - sum_k g_k) * softmax(z/T) + scatter_add(g))

What g is, only the backward pass knows, so that the logits are made again there: four products in all.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import row_kernel
from .common import (
    Spec,
    check_backend,
    check_ids,
    check_integers,
    check_linear,
    check_scalars,
    compute_dtype,
    computing,
    refuse_second_derivative,
    widened,
)
from .tile import TINY, Head, Targets, scan


def reference(hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None):
    """The plain form on whole logits [N,V]."""
    z = F.linear(hidden, weight)
    z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
    return torch.where(ids < 0, 0.0, z.log_softmax(1).gather(1, ids.long().clamp(min=0))), z.logsumexp(1)


@torch.library.custom_op("nanodistill::log_probs", mutates_args=())
def log_probs_op(
    hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None, backend: str,
    dtype: torch.dtype, rows: int | None, need: Sequence[bool],
) -> Tensor:  # fmt: skip
    """[N,K+1]: l at the ids, then lse."""
    check_ids(ids, len(weight))
    with computing(hidden):
        spec, options = Spec(temperature=temperature, softcap=softcap), {"dtype": dtype, "rows": rows}
        head = Head(hidden, weight, **options, aligned=backend == "triton")
        out = torch.empty(len(ids), ids.shape[1] + 1, dtype=head.dtype, device=ids.device)
        for place in head.places():
            if backend == "triton":
                targets = Targets(ids[place], out, None, None, out)
                row_kernel.launch(head.logits(place), out[place], targets, spec, "log_probs")
            else:
                _, zs, sums = scanned(head, place, ids, spec)
                out[place, :-1] = (zs - sums.peak[:, None]) / temperature - sums.lse[temperature][:, None]
                out[place, -1] = sums.peak / temperature + sums.lse[temperature]
        if backend != "triton":
            out[:, :-1].masked_fill_(ids < 0, 0.0)
    return out


@torch.library.custom_op("nanodistill::log_probs_grad", mutates_args=())
def grad_op(
    g: Tensor, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: float, softcap: float | None, backend: str,
    dtype: torch.dtype, rows: int | None, need: Sequence[bool],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """g [N,K+1], slopes of l and lse -> d_hidden, d_weight, empty where not needed."""
    with computing(hidden):
        spec, options = Spec(temperature=temperature, softcap=softcap), {"dtype": dtype, "rows": rows}
        head = Head(hidden, weight, need, **options, aligned=backend == "triton")
        g = g.to(head.dtype).contiguous()
        for place in head.places():
            if backend == "triton":
                z = head.logits(place)
                grads, factor = row_kernel.narrowed(z, dtype), None
                row_kernel.launch(z, g, Targets(ids[place], g[place], None, None, g), spec, "given", grads)
            else:
                grads, factor = torch_grads(*scanned(head, place, ids, spec), ids[place].long(), g[place], temperature)
            head.sink(place, grads, factor)
    return tuple(
        g.new_empty(0) if part is None else part.to(own.dtype)
        for part, own in zip(head.gradients, (hidden, weight), strict=True)
    )


def scanned(head: Head, place: slice, ids: Tensor, spec: Spec):
    """A chunk's E (see tile.py; S is empty here), its logits at the ids, and its sums."""
    z, part = head.logits(place), ids[place].long().clamp(min=0)
    zs = z.gather(1, part)
    zs = zs if spec.softcap is None else spec.softcap * (zs / spec.softcap).tanh()
    return z, zs, scan(z, part[:, :0], None, {spec.temperature}, spec, head.wanted)


def torch_grads(z: Tensor, _, sums, ids: Tensor, g: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """A chunk's E -> the gradient of its logits but for a row factor, and that factor [c,1]."""
    g, g_lse = g[:, :-1].masked_fill(ids < 0, 0.0), g[:, -1]
    f = (g_lse - g.sum(1)) / temperature  # times E, here the softmax itself
    f = torch.where(f.abs() < TINY, TINY, f)[:, None]
    places, values = ids.clamp(min=0), g / temperature / f
    if sums.cap_slope is not None:
        z.mul_(sums.cap_slope)
        values = values * sums.cap_slope.gather(1, places)
    return z.scatter_add_(1, places, values), f


@log_probs_op.register_fake
def _(hidden, weight, ids, *rest):
    return hidden.new_empty(len(ids), ids.shape[1] + 1, dtype=compute_dtype(rest[-3]))


@grad_op.register_fake
def _(g, hidden, weight, ids, *rest):
    return tuple(part.new_empty(part.shape if want else (0,)) for part, want in zip((hidden, weight), rest[-1], strict=True))


def keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.rest = inputs[3:]


def backward(ctx, g):
    refuse_second_derivative()
    made = grad_op(g, *ctx.saved_tensors, *ctx.rest)
    return *(part if want else None for part, want in zip(made, ctx.rest[-1], strict=True)), *[None] * 7


log_probs_op.register_autograd(backward, setup_context=keep_for_backward)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
    _rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(z/T) at the ids, z = hidden @ weight^T, without its [N,V] logits.

    Args: hidden [N,D], weight [V,D]; ids [N,K] integer, negative = empty slot (reads 0.0, sends no gradient; duplicates
        read alike and their gradients add); temperature T > 0; softcap c replaces z by c*tanh(z/c) first.
    Returns: log_probs [N,K] and lse [N] = logsumexp(z/T), nats, fp32 (fp64 for fp64), both differentiable.
    Raises: ValueError with the value and the rule.
    """
    check_scalars(temperature, softcap)
    dtype = check_linear(hidden, weight)
    check_integers("ids", ids, 2, hidden)
    backend, ids = check_backend(backend, dtype, hidden.device, ids.shape[1]), widened(ids)
    if backend == "reference":
        check_ids(ids, len(weight))
        with computing(hidden):
            wide = compute_dtype(dtype)
            return reference(hidden.to(dtype).to(wide), weight.to(dtype).to(wide), ids, temperature, softcap)
    need = [torch.is_grad_enabled() and part.requires_grad for part in (hidden, weight)]
    out = log_probs_op(hidden, weight, ids, float(temperature), softcap, backend, dtype, _rows, need)
    return out[:, :-1], out[:, -1]
