"""The student and its loss in one module: what DDP wraps, so that every gradient is synchronised.

B sequences of T positions; N = B*T rows, K teacher entries a row.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from engine import UserError, check_choice, check_ranges
from kernels import LossOutput, linear_cross_entropy, linear_full_kl, linear_topk_kl
from model.gpt import GPT


@dataclass
class LossConfig:
    """loss = (1 - kl_weight) * cross-entropy + kl_weight * temperature^2 * divergence (loss=ce takes no notice of the rest)."""

    name: str = "topk_kl"  # ce | topk_kl
    kl_weight: float = 1.0  # share of the divergence from the teacher, 0..1
    temperature: float = 1.0  # softens both sides of the divergence, > 0
    tail: str | None = (
        None  # mass outside the teacher's k entries: ghost | truncate | renormalize | renormalize_both | smooth;
    )
    # unset: ghost for access=topk and full, truncate for the others, whose weights are final
    divergence: str = "forward_kl"  # forward_kl | reverse_kl | jsd | skew_kl | tv (all but the first with tail=ghost only)
    beta: float = 0.5  # the teacher's share of the mixture in jsd and skew_kl, inside 0..1

    def __post_init__(self):
        check_choice("loss", self.name, ("ce", "topk_kl"))
        check_ranges(self, "kl_weight", "loss.", low=0, high=1)
        check_ranges(self, "temperature", "loss.", above=0)
        check_ranges(self, "beta", "loss.", above=0, below=1)
        check_choice(
            "loss.tail",
            self.tail,
            ("ghost", "truncate", "renormalize", "renormalize_both", "smooth"),
        )
        check_choice(
            "loss.divergence", self.divergence, ("forward_kl", "reverse_kl", "jsd", "skew_kl", "tv")
        )
        if self.divergence != "forward_kl" and self.tail not in ("ghost", None):
            rule = f"loss.tail={self.tail} takes forward_kl only; set loss.tail=ghost"
            raise UserError(f"loss.divergence={self.divergence} with loss.tail={self.tail}: {rule}")


class SparseTargets(NamedTuple):
    """What the teacher said at N positions."""

    ids: (
        torch.Tensor | None
    )  # [N,K] token ids, -1 = empty slot; None: log_probs are of the whole vocabulary, in order
    log_probs: torch.Tensor  # [N,K] fp32, at temperature 1
    log_norm: (
        torch.Tensor | None
    )  # [N] fp32: logsumexp(z/T) - logsumexp(z)/T, at the loss's temperature


class TeacherStates(NamedTuple):
    """What makes a teacher's whole distribution at N positions."""

    hidden: torch.Tensor  # [N,Dt]
    head: torch.Tensor  # [Vt,Dt], Vt at most the student's V


class StudentWithLoss(nn.Module):
    """Token ids to the loss; the student's logits never exist whole."""

    def __init__(self, student: GPT, loss: LossConfig):
        super().__init__()
        self.student = student
        self.options = {name: value for name, value in asdict(loss).items() if name != "name"} | {
            "tail": loss.tail or "ghost"
        }

    def forward(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        targets: SparseTargets | TeacherStates | None = None,
        documents: torch.Tensor | None = None,
    ) -> LossOutput:
        """Sums over the kept positions: the caller divides by how many the whole batch keeps.

        Args: ids, labels, documents [B,T]; label -100 keeps a position out of the loss. targets: None for plain cross-entropy.
        """
        hidden, head = (
            self.student.hidden(ids, document_ids=documents).flatten(0, 1),
            self.student.head_weight,
        )  # [N,D], [V,D]
        labels = labels.flatten()  # [N]
        if targets is None:
            return linear_cross_entropy(hidden, head, labels, reduction="sum")
        if isinstance(targets, TeacherStates):  # S is the whole vocabulary: there is no tail
            options = {name: value for name, value in self.options.items() if name != "tail"}
            return linear_full_kl(hidden, head, *targets, labels=labels, reduction="sum", **options)
        log_probs = targets.log_probs
        if (
            targets.ids is None
        ):  # rows of the student's that the teacher does not have are impossible tokens
            log_probs = F.pad(log_probs, (0, len(head) - log_probs.shape[1]), value=-torch.inf)
        told = {"labels": labels, "log_norm": targets.log_norm}
        return linear_topk_kl(
            hidden, head, targets.ids, log_probs, reduction="sum", **told, **self.options
        )
