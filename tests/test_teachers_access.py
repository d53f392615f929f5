"""Each access's optimum in closed form, and the edges. Variances are in test_readme.py.

The teacher says t_i ~ 1/i over V tokens at every position; its top K are the support.
"""

import numpy as np
import pytest
import torch

from kernels import topk_kl
from teachers.access import ACCESS_KINDS, TeacherOutput, to_sparse_targets
from tests.helpers import assert_close

K = 20
V = 64


def every_case(kind, t):
    """ids, log-weights [cases,slots] for all that can be drawn, and each case's chance [cases]."""
    tokens = torch.arange(V)
    if kind == "sampled":  # two draws
        draws = torch.cartesian_prod(tokens, tokens)
        chances = t[draws].prod(1)
    else:
        draws = tokens[:, None]
        chances = t.clone()
    if kind == "stratified":
        chances[:K] = 0
        chances /= chances.sum()
    k = ACCESS_KINDS[kind].num_entries(K, V)
    ids = tokens[:k].expand(len(draws), k)
    output = TeacherOutput(ids, t[ids].log().float(), None, draws)
    ids, log_weights, _ = to_sparse_targets(kind, output, tokens)
    return ids, log_weights, chances


def gradient(logits, ids, log_weights, tail, chances):
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
        even = (1 - mass) / (V - K)
        return torch.where(head > 0, head, even)
    if kind == "topk":
        return head / mass
    return t


CASES = [(kind, "truncate") for kind in ACCESS_KINDS]
CASES += [
    ("topk", "renormalize"),
    ("topk", "renormalize_both"),
    ("topk", "ghost"),
    ("topk", "smooth"),
]


@pytest.mark.parametrize("kind, tail", CASES)
def test_the_loss_is_least_where_the_table_says(kind, tail):
    t = 1 / torch.arange(1, V + 1).double()
    t /= t.sum()
    ids, log_weights, chances = every_case(kind, t)
    p = optimum(kind, tail, t)
    logits = p.clamp(min=1e-30).log()
    there = gradient(logits, ids, log_weights, tail, chances)
    assert there.abs().max() < 1e-7
    logits = (p + 0.01).log()
    elsewhere = gradient(logits, ids, log_weights, tail, chances)
    assert elsewhere.abs().max() > 1e-3


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
    access = ACCESS_KINDS[kind]
    k = access.num_entries(3, 10)
    n = access.num_draws(2)
    log_norm = torch.ones(2, 1)
    output = TeacherOutput(IDS[:, :k], PROBS[:, :k].log(), log_norm, DRAWS[:, :n])
    result = to_sparse_targets(kind, output, LABELS)
    ids, weights = EDGES[kind]
    assert (result.ids == tensor(ids)).all()
    expected = tensor(weights)
    width = expected.shape[1]
    last = result.log_probs[:, -width:]
    assert_close(last.exp(), expected, atol=1e-6)
    if access.final_weights:
        assert result.log_norm is None
    else:
        assert result.log_norm.equal(log_norm[:, 0])

    # Tensors without values: a look at one, for which a CUDA stream would wait, raises.
    output = [field.to("meta") for field in output]
    to_sparse_targets(kind, output, LABELS.to("meta"))
