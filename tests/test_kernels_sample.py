"""linear_sample against known distributions, fp64 running sums draw by draw, and itself.

N rows, V vocabulary, n draws a row, K excluded ids a row. Seeds are fixed, so a p-value is the same
in every run.
"""

import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import linear_sample, sample
from tests.helpers import assert_close

EXACT = 1e-6  # how far, of a row's whole mass, fp32 masses may move a boundary
INF = math.inf
NAN = math.nan
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    return request.param


@pytest.fixture(params=["torch", "reference"])
def backend(request):
    return request.param


class Inputs(NamedTuple):
    hidden: Tensor  # [N,D]
    weight: Tensor  # [V,D]
    exclude: Tensor | None = None  # [N,K]


def problem(N, V, K=0, device="cpu"):
    """fp32 holds the logits exactly; `exclude` has repeats and empty slots."""
    hidden = torch.randint(-4, 5, (N, 4))
    weight = torch.randint(-4, 5, (V, 4))
    exclude = torch.randint(-1, V, (N, K))
    exclude[:, 1:2] = exclude[:, :1]
    return Inputs(
        hidden.to(device) / 2,
        weight.to(device) / 2,
        exclude.to(device),
    )


def equal_rows(N, z, device="cpu", exclude=()):
    """N rows of the same logits z [V], whatever they are."""
    hidden = torch.ones(N, 1, device=device)
    weight = z.float().unsqueeze(1)
    exclude = torch.tensor(exclude, dtype=torch.int64)
    exclude = exclude.expand(N, -1)
    return Inputs(
        hidden,
        weight.to(device),
        exclude.to(device),
    )


def run(inputs, n=20, seed=5, **options):
    hidden, weight, exclude = inputs
    return linear_sample(
        hidden,
        weight,
        n,
        seed=seed,
        exclude=exclude,
        **options,
    )


def assert_same(found, expected):
    """Ids and log-probabilities, bit for bit."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def check_draws(ids, z, u):
    """Each is the token of z [N,V] at which the running sum passes u, or borders on it."""
    assert (ids >= 0).all()
    probs = z.softmax(1)
    mass = probs.gather(1, ids)
    assert (mass > 0).all()
    after = probs.cumsum(1).gather(1, ids)
    before = after - mass
    assert (u > before - EXACT).all()
    assert (u < after + EXACT).all()
    beyond = (u < before) | (u >= after)
    few = max(3, ids.numel() // 1000)
    assert beyond.sum() <= few


def check(inputs, n=20, softcap=None, rtol=1e-5):
    """Every draw and its log-probability against fp64, in both backends."""
    hidden, weight, exclude = inputs
    z = hidden.double() @ weight.double().T
    z = z.cpu()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = z.log_softmax(1)
    for row, excluded in zip(z, exclude.cpu().long(), strict=True):
        taken = excluded[excluded >= 0]
        row[taken] = -INF
    numbers = torch.arange(len(z)) + 7
    u = sample.uniforms(5, numbers, n)
    results = []
    for backend in ("torch", "reference"):
        ids, log_probs = run(
            inputs,
            n,
            rows=numbers.to(hidden.device),
            softcap=softcap,
            backend=backend,
        )
        assert ids.dtype == torch.int32
        ids = ids.cpu().long()
        check_draws(ids, z, u)
        expected = log_p.gather(1, ids).to(log_probs.dtype)
        atol = min(rtol, 2e-6)
        assert_close(log_probs.cpu(), expected, rtol, atol)
        results.append(ids)
    differ = results[0] != results[1]
    assert differ.sum() <= 2


# The distribution.


def p_value(counts, probs):
    """Pearson's chi-square of counts against the probabilities of their bins."""
    expected = probs * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0).double()
    return torch.special.gammaincc(freedom / 2, statistic / 2)


VOCABULARIES = [  # V, how many of the likeliest are excluded
    (300, 3),
    (100_000, 0),
]


@pytest.mark.parametrize("V, num_likely", VOCABULARIES)
def test_draws_have_the_distribution(V, num_likely, device):
    """Zipf's law in an order of its own, 1.6 million draws; from rank 60 on in bins.

    A distribution that is 1% off, up and down in turn, is told from it.
    """
    rank = torch.randperm(V)
    probs = 1 / (rank + 1).double()
    log_probs = probs.log()
    likely = rank.argsort()[:num_likely].tolist()
    exclude = [*likely, V - 1, V - 1, -1]
    probs[exclude[:-1]] = 0
    inputs = equal_rows(200, log_probs, device, exclude)
    ids, _ = run(inputs, 8000, seed=1)
    ids = ids.cpu().flatten()
    assert (probs[ids] > 0).all()
    bins = 60 + 4 * (rank.clamp(min=60) / 60).log2()
    bins = torch.where(rank < 60, rank, bins.long())
    expected = torch.bincount(bins, weights=probs)
    counts = torch.bincount(bins[ids], minlength=len(expected))
    drawn = expected > 0
    counts = counts[drawn]
    expected = expected[drawn] / probs.sum()
    assert p_value(counts, expected) > 1e-3
    signs = (-1.0) ** torch.arange(len(counts))
    tilted = expected * (1 + 0.01 * signs)
    assert p_value(counts, tilted / tilted.sum()) < 1e-4


