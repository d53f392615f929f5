"""Batches as pure functions of (seed, step); documents packed into blocks; prefetching.

Token number i is i, so every position can be told.
"""

import time

import numpy as np
import pytest
import torch

from data import Batch, Batches, Blocks, Prefetch, held_out
from data.packing import PackedBlocks, pack_documents


def numbers(blocks, size=8):
    return Blocks(np.arange(blocks * size + 1, dtype=np.uint16), size)


def documents():
    """300 documents' tokens, their mask, and each one's (start, end)."""
    draw = np.random.default_rng(0)
    places = []
    mask = []
    for _ in range(300):
        length = int(draw.integers(3, 40))
        prompt = int(draw.integers(1, length))
        places.append((len(mask), len(mask) + length))
        mask += [2, *[0] * (prompt - 1), *[1] * (length - prompt)]
    return np.arange(len(mask), dtype=np.uint16), np.array(mask, np.uint8), places


def assert_same(ours: Batch, theirs: Batch):
    for name in ("ids", "labels", "blocks", "document_ids"):
        one = getattr(ours, name)
        other = getattr(theirs, name)
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_a_batch_is_a_pure_function_of_seed_and_step(kind):
    source = numbers(10)
    if kind == "rows":
        tokens, mask, _ = documents()
        source = PackedBlocks(tokens, mask, 8)
    in_order = [Batches(source, 4, seed=0).batch(step) for step in range(9)]
    batches = Batches(source, 4, seed=0)
    for step in (7, 2, 8, 0, 3, 3, 1, 6, 5, 4):
        assert_same(batches.batch(step), in_order[step])
    ahead = Prefetch(batches, 3, 9)
    for step, batch in enumerate(ahead, 3):
        assert_same(batch, in_order[step])
    # The size of a batch does not change the order
    halves = [Batches(source, 2, seed=0).batch(step).blocks for step in (4, 5)]
    assert torch.equal(torch.cat(halves), in_order[2].blocks)


def test_labels_are_the_next_tokens():
    batch = Batches(numbers(12), 4, seed=0).batch(0)
    assert batch.ids.dtype == torch.int64
    assert torch.equal(batch.labels, batch.ids + 1)
    assert torch.equal(batch.ids[:, 0], batch.blocks * 8)


def test_every_block_comes_once_an_epoch_in_an_order_of_its_own():
    batches = Batches(numbers(21), 6, seed=0)
    blocks = torch.cat([batches.batch(step).blocks for step in range(7)]).tolist()
    assert sorted(blocks[:21]) == sorted(blocks[21:]) == list(range(21))
    orders = set()
    for seed in range(3):
        for epoch in range(3):
            orders.add(tuple(Batches(numbers(10), 10, seed).batch(epoch).blocks.tolist()))
    assert len(orders) == 9
    three_epochs = Batches(numbers(3), 10, seed=0).batch(0)
    assert sorted(torch.bincount(three_epochs.blocks).tolist()) == [3, 3, 4]


