"""The losses from sparse targets: every mode, gradient and trap of DESIGN section 4.

The reference is checked against the losses written outcome by outcome, and everything else against the
reference in float64. Chunked PyTorch runs in float64, the Triton kernels in Triton's interpreter or on
a GPU.
"""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_cross_entropy, linear_log_probs, linear_topk_kl, topk_kl
from kernels.checks import DIVERGENCES, TAILS
from kernels.losses import scale_gradient
from tests.helpers import assert_close
from tests.kernel_cases import (
    FP32,
    HALVES,
    MODES,
    NUM_FIELDS,
    REFERENCE,
    TARGETS,
    TEMPERATURES,
    TORCH,
    TRITON,
    agree,
    check,
    check_rounded,
    differentiate,
    held,
    no_worse,
    on_support,
    plain_loss,
    problem,
    run,
    traps,
)

# The losses outcome by outcome, from DESIGN's words; nothing of kernels/ is used.


def kl_divergence(a, b):
    """KL(a|b), with 0 log 0 = 0."""
    possible = a > 0
    return (a[possible] * (a[possible] / b[possible]).log()).sum()


def divergence(t, p, kind, beta):
    mixture = beta * t + (1 - beta) * p
    if kind == "forward_kl":
        return kl_divergence(t, p)
    if kind == "reverse_kl":
        return (p * (p.log() - t.log().clamp(min=-30))).sum()
    if kind == "jsd":
        return beta * kl_divergence(t, mixture) + (1 - beta) * kl_divergence(p, mixture)
    if kind == "skew_kl":
        return kl_divergence(t, mixture)
    return (t - p).abs().sum() / 2


def outcomes(p, ids, log_probs, log_norm, T, tail):
    """The probabilities of one row's outcomes, the teacher's and the student's."""
    weights = {}
    for token, log_prob in zip(ids.tolist(), log_probs, strict=True):
        if token >= 0:
            weights[token] = weights.get(token, 0.0) + log_prob.exp()
    inside = list(weights)
    outside = [token for token in range(len(p)) if token not in weights]
    t = torch.stack(list(weights.values())) ** (1 / T) * (-log_norm).exp()
    rest = (1 - t.sum()).clamp(min=0)
    if tail == "truncate":
        return t, p[inside]
    if tail == "renormalize":
        return t / t.sum(), p[inside]
    if tail == "renormalize_both":
        return t / t.sum(), p[inside] / p[inside].sum()
    if tail == "smooth":
        each = rest / len(outside)
        return torch.cat([t, each.expand(len(outside))]), p[inside + outside]
    return torch.cat([t, rest[None]]), torch.cat([p[inside], p[outside].sum()[None]])


def loss_in_words(z, case, kl_weight, T, tail, kind, beta):
    losses = []
    for row in range(len(z)):
        p = (z[row] / T).softmax(0)
        t, p = outcomes(p, case.ids[row], case.log_probs[row], case.log_norm[row], T, tail)
        ce = -z[row].log_softmax(0)[case.labels[row]]
        kl = divergence(t, p, kind, beta)
        losses.append((1 - kl_weight) * ce + kl_weight * T * T * kl)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("tail, kind", MODES)
