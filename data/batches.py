"""Batches as pure functions of (seed, step), whatever the number of ranks.

B sequences of T positions. In plain text block number i covers tokens i*T .. i*T+T, the last of which is only a label;
fine-tuning documents are packed whole into blocks.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from model.loss import SparseTargets

IGNORE = -100


class Batch(NamedTuple):
    ids: torch.Tensor  # [B,T] int64
    labels: torch.Tensor  # [B,T] int64, the next token; -100 = not in the loss
    blocks: torch.Tensor  # [B] int64, which block each sequence is: where a cache keeps its targets
    documents: torch.Tensor | None = (
        None  # [B,T] int64, a position's document within its block; None = all are one
    )
    targets: SparseTargets | None = None  # [b,T,K], from a cache: of this rank's b sequences alone

    def part(self, rows: slice, device: torch.device, own: slice | None = None) -> "Batch":
        """These sequences on `device`; the targets of their positions, the `own` ones of this rank's, as [N,K]."""

        def move(part: torch.Tensor) -> torch.Tensor:
            return part.to(device, non_blocking=True)

        targets = self.targets and (
            part if part is None else move(part[own or rows]).flatten(0, 1) for part in self.targets
        )
        return Batch(
            *(part if part is None else move(part[rows]) for part in self[:4]),
            targets and SparseTargets(*targets),
        )

    def pinned(self) -> "Batch":
        targets = self.targets and SparseTargets(
            *(part if part is None else part.pin_memory() for part in self.targets)
        )
        return Batch(*(part if part is None else part.pin_memory() for part in self[:4]), targets)


class Blocks:
    """Plain text as blocks; with `bos`, that token begins a new document wherever it stands."""

    def __init__(self, tokens: np.ndarray, block_size: int, bos: int | None = None):
        self.tokens, self.block_size, self.bos = tokens, block_size, bos

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.block_size

    def read(self, blocks: np.ndarray) -> Batch:
        """The blocks of those numbers [B]."""
        size = self.block_size
        rows = np.stack(
            [self.tokens[block * size : (block + 1) * size + 1] for block in blocks.tolist()]
        )  # [B,T+1]
        ids = torch.from_numpy(rows.astype(np.int64))
        inputs = ids[:, :-1].contiguous()
        documents = None if self.bos is None else (inputs == self.bos).cumsum(1)
        return Batch(inputs, ids[:, 1:].contiguous(), torch.from_numpy(blocks), documents)


class Packed(Blocks):
    """Fine-tuning documents packed whole into blocks; a document of n tokens takes n-1 positions, its last is only a label.

    `mask` [tokens] uint8: 1 = a label in the loss, 2 = a document's first token. A document longer than a block is cut at
    its end, and left out where no label remains: `cut` and `dropped` count both. `pad` fills up the blocks.
    """

    def __init__(self, tokens: np.ndarray, mask: np.ndarray, block_size: int, pad: int = 0):
        super().__init__(tokens, block_size)
        self.mask, self.pad = mask, pad
        starts = np.flatnonzero(mask == 2)
        lengths = np.diff(starts, append=len(mask)) - 1  # positions
        self.cut = int((lengths > block_size).sum())
        lengths = np.minimum(lengths, block_size)
        bounds = np.stack([starts + 1, starts + 1 + lengths], 1).ravel()
        kept = (
            np.add.reduceat(mask == 1, bounds[bounds < len(mask)], dtype=np.int64)[::2] > 0
        )  # the labels of each
        self.dropped = int((~kept).sum())
        self.starts, self.lengths = starts[kept], lengths[kept]
        homes = pack(self.lengths, block_size)
        self.order = np.argsort(homes, kind="stable")  # documents, block by block
        self.first = np.concatenate(
            [[0], np.bincount(homes).cumsum()]
        )  # where each block's documents begin there

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, blocks: np.ndarray) -> Batch:
        """The blocks of those numbers [B]; padding counts as one more document, without labels."""
        shape = (len(blocks), self.block_size)
        ids, labels, documents = (
            np.full(shape, value, np.int64) for value in (self.pad, IGNORE, 0)
        )  # [B,T]
        for row, block in enumerate(blocks.tolist()):
            end = 0
            for number, document in enumerate(
                self.order[self.first[block] : self.first[block + 1]].tolist()
            ):
                start, length = self.starts[document], self.lengths[document]
                here, end = slice(end, end + length), end + length
                ids[row, here] = self.tokens[start : start + length]
                follow = slice(start + 1, start + 1 + length)
                labels[row, here] = np.where(
                    self.mask[follow] == 1, self.tokens[follow].astype(np.int64), IGNORE
                )
                documents[row, end:] = number + 1
        return Batch(*map(torch.from_numpy, (ids, labels, blocks, documents)))


