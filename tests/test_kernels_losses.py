"""The losses from sparse targets: every mode, gradient and trap of DESIGN section 4.

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
from kernels.checks import DIVERGENCES, TAILS
from kernels.losses import scale_gradient
from tests import kernel_cases as cases
from tests.helpers import assert_close
from tests.kernel_cases import (
    MIXED,
    MODES,
    NUM_FIELDS,
    REFERENCE,
    agree,
    check,
    check_rounded,
    held,
    on_support,
    problem,
    run,
    traps,
)

all_targets = pytest.mark.parametrize("target", cases.TARGETS)
fp32_targets = pytest.mark.parametrize("target", cases.FP32)


def name_of(mode):
    return mode.get("divergence", mode["tail"]) if isinstance(mode, dict) else None


all_modes = pytest.mark.parametrize("mode", MODES, ids=name_of)


# The reference.


def outcomes_in_words(p, ids, log_probs, log_norm, T, tail):
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


@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
@all_modes
def test_the_reference_is_the_loss_in_words(mode, T, softcap):
    case = problem(7, 6, 23, 5, T)
    case = case._replace(logits=case.hidden @ case.weight.T)
    case.ids[0, 2] = case.ids[0, 0]
    case.ids[1, 1:3] = -1
    case.log_probs[2, 3] = -math.inf
    case.ids[3, :3] = case.ids[3, 4]
    case.ids[4] = case.ids[4, 0]
    case.log_probs[4, 1:3] = -math.inf
    logits = case.logits.clone().requires_grad_()
    z = logits
    if softcap is not None:
        z = softcap * (z / softcap).tanh()
    loss = 0
    for row in range(7):
        p = (z[row] / T).softmax(0)
        teacher = (
            case.ids[row],
            case.log_probs[row],
            case.log_norm[row],
        )
        t, p = outcomes_in_words(p, *teacher, T, mode["tail"])
        ce = -z[row].log_softmax(0)[case.labels[row]]
        kl = cases.divergence_in_words(t, p, mode.get("divergence", "forward_kl"))
        loss = loss + (0.3 * ce + 0.7 * T * T * kl) / 7
    d_logits = torch.autograd.grad(loss, logits)[0]
    options = {
        "temperature": T,
        "softcap": softcap,
        "beta": 0.3,
        **mode,
    }
    options |= {
        "labels": True,
        "kl_weight": 0.7,
        "upstream": torch.ones(()),
    }
    of_logits = run(topk_kl, case, REFERENCE, **options)
    of_head = run(linear_topk_kl, case, REFERENCE, **options)
    for ours, right in (
        (of_logits[0], loss.detach()),
        (of_head[0], loss.detach()),
        (of_logits[-1], d_logits),
        (of_head[-2], d_logits @ case.weight),
        (of_head[-1], d_logits.T @ case.hidden),
    ):
        assert_close(ours, right, rtol=1e-9, atol=1e-10)


@all_modes
def test_gradcheck_of_the_reference(mode):
    case = problem(3, 4, 11, 4)
    case.ids[0, 1] = case.ids[0, 0]
    case.ids[1, 2] = -1

    def loss(hidden):
        targets = case.ids, case.log_probs
        return linear_topk_kl(
            hidden,
            case.weight,
            *targets,
            backend="reference",
            **mode,
        ).loss

    assert torch.autograd.gradcheck(loss, case.hidden.requires_grad_())


# Modes and shapes.

ASKED = [
    (linear_topk_kl, {}),
    (
        linear_topk_kl,
        {
            "labels": True,
            "kl_weight": 0.3,
            "softcap": 4.0,
            "reduction": "none",
        },
    ),
    (
        linear_topk_kl,
        {
            "labels": True,
            "kl_weight": 0.7,
            "reduction": "sum",
        },
    ),
    (topk_kl, {"labels": True, "kl_weight": 0.3, "beta": 0.2}),
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
        agree(
            op,
            traps(T),
            target,
            temperature=T,
            **mode,
            **options,
        )


SHAPES = [
    (37, 0, topk_kl, {}),
    (23, 1, linear_topk_kl, {"divergence": "jsd"}),
    (300, 129, linear_topk_kl, {"divergence": "tv"}),
    (257, 20, topk_kl, {"tail": "smooth"}),
    (64, 64, linear_topk_kl, {"divergence": "reverse_kl"}),
    (33, 3, topk_kl, {"tail": "renormalize_both"}),
]


@pytest.mark.parametrize("V, K, op, options", SHAPES)
@all_targets
def test_any_number_of_entries_in_any_vocabulary(target, V, K, op, options, small_blocks):
    case = problem(2, 6, V, K, 2.0)
    if K:
        case.labels[0] = case.ids[0, K // 2]
    agree(op, case, target, temperature=2.0, **MIXED, **options)


@pytest.mark.parametrize("tail", ["ghost", "truncate", "smooth"])
@all_targets
def test_a_support_of_the_whole_vocabulary_has_no_tail(target, tail, small_blocks):
    """Not even where the teacher's mass on it is .75."""
    case = problem(1, 6, 20, 20)
    case.log_probs[:] = held(case.log_probs + math.log(0.75))
    kl = agree(topk_kl, case, target, tail=tail)[1]
    gap = case.log_probs - case.logits.log_softmax(1).gather(1, case.ids)
    assert_close(
        kl.cpu().double(),
        (case.log_probs.exp() * gap).sum(),
        rtol=1e-6,
    )


