"""linear_topk against fp64: the exact top k with all ties, log-probabilities and normalisers.

N rows, V vocabulary. Hidden states and weights are small whole numbers: their products are exact in
any dtype and order, and full of ties.
"""

import math

import pytest
import torch

from kernels import linear_topk, topk
from tests import kernel_cases as cases
from tests.helpers import assert_close

INF = math.inf
TORCH = cases.Target("torch")


@pytest.fixture(params=cases.FP32)
def target(request):
    return request.param


@pytest.fixture
def few_lanes(monkeypatch):
    """Groups of several tokens at small vocabularies."""

    def launch_shape(k):
        lanes = 16 if k <= 16 else 64
        return lanes, 4, None

    monkeypatch.setattr(topk, "launch_shape", launch_shape)


@pytest.fixture(autouse=True)
def small_chunks(chunks_of):
    chunks_of(2)


def whole_numbers(N, V):
    """hidden [N,4] and weight [V,4]."""
    hidden = torch.randint(-3, 4, (N, 4))
    weight = torch.randint(-3, 4, (V, 4))
    return hidden.double(), weight.double()


def one_row(z):
    """hidden and weight of one row with any logits z [V]."""
    weight = z.double().unsqueeze(1)
    return torch.ones(1, 1).double(), weight


def run(inputs, k, target, dtype=torch.float32, **options):
    hidden, weight = inputs
    return linear_topk(
        hidden.to(target.device, dtype),
        weight.to(target.device, dtype),
        k,
        backend=target.backend,
        **options,
    )


def check(
    inputs,
    k,
    target,
    temperatures,
    softcap=None,
    dtype=torch.float32,
):
    """ids unique, their logits those of the k largest; log_probs and log_norm those of fp64."""
    hidden, weight = inputs
    z = hidden @ weight.T
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    found = run(
        inputs,
        k,
        target,
        dtype,
        temperatures=temperatures,
        softcap=softcap,
    )
    ids, log_probs, log_norm = (part.cpu() for part in found)

    assert ids.dtype == torch.int32
    for row in ids.tolist():
        assert len(set(row)) == k
    taken = z.gather(1, ids.long())
    assert torch.equal(taken, z.topk(k).values)  # exactly: ties in any order

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    close = 1e-12 if dtype == torch.float64 else 2e-6
    expected = z.log_softmax(1).topk(k).values
    assert_close(log_probs, expected.to(wide), close, close)
    in_order = log_probs.sort(1, descending=True).values
    assert torch.equal(log_probs, in_order)
    assert log_norm.shape == (len(z), len(temperatures))
    lse = z.logsumexp(1)
    for T, norm in zip(temperatures, log_norm.T, strict=True):
        expected = (z / T).logsumexp(1) - lse / T
        assert_close(norm, expected.to(wide), 5 * close, 1.5 * close)
        assert T != 1 or (norm == 0).all()


SMALL = [  # N, V, k, temperatures, softcap
    (0, 37, 3, (2.0,), None),
    (3, 5, 1, (), None),
    (3, 23, 23, (0.5,), 20.0),
    (3, 37, 3, (1.0, 2.0), None),
    (3, 64, 64, (2.0, 1.0, 0.5, 4.0), 20.0),
    (3, 257, 16, (3.0, 3.0), 20.0),
    (3, 1000, 64, (2.0,), None),
]


@pytest.mark.parametrize("N, V, k, temperatures, softcap", SMALL)
def test_topk_is_exact_with_all_its_ties(N, V, k, temperatures, softcap, target, few_lanes):
    """In groups of several tokens."""
    check(whole_numbers(N, V), k, target, temperatures, softcap)


SHIPPED = [  # V, k
    (257, 3),
    (300, 256),
    (300, 300),
    (5000, 65),
    (50257, 64),
    (151_936, 64),
]


@pytest.mark.parametrize("V, k", SHIPPED)
def test_the_lanes_that_ship(V, k, target):
    hidden, weight = whole_numbers(1, V)
    weight[[V - 1, 131_073 % V]] = hidden * 100  # beyond 16 and 17 bits
    check((hidden, weight), k, target, (2.0, 1.0), softcap=20.0)


def peaks_at(*places):
    """Five peaks, two of them equal, in an even slope."""
    z = torch.linspace(0.5, -0.5, 173)
    z[list(places)] += torch.tensor([9.0, 8.0, 7.0, 9.0, 6.0])
    return z


RANKS = torch.arange(173.0).roll(50)
ODD_LOGITS = {
    "peaks in one lane": peaks_at(3, 19, 35, 51, 67),
    "peaks side by side": peaks_at(32, 33, 34, 35, 36),
    "peaks at the ends": peaks_at(0, 1, 2, 171, 172),
    "peaks anywhere": peaks_at(15, 16, 160, 159, 100),
    "the last bit decides": 1 + RANKS * 2.0**-23,
    "and below zero": -1 - RANKS * 2.0**-23,
    "all are equal": RANKS * 0,
    "fewer than k are finite": torch.where(RANKS < 3, RANKS, -INF),
    "more than k are finite": torch.where(RANKS < 9, RANKS, -INF),
    "far from zero": RANKS - 1e4,
}


@pytest.mark.parametrize("name", ODD_LOGITS)
def test_odd_logits(name, target, few_lanes):
    check(one_row(ODD_LOGITS[name]), 5, target, (1.0, 2.0))


def test_float64_is_float64():
    inputs = whole_numbers(2, 100)
    check(inputs, 20, TORCH, (2.0,), dtype=torch.float64)


@pytest.mark.parametrize("target", [cases.INTERPRETER])
def test_a_row_of_nan_keeps_its_ids_inside_the_vocabulary(target):
    inputs = torch.full((1, 4), INF), torch.zeros(40, 4)
    ids, log_probs, _ = run(inputs, 3, target)
    assert ids.min() >= 0
    assert ids.max() < 40
    assert log_probs.isnan().all()


def test_autocast_takes_its_own_dtype_of_any_layout(target, few_lanes):
    hidden, weight = whole_numbers(3, 100)
    hidden = hidden / 3
    weight = weight / 3
    expected = run((hidden, weight), 5, target, torch.bfloat16)
    hidden = hidden.T.contiguous().T
    weight = weight.T.contiguous().T.requires_grad_()
    with torch.autocast(target.device, dtype=torch.bfloat16):
        found = run((hidden, weight), 5, target)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


REFUSED = [
    ("k", 0, "k=0: must be an integer in 1..V=30"),
    ("k", 31, "k=31: must"),
    ("k", 2.0, "k=2.0: must"),
    ("temperatures", (1.0, 0.0), "temperature=0.0: must be a finite number above 0"),
    ("softcap", 0, "softcap=0: must be"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_refusals_name_the_value_and_the_rule(name, value, message):
    arguments = {"k": 2, name: value}
    with pytest.raises(ValueError, match=message):
        linear_topk(torch.zeros(6, 4), torch.zeros(30, 4), **arguments)
