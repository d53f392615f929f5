"""Batches as pure functions of (seed, step); prefetching; documents packed into blocks.

Token number i is i, so every position can be told.
"""

import numpy as np
import pytest
import torch

from data import Batch, Batches, Blocks, Prefetch, held_out
from data.batches import training_subset
from data.packing import PackedBlocks, pack_documents

SIZE = 8


def text_of(num_blocks):
    num_tokens = num_blocks * SIZE + 1
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return Blocks(tokens, SIZE)


def batches_of(num_blocks, batch_size=4, seed=0, **options):
    return Batches(text_of(num_blocks), batch_size, seed, **options)


def packed(block_size, lengths):
    """Documents of these lengths: of the prompt after its first token, of the answer."""
    mask = []
    for prompt, answer in lengths:
        mask.append(2)
        mask += [0] * prompt
        mask += [1] * answer
    tokens = np.arange(len(mask), dtype=np.uint16)
    mask = np.array(mask, np.uint8)
    return PackedBlocks(tokens, mask, block_size, pad=len(mask))


def read_all(source):
    return source.read(np.arange(len(source)))


def blocks_of(batches, steps):
    blocks = []
    for step in steps:
        blocks += batches.batch(step).blocks.tolist()
    return blocks


def test_a_batch_is_a_pure_function_of_seed_and_step():
    batches = batches_of(10)
    in_order = blocks_of(batches, range(9))
    fresh = batches_of(10)
    for step in map(int, "7280331654"):
        start = 4 * step
        assert blocks_of(fresh, [step]) == in_order[start : start + 4]

    # Batches made ahead come in the same order
    ahead = []
    for batch in Prefetch(batches, 3, 9):
        ahead += batch.blocks.tolist()
    assert ahead == in_order[12:]

    # The size of a batch does not change the order
    halves = batches_of(10, batch_size=2)
    assert blocks_of(halves, range(18)) == in_order


@pytest.mark.parametrize("fitting, ahead", [(0, 1), (2, 2), (9, 3)])
def test_as_many_batches_are_made_ahead_as_fit(fitting, ahead, monkeypatch):
    batches = batches_of(100)
    make = batches.batch
    batch_bytes = make(0).num_bytes()
    monkeypatch.setattr(Prefetch, "AHEAD_BYTES", fitting * batch_bytes)
    made = []

    def batch(step):
        made.append(step)
        return make(step)

    batches.batch = batch
    prefetch = Prefetch(batches, 0, 100)
    next(iter(prefetch))
    prefetch.pool.shutdown()  # waits for what is queued
    assert made == list(range(1 + ahead))


def test_every_block_comes_once_an_epoch_in_an_order_of_its_own():
    # A batch may hold several epochs
    orders = set()
    for seed in range(3):
        batches = batches_of(10, batch_size=30, seed=seed)
        blocks = batches.batch(0).blocks
        for order in blocks.split(10):
            assert sorted(order) == list(range(10))
            orders.add(tuple(order.tolist()))
    assert len(orders) == 9


def test_a_fraction_is_spread_over_the_text_the_same_for_every_seed_and_nested():
    small = set(training_subset(1000, 0.05))
    assert len(small) == 50
    assert small < set(training_subset(1000, 0.2))
    assert min(small) < 150
    assert max(small) > 850
    batches = batches_of(1000, seed=1, fraction=0.05)
    assert set(batches.blocks) == small


@pytest.mark.parametrize(
    "max_tokens, count",
    [
        (48, 6),
        (10**9, 125),
        (1, 1),
    ],
)
def test_held_out_is_spread_over_the_text_in_order(max_tokens, count):
    blocks = []
    for batch in held_out(text_of(125), 4, max_tokens):
        blocks += batch.blocks.tolist()
        assert len(batch.ids) == 4 or len(blocks) == count
        starts = batch.blocks[:, None] * SIZE
        ids = starts + torch.arange(SIZE)
        assert torch.equal(batch.ids, ids)
        assert torch.equal(batch.labels, ids + 1)
    wanted = np.arange(count) * 125 // count
    assert blocks == wanted.tolist()