@all_targets
def test_a_truncated_kl_may_be_negative(target, small_blocks):
    """Clamping it at zero would throw its minimum away."""
    logits = torch.zeros(1, 20)
    logits[:, :5] = 5.0
    case = on_support(logits, 5, 0.3)
    _, kl, *_ = agree(topk_kl, case, target, tail="truncate")
    assert kl < -0.3


@pytest.mark.parametrize("V, T", [(50257, 0.1), (50257, 10.0), (151936, 2.0)])
@fp32_targets
def test_the_vocabularies_that_models_have(target, V, T):
    """Ids beyond 16 and 17 bits are read whole; a probability's tenth power is no fp32 number."""
    case = problem(2, 4, V, 20, T)
    case.ids[0, 0] = V - 1
    case.ids[1, :2] = torch.tensor([131_073 % V, 0])
    case.labels[0] = V - 2
    options = {"temperature": T, **MIXED}
    ours = run(linear_topk_kl, case, target, **options)
    exact = run(linear_topk_kl, case, REFERENCE, **options)
    plain = run(
        linear_topk_kl,
        case,
        REFERENCE._replace(dtype=torch.float32),
        **options,
    )
    check(ours[:NUM_FIELDS], exact[:NUM_FIELDS], target, T)
    cases.no_worse(ours, plain, exact)
    p = (case.hidden @ case.weight.T / T).softmax(1)
    assert_close(
        ours[4].cpu(),
        p.gather(1, case.ids).sum(1).mean().float(),
    )
    agree(
        topk_kl,
        case,
        target,
        tail="smooth",
        atol=2e-6,
        **options,
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@all_targets
def test_any_chunk_gives_the_same(target, rows, small_blocks, chunks_of):
    """The last chunk is ragged; d_weight is the sum over chunks."""
    chunks_of(rows)
    agree(linear_topk_kl, problem(5, V=20), target, **MIXED)


@fp32_targets
def test_the_sum_over_many_chunks_is_wide(target, small_blocks, chunks_of):
    """d_weight is rounded once, not in each chunk."""
    chunks_of(1)
    case = problem(64, V=20, dtype=torch.bfloat16)
    target = target._replace(dtype=torch.bfloat16)
    d_weight = run(linear_topk_kl, case, target)[-1]
    exact = run(linear_topk_kl, case, REFERENCE)[-1]
    assert (d_weight.cpu() - exact).norm() <= 4e-3 * exact.norm()


@pytest.mark.parametrize(
    "softcap, reduction",
    [(None, "mean"), (3.0, "none"), (30.0, "sum")],
)
@all_targets
def test_cross_entropy_is_torchs(target, softcap, reduction, small_blocks):
    case = traps()
    hidden = case.hidden.nan_to_num(0.0).requires_grad_()
    weight = case.weight.clone().requires_grad_()
    z = hidden @ weight.T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ce = F.cross_entropy(z, case.labels, reduction=reduction)
    upstream = torch.linspace(-1, 2, ce.numel()).double().view(ce.shape)
    gradients = torch.autograd.grad(ce, (hidden, weight), upstream)
    exact = [ce.detach(), torch.zeros_like(ce), ce.detach()]
    exact += [exact[1], exact[1], *gradients]
    options = {
        "softcap": softcap,
        "reduction": reduction,
        "upstream": upstream,
    }
    ours = run(linear_cross_entropy, case, target, **options)
    check(ours, exact, target)
    assert all((ours[place] == 0).all() for place in (1, 3, 4))


# Rows and entries with something odd about them.


@pytest.mark.parametrize("tail", TAILS)
@all_targets
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
@all_targets
def test_ignored_rows_count_nowhere(target, op, reduction, small_blocks):
    """Whatever they hold."""
    case = problem(5, V=20)
    for row, junk in ((1, math.nan), (2, math.inf), (4, 1e30)):
        case.labels[row] = -100
        case.hidden[row] = case.logits[row] = junk
        case.log_probs[row] = math.nan
    case.ids[1] = -1
    case.ids[2, 0] = case.ids[2, 1]
    kept, ignored = [0, 3], [1, 2, 4]
    upstream = torch.ones(5) if reduction == "none" else torch.ones(())
    ours = run(
        op,
        case,
        target,
        reduction=reduction,
        upstream=upstream,
        **MIXED,
    )
    upstream = upstream[:2] if reduction == "none" else upstream
    few = run(
        op,
        case.rows(kept),
        REFERENCE,
        reduction=reduction,
        upstream=upstream,
        **MIXED,
    )
    for place, part in enumerate(ours):
        if part.dim() and len(part) == 5:
            assert (part[ignored] == 0).all()
            ours[place] = part[kept]
    check(ours, few, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [3, 0])
@all_targets
def test_no_row_left_is_no_loss_and_no_gradient(target, rows, reduction, small_blocks):
    case = problem(rows)
    case.labels[:] = -100
    for part in (case.hidden, case.logits, case.log_probs):
        part[:] = math.nan
    for op in (linear_topk_kl, topk_kl, linear_cross_entropy):
        ours = run(op, case, target, True, reduction=reduction)
        shape = (rows,) if reduction == "none" else ()
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


@pytest.mark.parametrize("beta", [0.5, 0.01, 0.99])
@pytest.mark.parametrize("kind", DIVERGENCES)
@fp32_targets
def test_the_students_tail_from_tiny_to_all(target, kind, beta, small_blocks):
    """Tails of 1e-3, 1e-17, 1e-30, 1e-87 (0 in fp32), 0, and of 1-1e-3, 1-1e-7, 1-1e-17, 1."""
    if beta != 0.5 and kind not in ("jsd", "skew_kl"):
        return
    gaps = torch.tensor([9.0, 41.0, 71.0, 200.0, 1e4, -5.0, -14.0, -37.0, -1e4])
    logits = torch.randn(len(gaps), 20).double()
    logits[:, :5] += gaps[:, None]
    case = on_support(logits, 5, 0.75)
    case.log_probs[:, 4] = -150.0
    options = {
        "divergence": kind,
        "beta": beta,
        "reduction": "none",
    }
    ours = agree(topk_kl, case, target, **options)
    tail = case.logits.softmax(1)[:, 5:].sum(1)
    assert tail[0] > 1e-4 and 1e-33 < tail[2] < 1e-28 and 0 < 1 - tail[6] < 2e-6
    # Each gradient off S is right to its own size, not its row's.
    exact = run(topk_kl, case, REFERENCE, **options)
    for row, rtol in (
        (0, 2e-5),
        (1, 2e-5),
        (2, 2e-5),
        (5, 1e-3),
    ):
        right = exact[-1][row, 5:].float()
        assert_close(
            ours[-1][row, 5:].cpu(),
            right,
            rtol=rtol,
            atol=1e-37,
        )


@pytest.mark.parametrize("mode", MODES[::2] + MODES[-3::2])
@fp32_targets
def test_the_teachers_tail_from_none_to_all(target, mode, small_blocks):
    case = on_support(torch.randn(4, 20).double(), 5, 1.0)
    masses = torch.tensor([1.0, 0.999999, 1e-7, 1e-30]).double()
    case.log_probs[:] = held((masses / 5).log()[:, None].expand(4, 5))
    agree(
        topk_kl,
        case,
        target,
        rtol=2e-5,
        reduction="none",
        **mode,
    )


FAR_OUT = [(mode, 1.0) for mode in MODES]
FAR_OUT += [(mode, 0.1) for mode in MODES[::2]]
FAR_OUT += [(mode, 10.0) for mode in MODES[1::2]]
FAR_OUT += [({"tail": "smooth", "softcap": 30.0}, 1.0)]


@pytest.mark.parametrize("mode, T", FAR_OUT, ids=name_of)
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
    ours = run(linear_topk_kl, case, target, **options)
    _, kl, _, teacher_mass, student_mass, *gradients = ours
    assert kl.abs() < (1e-30 if kind == "tv" else 2e-6)
    assert_close(teacher_mass, student_mass)
    assert 0.01 < student_mass < 0.99  # there is a tail
    assert max(gradient.abs().max() for gradient in gradients) < 2e-6 * T
    if kind == "tv":  # a sign: where both agree but for rounding there is none
        assert all((gradient == 0).all() for gradient in gradients)


def padded(value, dtype=torch.float32):
    """Eleven tokens off S, no labels, have logits of `value`."""
    case = problem(2, 6, 37, 3)
    taken = {
        *case.ids.flatten().tolist(),
        *case.labels.tolist(),
    }
    free = [token for token in range(37) if token not in taken]
    case.logits[:, free[-9:] + free[:2]] = value
    return case._replace(logits=held(case.logits, dtype))


@pytest.mark.parametrize("softcap", [None, 5.0])
@all_modes
@fp32_targets
def test_logits_of_minus_infinity_off_the_support(target, mode, softcap, small_blocks):
    """A padded vocabulary. A softcap of c makes -c of them."""
    options = {"softcap": softcap, **MIXED, **mode}
    case = padded(-math.inf)
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    if mode["tail"] == "smooth":  # the teacher gives them mass: no finite KL
        assert softcap or exact[1] == math.inf
        ours, exact = ours[:NUM_FIELDS], exact[:NUM_FIELDS]
    check(ours, exact, target)


@pytest.mark.parametrize("T, softcap", [(1.0, 5.0), (2.0, None)])
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES])
@fp32_targets
def test_logits_of_their_types_least_number(target, dtype, T, softcap, small_blocks):
    """As Hugging Face masks a padded vocabulary: torch.finfo(dtype).min is a number like any."""
    target = target._replace(dtype=dtype)
    case = padded(torch.finfo(dtype).min, dtype)
    agree_rounded(case, target, temperature=T, softcap=softcap)


