"""Each access's optimum, expectation and variance in closed form.

The teacher says t_i ~ 1/i over V tokens at every position; its top K are the support.
"""

import numpy as np
import pytest
import torch

from kernels import topk_kl
from teachers.access import ACCESS_KINDS, TeacherOutput, to_sparse_targets
from tests.helpers import assert_close

K = 20
N = 12


def zipf(V):
    ranks = torch.arange(1, V + 1)
    weights = 1 / ranks.double()
    return weights / weights.sum()


def targets(kind, t, draws=None, labels=None):
    """ids, log-weights [rows,slots], a row for each row of draws."""
    rows = 1 if draws is None else len(draws)
    k = ACCESS_KINDS[kind].num_entries(K, len(t))
    ids = torch.arange(k).expand(rows, k)
    log_probs = t[:k].log().float()
    log_probs = log_probs.expand(rows, k)
    output = TeacherOutput(ids, log_probs, None, draws)
    ids, log_weights, _ = to_sparse_targets(kind, output, labels)
    return ids, log_weights


def every_case(kind, t):
    """ids, log-weights [cases,slots] for all that can be drawn, and each case's chance [cases]."""
    tokens = torch.arange(len(t))
    if kind in ("greedy", "topk", "full"):
        draws = None
        chances = torch.ones(1).double()
    elif kind == "sampled":  # two draws
        draws = torch.cartesian_prod(tokens, tokens)
        chances = t[draws].prod(1)
    else:
        draws = tokens[:, None]
        chances = t.clone()
    if kind == "stratified":
        chances[:K] = 0
        chances /= chances.sum()
    ids, log_weights = targets(kind, t, draws, tokens)
    return ids, log_weights, chances


def gradient(logits, ids, log_weights, tail, chances=1.0):
    """[V] of the loss over rows that all have these logits, each counted with its chance."""
    logits = logits.clone().requires_grad_()
    rows = logits.expand(len(ids), -1)
    output = topk_kl(
        rows,
        ids,
        log_weights,
        tail=tail,
        reduction="none",
        backend="reference",
    )
    loss = output.loss * chances
    loss.sum().backward()
    return logits.grad


def optimum(kind, tail, t):
    """The student's distribution [V] that the table states."""
    head = t.clone()
    head[K:] = 0
    rest = t - head
    mass = head.sum()
    if kind == "greedy":
        return (t == t[0]).double()
    if kind == "residual_to_label":
        return head * (2 - mass) + rest * (1 - mass)
    if tail in ("ghost", "smooth"):  # ghost leaves the tail's shape free
        even = (1 - mass) / (len(t) - K)
        return torch.where(head > 0, head, even)
    if kind == "topk":
        return head / mass
    return t


CASES = [(kind, "truncate") for kind in ACCESS_KINDS]
CASES += [
    ("topk", "renormalize"),
    ("topk", "ghost"),
    ("topk", "smooth"),
]


@pytest.mark.parametrize("kind, tail", CASES)
def test_the_loss_is_least_where_the_table_says(kind, tail):
    t = zipf(64)
    ids, log_weights, chances = every_case(kind, t)
    p = optimum(kind, tail, t)
    logits = p.clamp(min=1e-30).log()
    there = gradient(logits, ids, log_weights, tail, chances)
    assert there.abs().max() < 1e-7
    logits = (p + 0.01).log()
    elsewhere = gradient(logits, ids, log_weights, tail, chances)
    assert elsewhere.abs().max() > 1e-3


def test_what_ghost_and_renormalize_both_leave_free():
    t = zipf(64)
    ids, log_weights = targets("topk", t)
    logits = t.log()
    logits[K:] = logits[K:].flip(0)  # another tail of the same mass
    ghost = gradient(logits, ids, log_weights, "ghost")
    assert ghost.abs().max() < 1e-7
    smooth = gradient(logits, ids, log_weights, "smooth")
    assert smooth.abs().max() > 1e-3
    logits = torch.randn(64).double()
    both = gradient(logits, ids, log_weights, "renormalize_both")
    assert both[K:].abs().max() < 1e-15
    assert both[:K].abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["text", "residual_to_label", "unbiased", "stratified"])
