"""The losses against float64 autograd on whole logits: every mode, every gradient, every trap of DESIGN section 4."""

import contextlib
import itertools
import math
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import common, linear_cross_entropy, linear_log_probs, linear_topk, linear_topk_kl, topk_kl
from kernels.bench import peak_memory
from kernels.common import DIVERGENCES, TAILS
from tests.helpers import assert_close

MODES = [("ghost", kind) for kind in DIVERGENCES] + [(tail, "forward_kl") for tail in TAILS[1:]]


def problem(N, D, V, K, T=1.0, dtype=torch.float64, scale=3.0, seed=0):
    """Hidden states, a head, and a random teacher's exact top-K with its normaliser at T."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    z = torch.randn(N, V, generator=generator, dtype=torch.float64) * scale
    ids = z.topk(K).indices
    log_probs = z.log_softmax(1).gather(1, ids)
    log_norm = (z / T).logsumexp(1) - z.logsumexp(1) / T
    labels = torch.randint(V, (N,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), ids, log_probs.to(dtype), log_norm.to(dtype), labels


def relative(a, b):
    """KL(a|b) of one row, 0 log 0 = 0."""
    return (a[a > 0] * (a[a > 0] / b[a > 0]).log()).sum()


def dense_loss(z, ids, log_probs, log_norm, labels, kl_weight, T, tail, kind, beta=0.5):
    """[N] losses outcome by outcome from DESIGN's words, in loops over rows: shares no code with kernels/."""
    losses = []
    for row in range(len(z)):
        p, weights = (z[row] / T).softmax(0), {}
        for token, log_prob in zip(ids[row].tolist(), log_probs[row], strict=True):
            if token >= 0:
                weights[token] = weights.get(token, 0.0) + log_prob.exp()
        S = sorted(weights)
        t = torch.stack([weights[token] for token in S]) ** (1 / T) * (-log_norm[row]).exp()
        ps, off = p[S], [token for token in range(len(p)) if token not in weights]
        M, tau = t.sum(), max(0.0, 1 - t.sum().item()) if off else 0.0
        if tail == "ghost":
            t, ps = torch.cat([t, t.new_tensor([tau])]), torch.cat([ps, p[off].sum()[None]])
        if tail.startswith("renormalize"):
            t = t / M
        if tail == "renormalize_both":
            ps = ps / ps.sum()
        if tail == "smooth":
            t, ps = torch.cat([t, t.new_full((len(off),), tau / len(off))]), torch.cat([ps, p[off]])
        m = beta * t + (1 - beta) * ps
        kl = {
            "forward_kl": lambda t=t, ps=ps: relative(t, ps),
            "reverse_kl": lambda t=t, ps=ps: (ps * (ps.log() - t.log().clamp(min=-30))).sum(),
            "jsd": lambda t=t, ps=ps, m=m: beta * relative(t, m) + (1 - beta) * relative(ps, m),
            "skew_kl": lambda t=t, m=m: relative(t, m),
            "tv": lambda t=t, ps=ps: (t - ps).abs().sum() / 2,
        }[kind]()
        ce = -z[row].log_softmax(0)[labels[row]]
        losses.append((1 - kl_weight) * ce + kl_weight * T * T * kl)
    return torch.stack(losses)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("tail, kind", MODES)
def test_every_mode_is_the_loss_of_the_design(tail, kind, T, backend):
    hidden, weight, ids, log_probs, log_norm, labels = problem(7, 6, 23, 5, T)
    ids[0, 2] = ids[0, 0]  # a duplicate
    ids[1, 1:3] = -1  # empty slots
    hidden.requires_grad_(), weight.requires_grad_()
    options = {
        "labels": labels,
        "kl_weight": 0.7,
        "temperature": T,
        "log_norm": log_norm,
        "tail": tail,
        "divergence": kind,
    }
    want = dense_loss(hidden @ weight.T, ids, log_probs, log_norm, labels, 0.7, T, tail, kind).mean()
    got = linear_topk_kl(hidden, weight, ids, log_probs, **options, backend=backend, _rows=3).loss
    assert_close(got, want, rtol=1e-9)
    for ours, theirs in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    logits = (hidden @ weight.T).detach().requires_grad_()
    got = topk_kl(logits, ids, log_probs, **options, backend=backend, _rows=3).loss
    assert_close(got, want, rtol=1e-9)
    want = dense_loss(logits, ids, log_probs, log_norm, labels, 0.7, T, tail, kind).mean()
    assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(want, logits)[0], rtol=1e-8, atol=1e-10)


SHAPES = [(33, 16, 257, 20), (9, 8, 50, 50), (5, 8, 64, 1), (4, 8, 50257, 100), (11, 8, 130, 64), (6, 4, 40, 3)]


