"""The losses against a teacher that is known whole: `linear_full_kl`, and `ids=None`.

Vt of the V tokens are the teacher's too. The reference is checked against the losses in words.
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
    REFERENCE,
    check,
    differentiate,
    held,
    problem,
)

all_targets = pytest.mark.parametrize("target", cases.TARGETS)
fp32_targets = pytest.mark.parametrize("target", cases.FP32)
all_kinds = pytest.mark.parametrize("kind", DIVERGENCES)


def full(case, target, labels=False, **options):
    """A student of V=20 tokens, and a teacher of the first 17 with a width of its own."""
    N, T = len(case.ids), options.get("temperature", 1.0)
    teacher = problem(N, 4, 17, T=T, seed=1)
    ignored = case.labels == -100
    teacher.hidden[ignored] = math.nan
    options["labels"] = case.labels if labels else None
    return differentiate(linear_full_kl, case[:2], teacher[:2], target, **options)


def whole(case, target, op=topk_kl, labels=False, mass=None, **options):
    """log_probs [N,V], one of them -inf, one row's mass .75; `mass` is log_norm's part."""
    T = options.get("temperature", 1.0)
    teacher = problem(len(case.ids), V=20, T=T, seed=2)
    log_probs = teacher.logits.log_softmax(1)
    log_probs[0, 5] = -math.inf
    log_probs[1] += math.log(0.75)
    log_probs = held(log_probs)
    if mass is not None:
        options["log_norm"] = held((log_probs / T).logsumexp(1) - math.log(mass))
    sources = [case.logits] if op is topk_kl else case[:2]
    options["labels"] = case.labels if labels else None
    return differentiate(op, sources, [None, log_probs], target, **options)


def traps(T=1.0):
    """A label that the teacher does not have, and a row that is ignored whatever it holds."""
    case = problem(4, V=20, T=T)
    case.labels[:] = torch.tensor([18, 5, -100, 0])
    case.hidden[2] = case.logits[2] = math.nan
    return case


def capped(z, softcap):
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize(
    "T, caps",
    [(1.0, (None, 3.0)), (2.0, (5.0, None)), (0.5, (4.0, 6.0))],
)
@all_kinds
def test_the_reference_is_the_loss_in_words(kind, T, caps):
    case = problem(4, V=20, T=T)
    case.labels[0] = 18
    teacher = problem(4, 4, 17, T=T, seed=1)
    hidden = case.hidden.clone().requires_grad_()
    z = capped(hidden @ case.weight.T, caps[0])
    t = (capped(teacher.hidden @ teacher.weight.T, caps[1]) / T).softmax(1)
    t = F.pad(t, (0, 3))
    p = (z / T).softmax(1)
    kl = [cases.divergence_in_words(t[row], p[row], kind) for row in range(4)]
    loss = 0.3 * F.cross_entropy(z, case.labels) + 0.7 * T * T * sum(kl) / 4
    options = {
        "temperature": T,
        "divergence": kind,
        "softcap": caps[0],
        "teacher_softcap": caps[1],
    }
    options |= {
        "labels": True,
        "kl_weight": 0.7,
        "beta": 0.3,
        "upstream": torch.ones(()),
    }
    ours = full(case, REFERENCE, **options)
    assert_close(ours[0], loss.detach(), rtol=1e-9)
    assert_close(
        ours[-2],
        torch.autograd.grad(loss, hidden)[0],
        rtol=1e-8,
        atol=1e-10,
    )
    assert abs(ours[3] - 1) < 1e-12 and abs(ours[4] - 1) < 1e-12


ASKED = [
    (full, {"reduction": "sum", "beta": 0.8}),
    (
        full,
        {
            "labels": True,
            "kl_weight": 0.3,
            "teacher_softcap": 3.0,
        },
    ),
    (
        whole,
        {"labels": True, "kl_weight": 0.4, "beta": 0.2, "softcap": 4.0},
    ),
    (
        full,
        {
            "labels": True,
            "kl_weight": 0.7,
            "softcap": 5.0,
            "reduction": "none",
        },
    ),
    (whole, {"op": linear_topk_kl, "labels": True, "mass": 0.7}),
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
@pytest.mark.parametrize("target", [*cases.TARGETS, pytest.param(REFERENCE, id="reference")])
def test_a_whole_distribution_is_one_slot_for_each_token(target, mode, small_blocks):
    """Under any tail, whatever its mass; log_norm is worked out where it is not given."""
    case = problem(2, V=20, K=20)
    log_probs = case.log_probs.gather(1, case.ids.argsort(1))
    log_probs[1] += math.log(0.75)
    log_probs = held(log_probs)
    slots = [torch.arange(20).expand(2, 20), log_probs]
    worked_out = (log_probs / 2).logsumexp(1)
    options = {
        "temperature": 2.0,
        "labels": case.labels,
        "kl_weight": 0.5,
        **mode,
    }
    for given in (None, worked_out + 0.3):
        log_norm = worked_out if given is None else given
        exact = differentiate(
            topk_kl,
            case[2:3],
            slots,
            REFERENCE,
            log_norm=log_norm,
            **options,
        )
        whole = [None, log_probs]
        ours = differentiate(topk_kl, case[2:3], whole, target, log_norm=given, **options)
        check(ours, exact, target)


@pytest.mark.parametrize("T", [1.0, 0.1])
@all_kinds
@fp32_targets
def test_logits_of_ten_thousand_and_of_minus_infinity(target, kind, T, small_blocks):
    """The student's, at a label too; a padded vocabulary where the teacher has nothing."""
    case = problem(2, T=T)
    case.logits[0, [3, 30]] = torch.tensor([1e4, -1e4]).double()
    case.labels[0] = 30
    log_probs = problem(2, T=T, seed=1).logits.log_softmax(1)
    log_probs[:, 20:25] = -math.inf
    if kind == "forward_kl":
        case.logits[1, 20:25] = -math.inf
        case.labels[1] = 0
    options = {
        "temperature": T,
        "divergence": kind,
        "labels": case.labels,
        "kl_weight": 0.5,
    }
    targets = [None, held(log_probs)]
    exact = differentiate(topk_kl, [case.logits], targets, REFERENCE, **options)
    check(
        differentiate(topk_kl, [case.logits], targets, target, **options),
        exact,
        target,
        T,
    )