def test_the_expected_weights_at_a_large_vocabulary(kind):
    t = zipf(100_000)
    ids, log_weights, chances = every_case(kind, t)
    weights = log_weights.double().exp()
    weights *= chances[:, None]
    weights[ids < 0] = 0
    mean = torch.zeros_like(t)
    ids = ids.clamp(min=0).flatten()
    mean.index_add_(0, ids, weights.flatten())
    expected = optimum(kind, "truncate", t)
    assert_close(mean, expected, rtol=1e-5, atol=1e-9)


SQUARES = zipf(64).square()
ALL = 1 - SQUARES.sum()
TAIL = zipf(64)[K:].sum()
TAIL_SQUARES = SQUARES[K:].sum()
VARIANCES = {
    ("text", 1): ALL,
    ("sampled", N): ALL / N,
    ("unbiased", 1): TAIL - TAIL_SQUARES,
    ("stratified", 1): TAIL**2 - TAIL_SQUARES,
    ("stratified", N): (TAIL**2 - TAIL_SQUARES) / N,
}


@pytest.mark.parametrize("kind, n", VARIANCES)
def test_variances(kind, n):
    t = zipf(64)
    chances = t.clone()
    if kind == "stratified":
        chances[:K] = 0
    draws = torch.multinomial(chances, 20_000 * n, replacement=True)
    draws = draws.view(-1, n)
    ids, log_weights = targets(kind, t, draws)
    weights = log_weights.exp()
    weights[ids < 0] = 0
    errors = -t.float().repeat(20_000, 1)
    ids = ids.clamp(min=0)
    errors.scatter_add_(1, ids, weights)
    variance = errors.square().sum(1).mean()
    expected = VARIANCES[kind, n].item()
    assert variance == pytest.approx(expected, rel=0.05)


def tensor(text):
    """[2,K] the numbers in two lines, parted by a bar."""
    numbers = np.loadtxt(text.split("|"), ndmin=2)
    return torch.tensor(numbers).float()


IDS = tensor("3 5 -1 | 0 1 2").long()
PROBS = tensor("0.5 0.3 0.9 | 0.6 0.4 1e-6")  # M = 0.8 and 1 + 1e-6
DRAWS = tensor("5 7 | 9 9").int()
LABELS = torch.tensor([5, -100])
EDGES = {  # the ids, and the last weights
    "greedy": ("3 | 0", "1 | 1"),
    "text": ("5 | 9", "1 | 1"),
    "sampled": ("5 7 | 9 9", "0.5 0.5 | 0.5 0.5"),
    "topk": ("3 5 -1 | 0 1 2", "0.5 0.3 0.9 | 0.6 0.4 1e-6"),
    "residual_to_label": ("3 5 -1 5 | 0 1 2 -1", "0.2 | 0"),
    "unbiased": ("3 5 -1 -1 | 0 1 2 9", "1 | 1"),
    "stratified": ("3 5 -1 5 7 | 0 1 2 9 9", "0.1 0.1 | 0 0"),
}


@pytest.mark.parametrize("kind", EDGES)
def test_empty_slots_no_label_and_a_mass_above_one(kind):
    log_norm = torch.ones(2, 1)
    output = TeacherOutput(IDS, PROBS.log(), log_norm, DRAWS)
    result = to_sparse_targets(kind, output, LABELS)
    ids, weights = EDGES[kind]
    assert (result.ids == tensor(ids)).all()
    expected = tensor(weights)
    width = expected.shape[1]
    last = result.log_probs[:, -width:]
    assert_close(last.exp(), expected, atol=1e-6)
    if ACCESS_KINDS[kind].final_weights:
        assert result.log_norm is None
    else:
        assert result.log_norm.equal(log_norm[:, 0])

    # Tensors without values: a look at one, for which a CUDA stream would wait, raises.
    output = [field.to("meta") for field in output]
    to_sparse_targets(kind, output, LABELS.to("meta"))
