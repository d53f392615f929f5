"""Batches as pure functions of (seed, step); prefetching; documents packed into blocks.

Token number i is i, so every position can be told.
"""

import time

import numpy as np
import pytest
import torch

from data import Batch, Batches, Blocks, Prefetch, held_out
from data.packing import PackedBlocks, pack_documents

SIZE = 8


def text_of(num_blocks):
    tokens = np.arange(num_blocks * SIZE + 1, dtype=np.uint16)
    return Blocks(tokens, SIZE)


def packed(block_size):
    """300 documents of 3 to 40 tokens, and each one's number, token by token."""
    draw = np.random.default_rng(0)
    mask = []
    owners = []
    for number in range(300):
        length = int(draw.integers(3, 40))
        prompt = int(draw.integers(1, length))
        mask.append(2)
        mask += [0] * (prompt - 1)
        mask += [1] * (length - prompt)
        owners += [number] * length
    tokens = np.arange(len(mask), dtype=np.uint16)
    mask = np.array(mask, dtype=np.uint8)
    source = PackedBlocks(tokens, mask, block_size, pad=65535)
    return source, np.array(owners)


def read_all(source):
    return source.read(np.arange(len(source)))


def blocks_of(batches, steps):
    blocks = []
    for step in steps:
        blocks += batches.batch(step).blocks.tolist()
    return blocks


def assert_same(ours, theirs):
    for name in ("ids", "labels", "blocks", "document_ids"):
        one = getattr(ours, name)
        other = getattr(theirs, name)
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_a_batch_is_a_pure_function_of_seed_and_step(kind):
    source = text_of(10)
    if kind == "rows":
        source, _ = packed(SIZE)
    batches = Batches(source, 4, seed=0)
    in_order = [batches.batch(step) for step in range(9)]
    batches = Batches(source, 4, seed=0)
    for step in (7, 2, 0, 3, 3, 8):
        assert_same(batches.batch(step), in_order[step])
    ahead = Prefetch(batches, 3, 9)
    for step, batch in enumerate(ahead, 3):
        assert_same(batch, in_order[step])
    # The size of a batch does not change the order
    halves = Batches(source, 2, seed=0)
    assert blocks_of(halves, [4, 5]) == in_order[2].blocks.tolist()


def test_labels_are_the_next_tokens():
    batch = Batches(text_of(12), 4, seed=0).batch(0)
    assert batch.ids.dtype == torch.int64
    assert torch.equal(batch.labels, batch.ids + 1)
    assert torch.equal(batch.ids[:, 0], batch.blocks * SIZE)


def test_every_block_comes_once_an_epoch_in_an_order_of_its_own():
    batches = Batches(text_of(21), 6, seed=0)
    blocks = blocks_of(batches, range(7))
    assert sorted(blocks[:21]) == list(range(21))
    assert sorted(blocks[21:]) == list(range(21))
    orders = set()
    for seed in range(3):
        batches = Batches(text_of(10), 10, seed)
        for epoch in range(3):
            orders.add(tuple(blocks_of(batches, [epoch])))
    assert len(orders) == 9
    # A batch of more than three epochs
    blocks = blocks_of(Batches(text_of(3), 10, seed=0), [0])
    assert sorted(np.bincount(blocks)) == [3, 3, 4]
    with pytest.raises(AssertionError, match="hold no block of 8"):
        Batches(text_of(0), 4, 0)


class Racing(Batches):
    """Another thread asks for another epoch the moment this one's order is kept."""

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name == "cached_order" and value[0] == 1:
            super().__setattr__(name, (2, value[1][::-1]))


def test_a_thread_in_another_epoch_does_not_change_this_ones_order():
    wanted = Batches(text_of(10), 10, seed=0)
    racing = Racing(text_of(10), 10, seed=0)
    assert_same(racing.batch(1), wanted.batch(1))


def test_a_fraction_is_spread_over_the_text_the_same_for_every_seed_and_nested():
    source = text_of(1000)
    small = Batches(source, 4, 0, 0.05)
    assert small.num_blocks == 50
    assert small.blocks.min() < 150
    assert small.blocks.max() > 850
    large = Batches(source, 4, 0, 0.2)
    other_seed = Batches(source, 4, 1, 0.05)
    blocks = set(small.blocks)
    assert blocks <= set(large.blocks)
    assert blocks == set(other_seed.blocks)
    assert blocks == set(blocks_of(small, range(30)))


def test_held_out_is_spread_over_the_text_in_order():
    source = text_of(125)
    batches = list(held_out(source, 4, max_tokens=80))
    assert [len(batch.ids) for batch in batches] == [4, 4, 2]
    blocks = torch.cat([batch.blocks for batch in batches])
    ids = torch.cat([batch.ids for batch in batches])
    assert blocks.tolist() == [int(12.5 * place) for place in range(10)]
    assert torch.equal(ids[:, 0], blocks * SIZE)
    everything = list(held_out(source, 4, max_tokens=10**9))
    assert sum(batch.ids.numel() for batch in everything) == 1000
    (one,) = held_out(source, 4, max_tokens=1)
    assert one.ids.shape == (1, SIZE)