OTHERS = [  # seed, row, draw
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
]


@pytest.mark.parametrize("seed, row, draw", OTHERS)
def test_draws_are_independent(seed, row, draw):
    """Of other seeds, of later rows and of later draws: a million pairs in 64 cells."""
    probs = torch.arange(3.0, 11.0).double() / 52
    inputs = equal_rows(250_001, probs.log())
    left, _ = run(inputs, 5, seed=0)
    right, _ = run(inputs, 5, seed=seed)
    right = right.roll(-row, 0).roll(-draw, 1)
    cells = 8 * left + right
    cells = cells[:-1, :-1].flatten()
    counts = torch.bincount(cells, minlength=64)
    pairs = torch.outer(probs, probs)
    assert p_value(counts, pairs.flatten()) > 1e-3


# The uniform numbers, and what they depend on.


LARGEST = 2**63 - 1
FROZEN = [  # seed, row number, the 53 bits of draw 2: the docstring's rule in Python's integers
    (0, 0, 8746909956485189),
    (0, 2**40, 4446497080726754),
    (0, LARGEST, 1160066929372560),
    (LARGEST, 0, 7818124818754127),
    (LARGEST, -1, 3568599145189868),
]


@pytest.mark.parametrize("seed, row, bits", FROZEN)
def test_the_uniforms_stay_what_they_are(seed, row, bits, device):
    rows = torch.tensor([row], device=device)
    u = sample.uniforms(seed, rows, 2)
    assert u[0, 1] == bits / 2**53


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_these_draws_stay_what_they_are(name):
    """Caches hold them: another rule would be another cache under the same name."""
    inputs = problem(3, 300, 4)
    ids, _ = run(inputs, 4, seed=7, backend=name)
    assert ids.tolist() == [
        [102, 102, 297, 51],
        [21, 21, 119, 154],
        [108, 163, 42, 105],
    ]


def test_a_rows_draws_depend_on_no_other_row(device, monkeypatch, chunks_of):
    inputs = problem(13, 300, 5, device)
    whole = run(inputs)
    for chunk in (1, 5, 12):
        chunks_of(chunk)
        assert_same(run(inputs), whole)
    monkeypatch.setattr("kernels.chunks.CPU_BLOCK_BYTES", 10_000)  # four rows at a time
    assert_same(run(inputs), whole)

    order = torch.randperm(13, device=device)[:7]
    part = Inputs(
        inputs.hidden[order],
        inputs.weight,
        inputs.exclude[order],
    )
    expected = [numbers[order, :9] for numbers in whole]
    assert_same(run(part, 9, rows=order.int()), expected)


# Draw by draw.


SIZES = [  # N, V, K, n, softcap
    (0, 300, 4, 20, None),
    (4, 1, 0, 20, None),
    (4, 5, 5, 1, 3.0),
    (4, 256, 3, 300, None),
    (4, 1000, 5, 20, 3.0),
]


@pytest.mark.parametrize("N, V, K, n, softcap", SIZES)
def test_draws_in_any_vocabulary(N, V, K, n, softcap, device):
    check(problem(N, V, K, device), n, softcap)


def test_excluded_ids_of_narrow_integers(device):
    """V=256 itself would wrap in uint8."""
    inputs = problem(3, 256, 3, device)
    narrow = inputs.exclude.clamp(min=0).byte()
    check(inputs._replace(exclude=narrow))


def test_a_token_without_mass_is_never_drawn(device):
    """By the least u, by one on a boundary, and by the largest."""
    z = torch.tensor([[-INF, 0.0, -INF, 0.0, -INF]], device=device)
    u = torch.tensor([[0.0, 0.5, 1 - 2.0**-53]], dtype=torch.float64)
    ids, _ = sample.draw(z, u.to(device), z[:, :0].long())
    assert ids.tolist() == [[1, 3, 3]]


@pytest.mark.parametrize("place", [0, 5, 299])
def test_every_bit_of_u_counts(place, device):
    """Beside a token of mass 1, 299 of e^-22 are drawn by the u at the middle of each."""
    z = torch.full((1, 300), -22.0, device=device)
    z[0, place] = 0.0
    probs = z.double().softmax(1)
    u = probs.cumsum(1) - probs / 2
    exclude = z[:, :0].long()
    ids, log_probs = sample.draw(z.clone(), u, exclude)
    assert ids[0].tolist() == list(range(300))
    assert_close(log_probs, z.log_softmax(1), atol=2e-6)


