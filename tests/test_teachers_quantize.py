"""A row's bytes: what quantisation costs, and that everything else returns as it was."""

import numpy as np
import pytest

from engine import UserError
from teachers import quantize
from teachers.quantize import KL_LIMIT, decode, depth_grid, encode, quantization_kl
from tests.helpers import cache_spec

V = 2000
NO_NORM = np.zeros((1, 1))  # log_norm [N,1] at T=1


def many_rows():
    """Logits [N,V], descending, from flat to peaked."""
    rng = np.random.default_rng(0)
    ranks = np.arange(1, V + 1)
    noise = rng.normal(size=(64, V))
    few = ranks <= rng.integers(2, 12, (64, 1))
    logits = [
        noise * 0.1,
        noise,
        noise * 3,
        noise * 8,
        noise - np.log(ranks),
        noise * 0.02 + 14 * few,  # a few tokens of about the same probability
        noise * 0.5 + 21 * (ranks == 1),
        np.where(ranks % 3 == 0, -np.inf, noise),
        np.zeros((1, V)),
        np.where(ranks <= 2, 0, -40)[None],
        np.where(ranks == 1, 0, -np.inf)[None],
    ]
    logits = np.concatenate(logits)
    return -np.sort(-logits, axis=1)


def reveal(logits, k, temperatures):
    """log_probs [N,k] and log_norm [N,temperatures] of logits [N,V]."""
    lse = np.logaddexp.reduce(logits, axis=1)
    norms = []
    for T in temperatures:
        lse_at_T = np.logaddexp.reduce(logits / T, axis=1)
        norms.append(lse_at_T - lse / T)
    log_probs = logits[:, :k] - lse[:, None]
    log_norm = np.stack(norms, axis=1)
    return log_probs.astype(np.float32), log_norm.astype(np.float32)


def outcomes(log_probs, log_norm, T, place):
    """[N,k+1] the probabilities at T of the entries and of the tail."""
    log_probs = log_probs.astype(float) / T
    p = np.exp(log_probs - log_norm[:, place, None])
    tail = 1 - p.sum(axis=1, keepdims=True)
    tail = np.maximum(tail, 1e-7)
    return np.concatenate([p, tail], axis=1)


TEMPERATURES = ((), (2.0,), (3.0,), (4.0,), (0.5, 4.0))


@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("k", [1, 2, 3, 20, 64, 128, 256, V])
def test_every_row_keeps_the_limit_its_mass_and_its_order(k, temperatures):
    kind = "full" if k == V else "topk"
    spec = cache_spec(kind, vocab_size=V, k=k, temperatures=temperatures)
    log_probs, log_norm = reveal(many_rows(), k, spec.temperatures)
    ids = np.tile(np.arange(k), (len(log_probs), 1))
    rows, costs = encode(spec, ids, log_probs, log_norm, None)
    stored = decode(spec, rows)
    assert costs.max() <= KL_LIMIT
    assert (stored.ids == ids).all()
    impossible = np.isneginf(log_probs)
    assert (np.isneginf(stored.log_probs) == impossible).all()
    finite = stored.log_probs.clip(min=-1e9)
    assert (np.diff(finite) <= 0).all()
    assert abs(stored.log_norm[:, 0]).max() < 1e-5
    if kind == "topk":
        mass = np.exp(stored.log_probs.astype(float)).sum(axis=1)
        assert mass.max() <= 1

    # The oracle, in fp64.
    for place, T in enumerate(spec.temperatures):
        t = outcomes(log_probs, log_norm, T, place)
        q = outcomes(stored.log_probs, stored.log_norm, T, place)
        with np.errstate(all="ignore"):
            terms = np.where(t > 0, t * np.log(t / q), 0)
        kl = terms.sum(axis=1)
        assert kl.max() <= KL_LIMIT


@pytest.mark.parametrize("k", [2, 3, 8, 20, 64, 256])
def test_the_stated_bound_at_one_temperature(k):
    """The k-1 lesser entries at one depth, half rounded up and half down: the worst there is."""
    finite = depth_grid(k, (1.0,))[:-1]
    assert len(finite) == 255
    middles = (finite[1:] + finite[:-1]) / 2
    up = np.arange(k - 1) < (k - 1) // 2
    depths = middles[:, None] + np.where(up, -1e-6, 1e-6)
    logits = np.pad(-depths, ((0, 0), (1, 0)))
    ids = np.tile(np.arange(k), (len(logits), 1))
    log_probs, log_norm = reveal(logits, k, (1.0,))
    encode(cache_spec(k=k), ids, log_probs, log_norm, None)


WIDE_CODES = [
    (512, (), "u1"),
    (1024, (), "u2"),
    (64, (2.0,), "u1"),
    (128, (2.0,), "u2"),
]


@pytest.mark.parametrize("k, temperatures, code_type", WIDE_CODES)
def test_where_a_code_takes_two_bytes(k, temperatures, code_type):
    spec = cache_spec(k=k, temperatures=temperatures)
    assert spec.row["codes"].base == code_type


