"""The teacher's side: its k likeliest tokens and exact normalisers, straight from hidden states.

N rows, D width, V vocabulary. log_norm(T) = logsumexp(z/T) - logsumexp(z)/T turns a stored log-probability at T=1 into
the exact one at T: log_prob/T - log_norm(T), tail included.
"""

import torch
from torch import Tensor

from .chunked import scan
from .common import Spec, check_backend, check_linear, check_scalars, refuse
from .linear import Head


@torch.compiler.disable
@torch.no_grad()
def linear_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    temperatures: tuple[float, ...] = (1.0,),
    softcap: float | None = None,
    backend: str = "auto",
    _rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Top-k of softmax(hidden @ weight^T) with exact log-probabilities, without its [N,V] logits; no gradient.

    Args: hidden [N,D], weight [V,D]; k in 1..V; temperatures: those whose normaliser is wanted, each above 0.
    Returns: ids [N,k] int32, by descending probability (ties in any order), log_probs [N,k] nats at T=1, and
        log_norm [N,len(temperatures)], both fp32 (fp64 for fp64).
    Raises: ValueError with the value and the rule.
    """
    backend = check_backend(backend)
    dtype = check_linear(hidden, weight, backend)
    for temperature in (*temperatures, 1.0):
        check_scalars(temperature, softcap)
    refuse(not 1 <= k <= len(weight), f"k={k}: must be in 1..V={len(weight)}")
    with torch.autocast(hidden.device.type, enabled=False):
        N = len(hidden)
        wanted = {1.0, *map(float, temperatures)}
        rows = max(1, N) if backend == "reference" else _rows  # the reference makes all logits at once
        head = Head(hidden.to(dtype), weight.to(dtype), (False, False), rows, softcap is not None)
        spec, ids = Spec(softcap=softcap), torch.empty(N, k, dtype=torch.int32, device=hidden.device)
        log_probs, log_norm = head.empty(N, k), head.empty(N, len(temperatures))
        for start in range(0, N, head.rows):
            place = slice(start, start + head.rows)
            z = head.logits(place)
            top = z.topk(k, dim=1)
            values = top.values if softcap is None else softcap * (top.values / softcap).tanh()
            sums = scan(z, top.indices[:, :0], None, wanted, spec)
            ids[place] = top.indices.int()
            log_probs[place] = values - sums.peak[:, None] - sums.lse[1.0][:, None]
            norms = [sums.lse[float(T)] - sums.lse[1.0] / T for T in temperatures]
            log_norm[place] = torch.stack(norms, dim=1) if norms else log_norm[place]
        return ids, log_probs, log_norm
