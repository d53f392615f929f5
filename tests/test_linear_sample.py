"""linear_sample against known distributions, against fp64 running sums draw by draw, and against itself cut otherwise.

N rows, V vocabulary, n draws a row. Triton runs in its interpreter where there is no GPU. Seeds are fixed, so a
p-value is the same in every run; each bound is shown to refuse draws whose distribution is 1% off.
"""

import contextlib
import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import linear_sample
from kernels.common import computing
from tests.helpers import assert_close
from tests.test_kernels import Watched
from tests.test_triton import far_apart

file = importlib.import_module("kernels.linear_sample")  # the package's name of it is the op
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "torch", "triton")
PARTS = ("torch", "triton")  # those that go chunk by chunk
G, MASK = 0x9E3779B97F4A7C15, 2**64 - 1
SCAN = file.SCAN
EXACT = 1e-6  # how far, of a row's whole mass, fp32 masses may move a boundary


def problem(N: int, V: int, K: int = 0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden [N,4], weight [V,4], exclude [N,K] with repeats and empty slots; every product is exact in fp32."""
    maker = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-4, 5, (N, 4), generator=maker).float() / 2
    weight = torch.randint(-4, 5, (V, 4), generator=maker).float() / 2
    exclude = torch.randint(-1, V, (N, K), generator=maker) if K else None
    if K > 1:
        exclude[:, 1] = exclude[:, 0]
    return hidden.to(DEVICE), weight.to(DEVICE), exclude.to(DEVICE) if K else None


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None = None) -> Tensor:
    z = hidden.double() @ weight.double().T
    return z if softcap is None else softcap * (z / softcap).tanh()


def without(z: Tensor, exclude: Tensor | None) -> Tensor:
    """z [N,V] with -inf where excluded, a row at a time."""
    z = z.clone()
    for row, ids in zip(z, [] if exclude is None else exclude, strict=exclude is not None):
        row[ids[ids >= 0]] = -math.inf
    return z


def check_draws(ids: Tensor, z: Tensor, u: Tensor) -> None:
    """Every draw is the token of fp64 logits z [N,V] at which the running sum passes u of the whole, or borders on it."""
    sums = z.softmax(1).cumsum(1)
    at = ids.long()
    before = torch.where(at > 0, sums.gather(1, (at - 1).clamp(min=0)), 0.0)
    assert ids.dtype == torch.int32 and (ids >= 0).all() and (ids < z.shape[1]).all()
    assert (z.gather(1, at) > -math.inf).all()
    assert (u > before - EXACT).all() and (u < sums.gather(1, at) + EXACT).all()
    beyond = (u < before) | (u >= sums.gather(1, at))
    assert beyond.sum() <= max(3, ids.numel() // 1000), f"{beyond.sum()} draws on the other side of a boundary"


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch):
    """The interpreter's scan is a loop: it is made over 8 blocks, so that 1500 tokens take two. One test has what ships."""
    if DEVICE == "cpu":
        monkeypatch.setattr(file, "SCAN", 8)


# The distribution.


def p_value(counts: Tensor, probs: Tensor) -> float:
    """Pearson's chi-square of counts against the probabilities of their bins."""
    expected = probs.double() * counts.sum()
    assert expected.min() > 5
    statistic = ((counts - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2).item()


def check_distribution(counts: Tensor, probs: Tensor) -> None:
    """And a distribution that is 1% off, up and down in turn, is told from it."""
    tilt = probs * (1 + 0.01 * (-1.0) ** torch.arange(len(probs)))
    assert p_value(counts, probs) > 1e-3
    assert p_value(counts, tilt / tilt.sum()) < 1e-4


@pytest.fixture
def many_at_once(monkeypatch):
    """The interpreter takes as long for a thousand draws as for sixteen; blocks of 8 tokens."""
    if DEVICE == "cpu":
        monkeypatch.setattr(file, "DRAWS", 4096)
        monkeypatch.setattr(file, "WIDTH", 8)


WAYS = [(b, V, out) for b in BACKENDS for V, out in ((64, True), (300, True), (64, False)) if (b, V) != ("triton", 300)]


@pytest.mark.parametrize("backend, V, excluding", WAYS)
def test_draws_have_the_distribution(backend, excluding, V, many_at_once):
    """Zipf's law in an order of its own, about a million draws of rows of equal logits."""
    probs = 1 / (torch.randperm(V) + 1).double()
    N, n = (24, 40_960) if backend == "triton" else (10_000, 160)
    gone = [*probs.topk(3).indices.tolist(), V - 1, V - 1, -1] if excluding else []
    exclude = torch.tensor(gone).expand(N, -1).to(DEVICE) if excluding else None
    weight = probs.log().float()[:, None].to(DEVICE)
    ids, _ = linear_sample(torch.ones(N, 1, device=DEVICE), weight, n, seed=1, exclude=exclude, backend=backend)
    probs[[token for token in gone if token >= 0]] = 0
    counts = torch.bincount(ids.cpu().flatten().long(), minlength=V)
    assert (counts[probs == 0] == 0).all()
    check_distribution(counts[probs > 0], probs[probs > 0] / probs.sum())


def test_draws_of_a_large_vocabulary_have_the_distribution():
    """V=100000: the fifty likeliest tokens, the rest in bins of about 1% by rank, and in others by place in a block."""
    V, rank = 100_000, torch.randperm(100_000)
    probs = 1 / (rank + 1).double()
    probs /= probs.sum()
    hidden, weight = torch.ones(200, 1, device=DEVICE), probs.log().float()[:, None].to(DEVICE)
    ids = linear_sample(hidden, weight, 4500, seed=1, backend="torch")[0].cpu().flatten().long()
    bins = torch.where(rank < 50, rank, 50 + (rank.clamp(min=50) / 50).log2().mul(4).long())
    for of in (bins, torch.where(rank < 50, 128, torch.arange(V) % 128)):
        expected = torch.zeros(int(of.max()) + 1, dtype=torch.float64).index_add_(0, of, probs)
        check_distribution(torch.bincount(of[ids], minlength=len(expected)), expected)


def test_draws_are_independent_of_each_other_of_other_rows_and_of_other_seeds():
    """Pairs of draws against the product of their probabilities: 64 cells, a million pairs."""
    probs = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05], dtype=torch.float64)
    hidden, weight = torch.ones(250_001, 1, device=DEVICE), probs.log().float()[:, None].to(DEVICE)
    one, two = (linear_sample(hidden, weight, 5, seed=seed)[0].cpu().long() for seed in (0, 1))
    pairs = {
        "draws": (one[:, :-1], one[:, 1:]), "rows": (one[:-1, 1:], one[1:, 1:]), "both": (one[:-1, 1:], one[1:, :-1]),
        "seeds": (one[:, 1:], two[:, 1:]), "seed and row": (one[1:, 1:], two[:-1, 1:]), "ends": (one[:, :1], one[:, -1:]),
        "seed and draw": (one[:, 1:], two[:, :-1]),
    }  # fmt: skip
    for name, (left, right) in pairs.items():
        counts = torch.bincount((left * 8 + right).flatten(), minlength=64)
        assert p_value(counts, (probs[:, None] * probs).flatten()) > 1e-3, name


