"""The losses from sparse targets: every mode, gradient and trap.

The reference is checked against the losses in words, and everything else against the reference in
float64. Chunked PyTorch runs in float64; the Triton kernels in Triton's interpreter, and on a GPU.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from kernels import (
    linear_cross_entropy,
    linear_full_kl,
    linear_log_probs,
    linear_topk_kl,
    topk_kl,
)
from kernels.checks import DIVERGENCES
from kernels.losses import scale_gradient
from tests import kernel_cases as cases
from tests.helpers import assert_close
from tests.kernel_cases import (
    MIXED,
    MODES,
    NUM_FIELDS,
    REFERENCE,
    agree,
    all_targets,
    capped,
    check,
    check_rounded,
    fp32_targets,
    held,
    on_support,
    problem,
    run,
    traps,
)

all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES])
all_modes = pytest.mark.parametrize("mode", MODES, ids=str)


# The reference.


def outcomes_in_words(p, ids, log_probs, log_norm, T, tail):
    """The probabilities of one row's outcomes, the teacher's and the student's; p [V]."""
    tokens = range(len(p))
    weights = [log_probs[ids == token].exp().sum() for token in tokens]
    inside = torch.tensor([token in ids for token in tokens])
    t = torch.stack(weights) ** (1 / T) / log_norm.exp()
    rest = (1 - t.sum()).clamp(min=0)
    if tail == "smooth":
        share = rest / (~inside).sum()
        return torch.where(inside, t, share), p
    t = t[inside]
    off_support = p[~inside].sum()
    p = p[inside]
    if tail == "ghost":
        return torch.cat([t, rest[None]]), torch.cat([p, off_support[None]])
    if tail == "renormalize_both":
        p = p / p.sum()
    if tail != "truncate":
        t = t / t.sum()
    return t, p


def kl_divergence(a, b):
    """KL(a|b) of probabilities [K], with 0 log 0 = 0."""
    possible = a > 0
    return (a[possible] * (a[possible] / b[possible]).log()).sum()


def divergence_in_words(t, p, kind, beta=0.3):
    """Teacher t and student p [K]; nothing of kernels/ is used."""
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


@pytest.mark.parametrize(
    "T, softcap, reduction",
    [(1.0, None, "mean"), (2.0, 4.0, "sum"), (0.5, None, "none")],
)
@all_modes
def test_the_reference_is_the_loss_in_words(mode, T, softcap, reduction):
    case = traps(T)
    kept = case.labels != -100
    few = case.rows(kept)
    hidden = case.hidden.requires_grad_()
    weight = case.weight.requires_grad_()
    z = capped(hidden[kept] @ weight.T, softcap)
    kind = mode.get("divergence", "forward_kl")
    kl = []
    for row, ids in enumerate(few.ids):
        p = (z[row] / T).softmax(0)
        teacher = ids, few.log_probs[row], few.log_norm[row]
        outcomes = outcomes_in_words(p, *teacher, T, mode["tail"])
        kl.append(divergence_in_words(*outcomes, kind))
    ce = F.cross_entropy(z, few.labels, reduction="none")
    loss = torch.zeros(7).double()
    loss[kept] = 0.3 * ce + 0.7 * T * T * torch.stack(kl)
    if reduction != "none":
        loss = loss.sum()
    if reduction == "mean":
        loss = loss / len(kl)
    upstream = torch.ones_like(loss)
    gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    options = {
        "labels": True,
        "kl_weight": 0.7,
        "temperature": T,
        "softcap": softcap,
        "beta": 0.3,
        "reduction": reduction,
        "upstream": upstream,
        **mode,
    }
    ours = run(linear_topk_kl, case, REFERENCE, **options)
    exact = [loss.detach(), *gradients]
    for mine, right in zip([ours[0], *ours[-2:]], exact, strict=True):
        assert_close(mine, right, rtol=1e-9, atol=1e-10)
    case = case._replace(logits=(hidden @ weight.T).detach())
    of_logits = run(topk_kl, case, REFERENCE, **options)
    assert_close(of_logits[0], ours[0])


