"""linear_topk against fp64: the exact top k with all ties, log-probabilities and normalisers.

N rows, V vocabulary. Hidden states and weights are small whole numbers: their products are exact in
any dtype and order, and full of ties.
"""

import math
import mmap
from typing import NamedTuple

import pytest
import torch

from kernels import linear_topk, topk
from tests.helpers import assert_close

INF = math.inf
HALVES = [torch.bfloat16, torch.float16]


class Target(NamedTuple):
    """What computes the op."""

    backend: str
    device: str = "cpu"


INTERPRETED = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="on a GPU machine it is off",
)
TORCH = Target("torch")
TARGETS = [
    pytest.param(TORCH, id="torch"),
    pytest.param(
        Target("triton"),
        id="interpreter",
        marks=INTERPRETED,
    ),
    pytest.param(
        Target("triton", "cuda"),
        id="cuda",
        marks=pytest.mark.gpu,
    ),
]


@pytest.fixture(params=TARGETS)
def target(request):
    return request.param


@pytest.fixture
def few_lanes(monkeypatch):
    """Groups of several tokens at small vocabularies."""

    def launch_shape(k):
        lanes = 16 if k <= 16 else 64
        return lanes, 4, None

    monkeypatch.setattr(topk, "launch_shape", launch_shape)


def whole_numbers(N, V):
    """hidden [N,4] and weight [V,4]."""
    hidden = torch.randint(-3, 4, (N, 4))
    weight = torch.randint(-3, 4, (V, 4))
    return hidden.double(), weight.double()


def one_row(z):
    """hidden and weight of one row with any logits z [V]."""
    weight = z.double().unsqueeze(1)
    return torch.ones(1, 1).double(), weight


@pytest.fixture(autouse=True)
def small_chunks(chunks_of):
    chunks_of(2)


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
    temperatures=(1.0,),
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


# Small vocabularies, in groups of several tokens.


SIZES = [  # V, k, softcap
    (5, 1, None),
    (23, 23, 20.0),
    (37, 3, None),
    (64, 64, 20.0),
    (257, 16, 20.0),
    (1000, 64, None),
]


@pytest.mark.parametrize("V, k, softcap", SIZES)
def test_topk_is_exact_with_all_its_ties(V, k, softcap, target, few_lanes):
    check(whole_numbers(3, V), k, target, (2.0,), softcap)


TEMPERATURES = [
    (),
    (0.5,),
    (1.0, 2.0),
    (2.0, 1.0, 0.5, 4.0),
    (3.0, 3.0),
]


@pytest.mark.parametrize("temperatures", TEMPERATURES)
def test_any_temperatures(temperatures, target, few_lanes):
    check(whole_numbers(2, 50), 3, target, temperatures)


NEIGHBOURS = [
    [3, 19, 35, 51, 67],  # one lane
    [32, 33, 34, 35, 36],
    [0, 1, 2, 171, 172],
    [15, 16, 160, 159, 100],
]


@pytest.mark.parametrize("places", NEIGHBOURS)
def test_neighbours_wherever_they_lie(places, target, few_lanes):
    z = torch.linspace(0.5, -0.5, 173)
    peaks = torch.tensor([9.0, 8.0, 7.0, 9.0, 6.0])
    z[places] += peaks
    check(one_row(z), 5, target, (1.0, 0.1))


RANKS = torch.arange(173.0).roll(50)
ODD_LOGITS = {
    "the last bit decides": 1 + RANKS * 2.0**-23,
    "and below zero": -1 - RANKS * 2.0**-23,
    "all are equal": RANKS * 0,
    "fewer than k are finite": torch.where(RANKS < 3, RANKS, -INF),
    "more than k are finite": torch.where(RANKS < 9, RANKS, -INF),
    "far from zero": RANKS - 1e4,
}


@pytest.mark.parametrize("name", ODD_LOGITS)
def test_odd_logits(name, target, few_lanes):
    check(one_row(ODD_LOGITS[name]), 5, target, (2.0,))


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype, target, few_lanes):
    check(whole_numbers(2, 100), 20, target, (2.0,), dtype=dtype)


def test_float64_is_float64():
    check(
        whole_numbers(2, 100),
        20,
        TORCH,
        (2.0,),
        dtype=torch.float64,
    )


