"""The primitive for losses of one's own: the student's log-probabilities of a few ids, straight from hidden states.

N rows, D width, V vocabulary, K ids a row. With l = log softmax(z/T) at the ids and lse = logsumexp(z/T):

    dz = 1/T * ((g_lse - sum_k g_k) * softmax(z/T) + scatter_add(g))
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunked import TINY, scan
from .common import Spec, check_backend, check_ids, check_linear, check_scalars, compute_dtype
from .linear import Head, scaled


class LinearLogProbs(torch.autograd.Function):
    """Logits are made again in the backward pass: what arrives there is not known in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, spec: Spec, need, dtype, rows):
        ctx.save_for_backward(hidden, weight, ids)
        ctx.state = (spec, need, dtype, rows)
        head = Head(hidden.to(dtype), weight.to(dtype), (False, False), rows, spec.softcap is not None)
        log_probs, lse = head.empty(*ids.shape), head.empty(len(ids))
        T = spec.temperature
        for place, _, zs, sums in LinearLogProbs.tiles(head, ids, spec):
            log_probs[place] = (zs - sums.peak[:, None]) / T - sums.lse[T][:, None]
            lse[place] = sums.peak / T + sums.lse[T]
        return log_probs.masked_fill_(ids < 0, 0.0), lse

    @staticmethod
    def tiles(head: Head, ids: Tensor, spec: Spec):
        """Each chunk's place, its E (see chunked.py; S is empty here), its logits at the ids, and its sums."""
        for start in range(0, len(ids), head.rows):
            place = slice(start, start + head.rows)
            z, part = head.logits(place), ids[place].long().clamp(min=0)
            zs = z.gather(1, part)
            zs = zs if spec.softcap is None else spec.softcap * (zs / spec.softcap).tanh()
            yield place, z, zs, scan(z, part[:, :0], None, {spec.temperature}, spec)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_log_probs, g_lse):
        hidden, weight, ids = ctx.saved_tensors
        spec, need, dtype, rows = ctx.state
        T = spec.temperature
        head = Head(hidden.to(dtype), weight.to(dtype), need, rows, spec.softcap is not None)
        g = g_log_probs.masked_fill(ids < 0, 0.0)
        for place, z, _, sums in LinearLogProbs.tiles(head, ids, spec):
            f = (g_lse[place] - g[place].sum(1)) / T * (-sums.lse[T]).exp()
            f = torch.where(f.abs() < TINY, TINY, f)[:, None]
            places, values = ids[place].long().clamp(min=0), g[place] / T / f
            if sums.cap_slope is not None:
                z.mul_(sums.cap_slope)
                values = values * sums.cap_slope.gather(1, places)
            head.sink(place, z.scatter_add_(1, places, values), f)
        one = g.new_ones(())
        pairs = ((head.d_hidden, hidden.dtype), (head.d_weight, weight.dtype))
        return *(scaled(gradient, one, own) for gradient, own in pairs), None, None, None, None, None


@torch.compiler.disable
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

    Args: hidden [N,D], weight [V,D]; ids [N,K] integer, negative = empty slot (reads 0.0, sends no gradient);
        duplicates read alike.
    Returns: log_probs [N,K] and lse [N] = logsumexp(z/T), nats, fp32 (fp64 for fp64), differentiable in hidden and weight.
    Raises: ValueError with the value and the rule.
    """
    backend = check_backend(backend)
    check_scalars(temperature, softcap)
    dtype = check_linear(hidden, weight, backend)
    check_ids(ids, len(hidden), len(weight))
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            wide = compute_dtype(hidden)
            z = F.linear(hidden.to(dtype).to(wide), weight.to(dtype).to(wide))
            z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
            log_probs = z.log_softmax(1).gather(1, ids.long().clamp(min=0))
            return torch.where(ids < 0, 0.0, log_probs), z.logsumexp(1)
        spec = Spec(temperature=float(temperature), softcap=softcap)
        grads = torch.is_grad_enabled()
        need = (grads and hidden.requires_grad, grads and weight.requires_grad)
        return LinearLogProbs.apply(hidden, weight, ids, spec, need, dtype, _rows)