class Broken:
    def batch(self, step):
        if step == 2:
            raise RuntimeError("disk gone")
        return Batch(*[torch.zeros(1)] * 3)


def test_prefetch_passes_errors_on_and_closes_early():
    with pytest.raises(RuntimeError, match="disk gone"):
        list(Prefetch(Broken(), 0, 9))
    batches = Batches(text_of(100), 4, seed=0)
    early = Prefetch(batches, 0, 10**9)
    next(iter(early))
    started = time.monotonic()
    early.close()
    early.close()
    assert time.monotonic() - started < 2
    assert not any(thread.is_alive() for thread in early.pool._threads)
    assert list(early) == []  # used up, not stuck


def test_prefetch_pins_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: -tensor - 1)
    source = Blocks(np.zeros(17, np.uint16), SIZE, bos=0)
    batches = Batches(source, 2, seed=0, read_targets=lambda batch: (batch.ids,))
    (batch,) = Prefetch(batches, 0, 1, pin=True)
    tensors = [batch.ids, batch.labels, batch.blocks, batch.document_ids]
    tensors += batch.targets
    for tensor in tensors:
        assert (tensor < 0).all()


def test_a_rank_gets_its_own_rows_and_the_labels_of_all():
    source, _ = packed(48)
    whole = Batches(source, 4, seed=0).batch(3)
    mine = Batches(
        source,
        4,
        seed=0,
        local_rows=[1, 3],
        read_targets=lambda batch: (batch.ids,),
    )
    batch = mine.batch(3)
    assert_same(batch, whole.select([1, 3]))
    assert torch.equal(batch.targets[0], whole.ids[[1, 3]])
    assert batch.num_kept == (whole.labels != -100).sum()
    visits = Batches(source, 4, seed=0, count_visits=True)
    assert blocks_of(visits, [3]) == [12, 13, 14, 15]


def test_documents_of_text_are_told_apart_by_bos():
    tokens = np.array([9, 1, 2, 9, 3], np.uint16)
    batch = read_all(Blocks(tokens, 4, bos=9))
    assert batch.document_ids.tolist() == [[1, 1, 1, 2]]
    batch = read_all(Blocks(tokens, 4, bos=3))
    assert batch.document_ids.tolist() == [[0, 0, 0, 0]]
    batch = read_all(Blocks(tokens, 4))
    assert batch.document_ids is None


def test_packed_blocks_cover_each_document_once_and_labels_stay_inside():
    source, owners = packed(48)
    batch = read_all(source)
    assert batch.ids.shape == (len(source), 48)
    assert batch.ids.dtype == batch.labels.dtype == batch.document_ids.dtype == torch.int64

    # Every token but each document's last is an input
    real = batch.ids != 65535
    last = np.flatnonzero(np.diff(owners, append=-1))
    inputs = np.setdiff1d(np.arange(len(owners)), last)
    assert np.array_equal(np.sort(batch.ids[real]), inputs)

    # Every label of the mask is one, and follows its input
    kept = batch.labels != -100
    labels = batch.labels[kept]
    assert torch.equal(labels, batch.ids[kept] + 1)
    assert (owners[labels] == owners[labels - 1]).all()
    assert np.array_equal(np.sort(labels), np.flatnonzero(source.mask == 1))

    # Documents are numbered within a block, padding as one more
    for ids, document_ids, there in zip(batch.ids, batch.document_ids, real, strict=True):
        owner = owners[ids[there]]
        changes = np.diff(owner, prepend=owner[0]) != 0
        numbers = changes.cumsum().tolist()
        assert document_ids[there].tolist() == numbers
        assert set(document_ids[~there].tolist()) <= {numbers[-1] + 1}
    assert real.float().mean() > 0.97
    assert source.num_cut == source.num_dropped == 0


def test_a_long_document_is_cut_and_one_without_a_label_dropped():
    mask = []
    for prompt in (1, 9, 10, 30):
        mask.append(2)
        mask += [0] * prompt
        mask += [1] * 12
    mask = np.array(mask, np.uint8)
    source = PackedBlocks(np.zeros(len(mask)), mask, 10)
    assert source.num_cut == 4
    assert source.num_dropped == 2
    num_labels = (read_all(source).labels != -100).sum(1)
    assert sorted(num_labels.tolist()) == [1, 9]


def test_documents_are_packed_by_best_fit():
    lengths = np.array([6, 4, 7, 2, 8, 1])
    assert pack_documents(lengths, 8).tolist() == [2, 3, 1, 2, 0, 1]
    lengths = np.random.default_rng(0).integers(1, 1025, 20000)
    num_blocks = pack_documents(lengths, 1024).max() + 1
    assert num_blocks <= 1.01 * lengths.sum() / 1024