# Modes and shapes.

ASKED = [
    (linear_topk_kl, {}),
    (
        linear_topk_kl,
        {**MIXED, "softcap": 4.0, "reduction": "none"},
    ),
    (linear_topk_kl, {**MIXED, "reduction": "sum"}),
    (topk_kl, {**MIXED, "beta": 0.2}),
    (
        topk_kl,
        {
            "labels": True,
            "reduction": "none",
            "beta": 0.7,
            "softcap": 6.0,
        },
    ),
    (
        topk_kl,
        {"labels": True, "kl_weight": 0.0, "reduction": "sum"},
    ),
]


@pytest.mark.parametrize("T", cases.TEMPERATURES)
@all_modes
@all_targets
def test_every_mode_with_every_trap(target, mode, T, small_blocks, chunks_of):
    """All of ASKED in chunked PyTorch, one in turn in Triton, whose interpreter is slow."""
    chunks_of(2)
    asked = ASKED
    if target.backend == "triton":
        turn = MODES.index(mode) + cases.TEMPERATURES.index(T)
        asked = [ASKED[turn % len(ASKED)]]
    if target.device == "cuda" and turn % 3:  # a third as many compilations
        return
    for op, options in asked:
        agree(op, traps(T), target, temperature=T, **mode, **options)


SHAPES = [
    (37, 0, topk_kl, {}),
    (23, 1, linear_topk_kl, {"divergence": "jsd"}),
    (300, 129, linear_topk_kl, {"divergence": "tv"}),
    (257, 20, topk_kl, {"tail": "smooth"}),
    (64, 64, linear_topk_kl, {"divergence": "reverse_kl"}),
    (33, 3, topk_kl, {"tail": "renormalize_both"}),
    (20, 20, topk_kl, {}),
    (20, 20, topk_kl, {"tail": "truncate"}),
    (20, 20, topk_kl, {"tail": "smooth"}),
]


@pytest.mark.parametrize("V, K, op, options", SHAPES)
@all_targets
def test_any_number_of_entries_in_any_vocabulary(target, V, K, op, options, small_blocks):
    """Without a token off S there is no tail, not even where the teacher's mass on it is .75."""
    case = problem(2, 6, V, K, 2.0)
    case = case._replace(log_probs=held(case.log_probs + math.log(0.75)))
    if K:
        case.labels[0] = case.ids[0, K // 2]
    agree(op, case, target, temperature=2.0, **MIXED, **options)


@pytest.mark.parametrize("V, T", [(50257, 0.1), (50257, 10.0), (151936, 2.0)])
@fp32_targets
def test_the_vocabularies_that_models_have(target, V, T):
    """Ids beyond 16 and 17 bits are read whole; a probability's tenth power is no fp32 number."""
    case = problem(2, 4, V, 20, T)
    case.ids[0, 0] = V - 1
    case.ids[1, :2] = torch.tensor([131_073 % V, 0])
    case.labels[0] = V - 2
    options = {"temperature": T, **MIXED}
    plain = REFERENCE._replace(dtype=torch.float32)
    targets = target, plain, REFERENCE
    results = [run(linear_topk_kl, case, each, **options) for each in targets]
    cases.no_worse(*results)
    agree(topk_kl, case, target, tail="smooth", atol=2e-6, **options)


@pytest.mark.parametrize("target", [cases.TORCH_FP32, cases.CUDA])
def test_many_chunks_of_half_precision(target, chunks_of):
    """Logits are fp32, and d_weight is rounded once, not in each chunk."""
    chunks_of(1)
    case = problem(64, V=20, dtype=torch.bfloat16)
    target = target._replace(dtype=torch.bfloat16)
    ours = run(linear_topk_kl, case, target)
    exact = run(linear_topk_kl, case, REFERENCE)
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target)
    d_weight = ours[-1].cpu()
    assert (d_weight - exact[-1]).norm() <= 4e-3 * exact[-1].norm()