@pytest.mark.parametrize("tail, kind", MODES)
def test_chunked_equals_reference_in_every_combination(tail, kind):
    for (N, D, V, K), T, (kl_weight, with_labels), cap in itertools.product(
        SHAPES, (1.0, 3.0, 0.1), ((1.0, False), (0.3, True), (1.0, True), (0.0, True)), (None, 5.0)
    ):
        if V > 1000 and (T != 3.0 or cap is None):
            continue
        hidden, weight, ids, log_probs, log_norm, labels = problem(N, D, V, K, T)
        labels[::3] = -100
        options = {"kl_weight": kl_weight, "temperature": T, "log_norm": log_norm, "tail": tail, "divergence": kind}
        options |= {"softcap": cap, "labels": labels if with_labels else None}
        for reduction in ("mean", "none"):
            results = []
            for backend, rows in (("reference", None), ("torch", 4)):
                a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
                out = linear_topk_kl(a, b, ids, log_probs, **options, reduction=reduction, backend=backend, _rows=rows)
                up = torch.linspace(0.5, 2, N, dtype=torch.float64) if reduction == "none" else torch.tensor(1.7).double()
                results.append([*out, *torch.autograd.grad(out.loss, (a, b), up)])
            for ours, theirs in zip(*results, strict=True):
                assert_close(theirs, ours, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tail, kind", MODES)
def test_gradcheck_of_the_reference(tail, kind):
    hidden, weight, ids, log_probs, log_norm, labels = problem(3, 4, 11, 4, 2.0, scale=1.0)
    ids[0, 1], ids[1, 2] = ids[0, 0], -1
    options = {
        "labels": labels,
        "kl_weight": 0.6,
        "temperature": 2.0,
        "log_norm": log_norm,
        "tail": tail,
        "divergence": kind,
    }

    def loss(hidden, weight):
        return linear_topk_kl(
            hidden, weight, ids, log_probs, **options, softcap=4.0, reduction="none", backend="reference"
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


def plain(hidden, weight, ids, log_probs, labels):
    """CE + ghost KL as one writes it in PyTorch: logits in the inputs' dtype, the loss in fp32."""
    log_p = (hidden @ weight.T).float().log_softmax(1)
    ls, t = log_p.gather(1, ids), log_probs.float().exp()
    tail, tau = (1 - ls.exp().sum(1)).clamp(min=1e-9), (1 - t.sum(1)).clamp(min=1e-9)
    kl = (t * (log_probs.float() - ls)).sum(1) + tau * (tau / tail).log()
    ce = torch.nn.functional.nll_loss(log_p, labels)
    return 0.5 * kl.mean() + 0.5 * ce


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_plain_pytorchs_own(dtype):
    hidden, weight, ids, log_probs, _, labels = problem(64, 32, 1031, 8)
    hidden, weight = hidden.to(dtype).double(), (weight * 0.3).to(dtype).double()
    inputs = {
        "exact": (hidden, weight),
        "plain": (hidden.to(dtype), weight.to(dtype)),
        "ours": (hidden.to(dtype), weight.to(dtype)),
    }
    found = {}
    for name, pair in inputs.items():
        pair = [tensor.clone().requires_grad_() for tensor in pair]
        if name == "plain":
            loss = plain(*pair, ids, log_probs.float(), labels)
        else:
            loss = linear_topk_kl(
                *pair,
                ids,
                log_probs.to(pair[0].dtype if name == "exact" else torch.float32),
                labels=labels,
                kl_weight=0.5,
            ).loss
        found[name] = [loss.double(), *(grad.double() for grad in torch.autograd.grad(loss, pair))]
    for exact, plainly, ours in zip(found["exact"], found["plain"], found["ours"], strict=True):
        floor = 1e-6 * exact.abs().max()
        assert (ours - exact).norm() <= 2 * (plainly - exact).norm() + floor


def test_gradients_have_each_inputs_own_dtype_and_losses_are_wide():
    hidden, weight, ids, log_probs, _, labels = problem(6, 8, 30, 4)
    for dtype, wide in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float64),
    ):
        pair = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        out = linear_topk_kl(*pair, ids, log_probs, labels=labels, kl_weight=0.5)
        assert {part.dtype for part in out} == {wide}
        assert {grad.dtype for grad in torch.autograd.grad(out.loss, pair)} == {dtype}


def test_autocast_takes_its_own_dtype_and_gives_fp32_gradients():
    hidden, weight, ids, log_probs, _, labels = problem(8, 16, 50, 4, dtype=torch.float32)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, kl_weight=0.5).loss
    narrow = weight.detach().bfloat16().requires_grad_()
    same = linear_topk_kl(hidden, narrow, ids, log_probs, labels=labels, kl_weight=0.5).loss
    assert_close(loss, same)
    assert torch.autograd.grad(loss, weight)[0].dtype == torch.float32
    with pytest.raises(ValueError, match="one dtype"):
        linear_topk_kl(hidden, weight, ids, log_probs)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_a_second_temperature_needs_a_block_of_memory_more():
    """1,024 x 50,304 logits: a tile of 98 MiB and 12 MiB of gradients, and not a new block for each block (205 MiB)."""
    assert peak_memory("linear_topk_kl T=2", (1024, 64, 50304, 8)) < 130