class Broken:
    def batch(self, step):
        if step == 2:
            raise RuntimeError("disk gone")
        nothing = torch.zeros(1)
        return Batch(nothing, nothing, nothing)


@pytest.mark.parametrize("num_tokens, count", [(2, 1), (SIZE + 1, 1), (SIZE + 2, 2), (20, 3)])
def test_a_text_is_read_to_its_end(num_tokens, count):
    tokens = np.arange(num_tokens, dtype=np.uint16)
    batch = read_all(Blocks(tokens, SIZE, to_the_end=True))
    assert batch.labels.shape == (count, SIZE)
    kept = batch.labels >= 0
    labels = batch.labels[kept]
    assert labels.tolist() == list(range(1, num_tokens))
    assert (batch.ids[kept] == labels - 1).all()
    assert len(Blocks(tokens, SIZE)) == (num_tokens - 1) // SIZE


def test_prefetch_passes_errors_on_and_closes_early():
    with pytest.raises(RuntimeError, match="disk gone"):
        list(Prefetch(Broken(), 0, 9))
    early = Prefetch(batches_of(100), 0, 10**9)
    next(iter(early))
    early.close()
    for thread in early.pool._threads:
        assert not thread.is_alive()


def test_a_rank_gets_its_own_rows_and_the_labels_of_all():
    lengths = [(2, 3), (1, 5)] * 20
    source = packed(10, lengths)
    whole = Batches(source, 4, seed=0).batch(3)
    mine = Batches(
        source,
        4,
        seed=0,
        local_rows=[1, 3],
        read_targets=lambda batch: batch.ids,
        count_visits=True,
    )
    batch = mine.batch(3)
    ids = whole.ids[[1, 3]]
    assert torch.equal(batch.ids, ids)
    assert torch.equal(batch.targets, ids)
    kept = whole.labels != -100
    assert batch.num_kept == kept.sum()
    assert batch.blocks.tolist() == [13, 15]  # the visits of the run


def test_documents_of_text_are_told_apart_by_bos():
    tokens = np.frombuffer(b"|ab|c|def", np.uint8)
    source = Blocks(tokens, 4, bos=ord("|"))
    batch = read_all(source)
    first, second = batch.document_ids.tolist()
    assert first == [1, 1, 1, 2]
    assert second == [0, 1, 1, 1]
    plain = read_all(Blocks(tokens, 4))
    assert plain.document_ids is None


def test_packed_blocks_cover_each_document_once_and_labels_stay_inside():
    random = np.random.default_rng(0)
    lengths = random.integers([0, 1], 20, (300, 2))
    source = packed(48, lengths)
    batch = read_all(source)
    assert source.num_cut == 0

    # Every token but each document's last is an input
    starts = source.mask == 2
    last = np.flatnonzero(starts) - 1
    inputs = np.delete(source.tokens, last)
    real = batch.ids[batch.ids != source.pad]
    assert sorted(real.tolist()) == inputs.tolist()

    # Every label of the mask is one, and follows its input
    mask = np.append(source.mask, [0, 0])
    following = batch.ids + 1
    labels = np.where(mask[following] == 1, following, -100)
    assert np.array_equal(batch.labels, labels)

    # Documents are numbered within a block, padding as one more
    owners = np.append(starts.cumsum(), 0)
    owners = owners[batch.ids]
    first = owners[:, :1]
    changes = np.diff(owners, axis=1, prepend=first) != 0
    assert np.array_equal(batch.document_ids, changes.cumsum(1))


def test_a_long_document_is_cut_and_one_without_a_label_dropped():
    lengths = [(prompt, 12) for prompt in (1, 9, 10, 30)]
    source = packed(10, lengths)
    assert source.num_cut == 4
    positions = sum(prompt + 12 for prompt, _ in lengths)
    assert source.share_cut == (positions - 4 * 10) / positions
    kept = read_all(source).labels != -100
    num_labels = kept.sum(1)
    assert sorted(num_labels) == [1, 9]


def test_documents_are_packed_by_best_fit():
    lengths = np.array([6, 1, 4, 7, 2, 8])
    blocks = pack_documents(lengths, 8)
    assert blocks.tolist() == [2, 1, 3, 1, 2, 0]