@pytest.mark.parametrize("T", [1.0, 2.0])
@all_kinds
@fp32_targets
def test_a_student_equal_to_its_teacher_has_no_loss(target, kind, T, small_blocks):
    case = problem(2, V=20)
    options = {
        "temperature": T,
        "divergence": kind,
        "softcap": 5.0,
        "teacher_softcap": 5.0,
    }
    ours = differentiate(linear_full_kl, case[:2], case[:2], target, **options)
    _, kl, *_, d_hidden, d_weight = ours
    assert kl.abs() < 2e-6 and d_hidden.abs().max() < 1e-5 and d_weight.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_a_teacher_of_any_dtype_gets_no_gradient_and_stays_as_it_is(backend, dtype, small_blocks):
    case = problem()
    hidden, weight = (part.float().requires_grad_() for part in case[:2])
    teacher = [part.to(dtype).requires_grad_() for part in problem(4, 4, 31, seed=1)[:2]]
    before = [part.detach().clone() for part in teacher]
    if backend == "triton" and dtype == torch.float64:
        with pytest.raises(ValueError, match="float64 is for"):
            linear_full_kl(hidden, weight, *teacher, backend=backend)
        return
    out = linear_full_kl(hidden, weight, *teacher, softcap=5.0, backend=backend)
    out.loss.backward()
    exact = differentiate(linear_full_kl, case[:2], before, REFERENCE, softcap=5.0)
    assert_close(out.loss.detach(), exact[0].float())
    assert hidden.grad is not None and weight.grad is not None
    for part, old in zip(teacher, before, strict=True):
        assert part.grad is None and torch.equal(part.detach(), old)


