"""How good a student is on held-out text, and how close it comes to its teacher.

B sequences of T positions, N positions that are measured ("rows"), D width, V vocabulary rows,
K entries of a teacher's.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from model.gpt import GPT

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
        terms = F.kl_div(log_p, log_t, reduction="none", log_target=True)
        measures["kl"] = terms.sum(dim=1)
    elif teacher_topk is not None:
        ids, topk_log_probs = teacher_topk
        teacher_top = ids[:, 0]
        log_t = append_tail(topk_log_probs.to(log_probs.dtype))  # [N,K+1]
        log_p = append_tail(log_probs.gather(1, ids))
        terms = log_t.exp() * (log_t - log_p)
        measures["kl"] = torch.where(log_t > -torch.inf, terms, 0.0).sum(dim=1)
    else:
        return measures
    overlap = torch.minimum(log_t, log_p).exp()
    measures["acceptance"] = overlap.sum(dim=1)  # sum of min(t,p) = 1 - TV
    measures["agreement"] = (teacher_top == top).to(log_probs.dtype)
    return measures


def reliability(confidence: Tensor, correct: Tensor) -> list[list[float]]:
    """BINS bins of [share of the rows, mean confidence, accuracy]; one without rows is [0, 0, 0].

    Args: confidence, correct: [N]. Source: Guo et al. 2017, figure 1.
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bin b holds (b/15, (b+1)/15]
    ones = torch.ones_like(confidence)
    columns = torch.stack([ones, confidence, correct], dim=1).double()  # [N,3]
    sums = torch.zeros(BINS, 3, dtype=torch.float64)
    sums.index_add_(0, bins, columns)
    counts = sums[:, :1]  # [BINS,1]
    shares = counts / len(confidence)
    means = sums[:, 1:] / counts.clamp(min=1)  # [BINS,2]
    return torch.cat([shares, means], dim=1).tolist()


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Sum over the bins of share * |accuracy - mean confidence|, a fraction (Guo et al. 2017)."""
    bins = reliability(confidence, correct)
    return sum(share * abs(accuracy - mean) for share, mean, accuracy in bins)


@torch.no_grad()
def measure_rows(
    student: GPT,
    batches: Iterable,
    teacher: GPT | None = None,
    autocast=nullcontext,
) -> dict[str, Tensor]:
    """`row_measures` of the kept positions of all batches, on the CPU, in reading order.

    Logits are fp32, ROWS rows at a time. For the arguments see `evaluate`.
    """
    models = [student]
    if teacher is not None:
        models.append(teacher)
    heads = [model.head_weight.float() for model in models]  # [V,D] each
    device = heads[0].device
    chunks = []
    for batch in batches:
        # Hidden states of the N positions whose label is kept
        batch = batch.to(device)
        labels = batch.labels.flatten()  # [B*T]
        kept = labels != -100
        labels = labels[kept]  # [N]
        hidden = []
        with autocast():
            for model in models:
                states = model.hidden(batch.ids, document_ids=batch.document_ids)  # [B,T,D]
                hidden.append(states.flatten(0, 1)[kept])  # [N,D]

        if batch.targets is not None:
            topk_ids = batch.targets.ids.flatten(0, 1)[kept]  # [N,K]
            topk_log_probs = batch.targets.log_probs.flatten(0, 1)[kept]  # [N,K]

        # Their measures, a few rows of logits at a time
        for start in range(0, len(labels), ROWS):
            rows = slice(start, start + ROWS)
            logits = []
            for states, head in zip(hidden, heads, strict=True):
                logits.append(F.linear(states[rows].float(), head))  # [ROWS,V]
            teacher_topk = None
            if batch.targets is not None:
                teacher_topk = (topk_ids[rows], topk_log_probs[rows])
            measures = row_measures(
                logits[0],
                labels[rows],
                *logits[1:],
                teacher_topk=teacher_topk,
            )
            chunks.append({name: values.cpu() for name, values in measures.items()})

    measures = {}
    for name in chunks[0] if chunks else ():
        measures[name] = torch.cat([chunk[name] for chunk in chunks])
    return measures


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

    Raises: ValueError where no position is kept.
    """
    was_training = student.training
    student.eval()
    try:
        rows = measure_rows(student, batches, teacher, autocast)
    finally:
        student.train(was_training)
    if not rows:
        raise ValueError("nothing to evaluate: no held-out position is kept")
    means = {}
    for name in ("loss", "kl", "acceptance", "agreement"):
        if name in rows:
            means[f"val_{name}"] = rows[name].double().mean().item()
    means["val_ece"] = expected_calibration_error(rows["confidence"], rows["correct"])
    means["val_reliability"] = reliability(rows["confidence"], rows["correct"])
    return means