@pytest.mark.parametrize("mode", MODES[2::3])
@pytest.mark.parametrize("dtype", cases.HALVES)
@fp32_targets
def test_half_precision_logits_cost_one_rounding(target, dtype, mode, small_blocks):
    case = traps(2.0, dtype=dtype)
    agree_rounded(
        case,
        target._replace(dtype=dtype),
        temperature=2.0,
        **mode,
    )


def agree_rounded(case, target, **options):
    options |= {
        "reduction": "sum",
        "upstream": torch.ones(()),
        **MIXED,
    }
    ours = run(topk_kl, case, target, **options)
    exact = run(topk_kl, case, REFERENCE, **options)
    check(
        ours[:NUM_FIELDS],
        exact[:NUM_FIELDS],
        target,
        options["temperature"],
    )
    check_rounded(ours[-1], exact[-1], target)


@pytest.mark.parametrize("kind", DIVERGENCES[1:])
@fp32_targets
def test_a_token_of_the_support_that_the_student_rules_out(target, kind, small_blocks):
    """Its logit is -inf: it costs what the divergence says of p = 0, and has no gradient."""
    case = problem(2, V=20)
    place = 0, case.ids[0, 1]
    case.logits[place] = -math.inf
    low = case._replace(logits=case.logits.clamp(min=-1e30))
    ours = run(topk_kl, case, target, divergence=kind)
    check(
        ours,
        run(topk_kl, low, REFERENCE, divergence=kind),
        target,
    )
    assert ours[-1][place] == 0


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES])
@fp32_targets
def test_a_label_that_is_almost_certain(target, dtype, T, small_blocks):
    """Its gradient p-1 = -.002 keeps its digits: p is not rounded before the 1 goes."""
    target = target._replace(dtype=dtype)
    logits = torch.randn(2, 40).double()
    logits[:, 7] = 10.5
    case = on_support(held(logits, dtype), 3, 0.5)
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
    assert (exact.abs() / 1.7 < 3e-3).all()
    check_rounded(gradient, exact, target, rtol=1e-4)


