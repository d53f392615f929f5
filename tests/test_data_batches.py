"""Batches as pure functions of (seed, step); prefetching; documents packed into blocks.

Token number i is i, so every position can be told.
"""

import numpy as np
import pytest
import torch

from data import Batch, Batches, Blocks, Prefetch, held_out
from data.packing import PackedBlocks, pack_documents

SIZE = 8


def text_of(num_blocks):
    num_tokens = num_blocks * SIZE + 1
    tokens = np.arange(num_tokens, dtype=np.uint16)
    return Blocks(tokens, SIZE)


def batches_of(source, batch_size=4, **options):
    if isinstance(source, int):
        source = text_of(source)
    return Batches(source, batch_size, **{"seed": 0} | options)


def packed(block_size, lengths):
    """Documents of these lengths: of the prompt after its first token, of the answer."""
    mask = []
    for prompt, answer in lengths:
        mask.append(2)
        mask += [0] * prompt
        mask += [1] * answer
    tokens = np.arange(len(mask), dtype=np.uint16)
    mask = np.array(mask, dtype=np.uint8)
    return PackedBlocks(tokens, mask, block_size, pad=len(mask))


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    lengths = random.integers([0, 1], 20, (300, 2))
    return packed(48, lengths)


def read_all(source):
    return source.read(np.arange(len(source)))


def blocks_of(batches, steps):
    blocks = []
    for step in steps:
        blocks += batches.batch(step).blocks.tolist()
    return blocks


def assert_same(ours, theirs):
    names = ["ids", "labels", "blocks", "document_ids"]
    for name in names:
        one = getattr(ours, name)
        other = getattr(theirs, name)
        assert one is other or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_a_batch_is_a_pure_function_of_seed_and_step(kind, rows):
    source = rows if kind == "rows" else 10
    batches = batches_of(source)
    in_order = [batches.batch(step) for step in range(9)]
    batches = batches_of(source)
    for step in map(int, "7280331654"):
        assert_same(batches.batch(step), in_order[step])
    ahead = list(Prefetch(batches, 3, 9))
    assert len(ahead) == 6
    for step, batch in enumerate(ahead, 3):
        assert_same(batch, in_order[step])

    # The size of a batch does not change the order
    halves = batches_of(source, 2)
    wanted = in_order[2].blocks.tolist()
    assert blocks_of(halves, [4, 5]) == wanted


def test_every_block_comes_once_an_epoch_in_an_order_of_its_own():
    batches = batches_of(21, 6)
    blocks = blocks_of(batches, range(7))
    everything = list(range(21))
    assert sorted(blocks[:21]) == everything
    assert sorted(blocks[21:]) == everything

    orders = set()
    for seed in range(3):
        batches = batches_of(10, 10, seed=seed)
        for epoch in range(3):
            order = blocks_of(batches, [epoch])
            orders.add(tuple(order))
    assert len(orders) == 9

    # A batch of more than three epochs
    batches = batches_of(3, 10)
    blocks = blocks_of(batches, [0])
    counts = np.bincount(blocks)
    assert sorted(counts) == [3, 3, 4]


def test_a_thread_in_another_epoch_does_not_change_this_ones_order(monkeypatch):
    batches = batches_of(10)
    wanted = batches.batch(3)
    other = (2, np.arange(10))
    # Another thread's order is what can be read back after this one has been kept
    cached = property(lambda batches: other, lambda batches, value: None)
    monkeypatch.setattr(Batches, "cached_order", cached, raising=False)
    racing = batches_of(10)
    assert_same(racing.batch(3), wanted)


