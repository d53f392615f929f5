"""Distillation losses from sparse targets, from hidden states to gradients without [N,V] logits.

from kernels import linear_topk_kl              # in the checkout
from nanodistill.kernels import linear_topk_kl  # installed

docs/kernels.md is the way in.
"""

from .checks import LossOutput
from .log_probs import linear_log_probs
from .losses import linear_cross_entropy, linear_full_kl, linear_topk_kl, topk_kl
from .sample import linear_sample
from .topk import linear_topk

__all__ = [
    "LossOutput",
    "linear_cross_entropy",
    "linear_full_kl",
    "linear_log_probs",
    "linear_sample",
    "linear_topk",
    "linear_topk_kl",
    "topk_kl",
]