def pack(lengths: np.ndarray, size: int) -> np.ndarray:
    """The block [documents] of each document by best fit, longest first: into the fullest block that still has room."""
    spaces, open_spaces, count = (
        [[] for _ in range(size)],
        0,
        0,
    )  # blocks by free positions; a bit for each list in use
    homes, sizes = np.empty(len(lengths), np.int64), lengths.tolist()
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = sizes[document]
        fitting = open_spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            block = spaces[space].pop()
            if not spaces[space]:
                open_spaces ^= 1 << space
        else:
            space, block, count = size, count, count + 1
        homes[document] = block
        if space > length:
            spaces[space - length].append(block)
            open_spaces |= 1 << (space - length)
    return homes


def as_blocks(tokens: np.ndarray | Blocks, block_size: int) -> Blocks:
    """`tokens` themselves where they are blocks already."""
    blocks = tokens if isinstance(tokens, Blocks) else Blocks(tokens, block_size)
    assert blocks.block_size == block_size, (
        f"blocks of {blocks.block_size} positions, {block_size} wanted"
    )
    assert len(blocks) > 0, f"{len(blocks.tokens)} tokens hold no block of {block_size}"
    return blocks


def training_subset(n_blocks: int, fraction: float) -> np.ndarray:
    """The block numbers of that part of a text, the same for every seed; those of a smaller part come first in a larger."""
    return np.random.default_rng(0).permutation(n_blocks)[: max(1, round(fraction * n_blocks))]


class Batches:
    """Fixed, non-overlapping blocks of `tokens` (or Tokens.blocks), each once an epoch, in an order of (seed, epoch).

    `fraction` keeps that part of the blocks, the same for every seed, drawn evenly over the whole text; smaller parts
    lie in larger ones. `targets` (Batch -> SparseTargets) gives a cache's part of a batch.
    """

    def __init__(
        self,
        tokens: np.ndarray | Blocks,
        block_size: int,
        batch_size: int,
        seed: int,
        fraction=1.0,
        targets=None,
    ):
        self.source, self.batch_size, self.seed, self.targets = (
            as_blocks(tokens, block_size),
            batch_size,
            seed,
            targets,
        )
        self.blocks = (
            training_subset(len(self.source), fraction)
            if fraction < 1
            else np.arange(len(self.source))
        )
        self.cached: tuple[int, np.ndarray] = (-1, self.blocks)

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def order(self, epoch: int) -> np.ndarray:
        """[n_blocks] block numbers in the epoch's order."""
        cached = self.cached  # read once: another thread may move it to another epoch meanwhile
        if cached[0] != epoch:
            cached = self.cached = (
                epoch,
                np.random.default_rng((self.seed, epoch)).permutation(self.blocks),
            )
        return cached[1]

    def batch(self, step: int) -> Batch:
        """Batch number `step` (from 0); it may begin in one epoch and end in a later one."""
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, inside = places // self.n_blocks, places % self.n_blocks
        blocks = np.concatenate(
            [self.order(int(epoch))[inside[epochs == epoch]] for epoch in np.unique(epochs)]
        )
        found = self.source.read(blocks)
        return found if self.targets is None else found._replace(targets=self.targets(found))


class Prefetch:
    """Iterates over batch(start) ... batch(stop-1), each made ahead in a thread, in pinned memory if asked."""

    def __init__(self, batches: Batches, start: int, stop: int, pin: bool = False):
        self.make = lambda step: batches.batch(step).pinned() if pin else batches.batch(step)
        self.pool, self.steps = ThreadPoolExecutor(1), iter(range(start, stop))
        self.ahead = deque(self.pool.submit(self.make, step) for step in islice(self.steps, 3))
        self.waited = 0.0  # seconds that the loop waited for a batch

    def __iter__(self) -> Iterator[Batch]:
        while self.ahead:
            asked = time.perf_counter()
            batch = self.ahead.popleft().result()  # or the error that making it met
            self.waited += time.perf_counter() - asked
            self.ahead.extend(self.pool.submit(self.make, step) for step in islice(self.steps, 1))
            yield batch

    def close(self) -> None:
        self.ahead.clear()
        self.pool.shutdown(cancel_futures=True)


def evenly_spaced(n_blocks: int, block_size: int, max_tokens: int) -> np.ndarray:
    """The numbers of blocks spread evenly over n_blocks, max_tokens at most (or one block)."""
    count = max(1, min(n_blocks, max_tokens // block_size))
    return (
        np.arange(count) * n_blocks // count
    )  # the first blocks alone would be the first few documents


def held_out(
    tokens: np.ndarray | Blocks, block_size: int, batch_size: int, max_tokens: int
) -> Iterator[Batch]:
    """The `spread` blocks of the held-out text; the last batch may be short."""
    source = as_blocks(tokens, block_size)
    chosen = evenly_spaced(len(source), block_size, max_tokens)
    for start in range(0, len(chosen), batch_size):
        yield source.read(chosen[start : start + batch_size])
