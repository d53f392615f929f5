"""The losses against a teacher that is known whole: `linear_full_kl`, and `ids=None`.

Vt of the V tokens are the teacher's too. The reference is that of sparse targets, a slot a token.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import linear_full_kl, linear_topk_kl, topk_kl
from kernels.checks import DIVERGENCES
from tests import kernel_cases as cases
from tests.helpers import assert_close
from tests.kernel_cases import (
    MIXED,
    REFERENCE,
    all_targets,
    capped,
    check,
    differentiate,
    fp32_targets,
    held,
    problem,
    run,
)

all_kinds = pytest.mark.parametrize("kind", DIVERGENCES)


def full(case, target, labels=False, **options):
    """A student of V=20 tokens, and a teacher of the first 17 with a width of its own."""
    T = options.get("temperature", 1.0)
    teacher = problem(len(case.ids), 4, 17, T=T, seed=1)
    teacher.hidden[case.labels == -100] = math.nan
    options["labels"] = case.labels if labels else None
    return differentiate(
        linear_full_kl,
        case[:2],
        teacher[:2],
        target,
        **options,
    )


def whole(case, target, op=topk_kl, labels=False, **options):
    """log_probs [N,V], one of them -inf; the rows' masses are 1, .75, 1 and 0."""
    T = options.get("temperature", 1.0)
    log_probs = problem(4, V=20, T=T, seed=2).logits.log_softmax(1)
    log_probs[0, 5] = -math.inf
    log_probs[1] += math.log(0.75)
    log_probs[3] = -math.inf
    sources = [case.logits] if op is topk_kl else case[:2]
    options["labels"] = case.labels if labels else None
    return differentiate(op, sources, [None, held(log_probs)], target, **options)


def traps(T=1.0):
    """A label that the teacher does not have, and a row that is ignored whatever it holds."""
    case = problem(4, V=20, T=T)
    case.labels[:] = torch.tensor([18, 5, -100, 0])
    case.hidden[2] = math.nan
    case.logits[2] = math.nan
    return case


@pytest.mark.parametrize(
    "T, softcap, teacher_softcap",
    [(1.0, None, 3.0), (2.0, 5.0, None), (0.5, 4.0, 6.0)],
)
@all_kinds
def test_a_teachers_head_is_one_slot_for_each_token(kind, T, softcap, teacher_softcap):
    """The reference of sparse targets is checked against the losses in words."""
    teacher = problem(4, 4, 17, T=T, seed=1)
    scores = capped(teacher.hidden @ teacher.weight.T, teacher_softcap)
    log_norm = (scores / T).logsumexp(1) - scores.logsumexp(1) / T
    log_probs = F.pad(scores.log_softmax(1), (0, 3), value=-math.inf)
    ids = torch.arange(20).expand(4, 20)
    case = traps(T)._replace(ids=ids, log_probs=log_probs, log_norm=log_norm)
    options = {
        "temperature": T,
        "divergence": kind,
        "softcap": softcap,
        "beta": 0.3,
        "reduction": "sum",
        **MIXED,
    }
    ours = full(case, REFERENCE, teacher_softcap=teacher_softcap, **options)
    exact = run(linear_topk_kl, case, REFERENCE, **options)
    check(ours, exact, REFERENCE)


ASKED = [
    (full, {"reduction": "sum", "beta": 0.8}),
    (full, {**MIXED, "teacher_softcap": 3.0}),
    (whole, {**MIXED, "beta": 0.2, "softcap": 4.0}),
    (full, {**MIXED, "softcap": 5.0, "reduction": "none"}),
    (whole, {**MIXED, "op": linear_topk_kl}),
]


@pytest.mark.parametrize("T", cases.TEMPERATURES)
@all_kinds
@all_targets
def test_every_divergence_with_every_trap(target, kind, T, small_blocks, chunks_of):
    """All of ASKED in chunked PyTorch, one in turn in Triton, whose interpreter is slow."""
    chunks_of(3)
    asked = ASKED
    if target.backend == "triton":
        turn = DIVERGENCES.index(kind) + 2 * cases.TEMPERATURES.index(T)
        asked = [ASKED[turn % len(ASKED)]]
    if target.device == "cuda" and turn % 2:  # half as many compilations
        return
    for losses, options in asked:
        case = traps(T) if "labels" in options else problem(4, V=20, T=T)
        options = {"temperature": T, "divergence": kind, **options}
        ours = losses(case, target, **options)
        check(ours, losses(case, REFERENCE, **options), target, T)


@pytest.mark.parametrize("mode", cases.MODES)
@pytest.mark.parametrize(
    "target",
    [*cases.TARGETS, pytest.param(REFERENCE, id="reference")],
)
def test_a_whole_distribution_is_one_slot_for_each_token(target, mode, small_blocks):
    """Under any tail, whatever its mass; log_norm is worked out where it is not given."""
    case = problem(2, V=20)
    log_probs = problem(2, V=20, seed=1).logits.log_softmax(1)
    log_probs[1] += math.log(0.75)
    log_probs = held(log_probs)
    slots = torch.arange(20).expand(2, 20)
    worked_out = (log_probs / 2).logsumexp(1)
    given = worked_out + 0.3
    options = {**MIXED, "labels": case.labels, **mode}
    for T, log_norm, exact_log_norm in (
        (1.0, None, None),
        (2.0, None, worked_out),
        (2.0, given, given),
    ):
        options |= {"temperature": T, "log_norm": log_norm}
        whole = [None, log_probs]
        ours = differentiate(
            topk_kl,
            [case.logits],
            whole,
            target,
            **options,
        )
        options["log_norm"] = exact_log_norm
        sparse = [slots, log_probs]
        exact = differentiate(
            topk_kl,
            [case.logits],
            sparse,
            REFERENCE,
            **options,
        )
        check(ours, exact, target)


