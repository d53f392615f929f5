"""Cross-entropy of labels from hidden states: linear_topk_kl without a teacher's entries."""

import torch
from torch import Tensor

from .common import LossOutput, Spec, check_linear
from .linear_topk_kl import topk_loss


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
    _rows: int | None = None,
    _path: int | None = None,
) -> LossOutput:
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
