"""Batches as pure functions of (seed, step), whatever the number of ranks.

B sequences of T positions. A text is cut into fixed blocks of T positions: block number i covers
tokens i*T .. i*T+T, the last of which is only a label. Fine-tuning documents are packed into blocks
instead, see data/packing.py.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

IGNORE = -100


class Batch(NamedTuple):
    """Sequences to train or to be measured on; the first dimension of every tensor is B."""

    ids: torch.Tensor  # [B,T] int64
    labels: torch.Tensor  # [B,T] int64, the next token; IGNORE = not in the loss
    blocks: torch.Tensor  # [B] int64, the number of each sequence's block
    document_ids: torch.Tensor | None = None  # [B,T] int64, which document of its block; None = one
    targets: tuple | None = None  # from a cache, [B,T,...] each: see model/loss.SparseTargets
    num_kept: int = 0  # labels in the loss, of the whole batch over all ranks

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Batch":
        """This batch with `function` applied to each of its tensors."""
        return tree_map_only(torch.Tensor, function, self)

    def num_bytes(self) -> int:
        tensors = [leaf for leaf in tree_leaves(self) if isinstance(leaf, torch.Tensor)]
        return sum(tensor.nbytes for tensor in tensors)

    def select(self, rows: slice | list[int]) -> "Batch":
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Batch":
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


class Blocks:
    """Plain text as blocks.

    Args:
        tokens: [tokens] the text's ids.
        bos: begins a new document wherever it stands (unset: the text is one document).
        to_the_end: the last block may be short of labels; else what does not fill one is left out.
    """

    num_cut = 0  # documents that packing cut

    def __init__(
        self,
        tokens: np.ndarray,
        block_size: int,
        bos: int | None = None,
        to_the_end: bool = False,
    ):
        self.tokens = tokens
        self.block_size = block_size
        self.bos = bos
        self.to_the_end = to_the_end

    def __len__(self) -> int:
        num_labels = len(self.tokens) - 1
        if self.to_the_end:
            num_labels += self.block_size - 1
        return num_labels // self.block_size

    def read(self, blocks: np.ndarray) -> Batch:
        """The blocks of those numbers [B]."""
        starts = blocks[:, None] * self.block_size  # [B,1]
        places = starts + np.arange(self.block_size + 1)  # [B,T+1]
        last = len(self.tokens) - 1
        tokens = torch.from_numpy(self.tokens[places.clip(max=last)].astype(np.int64))
        ids = tokens[:, :-1].contiguous()
        past_the_end = torch.from_numpy(places[:, 1:] > last)
        labels = tokens[:, 1:].masked_fill(past_the_end, IGNORE)
        document_ids = None
        if self.bos is not None:
            document_ids = (ids == self.bos).cumsum(1)
        return Batch(ids, labels, torch.from_numpy(blocks), document_ids)


def training_subset(num_blocks: int, fraction: float) -> np.ndarray:
    """The numbers of the blocks that `fraction` of a text trains on, drawn evenly over all of it.

    The same for every seed, and those of a smaller fraction come first in a larger one.
    """
    order = np.random.default_rng(0).permutation(num_blocks)
    return order[: max(1, round(fraction * num_blocks))]


class Batches:
    """A text's blocks, each once an epoch, in an order that is a function of (seed, epoch).

    Args:
        source: the text as blocks.
        fraction: the part of the blocks that is used, see `training_subset`.
        local_rows: which sequences of each batch are this rank's (unset: all).
        read_targets: gives a cache's targets for the sequences of this rank.
        count_visits: `blocks` numbers the visits of the run instead, so that what is drawn by
            block number is drawn anew each time.
    """

    def __init__(
        self,
        source: Blocks,
        batch_size: int,
        seed: int,
        fraction: float = 1.0,
        *,
        local_rows: list[int] | None = None,
        read_targets: Callable[[Batch], tuple] | None = None,
        count_visits: bool = False,
    ):
        assert len(source) > 0, f"{len(source.tokens)} tokens hold no block of {source.block_size}"
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.local_rows = local_rows
        self.read_targets = read_targets
        self.count_visits = count_visits
        self.blocks = np.arange(len(source))
        if fraction < 1:
            self.blocks = training_subset(len(source), fraction)
        self.num_blocks = len(self.blocks)
        self.order = lru_cache(maxsize=2)(self.make_order)

    def make_order(self, epoch: int) -> np.ndarray:
        """[num_blocks] block numbers in the epoch's order."""
        random = np.random.default_rng((self.seed, epoch))
        return random.permutation(self.blocks)

    def batch(self, step: int) -> Batch:
        """Batch number `step` (from 0); it may begin in one epoch and end in a later one."""
        visits = np.arange(self.batch_size) + step * self.batch_size
        blocks = []
        for visit in visits.tolist():
            epoch, place = divmod(visit, self.num_blocks)
            blocks.append(self.order(epoch)[place])

        batch = self.source.read(np.array(blocks))
        if self.count_visits:
            batch = batch._replace(blocks=torch.from_numpy(visits))
        # The loss is a mean over the labels of the whole batch, so they are counted before this
        # rank takes its share.
        num_kept = int((batch.labels != IGNORE).sum())
        batch = batch._replace(num_kept=max(1, num_kept))
        if self.local_rows is not None:
            batch = batch.select(self.local_rows)
        if self.read_targets is not None:
            batch = batch._replace(targets=self.read_targets(batch))
        return batch


class Prefetch:
    """Iterates over batch(start) ... batch(stop-1), each made ahead in a thread.

    AHEAD of them, or as many as fit in AHEAD_BYTES: whole distributions are hundreds of MiB each.
    """

    AHEAD = 3
    AHEAD_BYTES = 2**28

    def __init__(
        self,
        batches: Batches,
        start: int,
        stop: int,
        pin: bool = False,
    ):
        self.batches = batches
        self.steps = iter(range(start, stop))
        self.pin = pin
        self.seconds_waited = 0.0  # that training waited for a batch
        self.pool = ThreadPoolExecutor(1)

    def make(self, step: int) -> Batch:
        batch = self.batches.batch(step)
        return batch.map(torch.Tensor.pin_memory) if self.pin else batch

    def __iter__(self) -> Iterator[Batch]:
        first = islice(self.steps, 1)
        queue = deque(self.pool.submit(self.make, step) for step in first)
        while queue:
            started = time.perf_counter()
            batch = queue.popleft().result()  # or the error that making it met
            self.seconds_waited += time.perf_counter() - started
            fitting = self.AHEAD_BYTES // batch.num_bytes()
            ahead = max(1, min(self.AHEAD, fitting))
            for step in islice(self.steps, max(0, ahead - len(queue))):
                queue.append(self.pool.submit(self.make, step))
            yield batch

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)


def evenly_spaced(num_blocks: int, block_size: int, max_tokens: int) -> np.ndarray:
    """The numbers of blocks spread evenly over a text, of max_tokens at most (or one block).

    The first blocks alone would be the first few documents.
    """
    count = max(1, min(num_blocks, max_tokens // block_size))
    return np.arange(count) * num_blocks // count


def held_out(source: Blocks, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """The `evenly_spaced` blocks of the held-out text; the last batch may be short."""
    chosen = evenly_spaced(len(source), source.block_size, max_tokens)
    for start in range(0, len(chosen), batch_size):
        yield source.read(chosen[start : start + batch_size])