# As it ships.


SHIPPED = [  # V, k
    (257, 3),
    (5000, 64),
    (5000, 65),
    (300, 300),
]


@pytest.mark.parametrize("V, k", SHIPPED)
def test_the_lanes_that_ship(V, k, target):
    inputs = whole_numbers(2, V)
    check(inputs, k, target, (2.0, 1.0), softcap=20.0)


@pytest.mark.parametrize("V", [50257, 151936])
def test_the_vocabularies_that_models_have(V, target):
    hidden, weight = whole_numbers(1, V)
    weight[[V - 1, 131_073 % V]] = hidden * 100  # beyond 16 and 17 bits
    check((hidden, weight), 64, target, (2.0,))


@INTERPRETED
def test_rows_more_than_two_to_the_31_elements_apart():
    """Only the pages that are touched exist; an offset that wraps finds zeros."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    num_bytes = 2**34 + 256
    memory = mmap.mmap(-1, num_bytes, flags=flags)
    numbers = torch.frombuffer(memory, dtype=torch.float32)
    z = numbers.as_strided(
        (3, 64),
        (2**30, 1),
        2**31,
    )
    z.copy_(torch.randn(3, 64))
    ids, log_probs, _ = topk.triton_chunk(z, 4, [2.0], None)
    expected = z.log_softmax(1).topk(4)
    assert torch.equal(ids.long(), expected.indices)
    assert_close(log_probs, expected.values, atol=2e-6)


# The rest of PyTorch.


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


def test_no_rows(target):
    check(whole_numbers(0, 37), 3, target)


def test_inputs_in_any_layout(target, few_lanes):
    hidden, weight = whole_numbers(3, 100)
    expected = run((hidden, weight), 5, target)
    hidden = hidden.T.contiguous().T
    weight = weight.T.contiguous().T.requires_grad_()
    found = run((hidden, weight), 5, target)
    assert_same(found, expected)


def test_autocast_takes_its_own_dtype(target, few_lanes):
    hidden, weight = whole_numbers(3, 100)
    inputs = hidden / 3, weight
    expected = run(inputs, 5, target, torch.bfloat16)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        assert_same(run(inputs, 5, target), expected)


TRITON = pytest.param("triton", marks=INTERPRETED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("backend", ["torch", TRITON])
def test_the_op_is_registered_as_it_behaves(backend, dtype, few_lanes):
    hidden, weight = whole_numbers(4, 37)
    arguments = (
        hidden.to(dtype),
        weight.to(dtype),
        3,
        [1.0, 2.0],
        9.0,
        backend,
        dtype,
    )
    torch.library.opcheck(torch.ops.nanodistill.topk, arguments)


def test_the_op_compiles(target, few_lanes):
    torch._dynamo.reset()

    def scaled(inputs, k):
        options = {"temperatures": (1.0, 2.0)}
        ids, log_probs, log_norm = run(inputs, k, target, **options)
        return ids + 0, log_probs * 2, log_norm * 2

    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    for N, k in ((4, 3), (3, 5)):
        inputs = whole_numbers(N, 37)
        assert_same(compiled(inputs, k), scaled(inputs, k))


REFUSED = [
    ("k", 0, "k=0: must be an integer in 1..V=30"),
    ("k", 31, "k=31: must"),
    ("k", 2.0, "k=2.0: must"),
    ("temperatures", (1.0, 0.0), "temperature=0.0: must be a finite number above 0"),
    ("softcap", 0, "softcap=0: must be"),
    ("backend", "cuda", "backend='cuda'"),
    ("hidden", torch.zeros(6, 3), "D must agree"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_refusals_name_the_value_and_the_rule(name, value, message):
    arguments = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(30, 4),
        "k": 2,
        name: value,
    }
    with pytest.raises(ValueError, match=message):
        linear_topk(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: Triton's interpreter is off")
def test_a_row_of_nan_keeps_its_ids_inside_the_vocabulary():
    hidden = torch.full((1, 4), math.inf)
    ids, log_probs, _ = linear_topk(hidden, torch.zeros(40, 4), 3, backend="triton")
    assert (ids >= 0).all() and (ids < 40).all() and log_probs.isnan().all()