def test_the_reference_is_the_loss_of_the_design(tail, kind, T, softcap):
    case = problem(7, 6, 23, 5, T)
    case.ids[0, 2] = case.ids[0, 0]
    case.ids[1, 1:3] = -1
    case.log_probs[2, 3] = -math.inf
    options = {"temperature": T, "tail": tail, "divergence": kind, "softcap": softcap}
    options |= {"beta": 0.3, "kl_weight": 0.7}
    for op in (linear_topk_kl, topk_kl):
        upstream = torch.tensor(1.0)
        ours = run(op, case, REFERENCE, labels=True, upstream=upstream, **options)
        leaves = [case.hidden, case.weight] if op is linear_topk_kl else [case.logits]
        leaves = [part.clone().requires_grad_() for part in leaves]
        z = leaves[0] @ leaves[1].T if op is linear_topk_kl else leaves[0]
        if softcap is not None:
            z = softcap * (z / softcap).tanh()
        loss = loss_in_words(z, case, 0.7, T, tail, kind, 0.3)
        assert_close(ours[0], loss.detach(), rtol=1e-9)
        gradients = torch.autograd.grad(loss, leaves)
        for mine, right in zip(ours[NUM_FIELDS:], gradients, strict=True):
            assert_close(mine, right, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("tail, kind", MODES)
def test_gradcheck_of_the_reference(tail, kind):
    case = problem(3, 4, 11, 4, 2.0)
    case.ids[0, 1] = case.ids[0, 0]
    case.ids[1, 2] = -1
    options = {"temperature": 2.0, "log_norm": case.log_norm, "tail": tail, "divergence": kind}
    options |= {"labels": case.labels, "kl_weight": 0.6, "softcap": 4.0, "reduction": "none"}

    def loss(*leaves):
        targets = case.ids, case.log_probs
        return linear_topk_kl(*leaves, *targets, **options, backend="reference").loss

    leaves = [case.hidden.requires_grad_(), case.weight.requires_grad_()]
    assert torch.autograd.gradcheck(loss, leaves)


# Modes and shapes.

ASKED = [
    (linear_topk_kl, {}),
    (linear_topk_kl, {"labels": True, "kl_weight": 0.3, "softcap": 4.0, "reduction": "none"}),
    (linear_topk_kl, {"labels": True, "kl_weight": 0.7, "reduction": "sum", "_rows": 2}),
    (topk_kl, {"labels": True, "kl_weight": 0.3, "beta": 0.2}),
    (topk_kl, {"labels": True, "reduction": "none", "beta": 0.9, "softcap": 6.0}),
    (topk_kl, {"labels": True, "kl_weight": 0.0, "reduction": "sum"}),
]


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("tail, kind", MODES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_mode_with_every_trap(target, tail, kind, T, small_blocks):
    """All of ASKED in chunked PyTorch, one in turn in Triton, whose interpreter is slow."""
    asked = ASKED
    if target.backend == "triton":
        turn = MODES.index((tail, kind)) + TEMPERATURES.index(T)
        asked = [ASKED[turn % len(ASKED)]]
    for op, options in asked:
        modes = {"temperature": T, "tail": tail, "divergence": kind}
        agree(op, traps(T), target, **modes, **options)


SHAPES = [
    # V, K, op, options
    (37, 0, topk_kl, {}),
    (23, 1, linear_topk_kl, {"divergence": "jsd"}),
    (300, 129, linear_topk_kl, {"divergence": "tv"}),
    (257, 20, topk_kl, {"tail": "smooth"}),
    (64, 64, linear_topk_kl, {"divergence": "reverse_kl"}),
    (97, 97, topk_kl, {"tail": "smooth"}),
    (33, 3, topk_kl, {"tail": "renormalize_both"}),
]


@pytest.mark.parametrize("V, K, op, options", SHAPES)
@pytest.mark.parametrize("target", TARGETS)
def test_any_number_of_entries_in_any_vocabulary(target, V, K, op, options, small_blocks):
    case = problem(2, 6, V, K, 2.0)
    if K:
        case.labels[0] = case.ids[0, K // 2]
    agree(op, case, target, labels=True, kl_weight=0.6, temperature=2.0, **options)


@pytest.mark.parametrize("tail, kind", MODES)
@pytest.mark.parametrize("target", TARGETS)
def test_a_support_of_the_whole_vocabulary_has_no_tail(target, tail, kind, small_blocks):
    """Not even where the teacher's mass on it is .75."""
    case = problem(1, 6, 20, 20)
    case.log_probs[:] = held(case.log_probs + math.log(0.75))
    agree(topk_kl, case, target, labels=True, kl_weight=0.5, tail=tail, divergence=kind)
    if target.backend == "torch" and kind == "forward_kl" and tail != "renormalize_both":
        whole = problem(1, 6, 20, 20)
        kl = run(linear_topk_kl, whole, target, tail=tail)[1]
        z = whole.hidden @ whole.weight.T
        right = F.kl_div(z.log_softmax(1).gather(1, whole.ids), whole.log_probs.exp())
        assert_close(kl, right * 20, rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_the_blocks_that_ship(target):
    for tail, kind in MODES[:1] + MODES[-1:]:
        modes = {"temperature": 2.0, "tail": tail, "divergence": kind}
        agree(topk_kl, traps(2.0, 257), target, labels=True, kl_weight=0.5, **modes)


@pytest.mark.parametrize("V", [50257, 151936])
@pytest.mark.parametrize("target", FP32)
def test_the_vocabularies_that_models_have(target, V):
    """Ids beyond 16 and 17 bits are read whole."""
    case = problem(2, 4, V, 20, 2.0)
    case.ids[0, 0] = V - 1
    case.ids[1, :2] = torch.tensor([131_073 % V, 0])
    case.labels[0] = V - 2
    options = {"labels": True, "kl_weight": 0.6, "temperature": 2.0}
    ours = run(linear_topk_kl, case, target, **options)
    exact = run(linear_topk_kl, case, REFERENCE, **options)
    plainly = run(linear_topk_kl, case, REFERENCE._replace(dtype=torch.float32), **options)
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target, T=2.0)
    no_worse(ours, plainly, exact)
    p = (case.hidden @ case.weight.T / 2).softmax(1)
    student_mass = p.gather(1, case.ids).sum(1).mean().float()
    assert_close(ours[4].cpu(), student_mass)
    agree(topk_kl, case, target, tail="smooth", atol=2e-6, **options)


@pytest.mark.parametrize("T", [0.1, 10.0])
@pytest.mark.parametrize("target", FP32)
def test_two_temperatures_over_a_large_flat_vocabulary(target, T):
    """The tenth power of the smallest probability is no fp32 number."""
    case = problem(2, 8, 50_304, 5, T)
    case.weight[:] = held(0.1 / min(T, 1.0) * case.weight)
    options = {"labels": True, "kl_weight": 0.5, "temperature": T}
    ours = run(linear_topk_kl, case, target, **options)
    exact = run(linear_topk_kl, case, REFERENCE, **options)
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.cpu() - right).norm() <= 1e-5 * right.norm()


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("target", TARGETS)
def test_any_chunk_gives_the_same(target, rows, small_blocks):
    """The last chunk is ragged; d_weight is the sum over chunks."""
    case = problem(5, 6, 20, 3)
    agree(linear_topk_kl, case, target, labels=True, kl_weight=0.5, _rows=rows)
    agree(linear_cross_entropy, case, target, reduction="none", _rows=rows)


@pytest.mark.parametrize("softcap, reduction", [(None, "mean"), (3.0, "none"), (30.0, "sum")])
@pytest.mark.parametrize("target", TARGETS)
def test_cross_entropy_is_torchs(target, softcap, reduction, small_blocks):
    case = traps()
    options = {"softcap": softcap, "reduction": reduction}
    upstream = torch.linspace(-1, 2, 7).double() if reduction == "none" else torch.tensor(1.7)
    ours = run(linear_cross_entropy, case, target, upstream=upstream, **options)
    hidden = case.hidden.nan_to_num(0.0).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    z = hidden @ weight.T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ce = F.cross_entropy(z, case.labels, reduction=reduction)
    gradients = torch.autograd.grad(ce, (hidden, weight), upstream.double())
    ce = ce.detach()
    zero = torch.zeros_like(ce)
    check(ours, [ce, zero, ce, zero, zero, *gradients], target)
    assert (ours[1] == 0).all() and (ours[3] == 0).all() and (ours[4] == 0).all()


# Rows and entries with something odd about them.


def merged(case):
    """Equal ids of a row in one slot with their summed probability, by a Python dictionary."""
    ids = torch.full_like(case.ids, -1)
    log_probs = torch.zeros_like(case.log_probs)
    for row in range(len(ids)):
        weights = {}
        for token, log_prob in zip(case.ids[row].tolist(), case.log_probs[row], strict=True):
            weights[token] = weights.get(token, 0.0) + log_prob.exp()
        for slot, (token, weight) in enumerate(weights.items()):
            ids[row, slot] = token
            log_probs[row, slot] = weight.log()
    return case._replace(ids=ids, log_probs=log_probs)


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("tail, kind", [MODES[1], MODES[-1]])
@pytest.mark.parametrize("target", TARGETS)
def test_equal_ids_are_one_outcome(target, tail, kind, T, small_blocks):
    """They add at T=1, whatever T."""
    case = problem(5, 6, 37, 6, 2.0)
    _, _, _, ids, log_probs, _, labels = case
    ids[0, 4] = labels[0] = ids[0, 1]
    ids[1, 0] = ids[1, 3] = ids[1, 5]
    ids[2] = labels[2] = ids[2, 0]
    ids[3, :4] = labels[3] = ids[3, 0].item()
    log_probs[3, 1:3] = -math.inf
    ids[4, 1] = ids[4, 0]
    ids[4, 3] = ids[4, 2]
    log_probs[4, :2] = -math.inf
    options = {"labels": True, "kl_weight": 0.5, "reduction": "none"}
    options |= {"temperature": T, "tail": tail, "divergence": kind}
    exact = run(topk_kl, merged(case), REFERENCE, **options)
    check(run(topk_kl, case, target, **options), exact, target, T=T)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("target", TARGETS)
def test_rows_without_entries_or_mass(target, tail, small_blocks):
    """The first has no entry, the second entries without mass."""
    case = problem(3, 6, 37, 4)
    case.ids[0] = -1
    case.log_probs[1] = -math.inf
    ours = agree(topk_kl, case, target, tail=tail, reduction="none")
    _, kl, _, teacher_mass, student_mass, gradient = (part.cpu().double() for part in ours)
    assert (teacher_mass[:2] == 0).all() and student_mass[0] == 0 and student_mass[1] > 0
    log_p = case.logits.log_softmax(1)
    outside = [token for token in range(37) if token not in case.ids[1]]
    right = torch.zeros(2).double()
    if tail == "smooth":
        right[0] = -math.log(37) - log_p[0].mean()
        right[1] = -math.log(33) - log_p[1, outside].mean()
    if tail == "ghost":
        right[1] = -log_p[1, outside].logsumexp(0)
    assert_close(kl[:2], right, atol=1e-6)
    if tail not in ("ghost", "smooth"):
        assert kl[1] == 0 and (gradient[:2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("op", [topk_kl, linear_topk_kl])
@pytest.mark.parametrize("target", TARGETS)
def test_ignored_rows_count_nowhere(target, op, reduction, small_blocks):
    """Whatever they hold."""
    case = problem(5, 6, 20, 3)
    for row, junk in ((1, math.nan), (2, math.inf), (4, 1e30)):
        case.labels[row] = -100
        case.hidden[row] = case.logits[row] = junk
        case.log_probs[row] = math.nan
    case.ids[1] = -1
    case.ids[2, 0] = case.ids[2, 1]
    kept, ignored = [0, 3], [1, 2, 4]
    options = {"labels": True, "kl_weight": 0.5, "reduction": reduction}
    upstream = torch.linspace(-1, 2, 5) if reduction == "none" else torch.tensor(1.7)
    ours = run(op, case, target, upstream=upstream, **options)
    if reduction == "none":
        upstream = upstream[kept]
    exact = run(op, case.rows(kept), REFERENCE, upstream=upstream, **options)
    for place, part in enumerate(ours):
        if part.dim() and len(part) == 5:
            assert (part[ignored] == 0).all()
            ours[place] = part[kept]
    check(ours, exact, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", TARGETS)
def test_no_row_left_is_no_loss_and_no_gradient(target, reduction, small_blocks):
    case = problem(3)
    case.labels[:] = -100
    for part in (case.hidden, case.logits, case.log_probs):
        part[:] = math.nan
    for op in (linear_topk_kl, topk_kl, linear_cross_entropy):
        for rows in (3, 0):
            few = case.rows(slice(0, rows))
            ours = run(op, few, target, labels=True, reduction=reduction)
            shape = (rows,) if reduction == "none" else ()
            assert all(field.shape == shape for field in ours[:NUM_FIELDS])
            assert all((part == 0).all() for part in ours)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
@pytest.mark.parametrize("target", TARGETS)
def test_integers_of_any_width(target, dtype, small_blocks):
    case = problem(2, 6, 200, 4)
    case.ids[1, 2] = 0 if dtype == torch.uint8 else -1
    case.labels[0] = 199  # beyond int8
    case.ids[0, :2] = torch.tensor([198, 130])
    narrow = case._replace(ids=case.ids.to(dtype), labels=case.labels.to(dtype))
    results = [run(topk_kl, each, target, labels=True, kl_weight=0.5) for each in (case, narrow)]
    assert all(map(torch.equal, *results))


# Numbers at the edge of what fp32 holds.


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("target", FP32)
def test_the_students_tail_from_tiny_to_all(target, kind, small_blocks):
    """Tails of 1e-3, 1e-17, 1e-30, 1e-87 (0 in fp32), 0, and of 1-1e-3, 1-1e-7, 1-1e-17, 1."""
    gaps = torch.tensor([9.0, 41.0, 71.0, 200.0, 1e4, -5.0, -14.0, -37.0, -1e4])
    logits = torch.randn(len(gaps), 20).double()
    logits[:, :5] += gaps[:, None]
    case = on_support(logits, 5, 0.75)
    options = {"divergence": kind, "reduction": "none"}
    ours = agree(topk_kl, case, target, **options)
    tail = case.logits.softmax(1)[:, 5:].sum(1)
    assert tail[0] > 1e-4 and 1e-32 < tail[2] < 1e-29 and 0 < 1 - tail[6] < 2e-6
    # Each gradient off S is right to its own size, not its row's.
    exact = run(topk_kl, case, REFERENCE, **options)
    for row, rtol in ((0, 2e-5), (1, 2e-5), (2, 2e-5), (5, 1e-3)):
        mine, right = ours[-1][row, 5:], exact[-1][row, 5:]
        assert_close(mine.cpu(), right.float(), rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("tail, kind", [MODES[place] for place in (0, 2, 4, 5, 6, 7, 8)])
@pytest.mark.parametrize("target", FP32)
def test_the_teachers_tail_from_none_to_all(target, tail, kind, small_blocks):
    case = on_support(torch.randn(4, 20).double(), 5, 1.0)
    masses = torch.tensor([1.0, 0.999999, 1e-7, 1e-30]).double()
    case.log_probs[:] = held((masses / 5).log()[:, None].expand(4, 5))
    options = {"tail": tail, "divergence": kind, "reduction": "none"}
    agree(topk_kl, case, target, rtol=2e-5, **options)


def far_out(T):
    """Logits of 1e4 and -1e4, on S, off it, at a label, and of a whole row."""
    case = problem(3, 6, 37, 4, T)
    _, _, logits, ids, _, _, labels = case
    logits[0, 3] = 1e4
    logits[0, 30] = -1e4
    logits[1, ids[1, 1]] = 1e4
    logits[1] -= 1e4
    logits[2, ids[2, :2]] = -1e4
    labels[0] = 30
    labels[2] = ids[2, 0]
    return case._replace(logits=held(logits))


FAR_OUT = list(zip(MODES, itertools.cycle([1.0, 0.1, 10.0]), strict=False))
FAR_OUT += list(zip(MODES[-4:], itertools.cycle([10.0, 1.0, 0.1]), strict=False))


@pytest.mark.parametrize("mode, T", FAR_OUT)
@pytest.mark.parametrize("target", FP32)
def test_logits_of_ten_thousand(target, mode, T, small_blocks):
    tail, kind = mode
    options = {"labels": True, "kl_weight": 0.5, "temperature": T, "reduction": "none"}
    # plain PyTorch's error under renormalize_both: l = -1e4 rounds by 1e-3 before the softmax over S
    atol = 1e-4 if tail == "renormalize_both" else 1e-6
    agree(topk_kl, far_out(T), target, atol=atol, tail=tail, divergence=kind, **options)
    if tail == "smooth":
        agree(topk_kl, far_out(T), target, softcap=30.0, **options)


@pytest.mark.parametrize("T", [1.0, 2.0, 0.1])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("target", FP32)
def test_a_student_equal_to_its_teacher_has_no_loss(target, kind, T, small_blocks):
    case = problem(2, 6, 20, 5, T)
    z = case.hidden @ case.weight.T
    log_probs = z.log_softmax(1).gather(1, case.ids)
    log_norm = (z / T).logsumexp(1) - z.logsumexp(1) / T
    case = case._replace(log_probs=log_probs, log_norm=log_norm)
    options = {"temperature": T, "divergence": kind, "upstream": torch.tensor(1.0)}
    _, kl, _, teacher_mass, student_mass, *gradients = run(linear_topk_kl, case, target, **options)
    assert kl.abs() < (1e-30 if kind == "tv" else 2e-6)
    assert_close(teacher_mass, student_mass)
    assert 0.01 < student_mass < 0.99  # there is a tail
    assert max(gradient.abs().max() for gradient in gradients) < 2e-6 * T
    if kind == "tv":  # a sign: where both agree but for rounding there is none
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("beta", [0.5, 0.01, 0.99])
@pytest.mark.parametrize("kind", ["jsd", "skew_kl"])
@pytest.mark.parametrize("target", FP32)
def test_mixtures_survive_underflow(target, kind, beta, small_blocks):
    z = torch.tensor([[0.0, -200.0, -300.0, -1e4], [0.0, 0.0, -1e4, 90.0]])
    case = on_support(z.double(), 2, 0.5)
    case.ids[:] = torch.tensor([[1, 2], [2, 3]])
    case.log_probs[:] = held(torch.tensor([math.log(0.5), -150.0]))
    agree(topk_kl, case, target, divergence=kind, beta=beta, reduction="none")


@pytest.mark.parametrize("target", FP32)
def test_reverse_kl_of_a_teachers_zero_costs_thirty_nats(target):
    case = on_support(torch.zeros(1, 4).double(), 2, 1.0)
    case.log_probs[:] = torch.tensor([0.0, -math.inf])
    kl = run(topk_kl, case, target, divergence="reverse_kl")[1]
    right = 0.25 * math.log(0.25) + 0.25 * (math.log(0.25) + 30) + 0.5 * (math.log(0.5) + 30)
    assert_close(kl.cpu(), torch.tensor(right), rtol=1e-6)


def padded(value, dtype=torch.float32):
    """Eleven tokens off S, no labels, have logits of `value`."""
    case = problem(2, 6, 37, 3)
    taken = {*case.ids.flatten().tolist(), *case.labels.tolist()}
    free = [token for token in range(37) if token not in taken]
    case.logits[:, free[-9:] + free[:2]] = value
    return case._replace(logits=held(case.logits, dtype))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tail, kind", MODES)
@pytest.mark.parametrize("target", FP32)
def test_logits_of_minus_infinity_off_the_support(target, tail, kind, softcap, small_blocks):
    """A padded vocabulary. A softcap of c makes -c of them."""
    options = {"tail": tail, "divergence": kind, "softcap": softcap}
    options |= {"labels": True, "kl_weight": 0.5}
    case = padded(-math.inf)
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    if tail == "smooth":  # the teacher gives them mass: no finite KL
        assert softcap or exact[1] == math.inf
        ours, exact = ours[:NUM_FIELDS], exact[:NUM_FIELDS]
    check(ours, exact, target)


@pytest.mark.parametrize("tail, T, softcap", [("ghost", 1.0, 5.0), ("truncate", 2.0, None)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("target", FP32)
def test_logits_of_their_types_least_number(target, dtype, tail, T, softcap, small_blocks):
    """As Hugging Face masks a padded vocabulary: torch.finfo(dtype).min is a number like any."""
    target = target._replace(dtype=dtype)
    case = padded(torch.finfo(dtype).min, dtype)
    options = {"labels": True, "kl_weight": 0.5, "upstream": torch.tensor(1.0)}
    options |= {"tail": tail, "temperature": T, "softcap": softcap}
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target, T=T)
    check_rounded(ours[-1], exact[-1], target)


@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@pytest.mark.parametrize("target", FP32)
def test_a_token_of_the_support_that_the_student_rules_out(target, kind, small_blocks):
    """Its logit is -inf: it costs what the divergence says of p = 0, and has no gradient."""
    case = problem(2, 6, 20, 3)
    place = 0, case.ids[0, 1]
    case.logits[place] = -math.inf
    low = case._replace(logits=case.logits.clamp(min=-1e30))
    ours = run(topk_kl, case, target, divergence=kind)
    check(ours, run(topk_kl, low, REFERENCE, divergence=kind), target)
    assert ours[-1][place] == 0


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("target", TRITON)
def test_a_label_that_is_almost_certain(target, dtype, T, small_blocks):
    """Its gradient p-1 = -.002 keeps its digits: p is not rounded before the 1 goes."""
    target = target._replace(dtype=dtype)
    logits = torch.randn(2, 40).double()
    logits[:, 7] = 10.5
    case = on_support(held(logits, dtype), 3, 0.5)
    case.labels[:] = 7
    case.ids[0, 1] = 7  # in S in one row, outside in the other
    options = {"labels": True, "kl_weight": 0.0, "temperature": T, "reduction": "sum"}
    gradient = run(topk_kl, case, target, **options)[-1][:, 7]
    exact = run(topk_kl, case, REFERENCE, **options)[-1][:, 7]
    assert (exact.abs() / 1.7 < 3e-3).all()
    check_rounded(gradient, exact, target, rtol=1e-4)


# Precision.

PRECISION = [(1.0, None), (2.0, 20.0), (0.1, None)]


@pytest.mark.parametrize("T, softcap", PRECISION)
@pytest.mark.parametrize("op", [linear_topk_kl, topk_kl])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("target", FP32)
def test_error_is_at_most_twice_plain_pytorchs(target, dtype, op, T, softcap):
    target = target._replace(dtype=dtype)
    rounds_down = op is topk_kl and target.device == "cpu" and target.backend == "triton"
    times = 4.0 if rounds_down and dtype == torch.bfloat16 else 2.0  # see check_rounded
    case = problem(6, 32, 257, 8, T, dtype)
    options = {"labels": True, "kl_weight": 0.5, "upstream": torch.tensor(1.0)}
    options |= {"temperature": T, "softcap": softcap}
    ours = run(op, case, target, **options)
    exact = run(op, case, REFERENCE, **options)
    leaves = [case.logits] if op is topk_kl else [case.hidden, case.weight]
    leaves = [part.to(target.device, dtype).requires_grad_() for part in leaves]
    z = leaves[0] if op is topk_kl else leaves[0] @ leaves[1].T
    loss = plain_loss(z, case.on(target), T, softcap)
    plainly = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    no_worse([ours[0], *ours[NUM_FIELDS:]], plainly, [exact[0], *exact[NUM_FIELDS:]], times)


@pytest.mark.parametrize("softcap", [1e3, 1e6])
@pytest.mark.parametrize("target", FP32)
def test_a_softcap_far_above_the_logits_changes_nothing(target, softcap):
    """tanh by way of exp must not lose the digits of z/c."""
    options = {"labels": True, "kl_weight": 0.5, "softcap": softcap}
    agree(topk_kl, problem(3, 6, 37, 4), target, rtol=2e-5, atol=2e-6, **options)


@pytest.mark.parametrize("target", FP32)
def test_fp16_gradients_of_a_mean_do_not_vanish(target):
    """1/N times a small probability is less than fp16 holds: 1/N goes on the sums."""
    target = target._replace(dtype=torch.float16)
    case = problem(4, 16, 97, 4, dtype=torch.float16)
    gradients = []
    for scale in (1.0, 2.0**-12):
        upstream = torch.full((4,), scale)
        ours = run(linear_topk_kl, case, target, reduction="none", upstream=upstream)
        gradients.append([part.float() / scale for part in ours[NUM_FIELDS:]])
    for whole, small in zip(*gradients, strict=True):
        assert_close(small, whole, rtol=2e-3, atol=2.0**-12)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("target", FP32)
def test_fp16_gradients_of_logits_keep_what_a_loss_scale_is_for(target, scale):
    """Probabilities of 1/20,000 have few bits in fp16 until 2^16 multiplies them."""
    target = target._replace(dtype=torch.float16)
    case = problem(3, 16, 20_000, 4, dtype=torch.float16)
    options = {"labels": True, "kl_weight": 0.5, "upstream": torch.tensor(scale)}
    targets = target, target._replace(backend="reference"), REFERENCE
    ours, plainly, exact = (run(topk_kl, case, each, **options)[-1].cpu() for each in targets)
    small = exact.abs() < exact.abs().median()  # no label, and no entry of the teacher
    no_worse([ours[small]], [plainly[small]], [exact[small]])


@pytest.mark.parametrize("dtype", HALVES)
def test_a_loss_scale_is_not_rounded_to_the_gradients_type(dtype):
    """2^17 / 3 has more bits than either type, and 2^17 is more than fp16 holds."""
    gradient = (1 + torch.arange(128) / 128).to(dtype) / 1024
    for scale in (torch.tensor(2.0**17 / 3), torch.tensor(2.0**17)):
        scaled = scale_gradient(gradient.clone(), scale, dtype)
        assert torch.equal(scaled, (gradient.double() * scale.double()).to(dtype))


@pytest.mark.parametrize("tail, kind", [MODES[2], MODES[-1], MODES[-2]])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("target", FP32)
def test_half_precision_logits_cost_one_rounding(target, dtype, tail, kind, small_blocks):
    target = target._replace(dtype=dtype)
    options = {"temperature": 2.0, "tail": tail, "divergence": kind}
    options |= {"labels": True, "kl_weight": 0.5}
    options["upstream"] = torch.tensor(1.0)
    case = traps(2.0, dtype=dtype)
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target, T=2.0)
    check_rounded(ours[-1], exact[-1], target)


# What the modes mean.

ZIPF_V, ZIPF_K = 100_000, 20


def zipf_gradient(p, log_probs, **options):
    """The logit gradient of a student with probabilities p [V]."""
    z = p.clamp(min=1e-300).log()[None]
    ids = torch.arange(ZIPF_K)[None]
    return differentiate(topk_kl, [z], [ids, log_probs[None]], TORCH.values[0], **options)[-1] / 1.7


def test_closed_forms_of_the_zipf_teacher_are_the_optima():
    """t ~ 1/i, V=100000, K=20: the gradient vanishes at the optimum of DESIGN section 3."""
    t = 1 / torch.arange(1, ZIPF_V + 1).double()
    t /= t.sum()
    log_probs = t[:ZIPF_K].log()
    mass = t[:ZIPF_K].sum()
    inside = torch.arange(ZIPF_V) < ZIPF_K
    head = torch.where(inside, t / mass, 0.0)
    smooth = torch.where(inside, t, (1 - mass) / (ZIPF_V - ZIPF_K))
    assert abs(t[0] - 0.0827) < 5e-5 and abs(mass - 0.2976) < 5e-5 and abs(head[1] - 0.139) < 5e-5
    optima = [("ghost", t), ("truncate", head), ("renormalize", head), ("smooth", smooth)]
    optima += [("renormalize_both", t), ("renormalize_both", head)]  # p off S is not identified
    for tail, optimum in optima:
        assert zipf_gradient(optimum, log_probs, tail=tail).abs().max() < 1e-9
    for tail in ("truncate", "renormalize"):
        assert zipf_gradient(t, log_probs, tail=tail).abs().max() > 1e-3
    # (1-a) CE + a truncate: t / (1 - a(1-mass)) on S, (1-a) times that off S
    a = 0.4
    mixed = torch.where(inside, t, (1 - a) * t) / (1 - a * (1 - mass))
    gradient = zipf_gradient(mixed, log_probs, tail="truncate")[0]
    assert ((1 - a) * (mixed - t) + a * gradient).abs().max() < 1e-9
    # The minimum is negative: clamping at zero would throw it away.
    z = head.clamp(min=1e-300).log()[None]
    loss = topk_kl(z, torch.arange(ZIPF_K)[None], log_probs[None], tail="truncate").loss
    assert_close(loss, mass * mass.log(), rtol=1e-6)


def test_another_temperature_takes_the_exact_normaliser():
    """With the tail as one token the head would keep more than twice its mass."""
    z = -torch.arange(1, 5001).double().log()[None]
    T, K = 2.0, 64
    log_probs = z.log_softmax(1)
    log_norm = (z / T).logsumexp(1) - z.logsumexp(1) / T
    ids = torch.arange(K)[None]
    out = topk_kl(z, ids, log_probs[:, :K], temperature=T, log_norm=log_norm)
    true_mass = (z / T).softmax(1)[0, :K].sum()
    assert_close(out.teacher_mass, true_mass, rtol=1e-9)
    assert out.kl.abs() < 1e-12
    folded = torch.cat([log_probs[0, :K], log_probs[0, K:].logsumexp(0)[None]])
    assert (folded / T).softmax(0)[:K].sum() > 2 * true_mass


@pytest.mark.parametrize("target", TARGETS)
def test_micro_batches_sum_to_the_batch(target, small_blocks):
    case = problem(5, V=20)
    options = {"labels": True, "kl_weight": 0.5, "reduction": "sum"}
    parts = [case.rows(slice(0, 2)), case.rows(slice(2, 5))]
    first, second = (run(linear_topk_kl, part, target, **options) for part in parts)
    whole = run(linear_topk_kl, case, REFERENCE, **options)
    summed = [one + other for one, other in zip(first[:-2], second[:-2], strict=True)]
    check([*summed[:5], first[-1] + second[-1]], [*whole[:5], whole[-1]], target)
    assert_close(whole[0], 0.5 * whole[2] + 0.5 * whole[1], rtol=1e-12)


# Refusals.

REFUSALS = [
    # argument, its wrong value (or a function of the right one), what the message says
    ("weight", lambda weight: weight[:, :3], "hidden .N,D.=.* D must agree"),
    ("hidden", lambda hidden: hidden[0], "hidden has shape"),
    ("hidden", lambda hidden: hidden.long(), "hidden has dtype torch.int64"),
    ("hidden", lambda hidden: hidden.float(), "one dtype"),
    ("ids", lambda ids: ids[:2], "ids has shape"),
    ("ids", lambda ids: ids.float(), "ids has dtype"),
    ("ids", lambda ids: ids.fill_(37), "ids holds 37: .*below the vocabulary's V=37"),
    ("log_probs", lambda log_probs: log_probs[:, :2], "both must be .N,K."),
    ("labels", lambda labels: labels[:2], "labels has shape"),
    ("labels", lambda labels: labels.double(), "labels has dtype"),
    ("labels", lambda labels: labels.fill_(37), "labels holds 37: a label must be in 0..36"),
    ("labels", lambda labels: labels.fill_(-1), "labels holds -1:"),
    ("temperature", 0, "temperature=0"),
    ("temperature", math.nan, "temperature=nan"),
    ("temperature", 2.0, "temperature=2.0: needs log_norm"),
    ("log_norm", torch.zeros(3), "log_norm has shape"),
    ("softcap", 0, "softcap=0"),
    ("kl_weight", 1.5, "kl_weight=1.5"),
    ("beta", 1, "beta=1"),
    ("tail", "gost", "tail='gost'"),
    ("divergence", "kl", "divergence='kl'"),
    ("reduction", "avg", "reduction='avg'"),
    ("backend", "cuda", "backend='cuda'"),
    ("backend", "triton", "backend='triton': the kernels compute in fp32"),
]


def refused(**changes):
    case = problem(6, 8, 37, 4)
    arguments = {name: getattr(case, name) for name in ("hidden", "weight", "ids", "log_probs")}
    arguments["labels"] = case.labels
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ValueError) as caught:
        linear_topk_kl(*(arguments.pop(name) for name in list(arguments)[:4]), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    return caught


@pytest.mark.parametrize("name, change, message", REFUSALS)
def test_refusals_name_the_value_and_the_rule(name, change, message):
    assert refused(**{name: change}).match(message)


@pytest.mark.parametrize("tail", TAILS[1:])
def test_other_tails_take_the_forward_kl_only(tail):
    assert refused(tail=tail, divergence="jsd").match(f"divergence='jsd' with tail='{tail}'")


def test_labels_must_be_there_where_they_count():
    assert refused(kl_weight=0.5, labels=None).match("kl_weight=0.5: below 1 the loss needs")
    with pytest.raises(ValueError, match="labels=None"):
        linear_cross_entropy(torch.zeros(2, 3), torch.zeros(4, 3), None)


WITHOUT_INTERPRETER = """
import torch
from kernels import linear_cross_entropy, linear_full_kl, linear_log_probs, linear_topk_kl, topk_kl
h, ids = torch.randn(4, 4), torch.zeros(4, 2, dtype=torch.long)
calls = [(linear_topk_kl, h, h, ids, ids.float()), (topk_kl, h, ids, ids.float())]
calls += [(linear_cross_entropy, h, h, ids[:, 0]), (linear_log_probs, h, h, ids)]
calls += [(linear_full_kl, h, h, h, h), (topk_kl, h, None, h)]
for op, *arguments in calls:
    op(*arguments)
    try:
        op(*arguments, backend="triton")
    except ValueError as error:
        print(error)
"""


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused():
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all("backend='triton'" in line and "CUDA" in line for line in lines)
