"""Batches as pure functions of (seed, step), whatever the number of ranks.

B sequences of T positions; block number i covers tokens i*T .. i*T+T, the last of which is only a label.
"""

import queue
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch


class Batch(NamedTuple):
    ids: torch.Tensor  # [B,T] int64
    labels: torch.Tensor  # [B,T] int64, the next token; -100 = not in the loss
    blocks: torch.Tensor  # [B] int64, which block each sequence is: where a cache keeps its targets


def read_blocks(tokens: np.ndarray, block_size: int, blocks: np.ndarray) -> Batch:
    """The blocks of those numbers."""
    rows = np.stack([tokens[block * block_size : (block + 1) * block_size + 1] for block in blocks.tolist()])  # [B,T+1]
    ids = torch.from_numpy(rows.astype(np.int64))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.from_numpy(blocks))


class Batches:
    """Fixed, non-overlapping blocks of `tokens`, each once an epoch, in an order that (seed, epoch) determines.

    `fraction` keeps that part of the blocks, the same for every seed, drawn evenly over the whole text; smaller parts
    lie in larger ones.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, batch_size: int, seed: int, fraction: float = 1.0):
        self.tokens, self.block_size, self.batch_size, self.seed = tokens, block_size, batch_size, seed
        self.blocks = np.arange((len(tokens) - 1) // block_size)
        if fraction < 1:
            drawn = np.random.default_rng(0).permutation(len(self.blocks))
            self.blocks = drawn[: max(1, round(fraction * len(drawn)))]
        assert len(self.blocks) > 0, f"{len(tokens)} tokens hold no block of {block_size}"
        self.cached: tuple[int, np.ndarray] = (-1, self.blocks)

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def order(self, epoch: int) -> np.ndarray:
        """[n_blocks] block numbers in the epoch's order."""
        cached = self.cached  # read once: another thread may move it to another epoch meanwhile
        if cached[0] != epoch:
            cached = self.cached = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.blocks))
        return cached[1]

    def batch(self, step: int) -> Batch:
        """Batch number `step` (from 0); it may begin in one epoch and end in a later one."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, inside = places // self.n_blocks, places % self.n_blocks
        blocks = np.concatenate([self.order(int(epoch))[inside[epochs == epoch]] for epoch in np.unique(epochs)])
        return read_blocks(self.tokens, self.block_size, blocks)


class Prefetch:
    """Iterates over batch(start) ... batch(stop-1), each made ahead in a thread, in pinned memory if asked."""

    def __init__(self, batches: Batches, start: int, stop: int, pin: bool = False):
        self.queue: queue.Queue = queue.Queue(maxsize=2)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self.fill, args=(batches, start, stop, pin), daemon=True)
        self.thread.start()

    def fill(self, batches: Batches, start: int, stop: int, pin: bool) -> None:
        try:
            for step in range(start, stop):
                if self.closed.is_set():
                    return
                batch = batches.batch(step)
                self.put(Batch(*(part.pin_memory() for part in batch)) if pin else batch)
            self.put(None)
        except BaseException as error:  # raised again where the batch was wanted
            self.put(error)

    def put(self, item) -> None:
        while not self.closed.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[Batch]:
        while not self.closed.is_set():
            item = self.queue.get()
            if not isinstance(item, Batch):
                self.closed.set()
                if item is None:
                    return
                raise item
            yield item

    def close(self) -> None:
        self.closed.set()
        self.thread.join()


def held_out(tokens: np.ndarray, block_size: int, batch_size: int, max_tokens: int) -> Iterator[Batch]:
    """Blocks spread evenly over the held-out text, max_tokens at most (or one block); the last batch may be short."""
    assert len(tokens) > block_size, f"{len(tokens)} tokens hold no block of {block_size}"
    there = (len(tokens) - 1) // block_size
    count = max(1, min(there, max_tokens // block_size))
    chosen = np.arange(count) * there // count  # the first blocks alone would be the first few documents
    for start in range(0, count, batch_size):
        yield read_blocks(tokens, block_size, chosen[start : start + batch_size])