@pytest.mark.parametrize("losses", [full, whole])
@pytest.mark.parametrize("dtype", cases.HALVES)
@fp32_targets
def test_half_precision_costs_little(target, dtype, losses, small_blocks):
    """Logits in fp32 and a rounded gradient: .24% of it; in half-precision logits one rounding."""
    target = target._replace(dtype=dtype)
    case = problem(4, 32, V=20, dtype=dtype)
    options = {
        "labels": True,
        "kl_weight": 0.5,
        "temperature": 2.0,
        "divergence": "jsd",
    }
    ours = losses(case, target, **options)
    exact = losses(case, REFERENCE, **options)
    for mine, right in zip(ours, exact, strict=True):
        assert (mine.cpu() - right).norm() <= 5e-3 * right.norm()


REFUSALS = [
    (
        "teacher_weight",
        torch.zeros(38, 4),
        "teacher_weight has 38 rows: must be at most the student's V=37",
    ),
    ("teacher_weight", torch.zeros(0, 4), r"teacher_weight .V,D.=.0, 4.: V and D must be at least 1"),
    (
        "teacher_weight",
        torch.zeros(31, 5),
        "teacher_hidden .N,D.=.* D must agree",
    ),
    (
        "teacher_weight",
        torch.zeros(31, 4).bfloat16(),
        "teacher_hidden is .*one dtype",
    ),
    (
        "teacher_hidden",
        torch.zeros(3, 4),
        "teacher_hidden has shape .*N=4",
    ),
    ("hidden", torch.zeros(4, 5), "hidden .N,D.=.* D must agree"),
    ("teacher_softcap", 0.0, "teacher_softcap=0.0"),
    ("kl_weight", 0.5, "kl_weight=0.5: below 1 the loss needs labels"),
    ("labels", torch.full((4,), 37), "labels holds 37"),
    ("temperature", -1.0, "temperature=-1.0"),
    ("divergence", "kl", "divergence='kl'"),
    ("backend", "cuda", "backend='cuda'"),
]


@pytest.mark.parametrize("name, wrong, message", REFUSALS)
def test_refusals_name_the_value_and_the_rule(name, wrong, message):
    arguments = {
        "hidden": torch.zeros(4, 6),
        "weight": torch.zeros(37, 6),
    }
    arguments |= {
        "teacher_hidden": torch.zeros(4, 4),
        "teacher_weight": torch.zeros(31, 4),
    }
    with pytest.raises(ValueError, match=message):
        linear_full_kl(**arguments | {name: wrong})


def test_a_whole_distribution_has_the_vocabularys_width():
    with pytest.raises(ValueError, match="without ids it must be .N,V. with V=37"):
        topk_kl(torch.zeros(4, 37), None, torch.zeros(4, 36))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_teacher_in_any_layout(backend):
    """A column of linear_topk's log_norm, a transposed teacher, a row that other memory follows."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: Triton's interpreter is off")
    teacher = problem(4, V=20, T=2.0, seed=2)
    log_probs = teacher.logits.log_softmax(1).float()
    norms = torch.stack([teacher.log_norm, teacher.log_norm * 7], 1).float()
    logits = problem(4, V=20).logits.float()
    layouts = [
        log_probs,
        log_probs.t().contiguous().t(),
        torch.cat([log_probs, log_probs], 1)[:, :20],
    ]
    found = []
    for layout in layouts:
        out = topk_kl(
            logits,
            None,
            layout,
            temperature=2.0,
            log_norm=norms[:, 0],
            backend=backend,
        )
        found.append(out.kl)
    exact = topk_kl(
        logits.double(),
        None,
        log_probs.double(),
        temperature=2.0,
        log_norm=norms[:, 0].double(),
        backend="reference",
    )
    for kl in found:
        assert_close(kl, exact.kl.float(), rtol=1e-5)


@pytest.mark.parametrize("target", cases.FP32)
def test_a_teacher_without_mass_is_no_loss(target):
    """Every log-probability is -inf: 0 whatever the temperature, and with no log_norm to go by."""
    logits = problem(2, V=20).logits.float().to(target.device)
    nothing = torch.full_like(logits, -math.inf)
    out = topk_kl(
        logits,
        None,
        nothing,
        temperature=2.0,
        backend=target.backend,
    )
    assert out.kl == 0 and out.teacher_mass == 0