@pytest.mark.parametrize(
    "softcap, reduction",
    [(None, "sum"), (3.0, "none")],
)
@all_targets
def test_cross_entropy_is_a_loss_without_a_teacher(target, softcap, reduction, small_blocks):
    options = {"softcap": softcap, "reduction": reduction}
    ours = run(linear_cross_entropy, traps(), target, **options)
    options |= {"labels": True, "kl_weight": 0.0}
    exact = run(linear_topk_kl, traps(), REFERENCE, **options)
    for field in (1, 3, 4):  # kl and both masses
        exact[field] = torch.zeros_like(exact[0])
    check(ours, exact, target)


# Rows and entries with something odd about them.


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [3, 0])
@all_targets
def test_no_row_left_is_no_loss_and_no_gradient(target, rows, reduction, small_blocks):
    case = traps().rows([4] * rows)
    shape = (rows,) if reduction == "none" else ()
    for op in (linear_topk_kl, topk_kl, linear_cross_entropy):
        ours = run(op, case, target, True, reduction=reduction)
        assert all(field.shape == shape for field in ours[:NUM_FIELDS])
        assert all((part == 0).all() for part in ours)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.uint8])
@all_targets
def test_integers_of_any_width(target, dtype, small_blocks):
    case = problem(2, 6, 200, 4)
    case.ids[1, 2] = 0 if dtype == torch.uint8 else -1
    case.ids[0, :2] = torch.tensor([198, 130])
    case.labels[0] = 199  # beyond int8
    narrow = case._replace(ids=case.ids.to(dtype), labels=case.labels.to(dtype))
    results = [run(topk_kl, each, target, **MIXED) for each in (case, narrow)]
    assert all(map(torch.equal, *results))


# Numbers at the edge of what fp32 holds.