def test_a_fraction_is_spread_over_the_text_the_same_for_every_seed_and_nested():
    def subset(seed, fraction):
        batches = batches_of(1000, seed=seed, fraction=fraction)
        steps = range(batches.num_blocks // 4 + 1)
        return set(blocks_of(batches, steps))

    small = subset(0, 0.05)
    assert len(small) == 50
    assert small < subset(0, 0.2)
    assert small == subset(1, 0.05)
    assert min(small) < 150
    assert max(small) > 850


@pytest.mark.parametrize(
    "max_tokens, wanted",
    [
        (48, [0, 20, 41, 62, 83, 104]),
        (10**9, list(range(125))),
        (1, [0]),
    ],
)
def test_held_out_is_spread_over_the_text_in_order(max_tokens, wanted):
    blocks = []
    for batch in held_out(text_of(125), 4, max_tokens):
        blocks += batch.blocks.tolist()
        assert len(batch.ids) == 4 or blocks == wanted
        assert batch.ids.dtype == torch.int64
        first = batch.ids[:, 0]
        assert torch.equal(first, batch.blocks * SIZE)
        assert torch.equal(batch.labels, batch.ids + 1)
    assert blocks == wanted


class Broken:
    def batch(self, step):
        if step == 2:
            raise RuntimeError("disk gone")
        nothing = torch.zeros(1)
        return Batch(nothing, nothing, nothing)


def test_prefetch_passes_errors_on_and_closes_early():
    with pytest.raises(RuntimeError, match="disk gone"):
        list(Prefetch(Broken(), 0, 9))
    batches = batches_of(100)
    early = Prefetch(batches, 0, 10**9)
    next(iter(early))
    early.close()
    for thread in early.pool._threads:
        assert not thread.is_alive()


def test_prefetch_pins_every_tensor(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: -tensor - 1)
    source = text_of(4)
    source.bos = 0
    batches = batches_of(source, read_targets=lambda batch: (batch.ids, None))
    (batch,) = Prefetch(batches, 0, 1, pin=True)
    (targets, _) = batch.targets
    for tensor in (*batch[:4], targets):
        assert (tensor < 0).all()


def test_a_rank_gets_its_own_rows_and_the_labels_of_all(rows):
    whole = batches_of(rows).batch(3)
    mine = batches_of(rows, local_rows=[1, 3], read_targets=lambda batch: (batch.ids,))
    batch = mine.batch(3)
    assert_same(batch, whole.select([1, 3]))
    (targets,) = batch.targets
    assert torch.equal(targets, batch.ids)
    kept = whole.labels != -100
    assert batch.num_kept == kept.sum()


def test_visits_are_numbered_over_the_run():
    visits = batches_of(10, count_visits=True)
    wanted = list(range(8, 16))
    assert blocks_of(visits, [2, 3]) == wanted


def test_documents_of_text_are_told_apart_by_bos():
    tokens = np.frombuffer(b"|ab|c|def", np.uint8)
    batch = read_all(Blocks(tokens, 4, bos=ord("|")))
    first, second = batch.document_ids.tolist()
    assert first == [1, 1, 1, 2]
    assert second == [0, 1, 1, 1]
    plain = read_all(Blocks(tokens, 4))
    assert plain.document_ids is None


def test_packed_blocks_cover_each_document_once_and_labels_stay_inside(rows):
    batch = read_all(rows)
    assert batch.ids.shape == (len(rows), 48)
    for tensor in batch[:4]:
        assert tensor.dtype == torch.int64

    # Every token but each document's last is an input
    starts = rows.mask == 2
    last = np.flatnonzero(starts) - 1
    inputs = np.delete(rows.tokens, last)
    real = batch.ids[batch.ids != rows.pad]
    assert np.array_equal(np.sort(real), inputs)

    # Every label of the mask is one, and follows its input
    kept = batch.labels != -100
    labels = batch.labels[kept]
    inputs = batch.ids[kept]
    assert torch.equal(labels, inputs + 1)
    wanted = rows.tokens[rows.mask == 1]
    assert np.array_equal(np.sort(labels), wanted)

    # Documents are numbered within a block, padding as one more
    owners = np.append(starts.cumsum(), 0)
    owners = owners[batch.ids]
    first = owners[:, :1]
    changes = np.diff(owners, axis=1, prepend=first) != 0
    numbers = changes.cumsum(1)
    assert np.array_equal(batch.document_ids, numbers)
    assert rows.num_cut == 0


def test_a_long_document_is_cut_and_one_without_a_label_dropped():
    lengths = [(prompt, 12) for prompt in (1, 9, 10, 30)]
    source = packed(10, lengths)
    assert source.num_cut == 4
    kept = read_all(source).labels != -100
    num_labels = kept.sum(1).tolist()
    assert sorted(num_labels) == [1, 9]


def test_documents_are_packed_by_best_fit():
    lengths = np.array([6, 1, 4, 7, 2, 8])
    blocks = pack_documents(lengths, 8)
    assert blocks.tolist() == [2, 1, 3, 1, 2, 0]
