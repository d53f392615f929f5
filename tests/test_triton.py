"""The Triton backend against float64: in Triton's interpreter where there is no GPU, on the GPU where there is one.

N rows, D width, V vocabulary, K teacher entries a row, T temperature. Cases are float64 tensors whose values the dtype
under test holds exactly, so that what an op answers differs from the reference by its own arithmetic alone.
"""

import importlib
import itertools
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear_cross_entropy, linear_log_probs, linear_topk, linear_topk_kl, row_kernel, topk_kl
from kernels.common import DIVERGENCES, TAILS, Spec, scaled
from kernels.tile import SCRATCH, Targets
from tests.helpers import assert_close

topk_file = importlib.import_module("kernels.linear_topk")  # the package's name of it is the op
MODES = [("ghost", kind) for kind in DIVERGENCES] + [(tail, "forward_kl") for tail in TAILS[1:]]
HALVES = (torch.bfloat16, torch.float16)
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where the kernels run; fp32 products in fp32, not TF32."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off: this machine has a GPU, and there the kernels run on it")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 columns: a row of 37 has a first, an interior and a ragged last one."""
    monkeypatch.setattr(row_kernel, "TUNING", ((2**31, 16, 4),))


class Case(NamedTuple):
    """An op's inputs on the CPU, floats in float64."""

    hidden: Tensor  # [N,D]
    weight: Tensor  # [V,D]
    logits: Tensor  # [N,V] for topk_kl
    ids: Tensor  # [N,K]
    log_probs: Tensor  # [N,K]
    log_norm: Tensor  # [N]
    labels: Tensor  # [N]

    def rows(self, place) -> "Case":
        return Case(*(part if name == "weight" else part[place] for name, part in self._asdict().items()))


def held(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(dtype).double()


def problem(N, D, V, K, T=1.0, dtype=torch.float32, seed=0) -> Case:
    """A random student, and the exact top-K of a random teacher; both distributions at T are neither flat nor sharp."""
    generator = torch.Generator().manual_seed(seed)
    spread = min(T, 1.0)
    hidden, weight = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (N, V))
    hidden, weight = held(hidden, dtype), held(spread * weight / D**0.5 * 2, dtype)
    z = torch.randn(N, V, generator=generator, dtype=torch.float64) * 2 * spread
    ids = z.topk(K).indices
    log_norm = (z / T).logsumexp(1) - z.logsumexp(1) / T
    labels = torch.randint(V, (N,), generator=generator)
    logits = held(hidden @ weight.T, dtype)
    return Case(hidden, weight, logits, ids, held(z.log_softmax(1).gather(1, ids)), held(log_norm), labels)


def traps(T=1.0, V=37) -> Case:
    """Rows: label in S; two equal ids; empty slots, label outside; all empty; ignored garbage; three equal, one -inf; -inf."""
    case = problem(7, 6, V, 5, T)
    hidden, _, logits, ids, log_probs, _, labels = case
    labels[0] = ids[0, 2]
    ids[1, 3] = ids[1, 0]
    ids[2, 1:3], log_probs[2, 1], log_probs[2, 2] = -7, math.nan, 3.0
    labels[2] = next(token for token in range(V) if token not in ids[2])
    ids[3], log_probs[3] = -1, math.nan
    labels[4], hidden[4], logits[4], log_probs[4], ids[4, :2] = -100, math.nan, math.nan, math.nan, -1
    ids[5, 2] = ids[5, 4] = labels[5] = ids[5, 1]
    log_probs[5, 2] = -math.inf
    log_probs[6, 4] = -math.inf
    return case


def measure(op, case: Case, backend, device="cpu", dtype=torch.float64, labels=False, norm=True, up=None, **options):
    """The fields of an op's result and the gradients of its loss. Without labels an ignored row is no row."""
    with_labels = labels or op is linear_cross_entropy
    case = case if with_labels else case.rows(case.labels != -100)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    hidden, weight, logits, ids, log_probs, log_norm, labels = (part.to(device) for part in case)
    inputs = [part.to(dtype, copy=True).requires_grad_() for part in ([logits] if op is topk_kl else [hidden, weight])]
    targets = [labels] if op is linear_cross_entropy else [ids, log_probs.to(wide)]
    if op is not linear_cross_entropy:
        options |= {"labels": labels if with_labels else None, "log_norm": log_norm.to(wide) if norm else None}
    out = op(*inputs, *targets, backend=backend, **options)
    assert [part.requires_grad for part in out] == [True, False, False, False, False]
    if up is None:
        up = torch.linspace(-1, 2, len(ids)) if out.loss.dim() else torch.tensor(1.7)
    return [*(part.detach() for part in out), *torch.autograd.grad(out.loss, inputs, up.to(device, wide))]


def check(ours, exact, dtype=torch.float32, T=1.0, rtol=1e-5, atol=1e-6):
    """Fields in fp32 (nats: near 0 to within `atol`), gradients in `dtype` (to within atol * 2 of their largest number).

    A GPU's exp2 and log are approximate: four times the floor there, a guess until this has run on one.
    """
    atol = 4 * atol if ours[0].is_cuda else atol
    assert len(ours) == len(exact)
    for place, (one, other) in enumerate(zip(ours, exact, strict=True)):
        largest = other.abs().masked_fill(~other.isfinite(), 0).max().item() if other.numel() else 0.0
        floor = atol * (2 * largest if place >= 5 else max(1, T * T) + largest)
        assert_close(one.cpu(), other.to(torch.float32 if place < 5 else dtype), rtol=rtol, atol=floor)


def agree(op, case: Case, device, dtype=torch.float32, rtol=1e-5, atol=1e-6, **options):
    """The Triton backend equals the float64 reference in every field and gradient; returns its results."""
    ours = measure(op, case, "triton", device, dtype, **options)
    check(ours, measure(op, case, "reference", **options), dtype, options.get("temperature", 1.0), rtol, atol)
    return ours


def no_worse(ours, plain, exact, times=2.0):
    """Each error at most twice plain PyTorch's own in the same dtype, as norms; next to nothing counts as nothing."""
    for one, other, right in zip(ours, plain, exact, strict=True):
        floor = 1e-6 * right.abs().max()
        assert (one.cpu().double() - right).norm() <= times * (other.cpu().double() - right).norm() + floor


def check_rounded(gradient, exact, dtype, device, rtol=1e-5):
    """A gradient in `dtype` is the exact one rounded once; Triton's interpreter rounds to bf16 toward zero."""
    once = {torch.float32: 0.0, torch.float16: 2**-11, torch.bfloat16: 2**-7 if device == "cpu" else 2**-8}
    assert gradient.dtype == dtype
    assert_close(gradient.cpu().double(), exact, rtol=rtol + once[dtype], atol=1e-7 * (1 + exact.abs().max().item()))


ASKED = [
    (linear_topk_kl, {}),
    (linear_topk_kl, {"labels": True, "kl_weight": 0.3, "softcap": 4.0, "reduction": "none"}),
    (linear_topk_kl, {"labels": True, "kl_weight": 0.7, "reduction": "sum", "beta": 0.8, "_rows": 2}),
    (topk_kl, {"labels": True, "kl_weight": 0.3, "beta": 0.2}),
    (topk_kl, {"labels": True, "reduction": "none", "beta": 0.9}),
]


@pytest.mark.parametrize("T", [1.0, 2.0, 0.1, 10.0])
@pytest.mark.parametrize("tail, kind", MODES)
def test_every_mode_with_every_trap(tail, kind, T, device, small_blocks):
    case = traps(T)
    for op, options in ASKED:
        norm = T != 1 and not tail.startswith("renormalize")
        agree(op, case, device, temperature=T, norm=norm, tail=tail, divergence=kind, **options)


@pytest.mark.parametrize("T", [1.0, 2.0, 0.1, 10.0])
def test_a_kl_that_weighs_nothing_is_still_told(T, device, small_blocks):
    options = {"labels": True, "kl_weight": 0.0, "softcap": 4.0, "reduction": "sum", "divergence": "jsd"}
    assert agree(topk_kl, traps(T), device, temperature=T, **options)[1] > 0


# Shapes.


