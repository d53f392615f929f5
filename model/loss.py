"""The student and its loss in one module: what DDP wraps, so that every gradient is synchronised.

B sequences of T positions; N = B*T rows, D width, V vocabulary, K teacher entries a row.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine import UserError, check_choice, check_ranges
from kernels import LossOutput, linear_cross_entropy, linear_full_kl, linear_topk_kl
from kernels.checks import DIVERGENCES, TAILS
from model.gpt import GPT


@dataclass
class LossConfig:
    """loss = (1 - kl_weight) * cross-entropy + kl_weight * temperature^2 * divergence.

    loss=ce is cross-entropy alone and ignores the rest.
    """

    name: str = "topk_kl"  # ce | topk_kl
    kl_weight: float = 1.0  # share of the divergence from the teacher, 0..1
    temperature: float = 1.0  # softens both sides of the divergence, 1e-6..1e6
    # What becomes of the mass outside the teacher's k entries: ghost | smooth | truncate |
    # renormalize | renormalize_both. Unset: ghost for access=topk and full, else truncate.
    tail: str | None = None
    # forward_kl | reverse_kl | jsd | skew_kl | tv; all but the first with tail=ghost alone.
    divergence: str = "forward_kl"
    beta: float = 0.5  # the teacher's share of the mixture in jsd and skew_kl, inside 0..1

    def __post_init__(self):
        check_choice("loss", self.name, ("ce", "topk_kl"))
        check_ranges(self, "kl_weight", "loss.", low=0, high=1)
        check_ranges(self, "temperature", "loss.", low=1e-6, high=1e6)  # beyond, fp32 overflows
        check_ranges(self, "beta", "loss.", above=0, below=1)
        check_choice("loss.tail", self.tail, TAILS)
        check_choice("loss.divergence", self.divergence, DIVERGENCES)
        if self.divergence != "forward_kl" and self.tail not in ("ghost", None):
            setting = f"loss.divergence={self.divergence} with loss.tail={self.tail}"
            raise UserError(
                f"{setting}: that tail takes forward_kl only; leave loss.divergence out (or, with"
                " access=topk or full, set loss.tail=ghost)"
            )


class SparseTargets(NamedTuple):
    """A teacher's (token id, log-weight) pairs at N positions."""

    ids: torch.Tensor | None  # [N,K], -1 = empty slot; None: log_probs are of all tokens, in order
    log_probs: torch.Tensor  # [N,K] fp32, at temperature 1
    log_norm: torch.Tensor | None  # [N] fp32: logsumexp(z/T) - logsumexp(z)/T, at the loss's T


class TeacherStates(NamedTuple):
    """What makes a teacher's whole distribution at N positions."""

    hidden: torch.Tensor  # [N,Dt]
    head: torch.Tensor  # [Vt,Dt], Vt at most the student's V
    softcap: float | None = None  # of its logits


class StudentWithLoss(nn.Module):
    """Token ids to the loss; never materialises the student's [N,V] logits."""

    def __init__(self, student: GPT, loss: LossConfig):
        super().__init__()
        self.student = student
        self.softcap = student.config.logit_softcap
        self.tail = loss.tail or "ghost"
        self.options = {
            "kl_weight": loss.kl_weight,
            "temperature": loss.temperature,
            "divergence": loss.divergence,
            "beta": loss.beta,
            "softcap": self.softcap,
            "reduction": "sum",
        }

    def forward(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        targets: SparseTargets | TeacherStates | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> LossOutput:
        """Sums over the kept positions: the caller divides by how many the whole batch keeps.

        Args:
            ids, labels, document_ids: [B,T]; label -100 keeps a position out of the loss.
            targets: of the N = B*T positions; None for plain cross-entropy.
        """
        hidden = self.student.hidden(ids, document_ids=document_ids).flatten(0, 1)  # [N,D]
        head = self.student.head_weight  # [V,D]
        labels = labels.flatten()  # [N]

        if targets is None:
            return linear_cross_entropy(hidden, head, labels, softcap=self.softcap, reduction="sum")

        if isinstance(targets, TeacherStates):  # every token is an entry: there is no tail
            return linear_full_kl(
                hidden,
                head,
                targets.hidden,
                targets.head,
                labels=labels,
                teacher_softcap=targets.softcap,
                **self.options,
            )

        log_probs = targets.log_probs
        if targets.ids is None:
            # Rows of the student's that the teacher does not have are impossible tokens.
            missing_rows = len(head) - log_probs.shape[1]
            log_probs = F.pad(log_probs, (0, missing_rows), value=-torch.inf)
        return linear_topk_kl(
            hidden,
            head,
            targets.ids,
            log_probs,
            labels=labels,
            log_norm=targets.log_norm,
            tail=self.tail,
            **self.options,
        )
