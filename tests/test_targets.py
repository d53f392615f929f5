"""SparseTargets: each access's optimum, expectation and variance in closed form; what a byte costs; the cache under every damage."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import UserError
from kernels import linear_topk, topk_kl
from model import GPT, ModelConfig
from teachers import access as reading
from teachers import cache as targets
from teachers import quantize as coding
from teachers.access import ACCESS_KINDS, TeacherOutput
from teachers.cache import Cache, CacheSpec, CacheWriter, hash_tokens, main
from teachers.quantize import KL_LIMIT as LIMIT
from teachers.quantize import decode, encode
from teachers.quantize import depth_grid as grid
from tests.helpers import assert_close

ROOT = Path(__file__).parent.parent
K, DRAWS = 20, 12


def to_sparse_targets(kind, ids, log_probs, draws, labels):
    return reading.to_sparse_targets(kind, TeacherOutput(ids, log_probs, None, draws), labels)[:2]


def zipf(V):
    t = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    return t / t.sum()


def top(t, N=1, k=K):
    """The teacher's top k of N equal rows; t is descending."""
    return torch.arange(k).expand(N, k), t[:k].log().float().expand(N, k)


def every_draw(kind, t):
    """All that can be drawn at a position, a row each, and its probability: draws, labels, weights [V]."""
    V, off = len(t), torch.arange(len(t)) >= K
    if kind == "sampled":  # two draws: V * V rows
        pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        return pairs, None, t[pairs].prod(1)
    chances = torch.where(off, t, 0.0) / t[K:].sum() if kind == "stratified" else t
    return torch.arange(V)[:, None], torch.arange(V), chances


def expected(kind, t):
    """[V] the weights that `kind` gives, averaged over every draw."""
    draws, labels, chances = every_draw(kind, t)
    ids, log_weights = to_sparse_targets(kind, *top(t, len(draws)), draws, labels)
    weights = log_weights.double().exp() * chances[:, None] * (ids >= 0)
    return torch.zeros_like(t).scatter_add(0, ids.clamp(min=0).flatten(), weights.flatten())


def gradient(logits, ids, log_weights, tail="truncate", chances=None, backend="reference"):
    """[V] of the real loss summed over rows that all have these logits, each counted with its chance."""
    z = logits.clone().requires_grad_()
    rows = topk_kl(
        z.expand(len(ids), -1), ids, log_weights, tail=tail, reduction="none", backend=backend
    ).loss
    (rows if chances is None else rows * chances).sum().backward()
    return z.grad


UNBIASED = ("text", "sampled", "unbiased", "stratified", "full")


def optimum(kind, tail, t):
    """The student's distribution that the table of DESIGN.md section 3 states."""
    on, mass = torch.arange(len(t)) < K, t[:K].sum()
    if kind == "greedy":
        return (torch.arange(len(t)) == 0).double()
    if kind == "residual_to_label":
        return torch.where(on, t * (2 - mass), t * (1 - mass))
    if kind == "topk" and tail in ("truncate", "renormalize"):
        return torch.where(on, t / mass, 0.0)
    if kind == "topk":  # ghost leaves the tail's shape free: an even one is as good as any
        return torch.where(on, t, (1 - mass) / (len(t) - K))
    return t


@pytest.mark.parametrize("kind, tail", [(kind, "truncate") for kind in ACCESS_KINDS if kind != "full"] + [
    ("topk", "renormalize"), ("topk", "ghost"), ("topk", "smooth"), ("full", "ghost"), ("full", "truncate")
])  # fmt: skip
def test_the_loss_is_least_where_the_table_says(kind, tail):
    t = zipf(64)
    draws, labels, chances = every_draw(kind, t)
    if ACCESS_KINDS[kind].draws is None and kind != "residual_to_label":
        draws, labels, chances = draws[:1], labels[:1], torch.ones(1, dtype=torch.float64)
    ids, log_weights = to_sparse_targets(
        kind, *top(t, len(draws), 64 if kind == "full" else K), draws, labels
    )
    p = optimum(kind, tail, t)
    found = gradient(p.clamp(min=1e-30).log(), ids, log_weights, tail, chances)
    assert found.abs().max() < 1e-7, found
    elsewhere = gradient((p + 0.01).log(), ids, log_weights, tail, chances)
    assert elsewhere.abs().max() > 1e-3


def test_ghost_leaves_the_tails_shape_free_and_renormalize_both_all_of_it():
    t = zipf(64)
    z = t.log() + torch.cat([torch.zeros(K), torch.linspace(-2, 2, 64 - K)]).double()
    z[K:] += t[K:].sum().log() - z[K:].logsumexp(0)  # another tail of the same mass
    assert gradient(z, *top(t), "ghost").abs().max() < 1e-7
    assert gradient(z, *top(t), "smooth").abs().max() > 1e-2
    z = torch.randn(64, dtype=torch.float64)
    assert gradient(z, *top(t), "renormalize_both")[K:].abs().max() < 1e-15
    assert gradient(z, *top(t), "renormalize_both")[:K].abs().max() > 1e-2


@pytest.mark.parametrize(
    "kind", [kind for kind in ACCESS_KINDS if kind not in ("greedy", "topk", "full", "sampled")]
)
def test_the_expected_weights_at_a_large_vocabulary(kind):
    t = zipf(100_000)
    found, p = expected(kind, t), optimum(kind, "truncate", t)
    assert_close(found, p, rtol=1e-5, atol=1e-9)
    slope = gradient(p.log(), torch.arange(len(t))[None], found.log()[None], backend="torch")
    assert slope.abs().max() < 1e-7