# Precision.


@pytest.mark.parametrize("T, softcap", [(1.0, None), (2.0, 1e6), (0.1, None)])
@pytest.mark.parametrize("op", [linear_topk_kl, topk_kl])
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES])
@fp32_targets
def test_error_is_at_most_twice_plain_pytorchs(target, dtype, op, T, softcap):
    """tanh by way of exp may not lose the digits of z/c, at c = 1e6 either."""
    target = target._replace(dtype=dtype)
    case = problem(4, 32, 257, 8, T, dtype)
    options = {
        "temperature": T,
        "softcap": softcap,
        "upstream": torch.ones(()),
        **MIXED,
    }
    ours = run(op, case, target, **options)
    exact = run(op, case, REFERENCE, **options)
    leaves = [case.logits] if op is topk_kl else [case.hidden, case.weight]
    leaves = [part.to(target.device, dtype).requires_grad_() for part in leaves]
    z = leaves[0] if op is topk_kl else leaves[0] @ leaves[1].T
    loss = cases.plain_loss(z, case.on(target), T, softcap)
    plain = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    coarse = op is topk_kl and target == cases.Target("triton", "cpu", torch.bfloat16)
    times = 4.0 if coarse else 2.0  # see check_rounded
    places = [0, *range(NUM_FIELDS, len(ours))]
    ours, exact = ([parts[place] for place in places] for parts in (ours, exact))
    cases.no_worse(ours, plain, exact, times)