# The uniform numbers.


def splitmix64(state: int) -> int:
    x = state & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_the_numbers_are_splitmix64s():
    """Published outputs for the seed 1234567, and the docstring's rule in Python's integers."""
    published = (6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    for place, output in enumerate(published):
        state = (1234567 + (place + 1) * G) & MASK
        signed = torch.tensor(state - 2**64 if state >= 2**63 else state)
        assert splitmix64(state) == output and file.mix(signed).item() & MASK == output
    for seed in (0, 1, 2**63 - 1):
        numbers = [0, 1, 7, 2**40, 2**63 - 1]
        u = file.uniforms(seed, torch.tensor(numbers, device=DEVICE), 3)
        for row, number in enumerate(numbers):
            stream = splitmix64(splitmix64(seed + G) + (number + 1) * G)
            for draw in range(3):
                assert u[row, draw].item() == (splitmix64(stream + (draw + 1) * G) >> 11) / 2**53


@pytest.mark.parametrize("backend", BACKENDS)
def test_these_draws_stay_what_they_are(backend):
    """Caches hold them: another rule for u, or for the order of tokens, would be another cache under the same name."""
    hidden, weight, exclude = problem(3, 300, 4)
    ids, _ = linear_sample(hidden, weight, 4, seed=7, exclude=exclude, backend=backend)
    assert ids.tolist() == [[102, 102, 297, 51], [21, 21, 119, 154], [108, 163, 42, 105]]


# Cut otherwise, the same draws.


@pytest.mark.parametrize("backend, softcap", [("torch", None), ("torch", 3.0), ("triton", 3.0)])
def test_a_rows_draws_depend_on_no_other_row(backend, softcap, monkeypatch):
    """Any chunk, the first rows alone, rows in another order under their own numbers, fewer draws, smaller groups of draws."""
    hidden, weight, exclude = problem(13, 300, 5)
    options = {"seed": 3, "softcap": softcap, "backend": backend}
    whole = linear_sample(hidden, weight, 20, exclude=exclude, **options)
    order = torch.randperm(13, device=DEVICE)

    def same(found, *place):
        assert all(torch.equal(one, other[place]) for one, other in zip(found, whole, strict=True))

    for rows in (1, 5, 12):
        same(linear_sample(hidden, weight, 20, exclude=exclude, _rows=rows, **options), slice(None))
    same(linear_sample(hidden[:4], weight, 20, exclude=exclude[:4], **options), slice(4))
    same(linear_sample(hidden[order], weight, 20, exclude=exclude[order], rows=order.int(), _rows=5, **options), order)
    same(linear_sample(hidden, weight, 7, exclude=exclude, **options), slice(None), slice(7))
    monkeypatch.setattr(file, "MOST", 300)  # the second look takes two draws at a time, a chunk 15 rows
    same(linear_sample(hidden, weight, 20, exclude=exclude, **options), slice(None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_told_apart_by_their_numbers(backend):
    hidden, weight, _ = problem(1, 300)
    hidden, rows = hidden.expand(6, -1), torch.tensor([5, 0, 5, 2**40, 2**40 + 1, -1], device=DEVICE)
    ids, _ = linear_sample(hidden, weight, 30, seed=3, rows=rows, backend=backend)
    assert torch.equal(ids[0], ids[2]) and len(ids.unique(dim=0)) == 5
    plain, _ = linear_sample(hidden, weight, 30, seed=3, backend=backend)
    assert torch.equal(plain[[5, 0]], ids[:2])
    assert not torch.equal(plain, linear_sample(hidden, weight, 30, seed=4, backend=backend)[0])


# Draw by draw.


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1000])
@pytest.mark.parametrize("K", [0, 5])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_draws_and_log_probs_in_any_vocabulary(softcap, K, V, backend):
    """Below, at and past a block; two pieces of the kernel's sums are in `test_more_blocks_...`."""
    hidden, weight, exclude = problem(4, V, K if V > 2 else 0)
    ids, log_probs = linear_sample(hidden, weight, 20, seed=5, exclude=exclude, softcap=softcap, backend=backend)
    z = logits_of(hidden, weight, softcap)
    check_draws(ids, without(z, exclude), file.uniforms(5, torch.arange(4, device=DEVICE), 20))
    assert_close(log_probs, z.log_softmax(1).gather(1, ids.long()).float(), atol=2e-6)


@pytest.mark.parametrize("backend", PARTS)
def test_more_blocks_than_the_kernel_sums_at_a_time(backend, monkeypatch):
    monkeypatch.setattr(file, "SCAN", 4)
    monkeypatch.setattr(file, "GROUP", 2)
    hidden, weight, exclude = problem(3, 1500, 4)
    exclude = torch.cat([exclude, torch.arange(256, 640, device=DEVICE).expand(3, -1)], 1)  # whole blocks without mass
    ids, _ = linear_sample(hidden, weight, 60, seed=5, exclude=exclude, backend=backend)
    check_draws(ids, without(logits_of(hidden, weight), exclude), file.uniforms(5, torch.arange(3, device=DEVICE), 60))


@pytest.mark.parametrize("backend", PARTS)
def test_backends_agree_but_at_boundaries(backend, monkeypatch):
    """The reference's draws, of the same fp32 logits; `check_draws` proves what is left to border on them."""
    monkeypatch.setattr(file, "SCAN", SCAN)
    hidden, weight, exclude = problem(20, 700, 3)
    hidden = hidden / 4  # flat: the draws fall everywhere
    exact = linear_sample(hidden, weight, 100, seed=2, exclude=exclude, backend="reference")[0]
    ids, _ = linear_sample(hidden, weight, 100, seed=2, exclude=exclude, backend=backend)
    check_draws(ids, without(logits_of(hidden, weight), exclude), file.uniforms(2, torch.arange(20, device=DEVICE), 100))
    assert (ids != exact).sum() <= 2


@pytest.mark.parametrize("place", [0, 5, 299])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_of_u_counts(backend, place):
    """Beside a token of mass 1 at `place`, 299 of e^-22 are drawn by the u at the middle of each: steps of 3e-10."""
    z = torch.full((1, 300), -22.0, device=DEVICE)
    z[0, place] = 0.0
    sums = z.double().softmax(1).cumsum(1)
    u, n = sums - z.double().softmax(1) / 2, 300
    ids, log_probs = torch.empty(1, n, dtype=torch.int32, device=DEVICE), torch.empty(1, n, device=DEVICE)
    excluded = torch.full((1, 2), -math.inf, device=DEVICE)
    if backend == "triton":
        file.launch(z.clone(), u, excluded, ids, log_probs, None)
    elif backend == "torch":
        ids, log_probs = file.draw(z.clone(), u, excluded)
    else:
        ids, log_probs = file.reference(z, u, torch.empty(1, 0, dtype=torch.int64, device=DEVICE))
    assert torch.equal(ids, torch.arange(300, dtype=torch.int32, device=DEVICE)[None])
    assert_close(log_probs, z.log_softmax(1), atol=2e-6)


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_float64_is_float64(backend):
    hidden, weight, exclude = problem(5, 700, 3)
    pair = [part.double() / 3 for part in (hidden, weight)]
    ids, log_probs = linear_sample(*pair, 40, seed=2, exclude=exclude, backend=backend)
    assert_close(log_probs, logits_of(*pair).log_softmax(1).gather(1, ids.long()), rtol=1e-12)
    assert torch.equal(ids, linear_sample(*pair, 40, seed=2, exclude=exclude, backend="reference")[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_inputs_alone(dtype, backend):
    hidden, weight, _ = problem(5, 300)
    narrow = [(part * 1.1).to(dtype) for part in (hidden, weight)]
    ids, log_probs = linear_sample(*narrow, 40, seed=2, backend=backend)
    z = logits_of(*narrow)
    check_draws(ids, z, file.uniforms(2, torch.arange(5, device=DEVICE), 40))
    assert_close(log_probs, z.log_softmax(1).gather(1, ids.long()).float(), rtol=1e-4)
    with torch.autocast(DEVICE, dtype=dtype):
        again = linear_sample(hidden * 1.1, (weight * 1.1).requires_grad_(), 40, seed=2, backend=backend)
    assert torch.equal(again[0], ids) and torch.equal(again[1], log_probs) and not again[1].requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_one_draw_and_hundreds(backend):
    """And narrow integers, in which V=256 itself would wrap."""
    hidden, weight, exclude = problem(3, 256, 3)
    none = linear_sample(hidden[:0], weight, 4, seed=0, exclude=exclude[:0], backend=backend)
    for n in (1, 300):
        ids, log_probs = linear_sample(hidden, weight, n, seed=0, exclude=exclude.clamp(min=0), backend=backend)
        assert ids.shape == log_probs.shape == (3, n) and log_probs.dtype == torch.float32
        check_draws(
            ids, without(logits_of(hidden, weight), exclude.clamp(min=0)), file.uniforms(0, torch.arange(3), n).to(DEVICE)
        )
        narrow = exclude.clamp(min=0).to(torch.uint8)
        assert torch.equal(linear_sample(hidden, weight, n, seed=0, exclude=narrow, backend=backend)[0], ids)
    assert [(part.shape, part.dtype) for part in none] == [((0, 4), torch.int32), ((0, 4), torch.float32)]


def rows_of(*logits: Tensor) -> tuple[Tensor, Tensor]:
    """hidden and weight of any logits [V], one row each: a 1 for each row's own column, where others' infinities are 0."""
    return torch.ones(1, 1, device=DEVICE), torch.stack(logits, 1).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_without_bounds(softcap, backend):
    """-inf, +-1e4, the least number, and masses below fp32's least beside what is excluded."""
    V, least = 200, torch.finfo(torch.float32).min
    base = torch.randn(V)
    few = torch.full((V,), -math.inf)
    few[150] = 2.0
    cases = {
        "some -inf": base.masked_fill(torch.arange(V) % 3 > 0, -math.inf), "one finite": few,
        "one high": base.index_fill(0, torch.tensor(130), 1e4), "all low": base - 1e4, "all high": base + 1e4,
        "both": torch.where(base > 0, 1e4, -1e4), "least": base.masked_fill(torch.arange(V) > 9, least),
        "all least": torch.full((V,), least),
    }  # fmt: skip
    for name, z in cases.items():
        for exclude in (None, torch.tensor([[130, 130, -1, 0]], device=DEVICE)):
            hidden, weight = rows_of(z)
            ids, log_probs = linear_sample(hidden, weight, 40, seed=2, exclude=exclude, softcap=softcap, backend=backend)
            exact = logits_of(hidden, weight, softcap)
            check_draws(ids, without(exact, exclude), file.uniforms(2, torch.zeros(1, dtype=torch.long, device=DEVICE), 40))
            assert_close(log_probs, exact.log_softmax(1).gather(1, ids.long()).float(), atol=2e-6, rtol=2e-6), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_nothing_to_draw(backend):
    """All of V excluded, nothing above -inf left: ids -1, log_probs -inf. NaN or +inf, excluded or not: ids -1, NaN."""
    hidden, weight, _ = problem(3, 300)
    exclude = torch.arange(300, device=DEVICE).flip(0).repeat(3, 1)
    exclude[1, 7], exclude[2] = -1, -1
    ids, log_probs = linear_sample(hidden, weight, 5, seed=0, exclude=exclude, backend=backend)
    assert (ids[0] == -1).all() and (log_probs[0] == -math.inf).all()
    assert (ids[1] == 292).all() and (ids[2] >= 0).all() and log_probs[1:].isfinite().all()
    few = torch.full((300,), -math.inf)
    few[[3, 140]] = 0.0
    last = torch.tensor([[3, 140]], device=DEVICE)

    def holding(place, value):
        return few.index_fill(0, torch.tensor(place), value)

    for z, out, expected in (
        (few, last, -math.inf),
        (few, last[:, :1], -math.log(2)),
        (holding([3, 140], -math.inf), None, -math.inf),
        (holding(9, math.inf), None, math.nan),
        (holding(9, math.nan), None, math.nan),
        (holding(3, math.nan), last[:, :1], math.nan),
        (holding(3, math.inf), last[:, :1], math.nan),
    ):
        ids, log_probs = linear_sample(*rows_of(z), 5, seed=0, exclude=out, backend=backend)
        assert (ids == (140 if math.isfinite(expected) else -1)).all()
        torch.testing.assert_close(log_probs, torch.full_like(log_probs, expected), equal_nan=True)


# Memory.


def test_rows_more_than_two_to_the_31_elements_apart():
    z = far_apart(DEVICE, torch.float32)
    u = file.uniforms(1, torch.arange(3, device=DEVICE), 10)
    ids, log_probs = torch.full((3, 10), -7, dtype=torch.int32, device=DEVICE), torch.full((3, 10), math.nan, device=DEVICE)
    file.launch(z, u, torch.full((3, 2), -math.inf, device=DEVICE), ids, log_probs, None)
    check_draws(ids, z.double(), u)
    assert_close(log_probs, z.double().log_softmax(1).gather(1, ids.long()).float(), atol=2e-6)


@pytest.mark.parametrize("backend", PARTS)
def test_unwritten_memory_would_show(backend, monkeypatch):
    def poisoned(make):
        def made(*args, **options):
            tensor = make(*args, **options)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 2**30)

        return made

    hidden, weight, exclude = problem(7, 1000, 5)
    expected = linear_sample(hidden, weight, 20, seed=5, exclude=exclude, backend=backend)
    monkeypatch.setattr("kernels.tile.SCRATCH.tile", None)
    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(place, name, poisoned(getattr(place, name)))
    found = linear_sample(hidden, weight, 20, seed=5, exclude=exclude, backend=backend, _rows=3)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU is here: Triton's interpreter is off")
@pytest.mark.parametrize("backend", PARTS)
def test_logits_never_exist_whole(backend, monkeypatch):
    monkeypatch.setattr("kernels.tile.SCRATCH.tile", None)
    seen = Watched()

    @contextlib.contextmanager
    def watched(like):
        with computing(like), seen:
            yield

    monkeypatch.setattr(file, "computing", watched)
    hidden, weight, exclude = problem(18, 3000, 4)
    linear_sample(hidden, weight, 3, seed=0, exclude=exclude, softcap=9.0, backend=backend, _rows=6)
    assert 4 * 6 * 3000 <= seen.most <= 4 * 6 * 3015  # a tile, seen, and nothing larger


@pytest.mark.parametrize("sizes", ["1400, 50257, 300, 64", "131_072, 8, 40, 2", "20, 300, 30_000, 0"])
def test_scratch_on_a_cpu_stays_within_256_mib(sizes):
    code = f"""
import resource, torch
from kernels import linear_sample
def run(N, V, n, K):
    hidden, weight, exclude = torch.randn(N, 2), torch.randn(V, 2), torch.zeros(N, K, dtype=torch.int32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    linear_sample(hidden, weight, n, seed=0, exclude=exclude, backend="torch")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before - N * n * 8 // 1024
run(2, 300, 3, 1)
print(run({sizes}))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 256 * 1024, f"{done.stdout} KiB"


# The rest of PyTorch.


@pytest.mark.parametrize("backend", PARTS)
def test_the_op_is_registered_as_it_behaves_and_compiles(backend):
    hidden, weight, exclude = problem(4, 37, 3)
    kept, numbers = exclude.clone(), torch.arange(3, 7, device=DEVICE)
    for rest in ((exclude, numbers), (exclude[:, :0], numbers)):
        torch.library.opcheck(torch.ops.nanodistill.sample, (hidden, weight, 3, 5, *rest, None, backend, torch.float32, None))
    assert torch.equal(exclude, kept)
    torch._dynamo.reset()

    def scaled(hidden, weight, exclude, numbers, seed, n):
        out = linear_sample(hidden * 2, weight, n, seed=seed, exclude=exclude, rows=numbers, softcap=9.0, backend=backend)
        return out[0] + 0, out[1] * 2

    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    for N, seed, n in ((4, 0, 3), (3, 8, 3), (2, 2**40, 5)):
        inputs = (hidden[:N].requires_grad_(), weight, exclude[:N], numbers[:N], seed, n)
        for one, other in zip(compiled(*inputs), scaled(*inputs), strict=True):
            assert torch.equal(one, other) and not one.requires_grad


@pytest.mark.parametrize("backend", PARTS)
def test_inputs_in_any_layout(backend):
    hidden, weight, exclude = problem(6, 300, 4)
    rows = torch.tensor([3, 9, 4, 9, 1, 9, 5, 9, 9, 9, 0, 9], device=DEVICE)[::2]
    expected = linear_sample(hidden, weight, 9, seed=1, exclude=exclude, rows=rows.contiguous(), backend=backend)
    hidden, weight, exclude = (part.T.contiguous().T for part in (hidden, weight, exclude))
    found = linear_sample(hidden, weight, 9, seed=1, exclude=exclude, rows=rows, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


BAD = {
    "n=0: must be an integer of at least 1": lambda a: a.update(n=0),
    "n=2.0: must": lambda a: a.update(n=2.0),
    "seed=-1: must be an integer in 0..2.63-1": lambda a: a.update(seed=-1),
    "seed=9223372036854775808: must": lambda a: a.update(seed=2**63),
    "seed=None: must": lambda a: a.update(seed=None),
    r"exclude has shape \(5, 3\): must be .N,K. with N=6": lambda a: a.update(exclude=a["exclude"][:5]),
    r"exclude has shape \(6,\): must be .N,K.": lambda a: a.update(exclude=a["exclude"][:, 0]),
    "exclude has dtype torch.float32": lambda a: a.update(exclude=a["exclude"].float()),
    "exclude holds 30: an id must be below the vocabulary's V=30": lambda a: a["exclude"].__setitem__((5, 1), 30),
    r"rows has shape \(5,\): must be .N. with N=6": lambda a: a.update(rows=torch.arange(5)),
    "rows has dtype torch.float32": lambda a: a.update(rows=torch.zeros(6)),
    "softcap=0: must be": lambda a: a.update(softcap=0),
    "backend='cuda'": lambda a: a.update(backend="cuda"),
    "D must agree": lambda a: a.update(weight=a["weight"][:, :3]),
    "one dtype": lambda a: a.update(hidden=a["hidden"].double()),
    "weight has no rows": lambda a: a.update(weight=a["weight"][:0]),
    "hidden has shape": lambda a: a.update(hidden=a["hidden"][0]),
}


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("message", BAD)
def test_refusals_name_the_value_and_the_rule(message, backend):
    hidden, weight, exclude = (part.cpu() for part in problem(6, 30, 3))
    arguments = {"hidden": hidden, "weight": weight, "n": 2, "seed": 0, "exclude": exclude, "backend": backend}
    BAD[message](arguments)
    with pytest.raises(ValueError, match=message) as caught:
        linear_sample(**arguments)
    assert "\n" not in str(caught.value)


def test_triton_is_refused_for_float64():
    hidden, weight, _ = problem(2, 30)
    with pytest.raises(ValueError, match="backend='triton': the kernels compute in fp32"):
        linear_sample(hidden.double(), weight.double(), 2, seed=0, backend="triton")