class Racing(Batches):
    """Another thread asks for another epoch the moment this one's order is kept."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "cached_order" and value[0] == 1:
            super().__setattr__(name, (2, value[1][::-1]))


def test_a_thread_in_another_epoch_does_not_change_this_ones_order():
    wanted = Batches(numbers(10), 10, seed=0).batch(1)
    assert_same(Racing(numbers(10), 10, seed=0).batch(1), wanted)


def test_a_fraction_is_spread_over_the_text_the_same_for_every_seed_and_nested():
    small = Batches(numbers(1000), 4, 0, 0.05)
    assert small.num_blocks == 50
    assert set(small.blocks) <= set(Batches(numbers(1000), 4, 0, 0.2).blocks)
    assert set(small.blocks) == set(Batches(numbers(1000), 4, 1, 0.05).blocks)
    assert small.blocks.min() < 150
    assert small.blocks.max() > 850
    read = [small.batch(step).blocks for step in range(30)]
    assert set(torch.cat(read).tolist()) == set(small.blocks)


def test_held_out_is_spread_over_the_text_in_order():
    text = numbers(125)
    batches = list(held_out(text, 4, max_tokens=80))
    assert [len(batch.ids) for batch in batches] == [4, 4, 2]
    blocks = torch.cat([batch.blocks for batch in batches])
    assert blocks.tolist() == [12 * place + place // 2 for place in range(10)]  # of 125
    assert torch.equal(torch.cat([batch.ids for batch in batches])[:, 0], blocks * 8)
    assert sum(batch.ids.numel() for batch in held_out(text, 4, max_tokens=10**9)) == 1000
    assert [batch.ids.shape for batch in held_out(text, 4, max_tokens=1)] == [(1, 8)]
    with pytest.raises(AssertionError, match="hold no block of 8"):
        Batches(numbers(0), 4, 0)


class Broken:
    def batch(self, step):
        if step == 2:
            raise RuntimeError("disk gone")
        return Batch(*[torch.zeros(1)] * 3)


def test_prefetch_passes_errors_on_and_closes_early():
    with pytest.raises(RuntimeError, match="disk gone"):
        list(Prefetch(Broken(), 0, 9))
    early = Prefetch(Batches(numbers(100), 4, seed=0), 0, 10**9)
    next(iter(early))
    started = time.monotonic()
    early.close()
    early.close()
    assert time.monotonic() - started < 2
    assert not any(thread.is_alive() for thread in early.pool._threads)
    assert list(early) == []  # used up, not stuck


def test_prefetch_pins_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: -tensor - 1)
    source = Blocks(np.zeros(17, np.uint16), 8, bos=0)
    batches = Batches(source, 2, seed=0, read_targets=lambda batch: (batch.ids, None))
    (batch,) = Prefetch(batches, 0, 1, pin=True)
    for tensor in (batch.ids, batch.labels, batch.blocks, batch.document_ids, batch.targets[0]):
        assert (tensor < 0).all()


def test_a_rank_gets_its_own_rows_and_the_labels_of_all():
    tokens, mask, _ = documents()
    source = PackedBlocks(tokens, mask, 48)
    whole = Batches(source, 4, seed=0).batch(3)
    mine = Batches(source, 4, seed=0, local_rows=[1, 3], read_targets=lambda batch: (batch.ids,))
    batch = mine.batch(3)
    assert_same(batch, whole.select([1, 3]))
    assert torch.equal(batch.targets[0], whole.ids[[1, 3]])
    assert batch.num_kept == whole.num_kept == (whole.labels != -100).sum()
    visits = Batches(source, 4, seed=0, count_visits=True).batch(3)
    assert visits.blocks.tolist() == [12, 13, 14, 15]


def test_documents_of_text_are_told_apart_by_bos():
    tokens = np.array([9, 1, 2, 9, 3, 9, 4, 5, 6], np.uint16)
    batch = Blocks(tokens, 4, bos=9).read(np.arange(2))
    assert batch.document_ids.tolist() == [[1, 1, 1, 2], [0, 1, 1, 1]]
    assert Blocks(tokens, 4).read(np.arange(2)).document_ids is None


def test_packed_blocks_cover_each_document_once_and_labels_stay_inside():
    size = 48
    tokens, mask, places = documents()
    packed = PackedBlocks(tokens, mask, size, pad=65535)
    batch = packed.read(np.arange(len(packed)))
    assert batch.ids.shape == batch.document_ids.shape == (len(packed), size)
    assert batch.ids.dtype == batch.labels.dtype == batch.document_ids.dtype == torch.int64

    # Every token but each document's last is an input; every label of the mask is one, and follows
    owner = np.repeat(np.arange(len(places)), [end - start for start, end in places])
    real = batch.ids != 65535
    inputs = set(range(len(tokens))) - {end - 1 for _, end in places}
    assert sorted(batch.ids[real].tolist()) == sorted(inputs)
    kept = batch.labels != -100
    assert torch.equal(batch.labels[kept], batch.ids[kept] + 1)
    assert (owner[batch.ids[kept]] == owner[batch.labels[kept]]).all()
    assert sorted(batch.labels[kept].tolist()) == np.flatnonzero(mask == 1).tolist()

    # Documents are numbered within a block, padding as one more
    for ids, document, there in zip(batch.ids, batch.document_ids, real, strict=True):
        changes = np.diff(owner[ids[there]], prepend=owner[ids[0]]) != 0
        assert document[there].tolist() == changes.cumsum().tolist()
        assert set(document[~there].tolist()) <= {int(changes.sum()) + 1}
    assert real.float().mean() > 0.97
    assert packed.num_cut == packed.num_dropped == 0


def test_a_long_document_is_cut_and_one_without_a_label_dropped():
    mask = []
    for prompt in (1, 9, 10, 30):
        mask += [2, *[0] * prompt, *[1] * 12]
    packed = PackedBlocks(np.arange(len(mask), dtype=np.uint16), np.array(mask, np.uint8), 10)
    assert (packed.num_cut, packed.num_dropped) == (4, 2)
    batch = packed.read(np.arange(len(packed)))
    assert sorted((batch.labels != -100).sum(1).tolist()) == [1, 9]


def test_documents_are_packed_by_best_fit():
    assert pack_documents(np.array([6, 4, 7, 2, 8, 1]), 8).tolist() == [2, 3, 1, 2, 0, 1]
    lengths = np.random.default_rng(0).integers(1, 1025, 20000)
    assert pack_documents(lengths, 1024).max() + 1 <= 1.01 * lengths.sum() / 1024
