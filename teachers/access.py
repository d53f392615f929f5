"""Stub until the branch `access` lands."""

from dataclasses import dataclass

import torch

from engine import check_choice, check_range, check_ranges
from model.loss import SparseTargets
from teachers.rows import ACCESS_KINDS, TeacherOutput, to_sparse_targets


@dataclass
class AccessConfig:
    """What the teacher reveals at each position."""

    kind: str = "topk"  # greedy | text | sampled | topk | unbiased | stratified | residual_to_label | full (teachers/rows.py)
    k: int = 32  # its likeliest tokens, with their log-probabilities
    n: int = 12  # its draws (sampled, stratified; text and unbiased have one)
    seed: int = 0  # of the draws, which this and the position determine
    fresh: bool = False  # draw anew each time a position is read (online alone)

    def __post_init__(self):
        check_choice("access", self.kind, tuple(ACCESS_KINDS))
        check_ranges(self, "k n", "access.", low=1)
        check_range("access.seed", self.seed, low=0)


def loss_targets(
    kind: str, output: TeacherOutput, labels: torch.Tensor, column: int = 0
) -> SparseTargets:
    """What the loss reads at N positions: labels [N]; `column` is the temperature's in log_norm."""
    ids, log_weights = to_sparse_targets(kind, output.ids, output.log_probs, output.draws, labels)
    log_norm = None
    if ACCESS_KINDS[kind].tail is None:
        log_norm = output.log_norm[:, column]
    return SparseTargets(ids, log_weights, log_norm)
