"""The primitive for losses of one's own: the student's log-probabilities of a few ids, straight from hidden states.

N rows, D width, V vocabulary, K ids a row. With l = log softmax(z/T) at the ids and lse = logsumexp(z/T):

    dz = 1/T * ((g_lse - sum_k g_k) * softmax(z/T) + scatter_add(g))
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .common import Spec, check_backend, check_ids, check_linear, check_scalars, compute_dtype
from .tile import TINY, Head, scaled, scan


class LinearLogProbs(torch.autograd.Function):
    """Logits are made again in the backward pass: what arrives there is not known in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, spec: Spec, options: dict, need: tuple):
        ctx.save_for_backward(hidden, weight, ids)
        ctx.state = spec, options, need
        log_probs = torch.empty(ids.shape, dtype=compute_dtype(options["dtype"]), device=ids.device)
        lse, T = torch.empty_like(log_probs[:, :1]).squeeze(1), spec.temperature
        for place, _, zs, sums in LinearLogProbs.tiles(Head(hidden, weight, **options), ids, spec):
            log_probs[place] = (zs - sums.peak[:, None]) / T - sums.lse[T][:, None]
            lse[place] = sums.peak / T + sums.lse[T]
        return log_probs.masked_fill_(ids < 0, 0.0), lse

    @staticmethod
    def tiles(head: Head, ids: Tensor, spec: Spec):
        """Each chunk's place, its E (see tile.py; S is empty here), its logits at the ids, and its sums."""
        for start in range(0, len(ids), head.rows):
            place = slice(start, start + head.rows)
            z, part = head.logits(place), ids[place].clamp(min=0)
            zs = z.gather(1, part)
            zs = zs if spec.softcap is None else spec.softcap * (zs / spec.softcap).tanh()
            yield place, z, zs, scan(z, part[:, :0], None, {spec.temperature}, spec, head.wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_log_probs, g_lse):
        hidden, weight, ids = ctx.saved_tensors
        spec, options, need = ctx.state
        T, head = spec.temperature, Head(hidden, weight, need, **options)
        g = g_log_probs.masked_fill(ids < 0, 0.0)
        for place, z, _, sums in LinearLogProbs.tiles(head, ids, spec):
            f = (g_lse[place] - g[place].sum(1)) / T  # times E, here the softmax itself
            f = torch.where(f.abs() < TINY, TINY, f)[:, None]
            places, values = ids[place].clamp(min=0), g[place] / T / f
            if sums.cap_slope is not None:
                z.mul_(sums.cap_slope)
                values = values * sums.cap_slope.gather(1, places)
            head.sink(place, z.scatter_add_(1, places, values), f)
        pairs = zip(head.gradients, (hidden.dtype, weight.dtype), strict=True)
        return *(scaled(part, g.new_ones(()), own) for part, own in pairs), None, None, None, None


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

    Args: hidden [N,D], weight [V,D]; ids [N,K] integer, negative = empty slot (reads 0.0, sends no gradient; duplicates
        read alike and their gradients add); temperature T > 0; softcap c replaces z by c*tanh(z/c) first.
    Returns: log_probs [N,K] and lse [N] = logsumexp(z/T), nats, fp32 (fp64 for fp64), both differentiable.
    Raises: ValueError with the value and the rule.
    """
    backend = check_backend(backend)
    check_scalars(temperature, softcap)
    dtype = check_linear(hidden, weight)
    ids = check_ids(ids, len(hidden), len(weight), hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            wide = compute_dtype(dtype)
            z = F.linear(hidden.to(dtype).to(wide), weight.to(dtype).to(wide))
            z = (z if softcap is None else softcap * (z / softcap).tanh()) / temperature
            log_probs = z.log_softmax(1).gather(1, ids.clamp(min=0))
            return torch.where(ids < 0, 0.0, log_probs), z.logsumexp(1)
        spec = Spec(temperature=float(temperature), softcap=softcap)
        need = tuple(torch.is_grad_enabled() and part.requires_grad for part in (hidden, weight))
        options = {"dtype": dtype, "rows": _rows, "softcap": softcap is not None}
        return LinearLogProbs.apply(hidden, weight, ids, spec, options, need)
