"""How good a student is on held-out text, and how close it comes to its teacher.

B sequences of T positions, N positions that are measured ("rows"), D width, V vocabulary rows,
K entries of a teacher's.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt import GPT, softcap

ROWS = 256  # rows of logits that exist at a time
MIN_TAIL = 1e-9  # far below the fp32 error of one minus a sum of probabilities
BINS = 15  # equal-width bins of the top-1 confidence (Guo et al. 2017)


def append_tail(log_probs: Tensor) -> Tensor:
    """Log-probabilities [N,K] and, as one more outcome, that of all the rest: [N,K+1]."""
    tail = 1 - log_probs.exp().sum(dim=1, keepdim=True)  # [N,1]
    return torch.cat([log_probs, tail.clamp(min=MIN_TAIL).log()], dim=1)


def row_measures(
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    teacher_topk: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Measures of each row, [N] each.

    Args:
        student: [N,V] logits.
        labels: [N] token ids.
        teacher: [N,Vt] logits, Vt <= V; a token that the teacher lacks has probability zero.
        teacher_topk: instead of teacher, ids and log-probs [N,K] of its likeliest tokens, best
            first. All others are one more outcome: kl is a lower bound, acceptance an upper one.

    Returns:
        loss (nats), confidence (the top token's probability), correct (0 or 1). With a teacher also
        kl = KL(teacher | student) in nats, agreement of the top tokens (0 or 1) and acceptance =
        1 - TV, the rate at which speculative decoding keeps the student's draws.
    """
    log_probs = F.log_softmax(student, dim=-1)  # [N,V]
    top_log_prob, top = log_probs.max(dim=-1)  # [N] each
    label_log_prob = log_probs.gather(1, labels[:, None])[:, 0]
    measures = {
        "loss": -label_log_prob,
        "confidence": top_log_prob.exp(),
        "correct": (top == labels).to(log_probs.dtype),
    }
    if teacher is not None:
        teacher_top = teacher.argmax(dim=-1)
        log_t = F.log_softmax(teacher, dim=-1)  # [N,Vt]
        log_p = log_probs[:, : teacher.shape[1]]
    elif teacher_topk is not None:
        ids, topk_log_probs = teacher_topk
        teacher_top = ids[:, 0]
        log_t = append_tail(topk_log_probs.to(log_probs.dtype))  # [N,K+1]
        log_p = append_tail(log_probs.gather(1, ids))
    else:
        return measures
    terms = log_t.exp() * (log_t - log_p)
    terms = torch.where(log_t > -torch.inf, terms, 0.0)  # 0 log 0 = 0
    measures["kl"] = terms.sum(dim=1)
    overlap = torch.minimum(log_t, log_p).exp()
    measures["acceptance"] = overlap.sum(dim=1)  # sum of min(t,p) = 1 - TV
    measures["agreement"] = (teacher_top == top).to(log_probs.dtype)
    return measures


def bin_sums(confidence: Tensor, correct: Tensor) -> Tensor:
    """[3,BINS] in fp64: of each bin how many of the N rows it holds, and their two sums.

    Args: confidence, correct: [N].
    """
    bins = (confidence * BINS).ceil().long()
    bins = bins.clamp(1, BINS) - 1  # bin b holds (b/15, (b+1)/15]
    columns = [torch.ones_like(confidence), confidence, correct]
    return torch.stack([bins.bincount(column.double(), BINS) for column in columns])


def reliability(sums: Tensor) -> list[list[float]]:
    """BINS bins of [share of the rows, mean confidence, accuracy]; one without rows is [0, 0, 0].

    Args: sums: those of `bin_sums`, over any number of calls. Source: Guo et al. 2017, figure 1.
    """
    counts = sums[0]  # [BINS]
    means = [total / counts.clamp(min=1) for total in sums[1:]]
    return torch.stack([counts / counts.sum(), *means], dim=1).tolist()


@torch.no_grad()
def sum_measures(
    models: list[GPT],
    batches: Iterable,
    autocast,
) -> tuple[dict[str, float], Tensor]:
    """Sums of `row_measures` over the kept positions of all batches, and their `bin_sums`.

    Logits are fp32, ROWS rows at a time. Sums alone are kept: a small tensor of each ROWS rows,
    made between large ones, would pin the heap around it.

    Args: models: the student and, perhaps, the teacher. Of the others see `evaluate`.
    """
    heads = [model.head_weight.float() for model in models]  # [V,D] each
    totals = defaultdict(float)
    bins = torch.zeros(3, BINS, dtype=torch.float64)
    for batch in batches:
        batch = batch.to(heads[0].device)
        labels = batch.labels.flatten()  # [B*T]
        hidden = []
        with autocast():
            for model in models:
                states = model.hidden(batch.ids, document_ids=batch.document_ids)  # [B,T,D]
                hidden.append(states.flatten(0, 1))  # [B*T,D]

        # Their measures, a few rows of logits at a time
        kept = (labels != -100).nonzero()[:, 0]  # [N]
        for rows in kept.split(ROWS):
            logits = []
            for model, states, head in zip(models, hidden, heads, strict=True):
                plain = F.linear(states[rows].float(), head)  # [ROWS,V]
                logits.append(softcap(plain, model.config.logit_softcap))
            topk = None
            if batch.targets is not None:
                topk = [part.flatten(0, 1)[rows] for part in batch.targets[:2]]  # [ROWS,K] each
            measures = row_measures(
                logits[0],
                labels[rows],
                *logits[1:],
                teacher_topk=topk,
            )
            measures = {name: values.cpu() for name, values in measures.items()}
            confidence = measures.pop("confidence")
            correct = measures.pop("correct")
            bins += bin_sums(confidence, correct)
            for name, values in measures.items():
                totals[name] += values.double().sum().item()
    return totals, bins


def evaluate(
    student: GPT,
    batches: Iterable,
    teacher: GPT | None = None,
    autocast=nullcontext,
) -> dict:
    """Means over all kept positions: val_loss, val_ece, val_kl, val_acceptance, val_agreement.

    The last three need a teacher. val_reliability, a list, has the bins that val_ece follows from.

    Args:
        batches: of data/batches.Batch; a label -100 is not measured.
        teacher: on the student's device. Without one a batch's targets, where it has them, are the
            teacher's K likeliest tokens.
        autocast: makes the context of the forward passes.
    """
    was_training = student.training
    student.eval()
    try:
        models = [student] if teacher is None else [student, teacher]
        totals, sums = sum_measures(models, batches, autocast)
    finally:
        student.train(was_training)
    num_rows = sums[0].sum().item()
    means = {f"val_{name}": total / num_rows for name, total in totals.items()}
    bins = reliability(sums)
    # Sum over the bins of share * |accuracy - mean confidence| (Guo et al. 2017)
    means["val_ece"] = sum(share * abs(accuracy - mean) for share, mean, accuracy in bins)
    means["val_reliability"] = bins
    return means
