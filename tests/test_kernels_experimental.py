"""The experimental path (kernels/experimental.py) against the fp64 reference, within its range.

In Triton's interpreter it runs on fp32, whose products the interpreter gets right; on a GPU in bf16.
"""

import math

import pytest
import torch

from kernels import linear_topk_kl
from kernels.checks import DIVERGENCES, TAILS
from kernels.experimental import linear_topk_kl_exp

MODES = [("ghost", kind) for kind in DIVERGENCES]
MODES += [(tail, "forward_kl") for tail in TAILS if tail not in ("ghost", "smooth")]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: Triton's interpreter is off")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(N, D, V, K):
    """hidden, weight, ids, log_probs, labels; a row with equal ids, one with -inf, an empty slot."""
    hidden = torch.randn(
        N,
        D,
        dtype=torch.float64,
    )
    weight = torch.randn(
        V,
        D,
        dtype=torch.float64,
    ) / math.sqrt(D)
    z = hidden @ weight.T + torch.randn(
        N,
        V,
        dtype=torch.float64,
    )
    ids = z.topk(K).indices
    log_probs = z.log_softmax(1).gather(1, ids)
    labels = torch.randint(V, (N,))
    if K > 2:
        ids[0, 2] = ids[0, 1]
        labels[0] = ids[0, 1]
        ids[1, 2] = -1
        log_probs[2, 1] = -math.inf
    return hidden, weight, ids, log_probs, labels


def compare(inputs, device, dtype, rtol, _rows=None, **options):
    """Every field and both gradients, as norms; the reference reads the same rounded inputs."""
    hidden, weight, ids, log_probs, labels = (part.to(device) for part in inputs)
    found = []
    for kind in (dtype, torch.float64):
        leaves = [part.to(dtype).to(kind).requires_grad_() for part in (hidden, weight)]
        if kind == dtype:
            out = linear_topk_kl_exp(
                *leaves,
                ids,
                log_probs.float(),
                labels,
                _rows=_rows,
                **options,
            )
        else:
            out = linear_topk_kl(
                *leaves,
                ids,
                log_probs.float().double(),
                labels=labels,
                kl_weight=0.5,
                backend="reference",
                **options,
            )
        grads = torch.autograd.grad(1.7 * out.loss, leaves)
        found.append([part.detach().double() for part in (*out, *grads)])
    for ours, exact in zip(*found, strict=True):
        assert ours.isfinite().all()
        assert (ours - exact).norm() <= rtol * exact.norm() + 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tail, kind", MODES)
def test_it_is_the_same_loss(tail, kind, device):
    dtype, rtol = (torch.float32, 2e-4) if device == "cpu" else (torch.bfloat16, 8e-3)
    inputs = problem(7, 20, 77, 5)
    compare(
        inputs,
        device,
        dtype,
        rtol,
        _rows=3,
        tail=tail,
        divergence=kind,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("N, D, V, K", [(3, 33, 64, 64), (40, 16, 37, 1), (3, 64, 130, 3)])
def test_any_shape(N, D, V, K, device):
    """Rows, columns and widths that are no multiple of a block; S the whole vocabulary; one entry."""
    dtype, rtol = (torch.float32, 2e-4) if device == "cpu" else (torch.bfloat16, 8e-3)
    compare(
        problem(N, D, V, K),
        device,
        dtype,
        rtol,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gap", [9.0, 16.0, 23.0])
def test_a_small_tail_keeps_its_digits(gap, device):
    """1e-3, 1e-6 and 1e-9 of the mass off S, where the sum of all less S would have none left."""
    hidden, weight, ids, log_probs, labels = problem(
        3,
        6,
        37,
        4,
    )
    hidden[:, 0] = gap
    weight[:, 0] = 0.0
    weight[:4, 0] = 1.0
    ids[:] = torch.arange(4)
    labels[:] = 2
    rtol = 3e-4 if device == "cpu" else 2e-2
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    compare(
        (hidden, weight, ids, log_probs, labels),
        device,
        dtype,
        rtol,
    )


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_below_its_range_count_as_its_edge(device):
    """An entry 200 nats below the likely one reads 69 below: the loss stays finite, as documented."""
    hidden = torch.ones(1, 1, device=device)
    weight = torch.tensor([[0.0], [-200.0], [-1.0], [-2.0]], device=device)
    ids = torch.tensor([[0, 1]], device=device)
    log_probs = torch.tensor([[math.log(0.5), math.log(0.25)]], device=device)
    labels = torch.tensor([2], device=device)
    out = linear_topk_kl_exp(hidden, weight, ids, log_probs, labels)
    kept = torch.tensor([0.0, -1.0, -2.0]).logsumexp(0)
    ls = torch.tensor([0.0, math.log(1e-30)]) - kept
    tail = torch.tensor([-1.0, -2.0]).logsumexp(0) - kept
    t = torch.tensor([0.5, 0.25])
    want = (t * (t.log() - ls)).sum() + 0.25 * (math.log(0.25) - tail)
    torch.testing.assert_close(
        out.kl.cpu(),
        want,
        rtol=1e-4,
        atol=0,
    )