@fp32_targets
def test_fp16_gradients_of_a_mean_do_not_vanish(target):
    """1/N times a small probability is less than fp16 holds: 1/N goes on the sums."""
    target = target._replace(dtype=torch.float16)
    case = problem(4, 16, 97, 4, dtype=torch.float16)
    gradients = []
    for scale in (1.0, 2.0**-12):
        upstream = torch.full((4,), scale)
        ours = run(
            linear_topk_kl,
            case,
            target,
            reduction="none",
            upstream=upstream,
        )
        gradients.append([part.float() / scale for part in ours[NUM_FIELDS:]])
    for whole, small in zip(*gradients, strict=True):
        assert_close(small, whole, rtol=2e-3, atol=2.0**-12)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@fp32_targets
def test_fp16_gradients_of_logits_keep_what_a_loss_scale_is_for(target, scale):
    """Probabilities of 1/20,000 have few bits in fp16 until 2^16 multiplies them."""
    target = target._replace(dtype=torch.float16)
    case = problem(3, 16, 20_000, 4, dtype=torch.float16)
    upstream = torch.tensor(scale)
    targets = (
        target,
        target._replace(backend="reference"),
        REFERENCE,
    )
    results = [run(topk_kl, case, each, upstream=upstream, **MIXED)[-1].cpu() for each in targets]
    exact = results[-1].abs()
    small = exact < exact.median()  # no label, and no entry of the teacher
    cases.no_worse(*([gradient[small]] for gradient in results))


@pytest.mark.parametrize("dtype", cases.HALVES)
def test_a_loss_scale_is_not_rounded_to_the_gradients_type(
    dtype,
):
    """2^17 / 3 has more bits than either type, and 2^17 is more than fp16 holds."""
    gradient = (1 + torch.arange(128) / 128).to(dtype) / 1024
    for scale in (
        torch.tensor(2.0**17 / 3),
        torch.tensor(2.0**17),
    ):
        scaled = scale_gradient(gradient.clone(), scale, dtype)
        assert torch.equal(
            scaled,
            (gradient.double() * scale.double()).to(dtype),
        )


# What the modes mean.


