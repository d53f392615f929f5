"""A row's bytes: what quantisation costs, and that everything else returns as it was."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import log_softmax, logsumexp

from engine import UserError
from teachers import quantize
from teachers.quantize import KL_LIMIT, decode, depth_grid, encode
from tests.recording import cache_spec

V = 2000


def row(text):
    """[1,K] the numbers in a line."""
    return np.array([text.split()], float)


def roundtrip(
    spec,
    log_probs,
    log_norm=None,
    ids=None,
):
    """What a cache returns of log_probs [N,K], and what each row costs [N]."""
    if log_norm is None:
        log_norm = np.zeros((len(log_probs), 1))
    if ids is None:
        ids = np.arange(log_probs.shape[1])
        ids = np.tile(ids, (len(log_probs), 1))
    rows, costs = encode(spec, ids, log_probs, log_norm, None)
    return decode(spec, rows), costs


def many_rows():
    """Logits [N,V], descending, from flat to peaked."""
    rng = np.random.default_rng(0)
    ranks = np.arange(1, V + 1)
    noise = rng.normal(size=(32, V))
    counts = rng.integers(2, 12, (32, 1))
    few = ranks <= counts
    logits = [
        noise,
        noise * 8,
        noise - np.log(ranks),
        noise * 0.02 + 14 * few,  # a few tokens of about the same probability
        np.where(ranks % 3 == 0, -np.inf, noise),
        np.zeros((1, V)),
        -1e4 * (ranks > counts),  # M = 1
    ]
    logits = np.concatenate(logits)
    return -np.sort(-logits, axis=1)


def reveal(
    logits,
    k,
    temperatures,
):
    """log_probs [N,k] and log_norm [N,temperatures] of logits [N,V]."""
    log_t = log_softmax(logits, axis=1)
    log_norm = [logsumexp(log_t / T, axis=1) for T in temperatures]
    log_norm = np.stack(log_norm, axis=1)
    return log_t[:, :k].astype("f4"), log_norm.astype("f4")


def outcomes(
    log_probs,
    log_norm,
    T,
    place,
):
    """[N,k+1] the probabilities at T of the entries and of the tail."""
    log_probs = log_probs.astype(float) / T
    p = np.exp(log_probs - log_norm[:, place, None])
    tail = 1 - p.sum(axis=1, keepdims=True)
    tail = np.maximum(tail, 1e-7)
    p = np.maximum(p, 1e-300)
    return np.concatenate([p, tail], axis=1)


ENTRIES = [1, 2, 20, 64, 256, V]
TEMPERATURES = [
    (1.0,),
    (1.0, 2.0),
    (1.0, 0.5, 4.0),
]


@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("k", ENTRIES)
def test_every_row_keeps_the_limit_its_mass_and_its_order(k, temperatures):
    kind = "full" if k == V else "topk"
    spec = cache_spec(kind, vocab_size=V, k=k, temperatures=temperatures)
    log_probs, log_norm = reveal(many_rows(), k, temperatures)
    stored, costs = roundtrip(spec, log_probs, log_norm)
    assert costs.max() <= KL_LIMIT
    assert (stored.ids == range(k)).all()
    assert (np.isneginf(stored.log_probs) == np.isneginf(log_probs)).all()
    assert (stored.log_probs == -np.sort(-stored.log_probs)).all()
    assert abs(stored.log_norm[:, 0]).max() < 1e-5
    if kind == "topk":
        mass = np.exp(stored.log_probs.astype(float)).sum(axis=1)
        assert mass.max() <= 1 + 1e-12  # the error of this sum

    # The oracle, in fp64.
    for place, T in enumerate(temperatures):
        t = outcomes(log_probs, log_norm, T, place)
        q = outcomes(stored.log_probs, stored.log_norm, T, place)
        terms = t * np.log(t / q)
        kl = terms.sum(axis=1)
        assert kl.max() <= KL_LIMIT


@pytest.mark.parametrize("k", [2, 20, 256])
def test_the_stated_bound_at_one_temperature(k):
    """The k-1 lesser entries at one depth, half rounded up and half down: the worst there is."""
    grid = depth_grid(k, (1.0,))
    assert len(grid) == 256
    finite = grid[:-1]
    middles = (finite[1:] + finite[:-1]) / 2
    middles = middles[:, None]
    half = (k + 1) // 2
    logits = np.zeros((len(middles), k))
    logits[:, 1:half] = 1e-6 - middles
    logits[:, half:] = -1e-6 - middles
    log_probs, log_norm = reveal(logits, k, (1.0,))
    roundtrip(cache_spec(k=k), log_probs, log_norm)


BAD = {  # entries of 0.4, 0.28 and 0.1, times a factor
    1.0: r"1\.\de-02",
    2.0: "nan",  # a mass above 1
}


@pytest.mark.parametrize("factor", BAD)
def test_a_row_that_costs_too_much_is_refused(factor, monkeypatch):
    coarse = np.arange(256.0)
    coarse[255] = np.inf
    monkeypatch.setattr(quantize, "depth_grid", lambda *spec: coarse)
    log_probs = np.log(factor * row("0.4 0.28 0.1"))
    message = rf"^access.k=3 temperatures=\[1.0\]: .* {BAD[factor]} nats, over 0.0001"
    with pytest.raises(UserError, match=message):
        roundtrip(cache_spec(k=3), log_probs)


def test_a_code_takes_two_bytes_where_one_is_too_coarse():
    sizes = []
    for temperatures in ((1.0,), (2.0,)):
        spec = cache_spec(vocab_size=50_304, k=128, temperatures=temperatures)
        sizes.append(spec.row.itemsize)
    assert sizes == [386, 516]


ID_BYTES = {  # by vocab_size
    257: 2,
    65_535: 2,
    65_536: 3,
    2**24 - 1: 3,
}


@pytest.mark.parametrize("vocab_size", ID_BYTES)
def test_ids_return(vocab_size):
    spec = cache_spec("sampled", vocab_size=vocab_size, n=4)
    assert spec.row.itemsize == 4 * ID_BYTES[vocab_size]
    draws = np.array([[0, -1, vocab_size // 2, vocab_size - 1]])
    rows, _ = encode(spec, None, None, None, draws)
    assert (decode(spec, rows).draws == draws).all()


UNSORTED = [  # ids, probabilities, and both as they return
    ("7 -1 9 7", "0.1 0.9 0.5 0.2", "9 7 7 -1", "0.5 0.2 0.1 0"),
    ("-1 -1 -1 -1", "0.5 0.5 0.5 0.5", "-1 -1 -1 -1", "0 0 0 0"),
]


@pytest.mark.parametrize("ids, probs, stored_ids, stored_probs", UNSORTED)
def test_unsorted_entries_empty_slots_and_duplicates(ids, probs, stored_ids, stored_probs):
    log_probs = np.log(row(probs))
    stored, _ = roundtrip(cache_spec(k=4), log_probs, ids=row(ids).astype(int))
    assert (stored.ids == row(stored_ids)).all()
    assert_allclose(np.exp(stored.log_probs), row(stored_probs), atol=5e-3)
    assert abs(stored.log_norm) < 1e-6