@pytest.mark.parametrize("beta", [0.01, 0.99])
@pytest.mark.parametrize("kind", DIVERGENCES)
@fp32_targets
def test_the_students_tail_from_tiny_to_all(target, kind, beta, small_blocks):
    """Tails of 1e-3, 1e-17, 1e-30, 1e-87 (0 in fp32), 0, and of 1-1e-3, 1-1e-7, 1-1e-17, 1."""
    gaps = torch.tensor([9.0, 41.0, 71.0, 200.0, 1e4, -5.0, -14.0, -37.0, -1e4])
    logits = torch.randn(9, 20).double()
    logits[:, :5] += gaps[:, None]
    case = on_support(logits, 5, 0.75)
    case.log_probs[:, 4] = -150.0
    options = {
        "divergence": kind,
        "beta": beta,
        "reduction": "none",
    }
    ours = agree(topk_kl, case, target, **options)
    # Each gradient off S is right to its own size, not its row's.
    exact = run(topk_kl, case, REFERENCE, **options)
    for rows, rtol in ((slice(3), 2e-5), (slice(5, 6), 1e-3)):
        mine = ours[-1][rows, 5:].cpu()
        right = exact[-1][rows, 5:].float()
        assert_close(mine, right, rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("mode", [mode for mode in MODES if "reverse_kl" not in mode.values()])
@fp32_targets
def test_the_teachers_tail_from_none_to_all(target, mode, small_blocks):
    """All but reverse KL: it needs log(1 - .999999). At a mass of .3 a truncated KL is negative."""
    masses = torch.tensor([1.0, 0.999999, 0.3, 1e-7, 1e-30])
    case = on_support(torch.randn(5, 20).double(), 5, 1.0)
    case.logits[2, :5] += 5
    case.log_probs[:] = held((masses.double() / 5).log()[:, None])
    agree(topk_kl, case, target, rtol=2e-5, reduction="none", **mode)


@pytest.mark.parametrize("T", [1.0, 0.1, 10.0])
@all_modes
@fp32_targets
def test_logits_of_ten_thousand(target, mode, T, small_blocks):
    """On S, off it, at a label, and of a whole row."""
    case = problem(3, 6, 37, 4, T)
    _, _, logits, ids, _, _, labels = case
    logits[0, 3] = 1e4
    logits[0, 30] = -1e4
    logits[1, ids[1, 1]] = 1e4
    logits[1] -= 1e4
    logits[2, ids[2, :2]] = -1e4
    labels[0] = 30
    labels[2] = ids[2, 0]
    case = case._replace(logits=held(logits))
    # Plain PyTorch's errors: l = -1e4 rounds by 1e-3 before the softmax over S, z/T = -1e5 by 4e-3.
    atol = 1e-4 if mode["tail"] == "renormalize_both" else 1e-6
    if target.backend == "torch" and T == 0.1:
        atol = max(atol, 1e-5)
    agree(
        topk_kl,
        case,
        target,
        atol=atol,
        temperature=T,
        **MIXED,
        **mode,
    )


@pytest.mark.parametrize("T", [1.0, 2.0, 0.1])
@pytest.mark.parametrize("kind", DIVERGENCES)
@fp32_targets
def test_a_student_equal_to_its_teacher_has_no_loss(target, kind, T, small_blocks):
    case = problem(2, 6, 20, 5, T)
    z = case.hidden @ case.weight.T
    log_probs = z.log_softmax(1).gather(1, case.ids)
    log_norm = (z / T).logsumexp(1) - z.logsumexp(1) / T
    case = case._replace(log_probs=log_probs, log_norm=log_norm)
    options = {
        "temperature": T,
        "divergence": kind,
        "upstream": torch.ones(()),
    }
    _, kl, *_, d_hidden, d_weight = run(linear_topk_kl, case, target, **options)
    # The slope of tv is a sign: where both agree but for rounding there is none.
    tolerance = 0.0 if kind == "tv" else 2e-6
    assert kl.abs() <= tolerance
    assert d_hidden.abs().max() <= tolerance * T
    assert d_weight.abs().max() <= tolerance * T


def padded(value, dtype=torch.float32):
    """Eleven tokens off S have logits of `value`."""
    logits = torch.randn(2, 37).to(dtype)
    logits[:, 3:5] = value
    logits[:, -9:] = value
    case = on_support(logits, 3, 0.6)
    case.labels[1] = 20
    return case


@pytest.mark.parametrize("softcap", [None, 5.0])
@all_modes
@fp32_targets
def test_logits_of_minus_infinity_off_the_support(target, mode, softcap, small_blocks):
    """A padded vocabulary. A softcap of c makes -c of them."""
    options = {"softcap": softcap, **MIXED, **mode}
    case = padded(-math.inf)
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target)
    if mode["tail"] != "smooth":  # its teacher gives them mass: the KL is inf
        check(ours, exact, target)


@pytest.mark.parametrize("T", [1.0, 10.0])
@fp32_targets
def test_nothing_off_the_support_costs_a_teacher_with_a_tail_everything(target, T):
    """Every logit off S is -inf, the teacher has .25 there: inf, not a large number, at any T."""
    case = on_support(torch.tensor([[1.0, 2.0, -math.inf]]), 2, 0.75)
    case.log_norm[:] = math.log(4)  # at T = 10 there is a tail too
    assert run(topk_kl, case, target, temperature=T)[1] == math.inf


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "skew_kl", "tv"])
@fp32_targets
def test_a_token_of_the_support_that_the_student_rules_out(target, kind, small_blocks):
    """Its logit is -inf: it costs what the divergence says of p = 0, and has no gradient."""
    case = problem(2, V=20)
    place = 0, case.ids[0, 1]
    case.logits[place] = -math.inf
    low = case._replace(logits=case.logits.clamp(min=-1e30))
    ours = run(topk_kl, case, target, divergence=kind)
    exact = run(topk_kl, low, REFERENCE, divergence=kind)
    check(ours, exact, target)
    assert ours[-1][place] == 0


# Precision.

ROUNDED = [("traps", mode) for mode in MODES[2::3]]
ROUNDED += [("lowest", {}), ("lowest", {"softcap": 5.0})]