def test_float64_is_float64(device):
    hidden, weight, exclude = problem(5, 700, 3, device)
    hidden = hidden.double() / 3
    inputs = Inputs(hidden, weight.double(), exclude)
    check(inputs, 40, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_inputs_alone(dtype, backend, device):
    """Under autocast too, in any layout."""
    hidden, weight, exclude = problem(5, 300, 3, device)
    hidden = hidden * 1.1
    weight = weight * 1.1
    narrow = Inputs(
        hidden.to(dtype),
        weight.to(dtype),
        exclude,
    )
    check(narrow, 40, rtol=1e-4)
    numbers = torch.arange(10, device=device)[::2]
    expected = run(narrow, backend=backend, rows=numbers.contiguous())
    wide = hidden, weight.requires_grad_(), exclude
    turned = [part.T.contiguous().T for part in wide]
    with torch.autocast(device, dtype=dtype):
        found = run(turned, backend=backend, rows=numbers)
    assert_same(found, expected)
    assert not found[1].requires_grad


PLACES = torch.arange(200)
BASE = PLACES / 50
LEAST = torch.finfo(torch.float32).min
UNBOUNDED = {
    "some are -inf": BASE.masked_fill(PLACES % 3 > 0, -INF),
    "one is high": BASE.masked_fill(PLACES == 130, 1e4),
    "all are low": BASE - 1e4,
    "high and low": torch.where(PLACES % 2 > 0, 1e4, -1e4),
    "some are the least number": BASE.masked_fill(PLACES > 9, LEAST),
    "all are the least number": torch.full((200,), LEAST),
}


EXCLUDED = [
    [],
    [130, 130, -1, 0],
]


@pytest.mark.parametrize("exclude", EXCLUDED)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", UNBOUNDED)
def test_logits_without_bounds(name, softcap, exclude, device):
    inputs = equal_rows(1, UNBOUNDED[name], device, exclude)
    check(inputs, 40, softcap, rtol=2e-6)


# Three logits, the tokens excluded, and the id and log-probability that must come.
HOPELESS = [
    ("0 0 -inf", [0, -1, 1], -1, -INF),
    ("-inf -inf -inf", [], -1, -INF),
    ("0 inf 0", [], -1, NAN),
    ("0 nan 0", [1], -1, NAN),
    ("0 inf 0", [0, 1, 2], -1, NAN),
]


@pytest.mark.parametrize("logits, exclude, token, log_prob", HOPELESS)
def test_rows_with_nothing_to_draw(logits, exclude, token, log_prob, device):
    numbers = [float(text) for text in logits.split()]
    z = torch.tensor(numbers)
    inputs = equal_rows(1, z, device, exclude)
    ids, log_probs = run(inputs)
    assert (ids == token).all()
    expected = torch.full_like(log_probs, log_prob)
    torch.testing.assert_close(
        log_probs,
        expected,
        equal_nan=True,
    )


# Memory and refusals.

MEASURE = """
import resource, torch
from kernels import linear_sample

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def grown(N, V, n, K):
    hidden, weight, exclude = torch.randn(N, 2), torch.randn(V, 2), torch.zeros(N, K).int()
    before = peak()
    linear_sample(hidden, weight, n, seed=0, exclude=exclude)
    return peak() - before - N * n * 8 // 1024

grown(2, 300, 3, 1)
print(grown(SIZES))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        "1400, 50257, 300, 64",
        "131_072, 8, 40, 2",
        "20, 300, 30_000, 0",
    ],
)
def test_scratch_on_a_cpu_stays_within_256_mib(sizes):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.replace("SIZES", sizes)],
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert int(done.stdout) < 256 * 1024


REFUSED = [
    ("n", 0, "n=0: must be an integer of at least 1"),
    ("n", 2.0, "n=2.0: must"),
    ("seed", -1, "seed=-1: must be an integer in 0..2.63-1"),
    ("seed", 2**63, "seed=9223372036854775808: must"),
    ("exclude", torch.zeros(5, 3), r"exclude has shape \(5, 3\): must be .N,K. with N=6"),
    ("exclude", torch.full((6, 3), 30), "exclude holds 30: an id must be below .* V=30"),
    ("rows", torch.arange(5), r"rows has shape \(5,\): must be .N. with N=6"),
    ("softcap", 0, "softcap=0: must be"),
]


@pytest.mark.parametrize("name, value, message", REFUSED)
def test_refusals_name_the_value_and_the_rule(name, value, message, backend):
    arguments = problem(6, 30, 3)._asdict()
    arguments |= {"n": 2, "seed": 0, "backend": backend}
    arguments[name] = value
    with pytest.raises(ValueError, match=message):
        linear_sample(**arguments)
