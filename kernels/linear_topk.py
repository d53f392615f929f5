"""The teacher's side: its k likeliest tokens and exact normalisers, straight from hidden states.

N rows, D width, V vocabulary. log_norm(T) = logsumexp(z/T) - logsumexp(z)/T turns a stored log-probability at T=1 into
the exact one at T: log_prob/T - log_norm(T), tail included.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Spec, check_backend, check_linear, check_scalars, compute_dtype, refuse
from .tile import Head, scan


def reference(z: Tensor, k: int, temperatures: tuple[float, ...], softcap: float | None):
    """The plain form on whole logits z [N,V]."""
    z = z if softcap is None else softcap * (z / softcap).tanh()
    log_probs, ids = z.log_softmax(1).topk(k, dim=1)
    norms = [(z / T).logsumexp(1) - z.logsumexp(1) / T for T in temperatures]
    return ids.int(), log_probs, torch.stack(norms, dim=1) if norms else z[:, :0]


@torch.library.custom_op("nanodistill::topk", mutates_args=())
def topk_op(
    hidden: Tensor, weight: Tensor, k: int, temperatures: Sequence[float], softcap: float | None, backend: str,
    dtype: torch.dtype, rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """ids, log_probs [N,k], log_norm [N,len(temperatures)], chunk by chunk."""
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(hidden, weight, dtype=dtype, rows=rows, aligned=backend == "triton")
        ids = torch.empty(len(hidden), k, dtype=torch.int32, device=hidden.device)
        log_probs = torch.empty(len(hidden), k, dtype=head.dtype, device=hidden.device)
        log_norm = log_probs.new_empty(len(hidden), len(temperatures))
        for place in head.places():
            z = head.logits(place)
            top, places = z.topk(k, dim=1)
            top = top if softcap is None else softcap * (top / softcap).tanh()
            sums = scan(z, places[:, :0], None, {1.0, *temperatures}, Spec(softcap=softcap), False)
            ids[place], log_probs[place] = places.int(), top - sums.peak[:, None] - sums.lse[1.0][:, None]
            for column, T in enumerate(temperatures):
                log_norm[place, column] = sums.lse[T] - sums.lse[1.0] / T
    return ids, log_probs, log_norm


@topk_op.register_fake
def _(hidden, weight, k, temperatures, *rest):
    log_probs = hidden.new_empty(len(hidden), k, dtype=compute_dtype(rest[-2]))
    return log_probs.to(torch.int32), log_probs, log_probs.new_empty(len(hidden), len(temperatures))


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
    dtype = check_linear(hidden, weight)
    backend = check_backend(backend, dtype, hidden.device)
    for temperature in (*temperatures, 1.0):
        check_scalars(temperature, softcap)
    refuse(not isinstance(k, int) or not 1 <= k <= len(weight), f"k={k}: must be an integer in 1..V={len(weight)}")
    hidden, weight = hidden.detach(), weight.detach()
    if backend == "reference":
        with torch.autocast(hidden.device.type, enabled=False):
            wide = compute_dtype(dtype)
            z = F.linear(hidden.to(dtype).to(wide), weight.to(dtype).to(wide))
            return reference(z, k, temperatures, softcap)
    return topk_op(hidden, weight, k, [float(T) for T in temperatures], softcap, backend, dtype, _rows)
