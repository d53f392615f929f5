"""Fine-tuning documents packed whole into blocks, so that no position is spent on padding.

B sequences of T positions. A document of n tokens takes n-1 positions: its last is only a label.
"""

import numpy as np
import torch

from data.batches import IGNORE, Batch, Blocks

IN_LOSS = 1  # of a mask: this token is a label in the loss
DOCUMENT_START = 2  # of a mask: a document's first token


class PackedBlocks(Blocks):
    """Documents packed whole into blocks; attention stays within a document.

    A document longer than a block is cut at its end, and left out where no label remains.

    Args:
        tokens: [tokens] the documents' ids, one after the other.
        mask: [tokens] uint8, IN_LOSS and DOCUMENT_START where these hold.
        pad: the token that fills up the blocks.
    """

    def __init__(self, tokens: np.ndarray, mask: np.ndarray, block_size: int, pad: int = 0):
        super().__init__(tokens, block_size)
        self.mask = mask
        self.pad = pad
        starts = np.flatnonzero(mask == DOCUMENT_START)  # [documents]
        lengths = np.diff(starts, append=len(mask)) - 1  # in positions
        self.num_cut = int((lengths > block_size).sum())
        lengths = np.minimum(lengths, block_size)

        # A document's labels are the tokens after its first one. reduceat sums from each bound to
        # the next: every second sum is of a document, those between are of what was cut off.
        bounds = np.stack([starts + 1, starts + 1 + lengths], axis=1).ravel()
        bounds = bounds[bounds < len(mask)]
        num_labels = np.add.reduceat(mask == IN_LOSS, bounds, dtype=np.int64)[::2]
        kept = num_labels > 0
        self.num_dropped = int((~kept).sum())
        self.starts = starts[kept]
        self.lengths = lengths[kept]

        # Documents sorted by block, and where each block's documents begin in that order.
        homes = pack_documents(self.lengths, block_size)
        self.order = np.argsort(homes, kind="stable")
        self.first = np.concatenate([[0], np.bincount(homes).cumsum()])

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, blocks: np.ndarray) -> Batch:
        """The blocks of those numbers [B]; padding counts as one more document, without labels."""
        shape = (len(blocks), self.block_size)
        ids = np.full(shape, self.pad, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        document_ids = np.zeros(shape, np.int64)

        for row, block in enumerate(blocks.tolist()):
            end = 0
            documents = self.order[self.first[block] : self.first[block + 1]]
            for number, document in enumerate(documents.tolist(), start=1):
                start = self.starts[document]
                length = self.lengths[document]
                place = slice(end, end + length)
                end += length
                ids[row, place] = self.tokens[start : start + length]
                next_tokens = self.tokens[start + 1 : start + 1 + length].astype(np.int64)
                in_loss = self.mask[start + 1 : start + 1 + length] == IN_LOSS
                labels[row, place] = np.where(in_loss, next_tokens, IGNORE)
                document_ids[row, end:] = number
        return Batch(*map(torch.from_numpy, (ids, labels, blocks, document_ids)))


def pack_documents(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """The block [documents] of each document by best fit, longest first.

    Each goes into the fullest block that still has room. `open_spaces` has bit s set where some
    block has s free positions, so that the fullest fitting one is the lowest bit from `length` on.
    """
    blocks_by_space: list[list[int]] = [[] for _ in range(block_size)]
    open_spaces = 0
    num_blocks = 0
    homes = np.empty(len(lengths), np.int64)

    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        fitting = open_spaces >> length
        if fitting:
            lowest_bit = (fitting & -fitting).bit_length() - 1
            space = length + lowest_bit
            block = blocks_by_space[space].pop()
            if not blocks_by_space[space]:
                open_spaces ^= 1 << space
        else:
            space = block_size
            block = num_blocks
            num_blocks += 1
        homes[document] = block
        if space > length:
            blocks_by_space[space - length].append(block)
            open_spaces |= 1 << (space - length)
    return homes