class Watched(TorchDispatchMode):
    """Remembers the largest storage that any operation returns, the largest made anew, in bytes, and the matrix products."""

    def __init__(self):
        super().__init__()
        self.most = self.fresh = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        known = {part.untyped_storage().data_ptr() for part in args if isinstance(part, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().size()
                self.most = max(self.most, size)
                if func.namespace == "aten" and not func.is_view and tensor.untyped_storage().data_ptr() not in known:
                    self.fresh = max(self.fresh, size)
        return out


@pytest.fixture
def inside(monkeypatch):
    """A `Watched` of what the ops do inside themselves: a mode around a custom op sees the op alone."""
    monkeypatch.setattr("kernels.tile.SCRATCH.tile", None)
    seen, real = Watched(), common.computing

    @contextlib.contextmanager
    def watched(like):
        with real(like), seen:
            yield

    for name in ("linear_topk_kl", "linear_topk"):  # modules: the package's names of them are the ops
        monkeypatch.setattr(sys.modules[f"kernels.{name}"], "computing", watched)
    return seen


BACKENDS = [("torch", None), ("triton", 1), ("triton", 2)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: Triton's interpreter is off")
@pytest.mark.parametrize("backend, path", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("T", [1.0, 2.0])
def test_logits_never_exist_whole(T, reduction, backend, path, inside):
    N, V, rows = 18, 300, 6
    hidden, weight, ids, log_probs, log_norm, labels = problem(N, 4, V, 4, T, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    options = {"temperature": T, "log_norm": log_norm, "reduction": reduction, "_rows": rows, "backend": backend}
    options |= {"_path": path if reduction == "mean" else None}
    options |= {} if T != 1 and path == 2 else {"labels": labels, "kl_weight": 0.5}
    linear_topk_kl(hidden, weight, ids, log_probs, **options).loss.sum().backward()
    log_p, lse = linear_log_probs(hidden, weight, ids, _rows=rows, backend=backend)
    (log_p.sum() + lse.sum()).backward()
    linear_cross_entropy(hidden, weight, labels, _rows=rows, backend=backend, _path=path).loss.backward()
    linear_topk(hidden, weight, 3, _rows=rows, backend=backend, _path=path)
    assert 4 * rows * V <= inside.most <= 4 * rows * (V + 15)  # a tile, seen, and nothing larger; whole logits are three


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: Triton's interpreter is off")
@pytest.mark.parametrize("backend, path", BACKENDS)
def test_no_product_is_made_for_a_gradient_that_nobody_needs(backend, path, inside):
    """A chunk's logits, d_hidden, d_weight: a frozen head and hidden states without gradient cost one less each."""
    hidden, weight, ids, log_probs, *_ = problem(6, 8, 30, 4, dtype=torch.float32)
    logits = 0 if path == 2 else 1  # path 2 makes them in its own kernel
    for need in ((True, True), (True, False), (False, True)):
        pair = [part.clone().requires_grad_(wanted) for part, wanted in zip((hidden, weight), need, strict=True)]
        inside.products = 0
        linear_topk_kl(*pair, ids, log_probs, backend=backend, _rows=3, _path=path).loss.backward()
        assert inside.products == 2 * (logits + sum(need))
        inside.products = 0
        linear_log_probs(*pair, ids, backend=backend, _rows=3)[0].sum().backward()
        assert inside.products == 2 * (2 + sum(need))


def test_backward_hands_the_gradient_over():
    """No zeros for outputs that need no gradient, no copy of d_weight: the peak would grow by a third."""
    hidden, weight, ids, log_probs, _, labels = problem(128, 8, 3000, 4, dtype=torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, kl_weight=0.5).loss
    with Watched() as seen:
        torch.autograd.grad(loss, (hidden, weight))
    assert seen.fresh < hidden.nbytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: Triton's interpreter is off")
def test_a_softcaps_slopes_count_as_scratch(inside, monkeypatch):
    """They are as large as the logits that they belong to: a chunk has half the rows, whatever op makes it."""
    monkeypatch.setattr("kernels.tile.TILE_BYTES", 64 * 4 * 1000)
    hidden, weight, ids, log_probs, *_ = problem(200, 4, 1000, 4, dtype=torch.float32)
    hidden.requires_grad_()
    linear_topk_kl(hidden, weight, ids, log_probs, softcap=5.0).loss.backward()
    linear_log_probs(hidden, weight, ids, softcap=5.0)[1].sum().backward()
    assert inside.most <= 32 * 4 * 1000


def test_scratch_on_a_cpu_stays_within_256_mib():
    from kernels.tile import chunk_rows

    for V in (257, 50257, 151936, 262144):
        rows = chunk_rows(65536, 4096, V, torch.float32, torch.device("cpu"))
        assert rows * V * 4 <= 136 * 2**20 + 4 * V


def test_unwritten_scratch_would_show(monkeypatch):
    """Scratch memory comes poisoned with NaN: no result may hold any of it."""
    monkeypatch.setattr("kernels.tile.SCRATCH.tile", None)
    real = torch.empty
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *a, **k: real(*a, **k).fill_(math.nan) if k.get("dtype", torch.float32).is_floating_point else real(*a, **k),
    )
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, ids, log_probs, _, labels = problem(13, 8, 300, 4, dtype=dtype)
        hidden.requires_grad_(), weight.requires_grad_()
        out = linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, kl_weight=0.5, _rows=5)
        out.loss.backward()
        top = linear_topk(hidden, weight, 4, temperatures=(1.0, 2.0), _rows=5)
        for tensor in (*out, hidden.grad, weight.grad, *top[1:], *linear_log_probs(hidden, weight, ids, _rows=5)):
            assert not tensor.isnan().any()


def test_closed_forms_of_the_zipf_teacher_are_the_optima():
    """t ~ 1/i, V=100000, K=20: at the optimum of DESIGN section 3, and only there, the logit gradient vanishes."""
    V, K = 100_000, 20
    t = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    t /= t.sum()
    M = t[:K].sum()
    assert abs(t[0] - 0.0827) < 5e-5 and abs(M - 0.2976) < 5e-5
    ids = torch.arange(K)[None]

    def gradient(p, log_probs, **options):
        z = p.clamp(min=1e-300).log()[None].requires_grad_()
        return torch.autograd.grad(topk_kl(z, ids, log_probs[None], **options).loss, z)[0]

    exact = t.clone()
    assert gradient(exact, t[:K].log(), tail="ghost").abs().max() < 1e-9
    head = torch.cat([t[:K] / M, torch.zeros(V - K)])  # what truncation and renormalising converge to
    assert abs(head[1] - 0.1390) < 5e-5
    for tail in ("truncate", "renormalize"):
        assert gradient(head, t[:K].log(), tail=tail).abs().max() < 1e-9
        assert gradient(exact, t[:K].log(), tail=tail).abs().max() > 1e-3
    assert gradient(exact, t[:K].log(), tail="renormalize_both").abs().max() < 1e-9
    assert gradient(head, t[:K].log(), tail="renormalize_both").abs().max() < 1e-9  # p off S is not identified
    smooth = torch.cat([t[:K], ((1 - M) / (V - K)).expand(V - K)])
    assert gradient(smooth, t[:K].log(), tail="smooth").abs().max() < 1e-9
    a = 0.4  # (1-a) CE + a truncate: expected optimum t / (1 - a(1-M)) on S, (1-a) t / (1 - a(1-M)) off S
    mixed = torch.where(torch.arange(V) < K, t, (1 - a) * t) / (1 - a * (1 - M))
    assert abs(mixed.sum() - 1) < 1e-12
    ce = mixed - t  # the expected cross-entropy's logit gradient
    assert ((1 - a) * ce + a * gradient(mixed, t[:K].log(), tail="truncate")[0]).abs().max() < 1e-9
    loss = topk_kl(head.clamp(min=1e-300).log()[None], ids, t[None, :K].log(), tail="truncate").loss
    assert_close(loss, M * M.log(), rtol=1e-6)  # the minimum is negative: clamping at zero would throw it away


def test_teacher_equal_to_student_gives_zero():
    for T in (1.0, 2.0):
        hidden, weight, *_ = problem(6, 8, 40, 1)
        ids, log_probs, log_norm = linear_topk(hidden, weight, 7, temperatures=(T,))
        for kind in DIVERGENCES:
            a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            out = linear_topk_kl(a, b, ids, log_probs, temperature=T, log_norm=log_norm[:, 0], divergence=kind)
            out.loss.backward()
            assert out.loss.abs() < 1e-12 and a.grad.abs().max() < 1e-10 and b.grad.abs().max() < 1e-10
            assert_close(out.teacher_mass, out.student_mass, rtol=1e-12)


@pytest.mark.parametrize("gap", [5.0, 40.0, 200.0, 1e4])
@pytest.mark.parametrize("sign", [1, -1])
def test_tails_tiny_and_huge_and_logits_of_ten_thousand(gap, sign):
    """The support's logits `gap` above (below) the rest: fp32 equals fp64 and nothing is nan or inf."""
    z = torch.randn(4, 50, dtype=torch.float64)
    ids = torch.arange(5).expand(4, 5)
    z[:, :5] += sign * gap
    t = torch.full((4, 5), 0.15, dtype=torch.float64).log()
    exact = z.clone().requires_grad_()
    want = topk_kl(exact, ids, t, backend="reference")
    want.loss.backward()
    narrow = z.float().requires_grad_()
    got = topk_kl(narrow, ids, t.float())
    got.loss.backward()
    # the oracle is evaluated at the fp32 logits: at 1e4 their own rounding is 1e-3
    exact = z.float().double().requires_grad_()
    want = topk_kl(exact, ids, t, backend="reference")
    want.loss.backward()
    assert_close(got.loss, want.loss.float(), rtol=1e-5)
    assert_close(narrow.grad, exact.grad.float(), rtol=1e-4, atol=1e-6)
    for kind in ("reverse_kl", "jsd", "skew_kl", "tv"):
        z32 = z.float().requires_grad_()
        loss = topk_kl(z32, ids, t.float(), divergence=kind).loss
        loss.backward()
        assert loss.isfinite() and z32.grad.isfinite().all()


def test_ghost_of_a_small_tail_keeps_its_digits():
    """1 - sum p would round a tail of 1e-9 to nothing; the masked sum does not."""
    z = torch.full((1, 100), -20.0)
    z[0, 0] = 5.0
    tail = torch.log1p(-z.double().softmax(1)[:, 0])
    out = topk_kl(z, torch.tensor([[0]]), torch.tensor([[math.log(0.9)]]))
    want = 0.9 * (math.log(0.9) - z.double().log_softmax(1)[0, 0]) + 0.1 * (
        math.log(0.1) - torch.logsumexp(z.double().log_softmax(1)[0, 1:], 0)
    )
    assert tail < -1e-10
    assert_close(out.loss, want.float(), rtol=1e-5)


def test_lse_in_half_precision_logits_is_wide():
    """Ghost KL from bf16 logits: the log-sum-exp is taken in fp32 (FIELD section 1: .00249 where .00073 is true)."""
    torch.manual_seed(1)
    z = (torch.randn(64, 2000) * 2).bfloat16()
    exact = z.double()
    ids = exact.topk(32).indices
    teacher = (exact + 0.05 * torch.randn_like(exact)).log_softmax(1).gather(1, ids)
    want = topk_kl(exact, ids, teacher, backend="reference").loss
    assert_close(topk_kl(z, ids, teacher.float()).loss, want.float(), rtol=1e-3)


def test_tail_at_another_temperature_needs_the_exact_normaliser():
    """With log_norm the teacher's mass at T is exact; with the tail as one token the head would keep far too much."""
    z = -torch.arange(1, 5001).double().log()[None]  # Zipf
    T, K = 2.0, 64
    log_norm = (z / T).logsumexp(1) - z.logsumexp(1) / T
    out = topk_kl(z, torch.arange(K)[None], z.log_softmax(1)[:, :K], temperature=T, log_norm=log_norm)
    true_mass = (z / T).softmax(1)[0, :K].sum()
    assert_close(out.teacher_mass, true_mass, rtol=1e-9)
    assert out.kl.abs() < 1e-12
    folded = torch.cat([z.log_softmax(1)[0, :K], z.log_softmax(1)[0, K:].logsumexp(0)[None]])
    assert (folded / T).softmax(0)[:K].sum() > 2 * true_mass
    with pytest.raises(ValueError, match="needs log_norm"):
        topk_kl(z, torch.arange(K)[None], z.log_softmax(1)[:, :K], temperature=T)


def test_duplicates_are_one_outcome_and_merge_before_the_temperature():
    hidden, weight, ids, log_probs, log_norm, _ = problem(5, 6, 20, 4, 2.0)
    split_ids = torch.cat([ids, ids[:, :1]], 1)
    halves = torch.cat([log_probs, log_probs[:, :1]], 1)
    halves[:, 0], halves[:, -1] = log_probs[:, 0] + math.log(0.3), log_probs[:, 0] + math.log(0.7)
    for kind in DIVERGENCES:
        options = {"temperature": 2.0, "log_norm": log_norm, "divergence": kind}
        whole = linear_topk_kl(hidden, weight, ids, log_probs, **options)
        split = linear_topk_kl(hidden, weight, split_ids, halves, **options)
        for one, other in zip(whole, split, strict=True):
            assert_close(other, one, rtol=1e-10)


def test_empty_slots_rows_and_minus_inf():
    hidden, weight, ids, log_probs, *_ = problem(6, 8, 30, 4)
    wild = log_probs.clone()
    ids[0], wild[0] = -1, 5.0  # nothing at all, whatever log_probs says
    ids[1, 2], wild[1, 2] = -7, math.nan
    wild[2, 1] = -math.inf  # in S, with no mass
    wild[3] = -math.inf  # S without mass
    hidden.requires_grad_(), weight.requires_grad_()
    for tail, kind in MODES:
        out = linear_topk_kl(hidden, weight, ids, wild, tail=tail, divergence=kind, reduction="none")
        want = linear_topk_kl(hidden, weight, ids, wild, tail=tail, divergence=kind, reduction="none", backend="reference")
        grads = [torch.autograd.grad(each.loss.sum(), (hidden, weight)) for each in (out, want)]
        for ours, theirs in zip((*out, *grads[0]), (*want, *grads[1]), strict=True):
            assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        if tail != "smooth":
            assert out.kl[0] == 0
        if tail in ("truncate", "renormalize", "renormalize_both"):
            assert out.kl[3] == 0
    uniform = linear_topk_kl(hidden, weight, ids, wild, tail="smooth", reduction="none").kl[0]
    log_p = (hidden @ weight.T).log_softmax(1)[0]
    assert_close(uniform, (-math.log(30) - log_p.mean()), rtol=1e-9)


def test_the_whole_vocabulary_has_no_tail():
    hidden, weight, *_ = problem(5, 6, 12, 1)
    z = torch.randn(5, 12, dtype=torch.float64)
    ids = torch.arange(12).expand(5, 12)
    log_probs = z.log_softmax(1)
    log_p = (hidden @ weight.T).log_softmax(1)
    want = (log_probs.exp() * (log_probs - log_p)).sum(1).mean()
    for tail in TAILS:
        assert_close(linear_topk_kl(hidden, weight, ids, log_probs, tail=tail).loss, want, rtol=1e-9)


def test_reverse_kl_of_a_teachers_zero_costs_thirty_nats():
    z = torch.zeros(1, 4, dtype=torch.float64)
    log_probs = torch.tensor([[math.log(1.0), -math.inf]], dtype=torch.float64)
    out = topk_kl(z, torch.tensor([[0, 1]]), log_probs, divergence="reverse_kl")
    want = 0.25 * math.log(0.25) + 0.25 * (math.log(0.25) + 30) + 0.5 * (math.log(0.5) + 30)
    assert_close(out.kl, torch.tensor(want, dtype=torch.float64), rtol=1e-12)


def test_ignored_rows_count_nowhere():
    hidden, weight, ids, log_probs, _, labels = problem(9, 8, 30, 4)
    keep = torch.tensor([0, 2, 3, 7])
    ignored = torch.full_like(labels, -100)
    ignored[keep] = labels[keep]
    for reduction in ("mean", "sum"):
        options = {"kl_weight": 0.5, "reduction": reduction}
        a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_topk_kl(a, b, ids, log_probs, labels=ignored, **options)
        out.loss.backward()
        c, d = hidden[keep].requires_grad_(), weight.clone().requires_grad_()
        few = linear_topk_kl(c, d, ids[keep], log_probs[keep], labels=labels[keep], **options)
        few.loss.backward()
        for one, other in zip((*out, a.grad[keep], b.grad), (*few, c.grad, d.grad), strict=True):
            assert_close(one, other, rtol=1e-10)
        assert a.grad.abs().sum(1)[ignored == -100].max() == 0
    rows = linear_topk_kl(hidden, weight, ids, log_probs, labels=ignored, kl_weight=0.5, reduction="none")
    assert all((part[ignored == -100] == 0).all() for part in rows)
    a = hidden.clone().requires_grad_()
    for nobody in (
        linear_topk_kl(a, weight, ids, log_probs, labels=torch.full_like(labels, -100), kl_weight=0.5),
        linear_topk_kl(a[:0], weight, ids[:0], log_probs[:0]),
    ):
        assert nobody.loss == 0
        nobody.loss.backward()
    assert a.grad.abs().max() == 0


def test_cross_entropy_equals_torchs():
    hidden, weight, _, _, _, labels = problem(40, 8, 300, 1)
    labels[::4] = -100
    results = []
    for ours in (True, False):
        a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            out = linear_cross_entropy(a, b, labels, _rows=7)
            loss = out.loss
            assert out.kl == 0 and out.teacher_mass == 0 and out.student_mass == 0
            assert_close(out.ce, loss.detach())
        else:
            loss = torch.nn.functional.cross_entropy(a @ b.T, labels)
        loss.backward()
        results.append((loss.detach(), a.grad, b.grad))
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("cap", [None, 6.0])
def test_linear_log_probs_is_differentiable_in_both_results(cap):
    hidden, weight, ids, *_ = problem(9, 6, 40, 5)
    ids[0, 1], ids[1, 3] = -1, ids[1, 0]
    up = torch.randn(9, 5).double(), torch.randn(9).double()
    results = []
    for backend, rows in (("reference", None), ("torch", 4)):
        a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        log_probs, lse = linear_log_probs(a, b, ids, temperature=1.5, softcap=cap, backend=backend, _rows=rows)
        assert log_probs[0, 1] == 0 and log_probs[1, 3] == log_probs[1, 0]
        results.append([log_probs, lse, *torch.autograd.grad((log_probs, lse), (a, b), up)])
    for one, other in zip(*results, strict=True):
        assert_close(other, one, rtol=1e-9, atol=1e-11)


def test_a_loss_composed_on_linear_log_probs_equals_the_fused_one():
    hidden, weight, ids, log_probs, _, _ = problem(9, 6, 40, 5)
    a = hidden.clone().requires_grad_()
    ls, _ = linear_log_probs(a, weight, ids)
    t, tail = log_probs.exp(), 1 - log_probs.exp().sum(1)
    kl = (t * (log_probs - ls)).sum(1) + tail * (tail.log() - torch.log1p(-ls.exp().sum(1)))
    b = hidden.clone().requires_grad_()
    fused = linear_topk_kl(b, weight, ids, log_probs).loss
    assert_close(fused, kl.mean(), rtol=1e-9)
    assert_close(torch.autograd.grad(fused, b)[0], torch.autograd.grad(kl.mean(), a)[0], rtol=1e-8, atol=1e-12)


def test_linear_topk_is_exact_and_tells_any_temperature():
    hidden, weight, *_ = problem(10, 6, 70, 1)
    for cap in (None, 4.0):
        z = hidden @ weight.T
        z = z if cap is None else cap * (z / cap).tanh()
        ids, log_probs, log_norm = linear_topk(hidden, weight, 70, temperatures=(1.0, 2.0, 0.5), softcap=cap, _rows=3)
        assert ids.dtype == torch.int32 and (log_probs.diff(dim=1) <= 0).all()
        assert_close(log_probs, z.log_softmax(1).gather(1, ids.long()), rtol=1e-10, atol=1e-12)
        for place, T in enumerate((1.0, 2.0, 0.5)):
            assert_close(
                log_probs / T - log_norm[:, place, None],
                (z / T).log_softmax(1).gather(1, ids.long()),
                rtol=1e-9,
                atol=1e-10,
            )
        assert (log_norm[:, 0] == 0).all()


def test_large_vocabulary_ids_do_not_wrap():
    """151,936 entries: ids past 17 bits are read whole."""
    hidden, weight, ids, log_probs, _, _ = problem(2, 4, 151_936, 3)
    ids[:, 0] = torch.tensor([151_935, 131_073])
    results = []
    for backend in ("reference", "torch"):
        a = hidden.clone().requires_grad_()
        out = linear_topk_kl(a, weight, ids.int(), log_probs, backend=backend, _rows=1)
        results.append((out.loss.detach(), torch.autograd.grad(out.loss, a)[0]))
        p = (hidden @ weight.T).softmax(1)
        assert_close(out.student_mass, p.gather(1, ids).sum(1).mean(), rtol=1e-9)  # by plain indexing, no code shared
    for one, other in zip(*results, strict=True):
        assert_close(other, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("T", [0.1, 10.0])
def test_two_temperatures_far_apart_over_a_large_flat_vocabulary(T):
    hidden, weight, ids, log_probs, log_norm, labels = problem(4, 8, 50_304, 5, T)
    weight, found = weight * 0.1, {}  # nearly flat: the least probability's tenth power is no fp32 number
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "torch")):
        leaves = [part.to(dtype).requires_grad_() for part in (hidden, weight)]
        targets = ids, log_probs.to(dtype), labels, log_norm.to(dtype)
        options = dict(zip(("labels", "log_norm"), targets[2:], strict=True), temperature=T, kl_weight=0.5, backend=backend)
        out = linear_topk_kl(*leaves, *targets[:2], **options)
        parts = out.loss, out.ce, *torch.autograd.grad(out.loss, leaves)
        found[backend] = [part.detach().double() for part in (*parts, *linear_topk(*leaves, 3, temperatures=(1.0, T))[1:])]
    for ours, exact in zip(found["torch"], found["reference"], strict=True):
        assert (ours - exact).norm() <= 1e-5 * exact.norm()


def test_jsd_never_turns_nan_on_underflow():
    z = torch.tensor([[0.0, -200.0, -300.0, -1e4]], requires_grad=True)
    out = topk_kl(z, torch.tensor([[1, 2]]), torch.tensor([[math.log(0.5), -150.0]]), divergence="jsd")
    out.loss.backward()
    assert out.loss.isfinite() and z.grad.isfinite().all()


def test_callers_tensors_stay_as_they_are():
    hidden, weight, ids, log_probs, _, labels = problem(6, 8, 30, 4, dtype=torch.float32)
    logits = hidden @ weight.T
    before = [tensor.clone() for tensor in (hidden, weight, ids, log_probs, labels, logits)]
    topk_kl(logits.requires_grad_(), ids, log_probs, labels=labels, kl_weight=0.5).loss.backward()
    linear_topk_kl(hidden.requires_grad_(), weight.requires_grad_(), ids, log_probs).loss.backward()
    for old, new in zip(before, (hidden, weight, ids, log_probs, labels, logits), strict=True):
        assert torch.equal(old, new.detach())


def test_a_second_backward_works_or_raises():
    hidden, weight, ids, log_probs, *_ = problem(6, 8, 30, 4)
    hidden.requires_grad_()
    loss = linear_topk_kl(hidden, weight, ids, log_probs).loss
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert_close(torch.autograd.grad(loss, hidden, retain_graph=True)[0], first)
    assert_close(torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0], 3 * first)  # scaled in place: it is gone now
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, hidden)
    rows = linear_topk_kl(hidden, weight, ids, log_probs, reduction="none").loss
    first = torch.autograd.grad(rows.sum(), hidden, retain_graph=True)[0]
    assert_close(torch.autograd.grad(rows.sum(), hidden)[0], first)
    for loss in (linear_topk_kl(hidden, weight, ids, log_probs).loss, linear_log_probs(hidden, weight, ids)[0].sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_only_what_is_needed_is_made():
    hidden, weight, ids, log_probs, *_ = problem(6, 8, 30, 4)
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    want = torch.autograd.grad(linear_topk_kl(*both, ids, log_probs).loss, both)
    alone = hidden.clone().requires_grad_()
    assert_close(torch.autograd.grad(linear_topk_kl(alone, weight, ids, log_probs).loss, alone)[0], want[0])
    alone = weight.clone().requires_grad_()
    assert_close(torch.autograd.grad(linear_topk_kl(hidden, alone, ids, log_probs).loss, alone)[0], want[1])
    with torch.no_grad():
        assert not linear_topk_kl(*both, ids, log_probs).loss.requires_grad


def test_only_the_loss_carries_a_gradient():
    """A cross-entropy that is only reported would never reach the student: it is part of the loss instead."""
    hidden, weight, ids, log_probs, _, labels = problem(6, 8, 30, 4)
    out = linear_topk_kl(hidden.requires_grad_(), weight, ids, log_probs, labels=labels, kl_weight=0.25)
    assert [part.requires_grad for part in out] == [True, False, False, False, False]
    assert_close(out.loss.detach(), 0.75 * out.ce + 0.25 * out.kl, rtol=1e-12)


def test_non_contiguous_inputs():
    hidden, weight, ids, log_probs, _, labels = problem(6, 8, 30, 4)
    want = linear_topk_kl(hidden, weight, ids, log_probs, labels=labels, kl_weight=0.5).loss
    strided = [tensor.t().contiguous().t() for tensor in (hidden, weight, ids, log_probs)]
    assert not strided[0].is_contiguous()
    a, b = strided[0].requires_grad_(), strided[1].requires_grad_()
    got = linear_topk_kl(a, b, *strided[2:], labels=labels, kl_weight=0.5).loss
    assert_close(got.detach(), want, rtol=1e-12)
    got.backward()
    logits = (hidden @ weight.T).detach().t().contiguous().t().requires_grad_()
    topk_kl(logits, ids, log_probs).loss.backward()
    assert_close(logits.grad @ weight, torch.autograd.grad(linear_topk_kl(a, b, ids, log_probs).loss, a)[0], rtol=1e-9)


def test_under_torch_compile_the_loss_is_the_same():
    hidden, weight, ids, log_probs, *_ = problem(6, 8, 30, 4)
    hidden.requires_grad_()
    compiled = torch.compile(lambda h: linear_topk_kl(h * 2, weight, ids, log_probs).loss, backend="eager")
    assert_close(compiled(hidden), linear_topk_kl(hidden * 2, weight, ids, log_probs).loss)
    assert_close(
        torch.autograd.grad(compiled(hidden), hidden)[0],
        torch.autograd.grad(linear_topk_kl(hidden * 2, weight, ids, log_probs).loss, hidden)[0],
    )


BAD = {
    "hidden .N,D.=.* D must agree": lambda a: a.update(weight=a["weight"][:, :3]),
    "hidden has shape": lambda a: a.update(hidden=a["hidden"][0]),
    "hidden has dtype torch.int64": lambda a: a.update(hidden=a["hidden"].long()),
    "one dtype": lambda a: a.update(hidden=a["hidden"].float()),
    "ids has shape": lambda a: a.update(ids=a["ids"][:2]),
    "ids has dtype": lambda a: a.update(ids=a["ids"].float()),
    r"ids holds 30: .*below the vocabulary's V=30": lambda a: a["ids"].__setitem__((0, 0), 30),
    "both must be .N,K.": lambda a: a.update(log_probs=a["log_probs"][:, :2]),
    "labels has shape": lambda a: a.update(labels=a["labels"][:2]),
    "labels has dtype": lambda a: a.update(labels=a["labels"].double()),
    r"labels holds 30: a label must be in 0..29": lambda a: a["labels"].__setitem__(0, 30),
    "labels holds -1:": lambda a: a["labels"].__setitem__(0, -1),
    "temperature=0": lambda a: a.update(temperature=0),
    "temperature=2.0: needs log_norm": lambda a: a.update(temperature=2.0),
    "log_norm has shape": lambda a: a.update(temperature=2.0, log_norm=torch.zeros(3)),
    "softcap=0": lambda a: a.update(softcap=0),
    "kl_weight=1.5": lambda a: a.update(kl_weight=1.5),
    "kl_weight=0.5: below 1 the loss needs labels": lambda a: a.update(kl_weight=0.5, labels=None),
    "beta=1": lambda a: a.update(beta=1),
    "tail='gost'": lambda a: a.update(tail="gost"),
    "divergence='kl'": lambda a: a.update(divergence="kl"),
    "with tail='smooth'": lambda a: a.update(tail="smooth", divergence="jsd"),
    "reduction='avg'": lambda a: a.update(reduction="avg"),
    "backend='cuda'": lambda a: a.update(backend="cuda"),
    "backend='triton': the kernels compute in fp32": lambda a: a.update(backend="triton"),
}


@pytest.mark.parametrize("message", BAD)
def test_refusals_name_the_value_and_the_rule(message):
    hidden, weight, ids, log_probs, _, labels = problem(6, 8, 30, 4)
    arguments = {"hidden": hidden, "weight": weight, "ids": ids, "log_probs": log_probs, "labels": labels}
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message) as caught:
        linear_topk_kl(
            arguments.pop("hidden"),
            arguments.pop("weight"),
            arguments.pop("ids"),
            arguments.pop("log_probs"),
            **arguments,
        )
    assert "\n" not in str(caught.value)


def test_linear_topk_refuses_k_beyond_the_vocabulary():
    hidden, weight, *_ = problem(6, 8, 30, 4)
    for k in (0, 31):
        with pytest.raises(ValueError, match=f"k={k}: must be an integer in 1..V=30"):
            linear_topk(hidden, weight, k)