def test_closed_forms_of_the_zipf_teacher_are_the_optima():
    """V=100000, K=20: the gradient vanishes at the optimum of DESIGN section 3."""
    V, K, a = 100_000, 20, 0.4
    t = 1 / torch.arange(1, V + 1).double()
    t /= t.sum()
    inside = torch.arange(V) < K
    mass = t[:K].sum()
    head = torch.where(inside, t / mass, 0.0)
    smooth = torch.where(inside, t, (1 - mass) / (V - K))
    # of (1-a) CE + a truncate: t / (1 - a(1-mass)) on S, (1-a) times that off S
    mixed = torch.where(inside, t, (1 - a) * t) / (1 - a * (1 - mass))
    assert abs(t[0] - 0.0827) < 5e-5 and abs(mass - 0.2976) < 5e-5 and abs(head[1] - 0.139) < 5e-5

    def loss_and_gradient(p, tail):
        z = p.clamp(min=1e-300).log()[None].requires_grad_()
        loss = topk_kl(
            z,
            torch.arange(K)[None],
            t[None, :K].log(),
            tail=tail,
        ).loss
        return loss.detach(), torch.autograd.grad(loss, z)[0][0]

    optima = [
        ("ghost", t),
        ("truncate", head),
        ("renormalize", head),
        ("smooth", smooth),
    ]
    optima += [
        ("renormalize_both", t),
        ("renormalize_both", head),
    ]  # p off S is not identified
    for tail, optimum in optima:
        assert loss_and_gradient(optimum, tail)[1].abs().max() < 1e-9
    for tail in ("truncate", "renormalize"):
        assert loss_and_gradient(t, tail)[1].abs().max() > 1e-3
    gradient = (1 - a) * (mixed - t) + a * loss_and_gradient(mixed, "truncate")[1]
    assert gradient.abs().max() < 1e-9
    assert_close(
        loss_and_gradient(head, "truncate")[0],
        mass * mass.log(),
        rtol=1e-6,
    )


# Refusals.

REFUSALS = [
    (
        "weight",
        lambda weight: weight[:, :3],
        "hidden .N,D.=.* D must agree",
    ),
    ("hidden", lambda hidden: hidden[0], "hidden has shape"),
    (
        "hidden",
        lambda hidden: hidden.long(),
        "hidden has dtype torch.int64",
    ),
    ("hidden", lambda hidden: hidden.float(), "one dtype"),
    ("ids", lambda ids: ids[:2], "ids has shape"),
    ("ids", lambda ids: ids.float(), "ids has dtype"),
    (
        "ids",
        lambda ids: ids.fill_(37),
        "ids holds 37: .*below the vocabulary's V=37",
    ),
    (
        "log_probs",
        lambda log_probs: log_probs[:, :2],
        "both must be .N,K.",
    ),
    ("labels", lambda labels: labels[:2], "labels has shape"),
    (
        "labels",
        lambda labels: labels.double(),
        "labels has dtype",
    ),
    (
        "labels",
        lambda labels: labels.fill_(37),
        "labels holds 37: a label must be in 0..36",
    ),
    (
        "labels",
        lambda labels: labels.fill_(-1),
        "labels holds -1:",
    ),
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


@pytest.mark.parametrize("name, change, message", REFUSALS)
def test_refusals_name_the_value_and_the_rule(name, change, message):
    arguments = problem()._asdict()
    del arguments["logits"], arguments["log_norm"]
    arguments |= {"kl_weight": 0.5, "divergence": "jsd"}
    arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message) as caught:
        linear_topk_kl(**arguments)
    assert "\n" not in str(caught.value)


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused(
    monkeypatch,
):
    monkeypatch.setattr("kernels.backends.INTERPRETED", False)
    h = torch.zeros(4, 4)
    ids = torch.zeros(4, 2, dtype=torch.int64)
    for op, *arguments in (
        (linear_topk_kl, h, h, ids, ids.float()),
        (topk_kl, h, ids, ids.float()),
        (topk_kl, h, None, h),
        (linear_full_kl, h, h, h, h),
        (linear_cross_entropy, h, h, ids[:, 0]),
        (linear_log_probs, h, h, ids),
    ):
        op(*arguments)  # auto
        with pytest.raises(
            ValueError,
            match="backend='triton': .* on cpu: Triton needs CUDA",
        ):
            op(*arguments, backend="triton")


@pytest.mark.parametrize("target", cases.FP32)
def test_nothing_off_the_support_costs_a_teacher_with_a_tail_everything(target):
    """Every logit off S is -inf, the teacher has .25 there: inf, not a large number, at any T."""
    logits = torch.tensor([[1.0, 2.0, -math.inf]], device=target.device)
    ids = torch.tensor([[0, 1]], device=target.device)
    log_probs = torch.tensor([[math.log(0.5), math.log(0.25)]], device=target.device)
    log_norm = torch.tensor([math.log(4)], device=target.device)  # at T = 10 there is a tail too
    for T in (1.0, 10.0):
        out = topk_kl(
            logits,
            ids,
            log_probs,
            temperature=T,
            log_norm=log_norm if T > 1 else None,
            backend=target.backend,
        )
        assert out.kl == math.inf