@pytest.mark.parametrize("T", [1.0, 0.1])
@all_kinds
@fp32_targets
def test_logits_of_ten_thousand_and_of_minus_infinity(target, kind, T, small_blocks):
    """The student's, at a label too; a padded vocabulary where the teacher has nothing."""
    case = problem(2, T=T)
    case.logits[0, [3, 30]] = torch.tensor([1e4, -1e4]).double()
    case.labels[:] = torch.tensor([30, 0])
    log_probs = problem(2, T=T, seed=1).logits.log_softmax(1)
    log_probs[:, 20:25] = -math.inf
    if kind == "forward_kl":
        case.logits[1, 20:25] = -math.inf
    options = {
        "temperature": T,
        "divergence": kind,
        **MIXED,
        "labels": case.labels,
    }
    inputs = [case.logits], [None, held(log_probs)]
    ours = differentiate(topk_kl, *inputs, target, **options)
    exact = differentiate(topk_kl, *inputs, REFERENCE, **options)
    check(ours, exact, target, T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_teacher_of_any_dtype_gets_no_gradient_and_stays_as_it_is(backend, dtype, small_blocks):
    student = [part.float().requires_grad_() for part in problem()[:2]]
    before = [held(part, dtype) for part in problem(4, 4, 31, seed=1)[:2]]
    teacher = [part.to(dtype, copy=True).requires_grad_() for part in before]
    options = {"softcap": 5.0, "backend": backend}
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="float64 is for"):
            linear_full_kl(*student, *teacher, **options)
        return
    loss = linear_full_kl(*student, *teacher, **options).loss
    loss.backward()
    exact = differentiate(linear_full_kl, student, before, REFERENCE, softcap=5.0)[0]
    assert_close(loss.detach(), exact.float())
    for part, old in zip(teacher, before, strict=True):
        assert part.grad is None
        assert torch.equal(part.double(), old)


@pytest.mark.parametrize("losses", [full, whole])
@pytest.mark.parametrize("dtype", cases.HALVES)
@fp32_targets
def test_half_precision_costs_little(target, dtype, losses, small_blocks):
    """Logits in fp32 and a rounded gradient: .24% of it; in half-precision logits one rounding."""
    target = target._replace(dtype=dtype)
    case = problem(4, 32, V=20, dtype=dtype)
    options = {"temperature": 2.0, "divergence": "jsd", **MIXED}
    ours = losses(case, target, **options)
    exact = losses(case, REFERENCE, **options)
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.cpu() - right).norm() <= 5e-3 * right.norm()


@pytest.mark.parametrize("target", [cases.INTERPRETER])
def test_a_teacher_in_any_layout(target):
    """A transposed teacher, and a column of linear_topk's log_norm."""
    logits = problem(4, V=20).logits.float()
    teacher = problem(4, V=20, T=2.0, seed=2)
    log_probs = teacher.logits.log_softmax(1).float()
    log_norm = teacher.log_norm.float()
    transposed = log_probs.t().contiguous().t()
    column = log_norm.repeat_interleave(2)[::2]
    options = {"temperature": 2.0, "backend": target.backend}
    exact = topk_kl(logits, None, log_probs, log_norm=log_norm, **options).kl
    ours = topk_kl(logits, None, transposed, log_norm=column, **options).kl
    assert_close(ours, exact)


REFUSALS = [
    (
        "teacher_weight",
        torch.zeros(38, 4),
        "has 38 rows: must be at most the student's V=37",
    ),
    (
        "teacher_weight",
        torch.zeros(0, 4),
        "teacher_weight .*: V and D must be at least 1",
    ),
    (
        "teacher_weight",
        torch.zeros(31, 5),
        "teacher_hidden .N,D.=.* D must agree",
    ),
    (
        "teacher_hidden",
        torch.zeros(3, 4),
        "teacher_hidden has shape .*N=4",
    ),
    ("hidden", torch.zeros(4, 5), "hidden .N,D.=.* D must agree"),
    ("teacher_softcap", 0.0, "teacher_softcap=0.0"),
    (
        "kl_weight",
        0.5,
        "kl_weight=0.5: below 1 the loss needs labels",
    ),
    ("labels", torch.zeros(4), "labels has dtype"),
    ("backend", "cuda", "backend='cuda'"),
]


@pytest.mark.parametrize("name, wrong, message", REFUSALS)
def test_refusals_name_the_value_and_the_rule(name, wrong, message):
    arguments = {
        "hidden": torch.zeros(4, 6),
        "weight": torch.zeros(37, 6),
        "teacher_hidden": torch.zeros(4, 4),
        "teacher_weight": torch.zeros(31, 4),
    }
    with pytest.raises(ValueError, match=message):
        linear_full_kl(**arguments | {name: wrong})
