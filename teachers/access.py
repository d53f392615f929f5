"""What a teacher reveals at a position, and the sparse targets that it gives.

The README's table of accesses says what each is worth against full distillation.

N rows (positions), K entries a row, n draws, V vocabulary, S the token ids of a row's entries.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine import check_choice, check_range, check_ranges
from model.loss import SparseTargets

Array = np.ndarray | torch.Tensor | None


@dataclass(frozen=True)
class AccessKind:
    """One access to a teacher: which of its log-probabilities it shows, and how many of its draws.

    entries: None | "token" (the likeliest token, without its log-probability)
        | "top_k" (the access.k likeliest, with log-probabilities) | "all" (the whole vocabulary)
    draws: None | "any" (from the whole distribution) | "tail" (from its part outside S)
    uses_n: there are access.n draws; otherwise a kind with draws has one.
    final_weights: the targets are weights at T=1; otherwise loss.tail and loss.temperature apply.
    k, n: access.k and access.n where they are unset.
    """

    entries: str | None = None
    draws: str | None = None
    uses_n: bool = False
    final_weights: bool = True
    k: int = 32
    n: int = 12

    def num_entries(self, k: int | None, vocab_size: int) -> int:
        """K, the entries of a row."""
        counts = {None: 0, "token": 1, "top_k": k or self.k, "all": vocab_size}
        return counts[self.entries]

    def num_draws(self, n: int | None) -> int:
        """The draws of a row."""
        if self.uses_n:
            return n or self.n
        return int(self.draws is not None)

    def includes(self, other: "AccessKind") -> bool:
        """Whether a record of this access tells all that `other` shows."""
        order = (None, "token", "top_k", "all")
        has_entries = order.index(other.entries) <= order.index(self.entries)
        return has_entries and other.draws in (None, self.draws)


ACCESS_KINDS = {
    "greedy": AccessKind(entries="token"),
    "text": AccessKind(draws="any"),
    "sampled": AccessKind(draws="any", uses_n=True),
    "topk": AccessKind(entries="top_k", final_weights=False),
    "residual_to_label": AccessKind(entries="top_k"),
    "unbiased": AccessKind(entries="top_k", draws="any", k=20),
    "stratified": AccessKind(entries="top_k", draws="tail", uses_n=True, n=4),
    "full": AccessKind(entries="all", final_weights=False),
}


@dataclass
class AccessConfig:
    """What the teacher reveals at each position. Unset, with teacher=cache: all that it holds."""

    # greedy | text | sampled | topk | unbiased | stratified | residual_to_label | full;
    # unset: topk
    kind: str | None = None
    k: int | None = None  # its likeliest tokens, with log-probabilities; unset: 32 (unbiased: 20)
    # its draws (sampled, stratified; text and unbiased have one); unset: 12 (stratified: 4)
    n: int | None = None
    seed: int | None = None  # of the draws, which this and the position determine; unset: 0
    fresh: bool = False  # draw anew each time a position is read (online teachers only)

    def __post_init__(self):
        check_choice("access", self.kind, tuple(ACCESS_KINDS))
        check_ranges(self, "k n", "access.", low=1)
        check_range("access.seed", self.seed, low=0)

    def set_unset(self, spec=None) -> None:
        """Sets what is unset: to what a cache of that CacheSpec holds, else to the usual."""
        if self.kind is None:
            self.kind = spec.kind if spec else "topk"
        usual = ACCESS_KINDS[self.kind]
        k = usual.k
        n = usual.n
        if spec:
            recorded = ACCESS_KINDS[spec.kind]
            if recorded.entries == "top_k":
                k = spec.k
            elif recorded.entries == "all":
                k = min(k, spec.k)
            if recorded.uses_n:
                n = spec.n

        self.k = k if self.k is None else self.k
        self.n = n if self.n is None else self.n
        if self.seed is None:
            self.seed = spec.seed if spec else 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError where more entries are asked for than there are tokens."""
        if ACCESS_KINDS[self.kind].entries == "top_k":
            check_range("access.k", self.k, high=vocab_size)


class TeacherOutput(NamedTuple):
    """What an access shows of N positions, as arrays or as tensors; None for what it has not.

    ids: [N,K] integer, the likeliest first (in a cache of access=full: in the vocabulary's order);
        -1 = empty slot
    log_probs: [N,K] fp32, at T=1
    log_norm: [N,temperatures] fp32, logsumexp(z/T) - logsumexp(z)/T
    draws: [N,n] integer, -1 = empty slot
    """

    ids: Array = None
    log_probs: Array = None
    log_norm: Array = None
    draws: Array = None


def to_sparse_targets(kind: str, output: TeacherOutput, labels: torch.Tensor) -> SparseTargets:
    """What the teacher revealed, as (id, log-weight) pairs.

    `python train.py experiment=toy` shows what the targets of each access are worth.

    Args:
        kind: a key of ACCESS_KINDS.
        output: tensors, with log_norm [N,1] at the loss's temperature (None: T=1).
        labels: [N] the data's next tokens, -100 = none; only residual_to_label reads them.

    Returns: ids and log_probs [N,slots], where duplicate ids add up and -1 is an empty slot.
        No value is looked at, so that a CUDA stream never waits.
    """
    ids, log_probs, log_norm, draws = output

    if kind in ("topk", "full"):
        if log_norm is not None:
            log_norm = log_norm[:, 0]
        return SparseTargets(ids, log_probs, log_norm)
    if kind == "greedy":
        log_weights = torch.zeros_like(ids, dtype=torch.float32)
        return SparseTargets(ids, log_weights, None)
    if kind in ("text", "sampled"):
        share = -math.log(draws.shape[1])
        log_weights = torch.full_like(draws, share, dtype=torch.float32)
        return SparseTargets(draws, log_weights, None)

    # The others show S with its probabilities, and add slots for the tail's mass 1-M.
    filled = log_probs.masked_fill(ids < 0, -torch.inf)
    mass = filled.exp().sum(1, keepdim=True)  # [N,1]
    log_tail = (1 - mass).clamp(min=0).log()  # [N,1]
    if kind == "residual_to_label":
        # The whole tail goes to the data's next token.
        extra_ids = labels[:, None].clamp(min=-1)
        extra_weights = log_tail
    elif kind == "unbiased":
        # Weight 1 on the draw, but only where it lies outside S: expectation 1-M.
        in_support = (ids == draws).any(1, keepdim=True)
        extra_ids = draws.masked_fill(in_support, -1)
        extra_weights = torch.zeros_like(log_tail)
    else:
        # Each of the n draws from outside S carries an equal share of the tail.
        assert kind == "stratified", kind
        extra_ids = draws
        num_draws = draws.shape[1]
        share = log_tail - math.log(num_draws)
        extra_weights = share.expand(-1, num_draws)

    extra_ids = extra_ids.to(ids.dtype)
    all_ids = torch.cat([ids, extra_ids], 1)  # [N,K+extra]
    log_weights = torch.cat([log_probs, extra_weights], 1)
    return SparseTargets(all_ids, log_weights, None)
