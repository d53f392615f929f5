"""What a student is worth on held-out text, and how close it came to its teacher.

N rows (positions), D width, V vocabulary; t the teacher's distribution, p the student's.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from model.gpt import GPT

ROWS = 256  # rows of logits that exist at a time
LEAST = 1e-9  # of a tail: far below what fp32 tells of one minus a sum
BINS = 15  # equal-width bins of the top-1 confidence (Guo et al. 2017)


def row_measures(
    student: torch.Tensor,
    labels: torch.Tensor,
    teacher: torch.Tensor | None = None,
    told: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Measures of each row, [N] each.

    Args: student [N,V], teacher [N,V] or narrower: logits (what a teacher lacks has no probability); labels [N].
    told: a teacher's top ids and log-probs [N,K] instead; then all else is one more outcome, whose kl is a lower bound of the
    whole one and whose acceptance an upper bound.
    Returns: loss (nats), confidence (of the top token), correct (0 or 1); with a teacher kl = KL(t|p) in nats,
    acceptance = 1 - TV(t,p) (the rate at which speculative decoding keeps the student's draws), agreement (0 or 1).
    """
    log_p = F.log_softmax(student, dim=-1)  # [N,V]
    top = log_p.max(dim=-1)
    found = {"loss": -log_p.gather(1, labels[:, None])[:, 0], "confidence": top.values.exp()}
    found["correct"] = (top.indices == labels).to(log_p.dtype)
    if teacher is not None:
        log_t, top_t = F.log_softmax(teacher, dim=-1), teacher.argmax(dim=-1)
        log_p = log_p[:, : teacher.shape[1]]
        found["kl"] = F.kl_div(log_p, log_t, reduction="none", log_target=True).sum(dim=-1)
        found["acceptance"] = torch.minimum(log_t, log_p).exp().sum(dim=-1)  # sum min(t,p) = 1 - TV
        found["agreement"] = (top_t == top.indices).to(log_p.dtype)
    elif told is not None:
        sides = (told[1].to(log_p.dtype), log_p.gather(1, told[0]))
        tails = [1 - side.exp().sum(1, keepdim=True) for side in sides]
        log_t, log_s = (
            torch.cat([side, tail.clamp(min=LEAST).log()], 1)
            for side, tail in zip(sides, tails, strict=True)
        )
        found["kl"] = torch.where(log_t > -torch.inf, log_t.exp() * (log_t - log_s), 0.0).sum(1)
        found["acceptance"] = torch.minimum(log_t, log_s).exp().sum(1)
        found["agreement"] = (told[0][:, 0] == top.indices).to(log_p.dtype)
    return found


def reliability(confidence: torch.Tensor, correct: torch.Tensor) -> list[list[float]]:
    """BINS bins of [share of the rows, mean confidence, accuracy]; one without rows is [0, 0, 0].

    Args: confidence, correct [N]. Source: Guo et al. 2017, fig. 1.
    """
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bin b holds (b/15, (b+1)/15]
    columns = torch.stack(
        [torch.ones_like(confidence), confidence, correct], dim=1
    ).double()  # [N,3]
    sums = torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, bins, columns)
    counts = sums[:, :1]  # [BINS,1]
    return torch.cat([counts / len(confidence), sums[:, 1:] / counts.clamp(min=1)], dim=1).tolist()


def expected_calibration_error(confidence: torch.Tensor, correct: torch.Tensor) -> float:
    """Sum over `reliability`'s bins of share * |accuracy - mean confidence|, a fraction. Source: Guo et al. 2017."""
    return sum(
        share * abs(accuracy - mean) for share, mean, accuracy in reliability(confidence, correct)
    )


@torch.no_grad()
def measure_rows(
    student: GPT, batches: Iterable, teacher: GPT | None = None, autocast=nullcontext
) -> dict[str, torch.Tensor]:
    """`row_measures` of every kept position of `batches` (ids, labels [B,T]), on the CPU, in reading order.

    Logits are made in fp32, ROWS rows at a time.
    """
    found: dict[str, list] = {}
    device, models = (
        student.head_weight.device,
        [student] if teacher is None else [student, teacher],
    )
    heads = [model.head_weight.float() for model in models]
    for batch in batches:
        ids, labels = batch.ids.to(device), batch.labels.to(device).flatten()
        documents = None if batch.document_ids is None else batch.document_ids.to(device)
        kept = labels != -100
        with autocast():
            states = [
                model.hidden(ids, documents=documents).flatten(0, 1)[kept] for model in models
            ]  # [N,D] each
        labels, told = labels[kept], None
        if batch.targets is not None:
            told = [
                part.flatten(0, 1).to(device)[kept]
                for part in (batch.targets.ids, batch.targets.log_probs)
            ]
        for start in range(0, len(labels), ROWS):
            rows = slice(start, start + ROWS)
            here = told and [part[rows] for part in told]
            logits = [
                F.linear(state[rows].float(), head)
                for state, head in zip(states, heads, strict=True)
            ]
            for name, values in row_measures(
                logits[0], labels[rows], *logits[1:], told=here
            ).items():
                found.setdefault(name, []).append(values.cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def evaluate(
    student: GPT, batches: Iterable, teacher: GPT | None = None, autocast=nullcontext
) -> dict:
    """Means over all kept positions: val_loss, val_ece and, against a teacher, val_kl, val_acceptance, val_agreement.

    val_reliability is the one list among them: the bins that val_ece follows from.

    Args: batches yields objects with ids and labels [B,T] (label -100: not counted); models on one device.
    Raises: ValueError where no position is kept.
    """
    training = student.training
    student.eval()
    try:
        rows = measure_rows(student, batches, teacher, autocast)
    finally:
        student.train(training)
    if not rows:
        raise ValueError("nothing to evaluate: no held-out position is kept")
    means = {
        f"val_{name}": rows[name].double().mean().item()
        for name in ("loss", "kl", "acceptance", "agreement")
        if name in rows
    }
    calibration = rows["confidence"], rows["correct"]
    return means | {
        "val_ece": expected_calibration_error(*calibration),
        "val_reliability": reliability(*calibration),
    }