BAD = {
    "a mass above 1": ([0.7, 0.6, 0.5], "nan"),
    "not a number": ([0.7, np.nan, 0.1], "nan"),
    "a coarse grid": ([0.4, 0.28, 0.1], r"1\.\de-02"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_row_that_costs_too_much_is_refused(case, monkeypatch):
    probs, cost = BAD[case]
    if case == "a coarse grid":
        grid = np.append(np.linspace(0, 254, 255), np.inf)
        monkeypatch.setattr(quantize, "depth_grid", lambda k, temperatures: grid)
    message = rf"^access.k=3 temperatures=\[1.0\]: .* costs {cost} nats of KL, 0.0001 is"
    ids = np.arange(3)[None]
    log_probs = np.log([probs])
    with pytest.raises(UserError, match=message):
        encode(cache_spec(k=3), ids, log_probs, NO_NORM, None)


def test_another_tail_is_a_cost():
    spec = cache_spec(k=2)
    log_probs = np.log([[0.4, 0.2]])
    rows, _ = encode(spec, np.arange(2)[None], log_probs, NO_NORM, None)
    halved = np.log([[0.2, 0.1]])
    cost = quantization_kl(spec, halved, NO_NORM, decode(spec, rows))
    expected = 0.3 * np.log(0.5) + 0.7 * np.log(0.7 / 0.4)
    assert cost == pytest.approx(expected, rel=1e-3)


BYTES = {
    "greedy": 2,
    "text": 2,
    "sampled": 24,
    "topk": 194,
    "residual_to_label": 194,
    "unbiased": 196,
    "stratified": 218,
    "full": 2 * 50_304,
}


@pytest.mark.parametrize("kind", BYTES)
def test_bytes_a_token(kind):
    spec = cache_spec(kind, vocab_size=50_304, k=64, n=12)
    assert spec.row.itemsize == BYTES[kind]


def test_bytes_of_a_large_vocabulary_and_another_temperature():
    spec = cache_spec(k=64, temperatures=(2.0,))
    assert spec.row.itemsize == 64 * 4 + 2 * 2


@pytest.mark.parametrize("vocab_size", [64, 65_535, 65_536, 65_537, 151_936, 2**24 - 1])
def test_ids_return(vocab_size):
    spec = cache_spec("sampled", vocab_size=vocab_size, n=4)
    last = vocab_size - 1
    draws = np.array([[0, -1, last // 2, last]])
    rows, _ = encode(spec, None, None, None, draws)
    assert (decode(spec, rows).draws == draws).all()
    id_bytes = 2 if vocab_size <= 65_535 else 3
    assert spec.row.itemsize == 4 * id_bytes
    with pytest.raises(AssertionError, match=f"V={vocab_size}"):
        encode(spec, None, None, None, draws + 1)


ENTRIES = [  # ids, probabilities, and what returns
    ([7, -1, 9, 7], [0.1, 0.9, 0.5, 0.2], [9, 7, 7, -1], [0.5, 0.2, 0.1, 0]),
    ([3, 3, -1, -1], [0.3, 0.3, 0.4, 0.4], [3, 3, -1, -1], [0.3, 0.3, 0, 0]),
    ([-1, -1, -1, -1], [0.5, 0.5, 0.5, 0.5], [-1, -1, -1, -1], [0, 0, 0, 0]),
    ([1, 2, 3, 4], [0.4, 0.3, 0.2, 0.1], [1, 2, 3, 4], [0.4, 0.3, 0.2, 0.1]),
]


@pytest.mark.parametrize("ids, probs, stored_ids, stored_probs", ENTRIES)
def test_unsorted_entries_empty_slots_and_duplicates(ids, probs, stored_ids, stored_probs):
    spec = cache_spec(k=4)
    rows, _ = encode(spec, np.array([ids]), np.log([probs]), NO_NORM, None)
    stored = decode(spec, rows)
    assert stored.ids.tolist() == [stored_ids]
    np.testing.assert_allclose(np.exp(stored.log_probs[0]), stored_probs, atol=5e-3)
    assert abs(stored.log_norm) < 1e-6


def test_full_is_in_the_vocabularys_order():
    spec = cache_spec("full", vocab_size=3, temperatures=(2.0,))
    log_probs, log_norm = reveal(np.log([[0.5, 0.3, 0.2]]), 3, (1.0, 2.0))
    rows, _ = encode(spec, np.array([[2, 0, 1]]), log_probs, log_norm, None)
    stored = decode(spec, rows)
    assert stored.ids.tolist() == [[0, 1, 2]]
    np.testing.assert_allclose(np.exp(stored.log_probs[0]), [0.3, 0.2, 0.5], atol=1e-3)
    np.testing.assert_allclose(stored.log_norm, log_norm, atol=1e-3)