@pytest.mark.parametrize("V, K", [(37, 0), (23, 1), (37, 3), (257, 20), (64, 64), (257, 64), (97, 97), (300, 129)])
def test_any_number_of_entries_in_any_vocabulary(V, K, device, small_blocks):
    """K no power of two, K = V (no tail outcome), rows of odd lengths."""
    case = problem(2, 6, V, K, 2.0)
    case.labels[0] = case.ids[0, K // 2] if K else 0
    options = {"temperature": 2.0, "labels": True, "kl_weight": 0.6}
    agree(linear_topk_kl, case, device, divergence="jsd", **options)
    agree(topk_kl, case, device, divergence="reverse_kl", atol=2e-6, **options)
    for tail in TAILS[1:] if V < 100 else TAILS[-1:]:
        agree(topk_kl, case, device, tail=tail, **options)


@pytest.mark.parametrize("tail, kind", MODES)
def test_a_support_that_is_the_whole_vocabulary_has_no_tail(tail, kind, device, small_blocks):
    """Not even where the teacher's mass on it is .75."""
    case = problem(2, 6, 37, 37)
    case = case._replace(log_probs=held(case.log_probs + math.log(0.75)))
    agree(topk_kl, case, device, norm=False, tail=tail, divergence=kind, labels=True, kl_weight=0.5)


@pytest.mark.parametrize("tail, kind", MODES)
def test_the_blocks_that_ship(tail, kind, device):
    agree(topk_kl, traps(2.0, 257), device, temperature=2.0, tail=tail, divergence=kind, labels=True, kl_weight=0.5)


@pytest.mark.parametrize("V", [50257, 151936])
def test_the_vocabularies_that_models_have(V, device):
    case = problem(2, 4, V, 20, 2.0)
    case.ids[0, 0], case.ids[1, :2], case.labels[0] = V - 1, torch.tensor([131_073 % V, 0]), V - 2
    options = {"temperature": 2.0, "labels": True, "kl_weight": 0.6}
    ours = measure(linear_topk_kl, case, "triton", device, torch.float32, **options)
    exact, plain = (
        measure(linear_topk_kl, case, "reference", dtype=kind, **options) for kind in (torch.float64, torch.float32)
    )
    check(ours[:5], exact[:5], T=2.0)
    no_worse(ours, plain, exact)  # a product over V in fp32 rounds more than `check` allows
    p = (case.hidden @ case.weight.T / 2).softmax(1)
    assert_close(ours[4].cpu(), p.gather(1, case.ids).sum(1).mean().float())  # by plain indexing, no code shared
    agree(topk_kl, case, device, tail="smooth", **options, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_any_chunk_gives_the_same(rows, device, small_blocks):
    """The last chunk is ragged; d_weight is the sum over chunks."""
    case = problem(5, 6, 53, 3)
    agree(linear_topk_kl, case, device, labels=True, kl_weight=0.5, _rows=rows)
    agree(linear_cross_entropy, case, device, reduction="none", _rows=rows)


@pytest.mark.parametrize("softcap", [None, 3.0, 30.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(softcap, reduction, device, small_blocks):
    case = traps()
    ours = measure(linear_cross_entropy, case, "triton", device, torch.float32, softcap=softcap, reduction=reduction)
    hidden, weight = case.hidden.nan_to_num(0.0).requires_grad_(), case.weight.clone().requires_grad_()
    z = hidden @ weight.T if softcap is None else softcap * torch.tanh(hidden @ weight.T / softcap)
    loss = F.cross_entropy(z, case.labels, reduction=reduction)
    up = torch.linspace(-1, 2, 7).double() if reduction == "none" else torch.tensor(1.7).double()
    zero = torch.zeros_like(loss)
    exact = [loss.detach(), zero, loss.detach(), zero, zero, *torch.autograd.grad(loss, (hidden, weight), up)]
    check(ours, exact)


# Rows and entries with something odd about them.


def merged(case: Case) -> Case:
    """Equal ids of a row as one slot with their summed probability, the others empty; by Python dictionaries."""
    ids, log_probs = torch.full_like(case.ids, -1), torch.zeros_like(case.log_probs)
    for row in range(len(ids)):
        weights = {}
        for token, log_prob in zip(case.ids[row].tolist(), case.log_probs[row].tolist(), strict=True):
            weights[token] = weights.get(token, 0.0) + math.exp(log_prob)
        for slot, (token, weight) in enumerate(weights.items()):
            ids[row, slot], log_probs[row, slot] = token, math.log(weight) if weight else -math.inf
    return case._replace(ids=ids, log_probs=log_probs)


@pytest.mark.parametrize("tail, kind", [("ghost", "forward_kl"), ("ghost", "reverse_kl"), ("smooth", "forward_kl")])
def test_equal_ids_are_one_outcome(tail, kind, device, small_blocks):
    """Two, three of the same, all, with -inf among them, a label that is one of them; they add at T=1, whatever T."""
    case = problem(5, 6, 37, 6, 2.0)
    ids, log_probs, labels = case.ids, case.log_probs, case.labels
    ids[0, 4], labels[0] = ids[0, 1], ids[0, 1]
    ids[1, 0] = ids[1, 3] = ids[1, 5]
    ids[2] = labels[2] = ids[2, 0]
    ids[3, :4], log_probs[3, 1:3], labels[3] = ids[3, 0], -math.inf, ids[3, 0]
    ids[4, 1], ids[4, 3], log_probs[4, :2] = ids[4, 0], ids[4, 2], -math.inf
    for T in (1.0, 2.0):
        options = {"temperature": T, "norm": T != 1, "labels": True, "kl_weight": 0.5, "tail": tail, "divergence": kind}
        for op in (topk_kl, linear_topk_kl):
            exact = measure(op, merged(case), "reference", reduction="none", **options)
            check(measure(op, case, "triton", device, torch.float32, reduction="none", **options), exact, T=T)


@pytest.mark.parametrize("tail", TAILS)
def test_rows_without_entries_or_mass(tail, device, small_blocks):
    """The first has no entry, the second entries of no mass: 0, but uniform under smooth, and the tail's cost under ghost."""
    case = problem(3, 6, 37, 4)
    case.ids[0], case.log_probs[1] = -1, -math.inf
    _, kl, _, mass, student, d_logits = agree(topk_kl, case, device, norm=False, tail=tail, reduction="none")
    assert (mass[:2] == 0).all() and student[0] == 0 and student[1] > 0
    log_p = case.logits.log_softmax(1)
    if tail == "smooth":
        assert_close(kl[0].cpu(), (-math.log(37) - log_p[0].mean()).float())
        off = [token for token in range(37) if token not in case.ids[1]]
        assert_close(kl[1].cpu(), (-math.log(33) - log_p[1, off].mean()).float())
    else:
        assert kl[0].abs() < 1e-6 and d_logits[0].abs().max() < 1e-7
        tail_cost = -torch.log1p(-log_p[1].exp()[case.ids[1]].sum()) if tail == "ghost" else torch.zeros(())
        assert_close(kl[1].cpu(), tail_cost.float(), atol=1e-6)
    if tail not in ("ghost", "smooth"):
        assert kl[1] == 0 and (d_logits[:2] == 0).all()


@pytest.mark.parametrize("op", [topk_kl, linear_topk_kl])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_count_nowhere(op, reduction, device, small_blocks):
    """Whatever they hold: NaN in hidden states, logits and log-probabilities, infinities, ids -1 and good ones."""
    case = problem(5, 6, 37, 3)
    for row, junk in ((1, math.nan), (2, math.inf), (4, 1e30)):
        case.labels[row], case.hidden[row], case.logits[row], case.log_probs[row] = -100, junk, junk, math.nan
    case.ids[1], case.ids[2, 0] = -1, case.ids[2, 1]
    keep, gone = [0, 3], [1, 2, 4]
    options = {"labels": True, "kl_weight": 0.5, "reduction": reduction}
    ours = measure(op, case, "triton", device, torch.float32, **options)
    up = torch.linspace(-1, 2, 5)[keep] if reduction == "none" else None
    few = measure(op, case.rows(keep), "reference", up=up, **options)
    of_rows = [part.dim() > 0 and len(part) == 5 for part in ours]
    check([part[keep] if rows else part for part, rows in zip(ours, of_rows, strict=True)], few)
    assert all((part[gone] == 0).all() for part, rows in zip(ours, of_rows, strict=True) if rows)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_row_left_is_no_loss_and_no_gradient(reduction, device, small_blocks):
    case = problem(3, 6, 37, 3)
    case.labels[:] = -100
    case.hidden[:] = case.logits[:] = case.log_probs[:] = math.nan
    for op, part in itertools.product((linear_topk_kl, topk_kl, linear_cross_entropy), (case, case.rows(slice(0, 0)))):
        results = measure(op, part, "triton", device, torch.float32, labels=True, reduction=reduction)
        assert [tuple(field.shape) for field in results[:5]] == [(len(part.ids),) if reduction == "none" else ()] * 5
        assert all((result == 0).all() for result in results)
    empty = case.rows(slice(0, 0))
    hidden, weight = empty.hidden.float().to(device), case.weight.float().to(device).requires_grad_()
    log_probs, lse = linear_log_probs(hidden, weight, empty.ids.to(device), backend="triton")
    assert log_probs.shape == (0, 3) and lse.shape == (0,)
    assert (torch.autograd.grad(lse.sum(), weight)[0] == 0).all()
    assert [part.shape for part in linear_topk(hidden, weight, 3, backend="triton")] == [(0, 3), (0, 3), (0, 1)]


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.uint8])
def test_integers_of_any_width(kind, device, small_blocks):
    case = problem(3, 6, 200, 4)
    case.ids[1, 2] = 0 if kind == torch.uint8 else -1
    case.labels[0], case.ids[0, 0], case.ids[0, 1] = 199, 198, 130  # beyond int8 and past half of uint8
    narrow = case._replace(ids=case.ids.to(kind), labels=case.labels.to(kind))
    for op in (topk_kl, linear_topk_kl):
        results = [measure(op, each, "triton", device, torch.float32, labels=True, kl_weight=0.5) for each in (case, narrow)]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    hidden, weight = case.hidden.float().to(device), case.weight.float().to(device)
    results = [linear_log_probs(hidden, weight, each.ids.to(device), backend="triton") for each in (case, narrow)]
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


# Numbers at the edge of what fp32 holds.


def on_support(logits: Tensor, K: int, mass: float) -> Case:
    """A teacher that spreads `mass` evenly over the first K tokens of every row of logits [N,V]."""
    N = len(logits)
    ids, log_probs = torch.arange(K).repeat(N, 1), torch.full((N, K), math.log(mass / K)).double()
    return Case(
        torch.zeros(N, 1), torch.zeros(1, 1), held(logits), ids, held(log_probs), torch.zeros(N).double(), ids[:, 0].clone()
    )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_students_tails_from_tiny_to_all(kind, device, small_blocks):
    """Rows with a tail of 1e-3, 1e-17, 1e-30, 1e-87 (0 in fp32), 0 and of 1-1e-3, 1-1e-7, 1-1e-17, 1."""
    gaps = torch.tensor([9.0, 41.0, 71.0, 200.0, 1e4, -5.0, -14.0, -37.0, -1e4])
    logits = torch.randn(len(gaps), 40).double()
    logits[:, :5] += gaps[:, None]
    case = on_support(logits, 5, 0.75)
    ours = agree(topk_kl, case, device, norm=False, divergence=kind, reduction="none")
    tail = 1 - case.logits.softmax(1)[:, :5].sum(1)
    assert tail[0] > 1e-4 and (tail[2:5].abs() < 1e-15).all() and 0 < 1 - tail[6] < 2e-6
    exact = measure(topk_kl, case, "reference", norm=False, divergence=kind, reduction="none")
    for row, rtol in ((0, 2e-5), (1, 2e-5), (2, 2e-5), (5, 1e-3)):  # each gradient off S to its own size, not the row's
        assert_close(ours[5][row, 5:].cpu(), exact[5][row, 5:].float(), rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("mass", [1.0, 0.999999, 1e-7, 1e-30])
def test_teachers_tails_from_none_to_all(mass, tail, device, small_blocks):
    case = on_support(torch.randn(2, 40).double(), 5, mass)
    for kind in ("forward_kl", "jsd", "tv") if tail == "ghost" else ("forward_kl",):
        agree(topk_kl, case, device, norm=False, tail=tail, divergence=kind, rtol=2e-5)


@pytest.mark.parametrize("T", [1.0, 0.1, 10.0])
def test_logits_of_ten_thousand(T, device, small_blocks):
    case = problem(3, 6, 37, 4, T)
    logits = case.logits.clone()
    logits[0, [3, 30]], logits[1, case.ids[1, 1]], logits[2, case.ids[2, :2]] = torch.tensor([1e4, -1e4]).double(), 1e4, -1e4
    logits[1] -= 1e4
    case.labels[0], case.labels[2] = 30, case.ids[2, 0]
    case = case._replace(logits=held(logits))
    for tail, kind in MODES:
        options = {"tail": tail, "divergence": kind, "temperature": T, "labels": True, "kl_weight": 0.5}
        # plain PyTorch's error under renormalize_both: l = -1e4 rounds by 1e-3 before the softmax over S
        agree(topk_kl, case, device, reduction="none", atol=1e-4 if tail == "renormalize_both" else 1e-6, **options)
    agree(topk_kl, case, device, temperature=T, softcap=30.0, labels=True, kl_weight=0.5)


@pytest.mark.parametrize("T", [1.0, 2.0, 0.1])
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_equal_to_its_teacher_has_no_loss(kind, T, device, small_blocks):
    case = problem(3, 6, 37, 1, T)
    hidden, weight = (part.float().to(device).requires_grad_() for part in case[:2])
    ids, log_probs, log_norm = linear_topk(hidden, weight, 7, temperatures=(T,), backend="triton")
    options = {"temperature": T, "log_norm": log_norm[:, 0], "divergence": kind, "backend": "triton"}
    out = linear_topk_kl(hidden, weight, ids, log_probs, **options)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    assert out.kl.abs() < (2e-6 if kind != "tv" else 1e-30) and max(grad.abs().max() for grad in grads) < 2e-6 * T
    assert_close(out.teacher_mass, out.student_mass)
    assert 0.3 < out.student_mass < 0.99  # there is a tail
    if kind == "tv":  # a sign: where both agree but for rounding there is none
        assert all((grad == 0).all() for grad in grads)


def test_jsd_and_skew_kl_survive_underflow(device, small_blocks):
    z = torch.tensor([[0.0, -200.0, -300.0, -1e4], [0.0, 0.0, -1e4, 90.0]])
    case = on_support(z.double(), 2, 0.5)._replace(ids=torch.tensor([[1, 2], [2, 3]]))
    case.log_probs[:] = torch.tensor([math.log(0.5), -150.0])
    for kind, beta in itertools.product(("jsd", "skew_kl"), (0.5, 0.01, 0.99)):
        agree(topk_kl, case, device, norm=False, divergence=kind, beta=beta, reduction="none")


def test_reverse_kl_of_a_teachers_zero_costs_thirty_nats(device):
    out = topk_kl(
        torch.zeros(1, 4, device=device),
        torch.tensor([[0, 1]], device=device),
        torch.tensor([[0.0, -math.inf]], device=device),
        divergence="reverse_kl",
        backend="triton",
    )
    want = 0.25 * math.log(0.25) + 0.25 * (math.log(0.25) + 30) + 0.5 * (math.log(0.5) + 30)
    assert_close(out.kl.cpu(), torch.tensor(want), rtol=1e-6)


def padded(value: float, dtype: torch.dtype = torch.float32) -> Case:
    """Two rows, eleven of whose 37 tokens, off S and no label's, have logits of `value`."""
    case = problem(2, 6, 37, 3)
    outside = [token for token in range(37) if token not in {*case.ids.flatten().tolist(), *case.labels.tolist()}]
    case.logits[:, outside[-9:] + outside[:2]] = value
    return case._replace(logits=held(case.logits, dtype))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("tail, kind", MODES)
def test_logits_of_minus_infinity_off_the_support(tail, kind, softcap, device, small_blocks):
    """A padded vocabulary: its tokens have no probability, and under smooth, where the teacher gives them some, no finite KL.

    A softcap of c makes -c of them.
    """
    case = padded(-math.inf)
    options = {"tail": tail, "divergence": kind, "softcap": softcap, "labels": True, "kl_weight": 0.5}
    if tail != "smooth":
        agree(topk_kl, case, device, **options)
        return
    ours, exact = (
        measure(topk_kl, case, "triton", device, torch.float32, **options),
        measure(topk_kl, case, "reference", **options),
    )
    assert softcap or exact[1] == math.inf
    check(ours[:5], exact[:5])


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_their_types_least_number_off_the_support(dtype, softcap, device, small_blocks):
    """A vocabulary padded as Hugging Face masks: torch.finfo(dtype).min is a number like any other."""
    case = padded(torch.finfo(dtype).min, dtype)
    options = {"softcap": softcap, "labels": True, "kl_weight": 0.5, "up": torch.tensor(1.0)}  # rounded once, not scaled
    for tail, T in (("ghost", 1.0), ("truncate", 2.0), ("smooth", 1.0)):
        asked = {"tail": tail, "temperature": T, "norm": T != 1} | options
        ours, exact = measure(topk_kl, case, "triton", device, dtype, **asked), measure(topk_kl, case, "reference", **asked)
        if tail == "smooth" and exact[1] > 1e30:
            assert ours[1] > 1e30  # its last digits, or a sum past fp32's range, are nobody's concern
            continue
        check(ours[:5], exact[:5], T=T)
        check_rounded(ours[5], exact[5], dtype, device)


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd", "skew_kl", "tv"])
def test_a_token_of_the_support_that_the_student_rules_out(kind, device, small_blocks):
    """Its logit is -inf: it costs what the divergence says of p = 0, and its gradient is 0."""
    case = problem(2, 6, 37, 3)
    case.logits[0, case.ids[0, 1]] = -math.inf
    low = case._replace(logits=case.logits.clamp(min=-1e30))
    ours = measure(topk_kl, case, "triton", device, torch.float32, norm=False, divergence=kind)
    check(ours, measure(topk_kl, low, "reference", norm=False, divergence=kind))
    assert ours[5][0, case.ids[0, 1]] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inside", [True, False])
def test_a_label_that_is_almost_certain(inside, dtype, device, small_blocks):
    """Its gradient p-1 = -.002 keeps its relative accuracy: p is not rounded to `dtype` before the 1 goes."""
    logits = torch.randn(2, 40).double()
    logits[:, 7] = 10.5
    logits = held(logits, dtype)
    case = on_support(logits, 3, 0.5)
    case.labels[:] = 7
    if inside:
        case.ids[:, 1] = 7
    for T in (1.0, 2.0):
        options = {"labels": True, "kl_weight": 0.0, "temperature": T, "reduction": "sum"}
        got = measure(topk_kl, case, "triton", device, dtype, **options)[5][:, 7]
        exact = measure(topk_kl, case, "reference", **options)[5][:, 7]
        assert (exact.abs() / 1.7 < 3e-3).all()
        check_rounded(got, exact, dtype, device, rtol=1e-4)


# Precision.


def plain(z, ids, log_probs, log_norm, labels, T, softcap):
    """CE + ghost KL as one writes it in PyTorch, from logits in the inputs' dtype; the loss in fp32."""
    z = z.float() if softcap is None else softcap * torch.tanh(z.float() / softcap)
    t, ls = (log_probs / T - log_norm[:, None]).exp(), (z / T).log_softmax(1).gather(1, ids)
    tail, tau = (1 - ls.exp().sum(1)).clamp(min=1e-9), (1 - t.sum(1)).clamp(min=1e-9)
    kl = (t * (t.log() - ls)).sum(1) + tau * (tau / tail).log()
    return 0.5 * T * T * kl.mean() + 0.5 * F.cross_entropy(z, labels)


def torch_products(device: str) -> int | None:
    """The path for bf16 on this device: bf16 products of Triton's interpreter are wrong, there torch makes them."""
    return 1 if device == "cpu" else None


def oracle(op, case, dtype, device, T=1.0, softcap=None, times=2.0, **options):
    """`no_worse` of the loss and each gradient, against `plain`."""
    asked = {"labels": True, "kl_weight": 0.5, "temperature": T, "softcap": softcap, "up": torch.tensor(1.0)}
    ours, exact = measure(op, case, "triton", device, dtype, **asked, **options), measure(op, case, "reference", **asked)
    inputs = [part.to(device, dtype).requires_grad_() for part in ([case.logits] if op is topk_kl else case[:2])]
    z = inputs[0] if op is topk_kl else inputs[0] @ inputs[1].T
    ids, log_probs, log_norm, labels = (part.to(device) for part in case[3:])
    loss = plain(z, ids, log_probs.float(), log_norm.float(), labels, T, softcap)
    no_worse([ours[0], *ours[5:]], [loss.detach(), *torch.autograd.grad(loss, inputs)], [exact[0], *exact[5:]], times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [linear_topk_kl, topk_kl])
def test_error_is_at_most_twice_plain_pytorchs_own(op, dtype, device):
    times = 4.0 if device == "cpu" and dtype == torch.bfloat16 and op is topk_kl else 2.0  # see `check_rounded`
    for T, softcap in ((1.0, None), (2.0, None), (0.1, None), (1.0, 20.0)):
        case = problem(6, 32, 257, 8, T, dtype)
        for path in [{}] if op is topk_kl else [{"_path": 1}, {"_path": torch_products(device)}]:
            oracle(op, case, dtype, device, T, softcap, times, **path)


def test_a_softcap_far_above_the_logits_changes_nothing(device):
    """tanh by way of exp must not lose the digits of z/c: at c = 1000 and c = 1e6 the loss is that without a cap."""
    case = problem(3, 6, 37, 4)
    for softcap in (1e3, 1e6):
        agree(topk_kl, case, device, softcap=softcap, labels=True, kl_weight=0.5, norm=False, rtol=2e-5, atol=2e-6)


def test_fp16_gradients_of_a_mean_do_not_vanish(device):
    """1/N times a small probability is less than fp16 holds; it goes on the sums."""
    N = 64 if device == "cpu" else 4096
    case = problem(N, 16, 97, 4, dtype=torch.float16)
    case = case._replace(hidden=held(4 * case.hidden, torch.float16))
    oracle(linear_topk_kl, case, torch.float16, device)
    case = case.rows(slice(0, 4))
    scaled = [
        measure(linear_topk_kl, case, "triton", device, torch.float16, reduction="none", up=torch.full((4,), up), norm=False)[
            5:
        ]
        for up in (1.0, 2.0**-12)
    ]
    for one, other in zip(*scaled, strict=True):
        assert_close(other, one * 2.0**-12, rtol=2e-3, atol=2.0**-24)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("up", [1.0, 2.0**16])
def test_fp16_gradients_of_logits_keep_what_a_loss_scale_is_for(backend, up, device):
    """Probabilities of 1/20,000 have few bits in fp16, and over N rows fewer, until 2^16 multiplies them."""
    case = problem(8, 16, 20_000, 4, dtype=torch.float16)
    options = {"labels": True, "kl_weight": 0.5, "norm": False, "up": torch.tensor(up)}
    kinds = ((backend, device, torch.float16), ("reference", device, torch.float16), ("reference", "cpu", torch.float64))
    ours, plainly, exact = (measure(topk_kl, case, kind, where, dtype, **options) for kind, where, dtype in kinds)
    small = exact[-1].abs() < exact[-1].abs().median()  # neither labels nor the teacher's entries
    no_worse(*([*found[:5], found[5].cpu()[small]] for found in (ours, plainly, exact)))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_loss_scale_is_not_rounded_to_the_gradients_type(dtype, device):
    """Products are rounded once: 2^17 / 3 has more bits than either type, and 2^17 is more than fp16 holds."""
    gradients = (1 + torch.arange(128) / 128).to(device, dtype) / 1024
    for by in (torch.tensor(2.0**17 / 3, device=device), torch.tensor(2.0**17, device=device)):
        assert torch.equal(scaled(gradients.clone(), by, dtype), (gradients.double() * by.double()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_logits_cost_one_rounding(dtype, device, small_blocks):
    """Fields are those of fp32, the gradient is rounded once."""
    case = traps(2.0)
    case = case._replace(logits=held(case.logits, dtype))
    for tail, kind in (("ghost", "jsd"), ("smooth", "forward_kl"), ("renormalize_both", "forward_kl")):
        options = {"temperature": 2.0, "tail": tail, "divergence": kind, "labels": True, "kl_weight": 0.5, "reduction": "none"}
        ours, exact = measure(topk_kl, case, "triton", device, dtype, **options), measure(topk_kl, case, "reference", **options)
        check(ours[:5], exact[:5], T=2.0)
        check_rounded(ours[5], exact[5], dtype, device)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_gradients_have_their_inputs_dtype(dtype, device, small_blocks):
    """And overwrite, block by block, logits that are twice as wide and read already."""
    case = problem(3, 6, 137, 4, dtype=dtype)
    for T, softcap in ((1.0, None), (2.0, 5.0)):
        oracle(linear_topk_kl, case, dtype, device, T, softcap, _path=1)
    for op in (linear_topk_kl, topk_kl, linear_cross_entropy):
        path = {} if op is topk_kl else {"_path": torch_products(device)}
        results = measure(op, case, "triton", device, dtype, labels=True, **path)
        assert {field.dtype for field in results[:5]} == {torch.float32}
        assert {gradient.dtype for gradient in results[5:]} == {dtype}
    hidden, weight = (part.to(device, dtype).requires_grad_() for part in case[:2])
    log_probs, lse = linear_log_probs(hidden, weight, case.ids.to(device), backend="triton")
    assert {part.dtype for part in (log_probs, lse)} == {torch.float32}
    assert {part.dtype for part in torch.autograd.grad(log_probs.sum(), (hidden, weight))} == {dtype}
    ids, log_probs, log_norm = linear_topk(hidden, weight, 3, backend="triton", _path=torch_products(device))
    assert (ids.dtype, log_probs.dtype, log_norm.dtype) == (torch.int32, torch.float32, torch.float32)


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_takes_its_own_dtype(dtype, device, small_blocks):
    case = problem(3, 6, 37, 4, dtype=dtype)
    hidden, weight, ids, log_probs = (part.to(device) for part in (*case[:2], case.ids, case.log_probs.float()))
    options = {"labels": case.labels.to(device), "kl_weight": 0.5, "backend": "triton", "_path": 1}
    found = []
    for kinds, enabled in (((torch.float32, dtype), True), ((dtype, dtype), False)):
        inputs = [part.to(kind, copy=True).requires_grad_() for part, kind in zip((hidden, weight), kinds, strict=True)]
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            loss = linear_topk_kl(*inputs, ids, log_probs, **options).loss
            parts = linear_log_probs(*inputs, ids, backend="triton")
            top = linear_topk(*inputs, 3, backend="triton", _path=1)
        grads = torch.autograd.grad(loss + parts[0].sum() + parts[1].sum(), inputs)
        assert [grad.dtype for grad in grads] == list(kinds)
        found.append([loss.detach(), *(part.detach() for part in parts), *top, *(grad.to(dtype) for grad in grads)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=2e-2 if one.dtype == dtype else 1e-6, atol=1e-3 if one.dtype == dtype else 0)


# Memory: what is read, written and left alone.


def layouts(logits: Tensor):
    """The same logits [N,V] in memory as callers have them."""
    N, V = logits.shape
    spread = logits.new_full((2 * N, V + 5), math.nan)
    spread[::2, 3 : 3 + V] = logits
    odd = logits.new_full((N * V + 8,), math.nan)
    odd[1 : 1 + N * V] = logits.flatten()
    guarded = logits.new_full((N + 16, V), math.nan)
    guarded[8:-8] = logits
    return {
        "transposed": logits.t().contiguous().t(),
        "a window of wider rows": spread[::2, 3 : 3 + V],
        "off by one element": odd[1 : 1 + N * V].view(N, V),
        "rows of a longer tensor": guarded[8:-8],
    }


@pytest.mark.parametrize("V, dtype", [(37, torch.float32), (37, torch.bfloat16), (40, torch.float32), (40, torch.float16)])
def test_logits_in_any_layout_stay_as_they_are(V, dtype, device, small_blocks):
    """Bit for bit, in every row and around them, with a gradient and without (the forward of "none" makes none)."""
    case = traps(1.0, V)
    case.logits[0, 3], case.logits[0, 5] = -0.0, -math.inf
    logits, up = case.logits.to(device, dtype), torch.linspace(-1, 2, 7, device=device)
    ids, log_probs, labels = (part.to(device) for part in (case.ids, case.log_probs.float(), case.labels))
    options = {"labels": labels, "kl_weight": 0.5, "softcap": 9.0, "reduction": "none", "backend": "triton"}
    found = {}
    for name, view in {"contiguous": logits, **layouts(logits)}.items():
        whole = view.as_strided((view.untyped_storage().size() // view.element_size(),), (1,), 0)
        before = whole.view(BITS[dtype]).clone()
        z = view.detach().requires_grad_()
        out = topk_kl(z, ids, log_probs, **options)
        grad = torch.autograd.grad(out.loss, z, up)[0]
        topk_kl(z, ids, log_probs, **options | {"reduction": "mean"}).loss.backward()
        assert torch.equal(whole.view(BITS[dtype]), before), name
        found[name] = [*(part.detach() for part in out), grad, z.grad]
        assert all(torch.equal(one, other) for one, other in zip(found[name], found["contiguous"], strict=True)), name


def test_one_row_expanded_over_many(device, small_blocks):
    """Stride 0: each program has a row of its own to write in, and the gradients of all sum in the one row."""
    case = problem(3, 6, 37, 4)
    row = case.logits[:1].float().to(device).requires_grad_()
    ids, log_probs = case.ids.to(device), case.log_probs.float().to(device)
    out = topk_kl(row.expand(3, 37), ids, log_probs, backend="triton")
    exact = measure(topk_kl, case._replace(logits=case.logits[:1].repeat(3, 1)), "reference", norm=False, up=torch.tensor(1.0))
    check([part.detach() for part in out], exact[:5])
    assert_close(torch.autograd.grad(out.loss, row)[0].cpu(), exact[5].sum(0, keepdim=True).float(), atol=1e-7)


def test_inputs_in_any_layout(device, small_blocks):
    case = traps(2.0)
    parts = [part.to(device, torch.float32 if part.is_floating_point() else None) for part in case]
    found = []
    for change in (
        lambda part: part,
        lambda part: part.t().contiguous().t() if part.dim() == 2 else torch.stack([part, part], 1)[:, 0],
    ):
        hidden, weight, _, ids, log_probs, log_norm, labels = (change(part) for part in parts)
        hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        options = {"labels": labels, "log_norm": log_norm, "temperature": 2.0, "kl_weight": 0.5, "backend": "triton"}
        out = linear_topk_kl(hidden, weight, ids, log_probs, **options)
        log_p = linear_log_probs(hidden.nan_to_num(0.0), weight, ids, backend="triton")
        top = [part for path in (1, 2) for part in linear_topk(hidden.nan_to_num(0.0), weight, 3, backend="triton", _path=path)]
        two = linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, kl_weight=0.5, backend="triton", _path=2)
        grads = torch.autograd.grad(out.loss + two.loss + log_p[0].sum() + log_p[1].sum(), (hidden, weight))
        found.append([part.detach() for part in (*out, *two, *log_p, *top, *grads)])
    assert not change(parts[0]).is_contiguous() and not change(parts[-1]).is_contiguous()
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN, or in integers a number that is no id."""

    def poisoned(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(2**30)
            return tensor

        return made

    monkeypatch.setattr(SCRATCH, "tile", None)
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
        monkeypatch.setattr(place, name, poisoned(getattr(place, name)))


def test_unwritten_memory_would_show(device, small_blocks, poison):
    case = traps(2.0, 53)
    for op, options in ASKED:
        agree(op, case, device, temperature=2.0, **options)
    agree(linear_cross_entropy, case, device, _rows=3)
    hidden, weight = (part.float().to(device).requires_grad_() for part in (case.hidden.nan_to_num(0.0), case.weight))
    log_probs, lse = linear_log_probs(hidden, weight, case.ids.to(device), backend="triton", _rows=3)
    top = linear_topk(hidden, weight, 5, temperatures=(1.0, 2.0), backend="triton", _rows=3)
    for part in (log_probs, lse, *top, *torch.autograd.grad(log_probs.sum() + lse.sum(), (hidden, weight))):
        assert not part.isnan().any()
    assert top[0].max() < 53


def test_two_runs_give_the_same_bits(device, small_blocks):
    case = traps(2.0)
    for op, options in ASKED:
        results = [measure(op, case, "triton", device, torch.float32, temperature=2.0, **options) for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_kernel_itself_writes_zeros_for_ignored_rows(device, small_blocks):
    """Fields and gradients of a row of weight 0, over poison; its neighbours' are theirs."""
    case = on_support(torch.randn(3, 37).double(), 4, 0.75)
    ids, log_probs, labels, z = (
        part.to(device) for part in (case.ids, case.log_probs.float(), case.labels, case.logits.float())
    )
    out, grad = torch.full((3, 5), math.nan, device=device), torch.full((3, 37), math.nan, device=device)
    targets, spec = Targets(ids, log_probs, labels, torch.tensor([1.0, 0.0, 1.0], device=device)), Spec(kl_weight=0.5)
    row_kernel.launch(z, out, targets, spec, grad)
    assert (out[1] == 0).all() and (grad[1] == 0).all()
    exact = measure(topk_kl, case, "reference", norm=False, reduction="none", labels=True, kl_weight=0.5, up=torch.ones(3))
    check([*out[[0, 2]].t(), grad[[0, 2]]], [part[[0, 2]] for part in exact])


def far_apart(device: str, dtype: torch.dtype) -> Tensor:
    """Three rows of 64 logits, each 2^30 elements after the one before: the last begins 2^31 elements after the first.

    They lie in the second half of memory that nothing else touches (on a CPU only touched pages exist): an offset that
    wraps finds the zeros of the first half.
    """
    if device == "cpu":
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, (2**32 + 64) * dtype.itemsize, flags=kind), dtype=dtype)
    else:
        memory = torch.empty(2**32 + 64, dtype=dtype, device=device)
        memory[:64] = 0
    return memory.as_strided((3, 64), (2**30, 1), 2**31).copy_(torch.randn(3, 64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_more_than_two_to_the_31_elements_apart(dtype, device):
    z = far_apart(device, dtype)
    case = on_support(z.cpu().double(), 4, 0.75)
    exact = measure(topk_kl, case, "reference", norm=False, reduction="none", labels=True, kl_weight=0.5, up=torch.ones(3))
    if dtype == torch.float32:
        top, norm = torch.full((3, 4), math.nan, device=device), torch.full((3, 1), math.nan, device=device)
        topk_file.launch(z, None, torch.empty_like(top, dtype=torch.int32), top, norm, [2.0], None)
        assert_close(top.cpu(), case.logits.log_softmax(1).topk(4).values.float())
    ids, log_probs, labels = (part.to(device) for part in (case.ids, case.log_probs.float(), case.labels))
    targets, spec = Targets(ids, log_probs, labels, torch.ones(3, device=device)), Spec(kl_weight=0.5)
    out = torch.full((3, 5), math.nan, device=device)
    row_kernel.launch(z, out, targets, spec, own=False)
    assert torch.equal(z.cpu().double(), case.logits)
    row_kernel.launch(z, out, targets, spec, z)
    check([*out.t()], exact[:5])
    check_rounded(z, exact[5], dtype, device)


@pytest.mark.gpu
def test_more_than_two_to_the_31_logits():
    V = 151_936
    N = 2**31 // V + 2
    z = torch.zeros(N, V, dtype=torch.bfloat16, device="cuda")
    z[:, 7], z[-1, 100_000] = 3.0, 5.0
    ids, log_probs = torch.tensor([[7, 100_000]], device="cuda").expand(N, 2), torch.full((N, 2), math.log(0.3), device="cuda")
    out = topk_kl(z.requires_grad_(), ids, log_probs, reduction="none")
    grad = torch.autograd.grad(out.loss, z, torch.ones(N, device="cuda"))[0]
    for row in (0, N // 2, N - 1):
        few = z[row : row + 1].detach().double().requires_grad_()
        exact = topk_kl(few, ids[:1], log_probs[:1].double(), backend="reference")
        assert_close(out.kl[row], exact.kl.float())
        assert_close(grad[row], torch.autograd.grad(exact.loss, few)[0][0].bfloat16(), rtol=2**-7, atol=1e-7)


# Autograd, compilers and the rest of PyTorch.


def student(device, dtype=torch.float32, **sizes):
    """hidden, weight (both with a gradient), ids, log_probs, labels on the device."""
    case = problem(**{"N": 4, "D": 6, "V": 37, "K": 3} | sizes)
    hidden, weight = (part.to(device, dtype).requires_grad_() for part in case[:2])
    return hidden, weight, case.ids.to(device), case.log_probs.float().to(device), case.labels.to(device)


@pytest.mark.parametrize("path", [1, 2])
def test_only_what_is_needed_is_made(path, device):
    hidden, weight, ids, log_probs, labels = student(device)
    options = {"labels": labels, "kl_weight": 0.5, "backend": "triton", "_path": path}
    up = torch.rand(4, 4, device=device)

    def grads(*inputs):
        out = linear_topk_kl(*inputs, ids, log_probs, **options)
        log_p, lse = linear_log_probs(*inputs, ids, backend="triton")
        with torch.no_grad():
            nothing = linear_topk_kl(*inputs, ids, log_probs, **options | {"_path": None})
            assert not nothing.loss.requires_grad
            assert not linear_log_probs(*inputs, ids, backend="triton")[1].requires_grad
        assert_close(nothing.loss, out.loss.detach())
        wanted = [part for part in inputs if part.requires_grad]
        return torch.autograd.grad(out.loss, wanted), torch.autograd.grad((log_p, lse), wanted, (up[:, :3], up[:, 3]))

    (d_hidden, d_weight), (p_hidden, p_weight) = grads(hidden, weight)
    for one, other in zip((d_hidden, p_hidden), grads(hidden, weight.detach()), strict=True):
        assert_close(other[0], one)
    for one, other in zip((d_weight, p_weight), grads(hidden.detach(), weight), strict=True):
        assert_close(other[0], one)
    assert not any(part.requires_grad for part in linear_topk(hidden, weight, 3, backend="triton"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_works_or_raises(reduction, device):
    hidden, weight, ids, log_probs, _ = student(device)
    for op in (linear_topk_kl, topk_kl):
        inputs = (hidden, weight) if op is linear_topk_kl else ((hidden @ weight.T).detach().requires_grad_(),)
        loss = op(*inputs, ids, log_probs, reduction=reduction, backend="triton").loss.sum()
        first = [grad.clone() for grad in torch.autograd.grad(loss, inputs, retain_graph=True)]
        for one, other in zip(first, torch.autograd.grad(loss, inputs, retain_graph=True), strict=True):
            assert_close(other, one)
        for _ in range(2):
            try:
                again = torch.autograd.grad(3 * loss, inputs, retain_graph=True)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
                continue
            for one, other in zip(first, again, strict=True):
                assert_close(other, 3 * one, atol=1e-7)
        loss = op(*inputs, ids, log_probs, reduction=reduction, backend="triton").loss.sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, inputs, create_graph=True)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_shows(wrong, device):
    """NaN or inf that reaches the loss's backward stays in its row: it may not turn into numbers that look like some."""
    hidden, weight, ids, log_probs, _ = student(device)
    logits = (hidden @ weight.T).detach().requires_grad_()
    up = torch.tensor([1.0, wrong, 1.0, 1.0], device=device)
    loss = topk_kl(logits, ids, log_probs, reduction="none", backend="triton").loss
    grad = torch.autograd.grad(loss, logits, up)[0]
    assert not grad[1].isfinite().any() and grad[[0, 2, 3]].isfinite().all()
    loss = linear_topk_kl(hidden, weight, ids, log_probs, reduction="none", backend="triton").loss
    d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), up)
    assert not d_hidden[1].isfinite().any() and d_hidden[[0, 2, 3]].isfinite().all() and not d_weight.isfinite().any()


def test_two_micro_batches_sum_to_one_batch(device, small_blocks):
    hidden, weight, ids, log_probs, labels = student(device, N=5)
    options = {"kl_weight": 0.5, "reduction": "sum", "backend": "triton"}
    linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, **options).loss.backward()
    whole = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    for part in (slice(0, 2), slice(2, 5)):
        linear_topk_kl(hidden[part], weight, ids[part], log_probs[part], labels=labels[part], **options).loss.backward()
    for one, other in zip(whole, (hidden.grad, weight.grad), strict=True):
        assert_close(other, one, rtol=1e-5, atol=1e-6)


def every_op(hidden, weight, ids, log_probs, labels, backend, kl_weight=0.5, temperature=1.0):
    """All five ops in one function: the sum of their losses, and all that carries no gradient."""
    log_norm = log_probs.sum(1) * 0
    options = {"labels": labels, "kl_weight": kl_weight, "backend": backend}
    a = linear_topk_kl(hidden * 2, weight, ids, log_probs, temperature=temperature, log_norm=log_norm, **options)
    b = topk_kl(hidden @ weight.T, ids, log_probs, divergence="jsd", softcap=9.0, **options)
    c = linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend)
    d, lse = linear_log_probs(hidden, weight, ids, softcap=9.0, backend=backend)
    top = linear_topk(hidden, weight, 3, temperatures=(1.0, 2.0), backend=backend)
    return a.loss + b.loss + c.loss.sum() + d.sum() + lse.sum(), *a[1:], *b[1:], *c[1:], *top


def compare_compiled(compiled, inputs, *rest):
    found = []
    for function in (every_op, compiled):
        loss, *others = function(*inputs, *rest)
        found.append([loss.detach(), *others, *torch.autograd.grad(loss, inputs[:2])])
    for one, other in zip(*found, strict=True):
        assert_close(other, one, rtol=1e-5, atol=1e-6)


COMPILERS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_ops_equal_eager_ones(backend, compiler, device):
    """With no graph break, and so do further calls with another N and K, where sizes become symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(every_op, backend=compiler, fullgraph=True)
    for N, K in ((2, 3), (3, 2)):
        compare_compiled(compiled, student(device, N=N, K=K), backend)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiled_ops_take_any_size_and_weight(backend, device):
    """Everything symbolic from the start: N, D, V, K, and floats that a schedule changes."""
    torch._dynamo.reset()
    compiled = torch.compile(every_op, backend="aot_eager", fullgraph=True, dynamic=True)
    compare_compiled(compiled, student(device, N=2), backend, 0.5, 2.0)
    compare_compiled(compiled, student(device, N=3, V=40, K=2), backend, 0.25, 3.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_schedule_of_kl_weight_compiles(backend, device):
    torch._dynamo.reset()
    compiled = torch.compile(every_op, backend="eager", fullgraph=True)
    for kl_weight in (0.25, 0.5):
        compare_compiled(compiled, student(device, N=2), backend, kl_weight)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reduction", ["mean", "none", "none, upstream"])
def test_the_loss_op_is_registered_as_it_behaves(reduction, backend, device):
    hidden, weight, ids, log_probs, labels = student(device)
    up = torch.rand(4, device=device) if "upstream" in reduction else None
    spec = (0.5, 1.0, "ghost", "forward_kl", 0.5, None, -100, reduction[:4], backend, torch.float32, None, 1)
    op, logits = torch.ops.nanodistill.fused, (hidden @ weight.T).detach().requires_grad_()
    for source, head, need in ((hidden, weight, [True, True]), (logits, None, [True, False])):
        torch.library.opcheck(op, (source, head, ids, log_probs, labels, up, *spec, need))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_other_ops_are_registered_as_they_behave(backend, device):
    hidden, weight, ids, *_ = student(device)
    ops, given = torch.ops.nanodistill, torch.rand(4, 4, device=device)
    rest = (1.0, 1.5, "log_probs", "forward_kl", 0.5, 9.0, -100, "none", backend, torch.float32, None, None, [True, True])
    torch.library.opcheck(ops.fused, (hidden, weight, ids, None, None, None, *rest))
    torch.library.opcheck(ops.fused, (hidden.detach(), weight.detach(), ids, None, None, given, *rest))
    torch.library.opcheck(ops.topk, (hidden.detach(), weight.detach(), 3, [1.0, 2.0], None, backend, torch.float32, None, 1))


def test_triton_on_cpu_tensors_without_the_interpreter_is_refused():
    code = """
import torch
from kernels import linear_cross_entropy, linear_log_probs, linear_topk, linear_topk_kl, topk_kl
h, ids, labels = torch.randn(4, 4), torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, dtype=torch.long)
for call in (
    lambda: linear_topk_kl(h, h, ids, ids.float(), backend="triton"),
    lambda: topk_kl(h, ids, ids.float(), backend="triton"),
    lambda: linear_cross_entropy(h, h, labels, backend="triton"),
    lambda: linear_log_probs(h, h, ids, backend="triton"),
    lambda: linear_topk(h, h, 2, backend="triton"),
):
    try:
        call()
    except ValueError as error:
        print(error)
linear_topk_kl(h, h, ids, ids.float())
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all("backend='triton'" in line and "cpu" in line and "CUDA" in line for line in lines), done.stdout


# The primitive, and the teacher's side.


def plain_log_probs(case: Case, ids: Tensor, T: float, softcap: float | None):
    """[N,K] and [N] in float64 with autograd: 0 at empty slots."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / T).log_softmax(1).gather(1, ids.clamp(min=0))
    return (hidden, weight), log_p * (ids >= 0), (z / T).logsumexp(1)


@pytest.mark.parametrize("T, softcap", [(1.0, None), (2.0, 5.0), (0.1, None), (10.0, 5.0)])
@pytest.mark.parametrize("V, K", [(37, 5), (257, 1), (23, 23), (64, 20)])
def test_log_probs_and_their_gradients(V, K, T, softcap, device, small_blocks):
    """Both results, together and alone; equal ids read alike and their slopes add; an empty slot reads 0 and sends nothing."""
    case = problem(4, 6, V, K, T)
    ids = case.ids.clone()
    ids[0, K // 2], ids[1, K - 1], ids[2] = ids[0, 0], -5, ids[2, 0]
    ids[3] = -1
    up = torch.randn(4, K).double(), torch.randn(4).double()
    for parts in ((0, 1), (0,), (1,)) if V == 37 else ((0, 1),):
        inputs, *exact = plain_log_probs(case, ids, T, softcap)
        want = torch.autograd.grad([exact[part] for part in parts], inputs, [up[part] for part in parts])
        narrow = [part.float().to(device).requires_grad_() for part in case[:2]]
        ours = linear_log_probs(*narrow, ids.to(device), temperature=T, softcap=softcap, backend="triton", _rows=3)
        slopes = [up[part].float().to(device) for part in parts]
        got = torch.autograd.grad([ours[part] for part in parts], narrow, slopes)
        assert (ours[0][ids.to(device) < 0] == 0).all()
        for one, other in zip((*ours, *got), (*exact, *want), strict=True):
            assert_close(one.detach().cpu(), other.detach().float(), rtol=1e-5, atol=2e-6 * (1 + other.abs().max().item()))


def test_small_slopes_of_log_probs_do_not_vanish_in_fp16(device):
    """2^-17 of a probability of 1/300 is below fp16's least number: the slopes' size goes on the sums."""
    case, found = problem(4, 16, 300, 4, dtype=torch.float16), []
    for scale in (1.0, 2.0**-17):
        inputs = [part.to(device, torch.float32).requires_grad_() for part in (case.hidden / 16, case.weight)]
        with torch.autocast(device, torch.float16):
            lse = linear_log_probs(*inputs, case.ids.to(device), backend="triton")[1]
        grads = torch.autograd.grad(scale * lse.sum(), inputs)
        found.append([grad.float() / scale for grad in grads])
    for one, other in zip(*found, strict=True):
        assert (other - one).norm() < 1e-3 * one.norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_log_probs_error_is_at_most_twice_plain_pytorchs_own(dtype, device, small_blocks):
    case = problem(4, 32, 137, 8, dtype=dtype)
    inputs, *exact = plain_log_probs(case, case.ids, 1.0, None)
    exact = [*exact, *torch.autograd.grad((exact[0].sum(), exact[1].sum()), inputs)]
    found = []
    for ours in (True, False):
        hidden, weight = (part.to(device, dtype).requires_grad_() for part in case[:2])
        ids = case.ids.to(device)
        if ours:
            log_p, lse = linear_log_probs(hidden, weight, ids, backend="triton")
        else:
            z = (hidden @ weight.T).float()
            log_p, lse = z.log_softmax(1).gather(1, ids), z.logsumexp(1)
        found.append([log_p, lse, *torch.autograd.grad((log_p.sum(), lse.sum()), (hidden, weight))])
    for ours, other, right in zip(*found, exact, strict=True):
        assert (ours.cpu().double() - right).norm() <= 2 * (other.cpu().double() - right).norm() + 1e-6 * right.abs().max()


def whole_numbers(N, D, V, seed=0):
    """hidden and weight whose products are small whole numbers: exact in any dtype and order, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(-3, 4, (rows, D), generator=generator).double() for rows in (N, V))


@pytest.fixture
def few_lanes(monkeypatch):
    """Groups of several tokens at small vocabularies: 16 lanes to k = 16, 64 to k = 64, as many as are needed above."""
    monkeypatch.setattr(topk_file, "TUNING", ((16, 16, 4), (64, 64, 4), (1024, 1024, 4)))


def check_topk(hidden, weight, k, temperatures, softcap, device, dtype=torch.float32, path=1):
    """ids unique, in range, the multiset of their logits that of the k largest; log_probs and log_norm exact."""
    z = hidden @ weight.T
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    narrow = [part.to(device, dtype) for part in (hidden, weight)]
    found = linear_topk(*narrow, k, temperatures=temperatures, softcap=softcap, backend="triton", _rows=2, _path=path)
    ids, log_probs, log_norm = (part.cpu() for part in found)
    assert ids.dtype == torch.int32 and ids.shape == (len(z), k) and ids.min() >= 0 and ids.max() < z.shape[1]
    assert all(len(set(row)) == k for row in ids.tolist())
    assert torch.equal(z.gather(1, ids.long()), z.topk(k).values)  # exactly: ties in any order
    assert_close(log_probs, z.log_softmax(1).topk(k).values.float(), rtol=2e-6, atol=2e-6)
    assert (log_probs.diff(dim=1) <= 0).all()
    norms = [(z / T).logsumexp(1) - z.logsumexp(1) / T for T in temperatures]
    want = torch.stack(norms, 1) if norms else z[:, :0]
    assert_close(log_norm, want.float(), rtol=1e-5, atol=3e-6)
    assert all((log_norm[:, place] == 0).all() for place, T in enumerate(temperatures) if T == 1)


@pytest.mark.parametrize("V, k", [(5, 1), (23, 23), (37, 3), (100, 64), (257, 16), (300, 20), (1000, 64), (64, 64)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_topk_is_exact_with_all_its_ties(V, k, softcap, device, few_lanes):
    check_topk(*whole_numbers(3, 4, V), k, (2.0,), softcap, device)


@pytest.mark.parametrize("temperatures", [(), (1.0,), (0.5,), (1.0, 2.0), (2.0, 1.0, 0.5, 4.0), (3.0, 3.0)])
def test_topk_tells_the_normaliser_of_any_temperatures(temperatures, device, few_lanes):
    check_topk(*whole_numbers(2, 4, 50), 3, temperatures, None, device)


@pytest.mark.parametrize("V, k", [(257, 3), (5000, 64), (5000, 5), (300, 300)])
def test_topk_with_the_lanes_that_ship(V, k, device):
    check_topk(*whole_numbers(2, 4, V), k, (2.0, 1.0), None, device)
    hidden, weight = whole_numbers(1, 4, V)
    for path in (1, 2):
        check_topk(torch.zeros_like(hidden), weight, k, (1.0,), None, device, path=path)  # all V are ties


def test_topk_finds_neighbours_wherever_they_lie(device, few_lanes):
    """The k largest in one lane, in one block, at the first and last places, and all but equal."""
    V, k = 173, 5
    for places in ([3, 19, 35, 51, 67], [32, 33, 34, 35, 36], [0, 1, 2, V - 2, V - 1], [15, 16, V - 13, V - 14, 100]):
        z = torch.linspace(-5, 5, V).double().flip(0) * 0.1
        z[places] += torch.tensor([9.0, 8.0, 7.0, 9.0, 6.0])
        for path in (1, 2):
            check_topk(torch.ones(1, 1).double(), held(z)[:, None], k, (1.0, 0.1), None, device, path=path)
    close = 1 + torch.arange(V).double()[torch.randperm(V)] * 2.0**-23  # the last bit decides
    check_topk(torch.ones(1, 1).double(), close[:, None], k, (1.0,), None, device)
    check_topk(torch.ones(1, 1).double(), -close[:, None], k, (1.0,), None, device)


@pytest.mark.parametrize("V", [50257, 151936])
def test_topk_of_the_vocabularies_that_models_have(V, device):
    hidden, weight = whole_numbers(1, 4, V)
    weight[[V - 1, 131_073 % V]] = hidden[0] * 100  # the first and second place, beyond int16 and 17 bits
    check_topk(hidden, weight, 64, (2.0,), None, device)
    if device == "cuda":  # thousands of programs: a minute in the interpreter
        check_topk(hidden, weight, 64, (2.0,), None, device, path=2)


@pytest.mark.parametrize("dtype", HALVES)
def test_topk_in_half_precision(dtype, device, few_lanes):
    for path in (1, torch_products(device)):
        check_topk(*whole_numbers(2, 4, 100), 20, (2.0,), None, device, dtype, path)


@pytest.mark.parametrize("V, k", [(5, 1), (130, 3), (257, 40), (64, 64), (1000, 7), (300, 290)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_topk_whose_product_keeps_the_maxima(V, k, softcap, device):
    """Path 2: groups of 32 neighbours, of which the product kernel tells the maximum."""
    check_topk(*whole_numbers(3, 4, V), k, (2.0, 1.0), softcap, device, path=2)


def test_topk_whose_product_has_blocks_to_spare(device):
    """Rows beyond one block of the product, a ragged width, and no normaliser asked for."""
    hidden, weight = (part.to(device, torch.float32) for part in whole_numbers(70, 40, 97))
    ids, log_probs, log_norm = linear_topk(hidden, weight, 5, temperatures=(), backend="triton", _path=2)
    z = hidden @ weight.T
    assert torch.equal(z.gather(1, ids.long()), z.topk(5).values) and log_norm.shape == (70, 0)
    assert_close(log_probs, z.log_softmax(1).topk(5).values, rtol=2e-6, atol=2e-6)


# The second path of the chunked losses, exp_kernel.py.


PATH_TWO = [
    (1.0, {"labels": True, "kl_weight": 0.4}),
    (2.0, {"_rows": 3}),
    (0.5, {"reduction": "sum"}),
    (1.0, {"labels": True, "beta": 0.2, "reduction": "sum"}),
]


@pytest.mark.parametrize("T, options", PATH_TWO)
@pytest.mark.parametrize("tail, kind", [mode for mode in MODES if mode[0] != "smooth"])
def test_path_two_with_every_trap(tail, kind, T, options, device):
    """Its tail is a difference of sums wherever that keeps three digits more than are needed here."""
    modes = {"tail": tail, "divergence": kind, "temperature": T, "norm": T != 1}
    agree(linear_topk_kl, traps(T), device, rtol=2e-5, atol=4e-6, _path=2, **modes, **options)


@pytest.mark.parametrize("N, D, V, K", [(3, 6, 257, 20), (70, 40, 130, 3), (5, 32, 64, 64), (3, 33, 37, 37), (2, 128, 97, 1)])
def test_path_two_in_any_shape(N, D, V, K, device):
    """More rows and columns than a block holds, ragged ones, and widths that are no multiple of the product's step."""
    case = problem(N, D, V, K)
    agree(linear_topk_kl, case, device, labels=True, kl_weight=0.4, atol=4e-6, norm=False, _path=2)
    agree(linear_cross_entropy, case, device, atol=4e-6, _path=2)


def test_path_two_does_rows_beyond_its_range_anew(device, small_blocks):
    """A label or a tail that e^(z-m) cannot hold, logits of +-1e4, next to rows that it holds well."""
    case = problem(6, 4, 37, 3)
    hidden, weight = torch.zeros_like(case.hidden), case.weight
    hidden[:, 0], weight[:, 0] = torch.tensor([1.0, 30.0, 90.0, 1000.0, 1e4, 1.0]), torch.linspace(-1, 1, 37)
    case = case._replace(hidden=hidden, weight=held(weight))
    case.ids[:, 0] = torch.tensor([3, 0, 0, 36, 18, 5])
    case.labels[:] = torch.tensor([36, 36, 20, 0, 1, 5])
    case.log_probs[:] = math.log(0.25)
    for row in range(6):
        agree(linear_topk_kl, case.rows([row]), device, labels=True, kl_weight=0.5, norm=False, rtol=2e-5, _path=2)
    agree(linear_topk_kl, case, device, norm=False, rtol=2e-5, _path=2)
    agree(linear_topk_kl, case, device, labels=True, kl_weight=0.0, norm=False, rtol=2e-5, _path=2)


def test_path_two_keeps_digits_of_a_small_tail(device):
    """1e-3, 1e-6 and 1e-9 of the student's mass off S: three digits at least, where sums less S would have none left."""
    case = problem(3, 6, 37, 4)
    hidden, weight = case.hidden * 0.1, case.weight
    hidden[:, 0], weight[:, 0] = torch.tensor([9.0, 16.0, 23.0]), 0.0
    weight[:4, 0], case.ids[:] = 1.0, torch.arange(4)
    case = case._replace(hidden=held(hidden), weight=held(weight))
    for row, kind in itertools.product(range(3), DIVERGENCES):
        agree(linear_topk_kl, case.rows([row]), device, norm=False, divergence=kind, rtol=3e-4, _path=2)


@pytest.mark.parametrize("path", [1, 2])
def test_neither_entries_nor_labels_are_no_loss(path, device):
    """K = 0: nothing is asked of the student."""
    results = measure(linear_topk_kl, problem(2, 6, 37, 0), "triton", device, torch.float32, norm=False, _path=path)
    assert all(part.abs().max() < 1e-6 for part in results)


def test_path_two_is_refused_where_it_cannot_serve(device):
    hidden, weight, ids, log_probs, labels = student(device)
    options = {"labels": labels, "log_norm": log_probs.sum(1) * 0, "backend": "triton", "_path": 2}
    for wrong in ({"softcap": 9.0}, {"tail": "smooth"}, {"temperature": 2.0}):
        with pytest.raises(ValueError, match="_path=2"):
            linear_topk_kl(hidden, weight, ids, log_probs, **options | wrong)