@pytest.mark.parametrize("name, options", ROUNDED)
@all_dtypes
@fp32_targets
def test_half_precision_logits_cost_one_rounding(target, dtype, name, options, small_blocks):
    """Hugging Face masks a padded vocabulary by torch.finfo(dtype).min, a number like any."""
    target = target._replace(dtype=dtype)
    case = traps(2.0, dtype=dtype)
    if name == "lowest":
        case = padded(torch.finfo(dtype).min, dtype)
    options = {
        "temperature": 2.0,
        "reduction": "sum",
        "upstream": torch.ones(()),
        **MIXED,
        **options,
    }
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target, 2.0)
    check_rounded(ours[-1], exact[-1], target)


@pytest.mark.parametrize("T", [1.0, 2.0])
@all_dtypes
@fp32_targets
def test_a_label_that_is_almost_certain(target, dtype, T, small_blocks):
    """Its gradient p-1 = -.002 keeps its digits: p is not rounded before the 1 goes."""
    target = target._replace(dtype=dtype)
    logits = torch.randn(2, 40).to(dtype)
    logits[:, 7] = 10.5
    case = on_support(logits, 3, 0.5)
    case.labels[:] = 7
    case.ids[0, 1] = 7  # in S in one row, outside in the other
    options = {
        "labels": True,
        "kl_weight": 0.0,
        "temperature": T,
        "reduction": "sum",
    }
    gradient = run(topk_kl, case, target, **options)[-1][:, 7]
    exact = run(topk_kl, case, REFERENCE, **options)[-1][:, 7]
    check_rounded(gradient, exact, target, rtol=1e-4)


def plain_linear_topk_kl(hidden, weight, *targets, **options):
    """Logits in the inputs' dtype, the loss in fp32."""
    return topk_kl(hidden @ weight.T, *targets, **options)


@pytest.mark.parametrize("T, softcap", [(1.0, None), (2.0, 1e6), (0.1, None)])
@pytest.mark.parametrize(
    "op, plain_op",
    [(linear_topk_kl, plain_linear_topk_kl), (topk_kl, topk_kl)],
)
@all_dtypes
@fp32_targets
def test_error_is_at_most_twice_plain_pytorchs(target, dtype, op, plain_op, T, softcap):
    """tanh by way of exp may not lose the digits of z/c, at c = 1e6 either."""
    case = problem(4, 32, 257, 8, T, dtype)
    options = {
        "temperature": T,
        "softcap": softcap,
        "upstream": torch.ones(()),
        **MIXED,
    }
    target = target._replace(dtype=dtype)
    plain_target = target._replace(backend="reference")
    ours = run(op, case, target, **options)
    exact = run(op, case, REFERENCE, **options)
    plain = run(plain_op, case, plain_target, **options)
    coarse = op is topk_kl and target == cases.Target("triton", "cpu", torch.bfloat16)
    times = 4.0 if coarse else 2.0  # see check_rounded
    cases.no_worse(ours, plain, exact, times)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@fp32_targets
def test_fp16_gradients_keep_what_a_loss_scale_is_for(target, scale):
    """Probabilities of 1/20,000 have few bits in fp16 until 2^16 multiplies them."""
    target = target._replace(dtype=torch.float16)
    plain = target._replace(backend="reference")
    case = problem(3, 16, 20_000, 4, dtype=torch.float16)
    options = {"upstream": torch.tensor(scale), **MIXED}
    targets = target, plain, REFERENCE
    results = [run(topk_kl, case, each, **options)[-1].cpu() for each in targets]
    exact = results[-1].abs()
    small = exact < exact.median()  # no label, and no entry of the teacher
    cases.no_worse(*([gradient[small]] for gradient in results))


