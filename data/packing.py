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
        first_labels = starts + 1
        ends = first_labels + lengths
        bounds = np.stack([first_labels, ends], axis=1).ravel()
        bounds = bounds[bounds < len(mask)]
        in_loss = mask == IN_LOSS
        num_labels = np.add.reduceat(in_loss, bounds, dtype=np.int64)
        kept = num_labels[::2] > 0
        self.num_dropped = int((~kept).sum())
        self.starts = starts[kept]
        self.lengths = lengths[kept]

        # Documents sorted by block, and where each block's documents begin in that order.
        homes = pack_documents(self.lengths, block_size)
        self.order = np.argsort(homes, kind="stable")
        ends = np.bincount(homes).cumsum()
        self.first = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, blocks: np.ndarray) -> Batch:
        """The blocks of those numbers [B]; padding counts as one more document, without labels."""
        shape = (len(blocks), self.block_size)
        ids = np.full(shape, self.pad, np.int64)
        labels = np.full(shape, IGNORE, np.int64)
        document_ids = np.zeros(shape, np.int64)

        for row, block in enumerate(blocks.tolist()):
            place = 0
            first = self.first[block]
            last = self.first[block + 1]
            for number, document in enumerate(self.order[first:last], start=1):
                start = self.starts[document]
                length = self.lengths[document]
                end = place + length
                tokens = self.tokens[start : start + length + 1].astype(np.int64)
                mask = self.mask[start : start + length + 1]
                ids[row, place:end] = tokens[:-1]
                in_loss = mask[1:] == IN_LOSS
                labels[row, place:end] = np.where(in_loss, tokens[1:], IGNORE)
                document_ids[row, end:] = number
                place = end

        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(labels),
            torch.from_numpy(blocks),
            torch.from_numpy(document_ids),
        )


def pack_documents(lengths: np.ndarray, block_size: int) -> np.ndarray:
    """The block [documents] of each document by best fit, longest first.

    Each goes into the fullest block that still has room. `open_spaces` has bit s set where some
    block has s free positions, so that the fullest fitting one is the lowest bit from `length` on.
    """
    blocks_by_space = [[] for _ in range(block_size)]
    open_spaces = 0
    num_blocks = 0
    homes = np.empty(len(lengths), np.int64)

    longest_first = np.argsort(-lengths, kind="stable")
    for document in longest_first.tolist():
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
