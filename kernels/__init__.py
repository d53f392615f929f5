"""Distillation losses from sparse targets, from hidden states to gradients without [N,V] logits.

from kernels import linear_topk_kl              # in the checkout
from nanodistill.kernels import linear_topk_kl  # installed
"""

from .common import LossOutput
from .linear_sample import linear_sample
from .linear_topk import linear_topk
from .linear_topk_kl import linear_cross_entropy, linear_log_probs, linear_topk_kl, topk_kl

__all__ = [
    "LossOutput",
    "linear_cross_entropy",
    "linear_log_probs",
    "linear_sample",
    "linear_topk",
    "linear_topk_kl",
    "topk_kl",
]
