"""The top-k distillation loss on logits that exist already; linear_topk_kl.py has the maths and the code."""

from torch import Tensor

from .common import LossOutput, Spec, check_matrix
from .linear_topk_kl import topk_loss


def topk_kl(
    logits: Tensor,
    ids: Tensor,
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
    _rows: int | None = None,
) -> LossOutput:
    """`linear_topk_kl` on logits [N,V] (fp32, bf16, fp16 or fp64), which stay as they are; all else is as there.

    The Triton kernel marks the teacher's entries in the logits while it runs and puts them back bit for bit: no other CUDA
    stream may read them meanwhile.
    """
    spec = Spec(kl_weight, temperature, tail, divergence, beta, softcap, ignore_index, reduction)
    check_matrix("logits", logits)
    return topk_loss((logits, None), logits.dtype, ids, log_probs, labels, log_norm, spec, backend, _rows)
