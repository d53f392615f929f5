"""Cross-entropy of labels from hidden states: linear_topk_kl without a teacher's entries."""

from torch import Tensor

from .common import LossOutput, refuse
from .linear_topk_kl import linear_topk_kl


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
) -> LossOutput:
    """-log softmax(hidden @ weight^T)[label], nats, in fp32; kl and both masses of the result are 0.

    Args: hidden [N,D], weight [V,D], labels [N] (`ignore_index` rows count nowhere); the rest as in linear_topk_kl.
    Raises: ValueError with the value and the rule.
    """
    refuse(labels is None, "labels=None: cross-entropy needs them")
    ids = labels.new_empty((hidden.shape[0], 0)).long()
    options = {"softcap": softcap, "ignore_index": ignore_index, "reduction": reduction, "backend": backend, "_rows": _rows}
    return linear_topk_kl(hidden, weight, ids, hidden.new_empty(ids.shape), labels=labels, kl_weight=0.0, **options)