def test_the_published_numbers():
    t = zipf(100_000)
    mass = t[:K].sum()
    assert f"{t[0]:.4f} {mass:.4f}" == "0.0827 0.2976"
    assert f"{optimum('topk', 'renormalize', t)[1]:.4f}" == "0.1390"
    assert f"{expected('residual_to_label', t)[0]:.4f}" == "0.1408"
    loss = topk_kl((t / mass)[None].log(), *top(t), tail="truncate", backend="torch").loss
    least = mass * (mass.log() + torch.where(torch.arange(len(t)) < K, t / mass, 0).sum().log())
    at_optimum = topk_kl(
        optimum("topk", "truncate", t).clamp(min=1e-30)[None].log(),
        *top(t),
        tail="truncate",
        backend="torch",
    )
    assert abs(at_optimum.loss - least) < 1e-6 and least < 0 < loss - at_optimum.loss


def squared_error(kind, t, rows, n):
    """The mean over rows of |weights - t|^2, drawn at random."""
    generator = torch.Generator().manual_seed(1)
    chances = torch.where(torch.arange(len(t)) >= K, t, 0.0) if kind == "stratified" else t
    found = []
    for _ in range(0, rows, 200):
        draws = torch.multinomial(chances, 200 * n, True, generator=generator).view(200, n)
        ids, log_weights = to_sparse_targets(kind, *top(t, 200), draws, None)
        dense = (-t.float()).repeat(200, 1)
        dense.scatter_add_(1, ids.clamp(min=0), torch.where(ids >= 0, log_weights.exp(), 0.0))
        found.append(dense.square().sum(1).double().mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("V, rows", [(64, 20_000), (100_000, 1_600)])
def test_variances(V, rows):
    t = zipf(V)
    off = t[K:]
    laws = {
        ("text", 1): 1 - t.square().sum(),
        ("sampled", DRAWS): (1 - t.square().sum()) / DRAWS,
        ("unbiased", 1): off.sum() - off.square().sum(),
        ("stratified", 1): off.sum() ** 2 - off.square().sum(),
        ("stratified", DRAWS): (off.sum() ** 2 - off.square().sum()) / DRAWS,
    }
    found = {key: squared_error(key[0], t, rows, key[1]) for key in laws}
    for key, law in laws.items():
        assert abs(found[key] / law - 1) < 0.05, (key, found[key], law)
    assert found["stratified", 1] < found["unbiased", 1] < found["text", 1]
    assert found["stratified", DRAWS] < found["sampled", DRAWS]


def test_excess_of_random_sampling():
    t, n, visits, repeats = zipf(64), 250, 200, 60
    generator, found = torch.Generator().manual_seed(2), []
    for _ in range(repeats):
        draws = torch.multinomial(t, visits * n, True, generator=generator).view(visits, n)
        ids, log_weights = to_sparse_targets("sampled", None, None, draws, None)
        fitted = (
            torch.zeros_like(t).scatter_add(0, ids.flatten(), log_weights.double().exp().flatten())
            / visits
        )
        assert (
            gradient(fitted.log(), ids[:50], log_weights[:50]).abs().max() < 1
        )  # the loss takes them
        found.append((t * (t / fitted).log()).sum())
    assert abs(torch.stack(found).mean() / ((64 - 1) / (2 * n * visits)) - 1) < 0.05


def test_edges_of_the_weights():
    ids, log_probs = (
        torch.tensor([[3, 5, -1], [0, 1, 2]]),
        torch.tensor([[0.5, 0.3, 0.9], [0.6, 0.4, 1e-6]]).log(),
    )
    draws, labels = torch.tensor([[5, 7], [9, 9]], dtype=torch.int32), torch.tensor([5, -100])
    found, log_weights = to_sparse_targets("unbiased", ids, log_probs, draws, labels)
    assert found.tolist() == [[3, 5, -1, -1], [0, 1, 2, 9]] and log_weights[1, 3] == 0
    found, log_weights = to_sparse_targets("residual_to_label", ids, log_probs, None, labels)
    assert found.tolist() == [[3, 5, -1, 5], [0, 1, 2, -1]]
    assert (
        math.isclose(log_weights[0, 3].exp(), 0.2, rel_tol=1e-5) and log_weights[1, 3] == -math.inf
    )  # M = 1 + 1e-6
    found, log_weights = to_sparse_targets("stratified", ids, log_probs, draws, None)
    assert found.dtype == ids.dtype and found[1].tolist() == [0, 1, 2, 9, 9]
    assert torch.allclose(log_weights[0, 3:].exp(), torch.tensor(0.1))
    z = torch.zeros(2, 10)
    assert topk_kl(z, found, log_weights, tail="truncate", backend="reference").loss.isfinite()
    assert to_sparse_targets("text", None, None, draws, None)[0].tolist() == [[5], [9]]


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_weighing_never_waits_for_the_device(kind):
    ids, log_probs = (
        torch.empty(4, 3, dtype=torch.int32, device="meta"),
        torch.empty(4, 3, device="meta"),
    )
    draws, labels = (
        torch.empty(4, 2, dtype=torch.int32, device="meta"),
        torch.empty(4, dtype=torch.int64, device="meta"),
    )
    found, log_weights = to_sparse_targets(
        kind, ids, log_probs, draws, labels
    )  # a look at a value would raise
    assert found.shape == log_weights.shape and log_weights.dtype == torch.float32


# ---- quantisation


def facts_of(kind="topk", **changes):
    given = {
        "vocab_size": 151_936,
        "block_size": 8,
        "blocks": {"train": 11, "val": 3},
        "k": 6,
        "n": 4,
        "blocks_per_shard": 4,
    }
    return CacheSpec(
        kind, **({"teacher": "a" * 64, "tokenizer": "b" * 64, "tokens": "c" * 64} | given | changes)
    )


def teachers(V, k, rows=64):
    """name -> log-probabilities [rows,k] fp32 of the top k and the logits' normaliser, from full distributions."""
    rng, ranks = np.random.default_rng(0), np.arange(1, V + 1)
    logits = {f"zipf {e}": np.tile(-e * np.log(ranks), (1, 1)) for e in (0.5, 1.0, 1.5, 3.0)}
    logits |= {"flat": np.zeros((1, V)), "two": np.where(ranks <= 2, 0.0, -40.0)[None]}
    logits |= {f"normal {s}": rng.normal(size=(rows, V)) * s for s in (0.1, 1.0, 3.0, 8.0)}
    logits["peaked"] = (
        np.where(ranks == 1, math.log((V - 1) * (1 - 1e-6) / 1e-6), 0.0)[None]
        + rng.normal(size=(rows, V)) * 0.5
    )
    logits["holes"] = np.where(ranks % 3 == 0, -np.inf, -np.log(ranks) + rng.normal(size=(rows, V)))
    logits["one"] = np.where(ranks == 7, 0.0, -np.inf)[None]
    return {name: -np.sort(-z, 1) for name, z in logits.items()}


def teach(z, k, temperatures):
    lse = np.logaddexp.reduce(z, 1, keepdims=True)
    norms = [np.logaddexp.reduce(z / T, 1) - lse[:, 0] / T for T in temperatures]
    return (z[:, :k] - lse).astype(np.float32), np.stack(norms, 1).astype(np.float32)


def kl(log_probs, log_norm, back, T, place):
    """The oracle: KL over the k entries and the tail, in fp64."""
    t, q = (
        np.exp(a.astype(np.float64) / T - b[:, place, None])
        for a, b in ((log_probs, log_norm), (back.log_probs, back.log_norm))
    )
    tails = [1 - t.sum(1), 1 - q.sum(1)]
    found = np.where(t > 0, t * np.log(np.where(t > 0, t, 1) / np.where(t > 0, q, 1)), 0).sum(1)
    return found + np.where(
        tails[0] > 1e-6,
        tails[0] * np.log(np.maximum(tails[0], 1e-30) / np.maximum(tails[1], 1e-30)),
        0,
    )


SEVERAL = [
    (k, temperatures)
    for temperatures in ((1.0,), (1.0, 2.0), (0.5, 1.0, 4.0))
    for k in (1, 2, 3, 20, 64, 256)
]


@pytest.mark.parametrize(
    "k, temperatures", SEVERAL
)  # the last is more than a byte can tell: refused below
def test_a_byte_costs_less_than_the_limit(k, temperatures):
    V = 2000
    facts = facts_of(vocab_size=V, k=k, temperatures=temperatures)
    for name, z in teachers(V, k).items():
        log_probs, log_norm = teach(z, k, facts.temperatures)
        ids = np.tile(np.arange(k), (len(z), 1))
        rows, paid = encode(facts, ids, log_probs, log_norm)
        back = decode(facts, rows)
        assert not np.isnan(back.log_probs).any() and not np.isnan(back.log_norm).any(), name
        assert (np.exp(back.log_probs.astype(np.float64)).sum(1) <= 1).all(), name
        assert (np.diff(back.log_probs.clip(min=-1e9)) <= 0).all(), name
        assert (np.isneginf(log_probs) == np.isneginf(back.log_probs)).all(), name
        assert (paid <= LIMIT).all() and abs(back.log_norm[:, 0]).max() < 1e-5, name
        for place, T in enumerate(facts.temperatures):
            assert (kl(log_probs, log_norm, back, T, place) <= LIMIT).all(), (name, T)


def test_the_stated_mathematics():
    """No row of up to 256 entries whose k-1 lesser ones lie at one depth costs the limit, at any depth and rounding."""
    for k in (2, 3, 8, 20, 64, 256):
        depths = grid(k, (1.0,))
        bounds = (depths[1:255] + depths[:254]) / 2
        half = (k - 1) // 2
        near = np.repeat(bounds[:, None], k - 1, 1) + np.where(np.arange(k - 1) < half, -1e-6, 1e-6)
        z = np.concatenate([np.zeros((len(near), 1)), -near], 1)
        log_probs, log_norm = teach(z, k, (1.0,))
        facts = facts_of(k=k)
        _, paid = encode(facts, np.tile(np.arange(k), (len(z), 1)), log_probs, log_norm)
        assert paid.max() <= LIMIT
    assert depths[1] <= 0.0285 and math.isclose(depths[254], 30)
    x = np.linspace(0, 60, 600_001)
    integral = np.trapezoid(1 / np.sqrt(1 + np.exp(x - math.log(255))), x)
    assert abs(integral - math.log(4 * 255)) < 0.01 and integral + 0.15 <= 0.0285 * 254


def test_a_row_too_dear_is_refused(monkeypatch):
    facts = facts_of(k=3)
    ids = np.arange(3)[None]
    for bad, rule in (
        (np.log([[0.7, 0.6, 0.5]]), "nan"),
        (np.array([[-1.0, np.nan, -3.0]]), "nan"),
    ):
        with pytest.raises(UserError, match=f"costs {rule} nats"):
            encode(facts, ids, bad.astype(np.float32), np.zeros((1, 1)))
    monkeypatch.setattr(
        coding, "depth_grid", lambda *_: np.append(np.linspace(0, 255, 255), np.inf)
    )
    with pytest.raises(UserError, match=r"costs 1\.\de-02 nats of KL, 0.0001 is the limit"):
        encode(facts, ids, np.log([[0.4, 0.28, 0.1]]).astype(np.float32), np.zeros((1, 1)))


def test_a_real_teacher():
    text = torch.tensor(list((ROOT / "data" / "tokens.py").read_bytes()))
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=64), 257)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(80):
        at = torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)
        loss = torch.nn.functional.cross_entropy(
            model(text[at[:, :-1]]).flatten(0, 1), text[at[:, 1:]].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 3.5
    with torch.no_grad():
        hidden = model.hidden(text[: 64 * 32].view(32, 64)).flatten(0, 1)
    for k, kind in ((1, "topk"), (20, "topk"), (256, "topk"), (257, "full")):
        facts = facts_of(kind, vocab_size=257, k=k, temperatures=(2.0, 0.5))
        ids, log_probs, log_norm = linear_topk(
            hidden, model.head_weight.detach(), k, temperatures=facts.temperatures
        )
        rows, paid = encode(facts, ids, log_probs, log_norm)
        assert paid.max() <= LIMIT and paid.max() < (1e-5 if kind == "full" else 1)
        if kind == "topk":
            back = decode(facts, rows)
            assert (back.ids == ids.numpy()).all() and abs(
                back.log_norm - log_norm.numpy()
            ).max() < 0.05


BYTES = {
    "greedy": 2,
    "text": 2,
    "sampled": 24,
    "topk": 162,
    "residual_to_label": 162,
    "unbiased": 164,
    "stratified": 186,
}


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_bytes_a_token(kind):
    if kind == "full":
        assert facts_of(kind, vocab_size=4096).row.itemsize == 2 * 4096
        return
    assert facts_of(kind, vocab_size=50_304, k=64, n=12).row.itemsize == BYTES[kind]
    if kind == "topk":
        assert facts_of(kind, vocab_size=50_304, k=64, temperatures=(2.0,)).row.itemsize == 164
        assert facts_of(kind, k=64).row.itemsize == 2 + 64 * 18 / 8 + 32
        published = [facts_of(kind, vocab_size=50_304, k=k).row.itemsize for k in (128, 50)]
        assert published == [306, 129]


@pytest.mark.parametrize("V", [64, 65_535, 65_536, 65_537, 151_936, 2**24 - 1, 2**24])
def test_ids_return(V):
    facts = facts_of("sampled", vocab_size=V, n=5)
    ids = np.array([[0, 1, min(V - 1, 131_073), V - 2, V - 1]])
    assert (decode(facts, encode(facts, draws=ids)[0]).draws == ids).all()
    empty = np.array([[0, -1, 3, -1, V - 1]])
    assert (decode(facts, encode(facts, draws=empty)[0]).draws == empty).all()
    assert facts.row.itemsize <= 5 * (3 if V <= 65_536 else 4)
    with pytest.raises(AssertionError, match=f"V={V}"):
        encode(facts, draws=ids + 1)


def test_entries_out_of_order_empty_slots_and_duplicates():
    """Sorted where they do not descend, an empty slot last whatever its log-probability, duplicates kept."""
    facts = facts_of(k=4)
    ids = np.array([[7, -1, 9, 7], [3, 3, -1, -1], [-1, -1, -1, -1], [1, 2, 3, 4]])
    log_probs = np.log(
        np.array(
            [[0.1, 0.9, 0.5, 0.2], [0.3, 0.3, 0.4, 0.4], [0.5, 0.5, 0.5, 0.5], [0.4, 0.3, 0.2, 0.1]]
        )
    )
    rows, paid = encode(
        facts, torch.from_numpy(ids), torch.from_numpy(log_probs.astype(np.float32))
    )
    back = decode(facts, rows)
    assert (
        back.ids.tolist() == [[9, 7, 7, -1], [3, 3, -1, -1], [-1, -1, -1, -1], [1, 2, 3, 4]]
        and paid.max() <= LIMIT
    )
    want = np.array([[0.5, 0.2, 0.1, 0], [0.3, 0.3, 0, 0], [0, 0, 0, 0], [0.4, 0.3, 0.2, 0.1]])
    assert (
        abs(np.exp(back.log_probs) - want).max() < 5e-3
        and (back.log_probs[back.ids < 0] == -np.inf).all()
    )


# ---- the cache


def tokens_of(split, blocks, facts):
    blocks = np.asarray(blocks)
    return (
        blocks[:, None] * 1000 + np.arange(facts.block_size) + (split == "val") * 77
    ) % facts.vocab_size


def revealed(split, blocks, facts):
    """What a made-up teacher says at those blocks: ids, log_probs, log_norm, draws."""
    found = []
    for block in blocks:
        rng = np.random.default_rng((block, split == "val"))
        T, V = facts.block_size, facts.vocab_size
        k = max(facts.k, 1)
        ids = np.stack(
            [
                rng.permutation(V)[:k] if V < 1000 else V - 1 - rng.permutation(1000)[:k]
                for _ in range(T)
            ]
        )
        z = -np.sort(-rng.normal(size=(T, k)) * 3, 1)
        log_probs = z - np.logaddexp.reduce(z, 1, keepdims=True) + (0 if k == V else math.log(0.8))
        norms = [
            np.logaddexp.reduce(log_probs / t, 1) - math.log(1 if k == V else 0.7) * (t != 1)
            for t in facts.temperatures
        ]
        norms = np.stack(norms, 1) * (np.array(facts.temperatures) != 1)
        found.append(
            (
                ids,
                log_probs.astype(np.float32),
                norms.astype(np.float32),
                rng.integers(0, V, (T, max(facts.n, 1))),
            )
        )
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def capture(folder, facts, world=1, each=3):
    for rank in range(world):
        writer = CacheWriter(folder, facts)
        for name in writer.missing(rank, world):
            with writer.shard(name) as add:
                split, span = name.split("-")[0], facts.shards()[name]
                for start in range(0, len(span), each):
                    blocks = span[start : start + each]
                    add(tokens_of(split, blocks, facts), *revealed(split, blocks, facts))
    return writer.finish()


def contents(folder):
    return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


@pytest.mark.parametrize("kind", ACCESS_KINDS)
def test_what_is_written_is_read_in_any_order(kind, tmp_path):
    facts = facts_of(kind, vocab_size=40 if kind == "full" else 151_936, temperatures=(2.0,))
    assert capture(tmp_path, facts)
    cache = Cache(tmp_path)
    assert cache.spec == facts
    for split, blocks in (("train", [10, 0, 7, 0, 3]), ("val", [2, 1])):
        rows = cache.read(split, blocks)
        ids, log_probs, log_norm, draws = revealed(split, blocks, facts)
        if kind == "full":
            log_probs = np.take_along_axis(log_probs, np.argsort(ids, 1), 1)
            ids = np.broadcast_to(np.arange(40), ids.shape)
        stored = ACCESS_KINDS[kind].stored
        assert (rows.ids is None) == (rows.draws is not None and "top" not in stored)
        assert rows.ids is None or (
            (rows.ids == ids).all() and rows.ids.max() > (131_072 if kind != "full" else 0)
        )
        assert (rows.draws is None) == (facts.n == 0) and (
            rows.draws is None or (rows.draws == draws).all()
        )
        if "top" in stored or kind == "full":
            assert (
                rows.log_probs.dtype == np.float32 and abs(rows.log_probs - log_probs).max() < 0.3
            )
            assert (
                rows.log_norm.shape == (len(ids), len(facts.temperatures))
                and abs(rows.log_norm - log_norm).max() < 0.02
            )
            for place, T in enumerate(facts.temperatures):
                assert kl(log_probs, log_norm, rows, T, place).max() <= LIMIT
    if "top" in stored:
        fewer = cache.read("val", [2, 1], k=2, n=1)
        assert (fewer.ids == rows.ids[:, :2]).all() and (
            fewer.log_probs == rows.log_probs[:, :2]
        ).all()
        assert fewer.draws is None or (fewer.draws == rows.draws[:, :1]).all()


def test_a_read_shard_feeds_the_loss(tmp_path):
    facts = facts_of("stratified", vocab_size=64, temperatures=())
    capture(tmp_path, facts)
    rows = Cache(tmp_path).read("train", [4, 2])
    ids, log_probs, draws = (
        torch.from_numpy(part) for part in (rows.ids, rows.log_probs, rows.draws)
    )
    ids, log_weights = to_sparse_targets("stratified", ids, log_probs, draws, None)
    assert torch.allclose(log_weights.exp().sum(1), torch.tensor(1.0), atol=1e-5)
    assert (
        topk_kl(
            torch.zeros(len(ids), 64), ids, log_weights, tail="truncate", backend="reference"
        ).loss
        > 0
    )


def test_ranks_share_the_shards_and_write_the_same_bytes(tmp_path):
    facts = facts_of()
    writer = CacheWriter(tmp_path / "shared", facts)
    shares = [["train-00000.bin", "train-00002.bin"], ["train-00001.bin", "val-00000.bin"]]
    assert [writer.missing(rank, 2) for rank in (0, 1)] == shares
    assert capture(tmp_path / "shared", facts, world=2, each=1) and capture(
        tmp_path / "alone", facts
    )
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert len(contents(tmp_path / "alone")) == 5


def run_until(line, folder, facts):
    """Captures in a child process that SIGKILLs itself at that line of the writer (None: never); returns how many it ran."""
    reader, writer = os.pipe()
    files, ran = (targets.__file__, coding.__file__, targets.write_atomic.__code__.co_filename), 0

    def trace(frame, event, _):
        nonlocal ran
        if frame.f_code.co_filename not in files:
            return None
        ran += 1
        if ran == line:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    child = os.fork()
    if child == 0:
        sys.settrace(trace)
        capture(folder, facts)
        os.write(writer, str(ran).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as stream:
        return int(stream.read() or 0)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path):
    facts, rng, kinds = facts_of("stratified"), random.Random(0), set()
    lines = run_until(None, tmp_path / "whole", facts)
    whole = contents(tmp_path / "whole")
    assert lines > 500
    for turn in range(20):
        folder = tmp_path / str(turn)
        assert run_until(rng.randrange(1, lines), folder, facts) == 0
        left = contents(folder) if folder.exists() else {}
        kinds |= {Path(name).suffix for name in left}
        if left.keys() != whole.keys():
            assert "no cache of sparse targets" in refusal(lambda folder=folder: Cache(folder))
        before = {
            name: (folder / name).stat().st_mtime_ns for name in left if name.endswith(".bin")
        }
        assert capture(folder, facts) and contents(folder) == whole
        assert all((folder / name).stat().st_mtime_ns == stamp for name, stamp in before.items()), (
            "a finished shard was redone"
        )
    assert ".bin" in kinds


def test_killed_between_writing_and_renaming(tmp_path):
    facts = facts_of()
    lines = run_until(None, tmp_path / "whole", facts)
    left = set()
    for line in range(lines - 70, lines, 2):  # the last shard, and the manifest
        folder = tmp_path / str(line)
        run_until(line, folder, facts)
        left |= {name for name in contents(folder) if name.endswith(".tmp")}
        assert capture(folder, facts) and contents(folder) == contents(tmp_path / "whole")
    assert ".manifest.json.tmp" in left


@pytest.mark.parametrize("place", ["write", "fsync", "replace", "teacher", "manifest"])
def test_an_error_at_each_step_leaves_nothing_half(place, tmp_path, monkeypatch):
    facts = facts_of()
    capture(tmp_path / "whole", facts)
    folder, calls = tmp_path / "out", 0

    def failing(real, fatal, error):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise error
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        if place == "teacher":
            patch.setattr(targets, "encode", failing(encode, 3, KeyboardInterrupt()))
        elif place == "manifest":
            patch.setattr(
                targets,
                "write_atomic",
                failing(targets.write_atomic, 1, OSError(28, "No space left on device")),
            )
        elif place == "write":
            (folder).mkdir()
            (folder / ".train-00001.bin.tmp").symlink_to("/dev/full")
        else:
            module = targets if place == "fsync" else os
            patch.setattr(
                module,
                place,
                failing(getattr(module, place), 3, OSError(28, "No space left on device")),
            )
        if place == "teacher":
            with pytest.raises(KeyboardInterrupt):
                capture(folder, facts)
        else:
            line = refusal(lambda: capture(folder, facts))
            name = r"manifest\.json" if place == "manifest" else r"\S+\.bin"
            assert re.fullmatch(
                rf"out=\S+: cannot write {name} \(No space left on device\); .*finished shards are kept",
                line,
            ), line
    assert not (folder / "manifest.json").exists()
    (folder / ".train-00009.bin.tmp").write_bytes(b"left by a kill")
    assert capture(folder, facts) and contents(folder) == contents(tmp_path / "whole")


def test_the_manifest_waits_for_every_shard(tmp_path):
    facts = facts_of()
    writer = CacheWriter(tmp_path, facts)
    assert writer.finish() is False and contents(tmp_path) == {}
    assert "no manifest.json" in refusal(lambda: Cache(tmp_path))
    with writer.shard("val-00000.bin") as add:
        add(tokens_of("val", range(3), facts), *revealed("val", range(3), facts))
    assert (
        writer.missing() == [f"train-0000{number}.bin" for number in range(3)]
        and writer.finish() is False
    )
    assert "unfinished" in refusal(
        lambda: Cache(tmp_path)
    ) and "run the same teachers.capture" in refusal(lambda: Cache(tmp_path))
    with (
        pytest.raises(AssertionError, match="16 rows for 4 blocks"),
        CacheWriter(tmp_path, facts).shard("train-00000.bin") as add,
    ):
        add(tokens_of("train", range(2), facts), *revealed("train", range(2), facts))


def test_read_only_and_foreign_places_are_refused(tmp_path, monkeypatch):
    facts = facts_of()
    capture(tmp_path / "out", facts)
    (tmp_path / "file").write_text("x")
    assert "cannot write there (File exists)" in refusal(
        lambda: CacheWriter(tmp_path / "file", facts)
    )
    line = refusal(lambda: CacheWriter(tmp_path / "out", replace(facts, teacher="d" * 64)))
    assert "a cache of another teacher is there; give another folder" in line
    assert "with seed=0, not 1" in refusal(
        lambda: CacheWriter(tmp_path / "out", replace(facts, seed=1))
    )
    assert "a folder of other files, file among them" in refusal(
        lambda: CacheWriter(tmp_path, facts)
    )
    (tmp_path / "out" / "manifest.json").unlink()
    line = refusal(lambda: CacheWriter(tmp_path / "out", replace(facts, seed=1)).missing())
    assert "train-00000.bin is of another teacher, other data or another access" in line
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text('{"step": 3, "sha256": {}}')
    assert "not one of a cache" in refusal(lambda: CacheWriter(tmp_path / "run", facts))

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "cannot write there (Read-only file system)" in refusal(
        lambda: CacheWriter(tmp_path / "new", facts)
    )


def refusal(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def made(tmp_path):
    folder = tmp_path / "cache"
    assert capture(folder, facts_of("topk", temperatures=(2.0,)))
    return folder


def flip(file, place, bit=1):
    data = bytearray(file.read_bytes())
    data[place] ^= bit
    file.write_bytes(data)


def read_all(folder):
    cache = Cache(folder)
    return [cache.read(split, range(count)) for split, count in cache.spec.blocks.items()]


def test_every_flipped_bit_is_seen(made):
    read_all(made)
    facts, shard = Cache(made).spec, made / "train-00001.bin"
    size, rng = shard.stat().st_size, random.Random(0)
    rows, sums = 4 * 8 * facts.row.itemsize, 16
    places = [
        0,
        rows - 1,
        rows,
        rows + sums - 1,
        size - 1,
        size - 33,
        *(rng.randrange(size) for _ in range(30)),
    ]
    for place in places:
        bit = 1 << rng.randrange(8)
        flip(shard, place, bit)
        assert "train-00001.bin does not match its SHA-256" in refusal(lambda: Cache(made).verify())
        if not rows + sums <= place < size - 64:  # the trailer's counts alone are left to verify
            line = refusal(lambda: read_all(made))
            wrong = (
                "is not the shard that"
                if place >= size - 64
                else r"is damaged: block \d+ does not match its CRC32"
            )
            assert re.search(
                rf"teacher.path=\S+: train-00001.bin {wrong}.*; delete that file and run", line
            ), line
        Cache(made).read("train", [0, 1, 8])  # the other shards serve on
        flip(shard, place, bit)
    read_all(made)
    Cache(made).verify()


def test_missing_cut_and_swapped_shards(made):
    whole = contents(made)
    shard, other = made / "train-00001.bin", made / "train-00000.bin"
    opened = Cache(made)
    shard.write_bytes(whole[shard.name][:-1])
    size = len(whole[shard.name])
    assert f"train-00001.bin has {size - 1} bytes, not {size}; delete" in refusal(
        lambda: Cache(made)
    )
    assert f"has {size - 1} bytes" in refusal(lambda: opened.read("train", [5]))
    shard.write_bytes(b"")
    assert "has 0 bytes" in refusal(lambda: opened.read("train", [5]))
    shard.unlink()
    assert "train-00001.bin is missing" in refusal(lambda: Cache(made))
    assert "train-00001.bin is missing" in refusal(lambda: opened.read("train", [5]))
    shard.write_bytes(whole[other.name])
    assert "train-00001.bin is not the shard that manifest.json names" in refusal(
        lambda: Cache(made).read("train", [5])
    )
    shard.unlink()
    assert capture(made, opened.spec) and contents(made) == whole  # what the line says mends it


@pytest.mark.parametrize("change, said", [
    (lambda text: text[:50], "not one of a cache of sparse targets"),
    (lambda text: "[1, 2]", "not one of a cache of sparse targets"),
    (lambda text: "{}", "not one of a cache of sparse targets"),
    (lambda text: '{"step": 3, "sha256": {}}', "not one of a cache of sparse targets"),
    (lambda text: text.replace("sparse targets", "lineage"), "not one of a cache of sparse targets"),
    (lambda text: text.replace('"version": 2', '"version": 1'), "a cache of version 1, this code reads 2"),
    (lambda text: text.replace('"block_size": 8', '"block_size": 9'), "manifest.json is damaged"),
    (lambda text: text.replace('"teacher": "aaa', '"teacher": "baa'), "manifest.json is damaged"),
    (lambda text: "\udcff", "not one of a cache of sparse targets"),
])  # fmt: skip
def test_foreign_and_damaged_manifests(made, change, said):
    text = (made / "manifest.json").read_text()
    changed = change(text)
    assert changed != text
    (made / "manifest.json").write_bytes(changed.encode(errors="surrogateescape"))
    line = refusal(lambda: Cache(made, "teacher.path"))
    assert said in line and line.startswith(f"teacher.path={made}: "), line


CHECKS = [
    (
        "topk",
        {"tokenizer": "x" * 64},
        rf"data.tokenizer: the cache \S+ is of another .*set data.tokenizer to .*{'b' * 64}",
    ),
    ("topk", {"tokens": "x" * 64}, rf"data: the cache \S+ is of other text; .*{'c' * 64}"),
    (
        "topk",
        {"tokens": "c" * 64 + "+documents"},
        r"data.document_mask=True: .*set data.document_mask to False",
    ),
    ("topk", {"block_size": 16}, r"model.block_size=16: .*set model.block_size to 8"),
    ("topk", {"vocab_size": 50_257}, r"model.vocab_size=50257: .*set model.vocab_size to 151936"),
    ("topk", {"k": 7}, r"access.k=7: .*set access.k to 6 or less"),
    ("topk", {"temperature": 3.0}, r"loss.temperature=3.0: .*set loss.temperature to 1.0 or 2.0"),
    (
        "topk",
        {"kind": "unbiased"},
        r"access=unbiased: .*set access to greedy or topk or residual_to_label",
    ),
    (
        "unbiased",
        {"kind": "stratified"},
        r"access=stratified: .*greedy or text or sampled or topk or residual_to_label or unb",
    ),
    ("stratified", {"kind": "unbiased"}, r"access=unbiased: "),
    ("stratified", {"k": 5}, r"access.k=5: .*set access.k to 6, or"),
    ("stratified", {"n": 5}, r"access.n=5: .*set access.n to 4 or less"),
    (
        "full",
        {"kind": "unbiased", "k": 2},
        r"access=unbiased: .*set access to greedy or topk or residual_to_label or full",
    ),
    ("full", {"kind": "topk", "k": 41}, r"access.k=41: .*set access.k to 40 or less"),
    ("greedy", {"kind": "text"}, r"access=text: .*set access to greedy"),
    ("stratified", {"temperature": 2.0}, r"loss.temperature=2.0: .*1.0"),
]


@pytest.mark.parametrize("kind, asked, said", CHECKS)
def test_what_a_cache_cannot_serve_is_refused(kind, asked, said, tmp_path):
    facts = facts_of(kind, vocab_size=40 if kind == "full" else 151_936, temperatures=(2.0,))
    capture(tmp_path, facts)
    cache = Cache(tmp_path)
    own = {
        name: getattr(facts, name)
        for name in ("tokenizer", "tokens", "vocab_size", "block_size", "kind", "k", "n")
    }
    cache.check()
    cache.check(**own, temperature=1.0)
    line = refusal(lambda: cache.check(**own | asked))
    assert re.match(said, line) and line.endswith("or capture again"), line


def test_what_a_cache_serves_besides(made, tmp_path):
    Cache(made).check(kind="residual_to_label", k=3)
    Cache(made).check(kind="greedy", k=99, n=99, temperature=2.0, vocab_size=151_937)
    for kind in ("unbiased", "stratified"):
        capture(tmp_path / kind, facts_of(kind))
        Cache(tmp_path / kind).check(kind="topk", k=2)
    Cache(tmp_path / "unbiased").check(kind="unbiased", k=2)
    capture(tmp_path / "sampled", facts_of("sampled"))
    Cache(tmp_path / "sampled").check(kind="text")


def test_the_tokens_that_a_shard_covers(made):
    cache = Cache(made)
    for name, span in cache.shards.items():
        tokens = tokens_of(name[: name.index("-")], span, cache.spec)
        cache.check_tokens(name, torch.from_numpy(tokens))
        assert cache.records[name]["tokens"] == hash_tokens(
            tokens.astype(np.uint16 if tokens.max() < 2**16 else np.int32)
        )
        line = refusal(
            lambda name=name, tokens=tokens: cache.check_tokens(name, np.roll(tokens, 1))
        )
        assert f"{name} covers other tokens" in line


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_ten_gigabytes_open_at_once_and_stay_on_disk(tmp_path):
    block_size = 1024
    row = facts_of(k=64, vocab_size=50_304).row.itemsize
    count = 10 * 2**30 // (block_size * row) + 1
    facts = facts_of(
        k=64,
        vocab_size=50_304,
        block_size=block_size,
        blocks={"train": count},
        blocks_per_shard=count,
    )
    ids, log_probs, log_norm, _ = revealed("train", [0], facts)
    block, _ = encode(facts, ids, log_probs, log_norm)
    sums = np.full(count, targets.zlib.crc32(block), "<u4")
    visited = np.random.default_rng(0).integers(0, count, 150)  # 25 MB
    with open(tmp_path / "train-00000.bin", "wb") as stream:
        for place in {*visited.tolist(), count - 1}:  # all the others are a hole
            stream.seek(place * block.nbytes)
            stream.write(block)
        stream.seek(count * block.nbytes)
        stream.write(
            sums.tobytes() + targets.TRAILER.pack(count * block_size, 0, 0, facts.digest, bytes(32))
        )
    record = {
        "rows": count * block_size,
        "mean_kl": 0,
        "worst_kl": 0,
        "tokens": bytes(32).hex(),
        "sha256": "",
    }
    content = {
        "format": targets.FORMAT,
        "version": 2,
        "spec": vars(facts),
        "names": {},
        "shards": {"train-00000.bin": record},
    }
    content = json.loads(json.dumps(content))
    (tmp_path / "manifest.json").write_text(json.dumps(content | {"seal": targets.seal(content)}))
    start, before = time.perf_counter(), resident()
    cache = Cache(tmp_path)
    cache.read("train", [count - 1])
    assert time.perf_counter() - start < 1 and resident() - before < 100 * 2**20
    before = resident()
    for place in visited:
        assert (cache.read("train", [place], k=2).ids == ids[:, :2]).all()
    assert resident() - before < 10 * 2**20


def test_command_line(made, monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["targets", *map(str, words)])
        main()
        return capsys.readouterr().out

    said = call("info", made)
    assert re.search(r"^access +topk k=6, seed 0, vocabulary 151,936$", said, re.M), said
    assert re.search(r"^rows +112 in 4 shards \(train 11 blocks, val 3 blocks of 8\)$", said, re.M)
    total = sum(file.stat().st_size for file in made.glob("*.bin"))
    assert (
        re.search(rf"^bytes +24 a token, {total:,} in all$", said, re.M)
        and f"teacher      {'a' * 64}" in said
    )
    assert call("verify", made) == f"{made}: whole, 4 shards\n"
    flip(made / "val-00000.bin", 5)
    ran = subprocess.run(
        [sys.executable, "-m", "teachers.cache", "verify", str(made)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and ran.stdout == "", ran
    assert ran.stderr == f"error: {refusal(lambda: Cache(made, 'path').verify())}\n"