@fp32_targets
def test_the_largest_fp16_gradients_fit(target):
    """Reverse KL at T=10, with half of the student's mass where the teacher has none."""
    logits = torch.zeros(1, 20)
    logits[:, :2] = 200.0
    case = problem(1, V=20, K=2)
    case = case._replace(
        logits=logits,
        ids=torch.tensor([[0, 1]]),
        log_probs=torch.tensor([[0.0, -math.inf]]),
        log_norm=torch.zeros(1),
    )
    options = {
        "temperature": 10.0,
        "divergence": "reverse_kl",
    }
    target = target._replace(dtype=torch.float16)
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    assert exact[-1].abs().max() > 70
    assert_close(ours[-1].cpu().double(), exact[-1], rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize("scale", [2.0**17 / 3, 2.0**17])
@pytest.mark.parametrize("dtype", cases.HALVES)
def test_a_loss_scale_is_not_rounded_to_the_gradients_type(dtype, scale):
    """2^17 / 3 has more bits than either type, and 2^17 is more than fp16 holds."""
    scale = torch.tensor(scale)
    gradient = (1 + torch.arange(128) / 128).to(dtype) / 1024
    exact = gradient.double() * scale.double()
    scaled = scale_gradient(gradient, scale, dtype)
    assert torch.equal(scaled, exact.to(dtype))


# Refusals.

REFUSALS = [
    ("weight", torch.zeros(37, 3), "hidden .N,D.=.* D must agree"),
    ("hidden", torch.zeros(6), "hidden has shape"),
    (
        "hidden",
        torch.zeros(4, 6).long(),
        "hidden has dtype torch.int64",
    ),
    ("hidden", torch.zeros(4, 6), "one dtype"),
    ("ids", torch.zeros(2, 3).long(), "ids has shape"),
    (
        "ids",
        torch.full((4, 3), 37),
        "ids holds 37: .*below the vocabulary's V=37",
    ),
    (
        "ids",
        None,
        "log_probs has shape .4, 3.: without ids it must be .N,V. with V=37",
    ),
    ("log_probs", torch.zeros(4, 2), "both must be .N,K."),
    ("labels", torch.zeros(2).long(), "labels has shape"),
    ("labels", torch.zeros(4), "labels has dtype"),
    (
        "labels",
        torch.full((4,), 37),
        "labels holds 37: a label must be in 0..36",
    ),
    ("labels", torch.full((4,), -1), "labels holds -1:"),
    (
        "labels",
        None,
        "kl_weight=0.5: below 1 the loss needs labels",
    ),
    ("temperature", 0, "temperature=0"),
    ("temperature", 2.0, "temperature=2.0: needs log_norm"),
    ("log_norm", torch.zeros(3), "log_norm has shape"),
    ("softcap", 0, "softcap=0"),
    ("kl_weight", 1.5, "kl_weight=1.5"),
    ("beta", 1, "beta=1"),
    ("tail", "gost", "tail='gost'"),
    ("tail", "smooth", "divergence='jsd' with tail='smooth'"),
    ("divergence", "kl", "divergence='kl'"),
    ("reduction", "avg", "reduction='avg'"),
    ("backend", "cuda", "backend='cuda'"),
    (
        "backend",
        "triton",
        "backend='triton': the kernels compute in fp32",
    ),
]


@pytest.mark.parametrize("name, wrong, message", REFUSALS)
def test_refusals_name_the_value_and_the_rule(name, wrong, message):
    arguments = problem()._asdict()
    del arguments["logits"], arguments["log_norm"]
    arguments |= {
        "kl_weight": 0.5,
        "divergence": "jsd",
        name: wrong,
    }
    with pytest.raises(ValueError, match=message) as caught:
        linear_topk_kl(**arguments)
    assert "\n" not in str(caught.value)


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr("kernels.backends.INTERPRETED", False)
    h = torch.zeros(4, 4)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    for op, *arguments in (
        (topk_kl, h, ids, ids.float()),
        (topk_kl, h, None, h),
        (linear_full_kl, h, h, h, h),
        (linear_log_probs, h, h, ids),
    ):
        op(*arguments)  # auto
        with pytest.raises(ValueError, match="backend='triton': .* on cpu: Triton needs CUDA"):
            op(*arguments, backend="triton")
