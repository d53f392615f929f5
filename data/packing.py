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

    def __init__(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        block_size: int,
        pad: int = 0,
    ):
        super().__init__(tokens, block_size)
        self.mask = mask
        self.pad = pad
        starts = np.flatnonzero(mask == DOCUMENT_START)  # [documents]
        lengths = np.diff(starts, append=len(mask)) - 1  # in positions
        self.num_cut = int((lengths > block_size).sum())
        self.share_cut = (lengths - block_size).clip(min=0).sum() / max(1, lengths.sum())
        lengths = np.minimum(lengths, block_size)

        # A document's labels are the tokens after its first one. reduceat sums from each bound to
        # the next: every second sum is of a document, those between are of what was cut off.
        first_labels = starts + 1
        bounds = np.stack([first_labels, first_labels + lengths], axis=1)
        bounds = bounds[bounds < len(mask)]
        in_loss = mask == IN_LOSS
        num_labels = np.add.reduceat(in_loss, bounds, dtype=np.int64)
        kept = num_labels[::2] > 0

        # Documents sorted by block, and where each block's documents begin in that order.
        homes = pack_documents(lengths[kept], block_size)
        order = np.argsort(homes, kind="stable")
        self.starts = starts[kept][order]
        self.lengths = lengths[kept][order]
        self.first = np.append(0, np.bincount(homes).cumsum())

    def __len__(self) -> int:
        return len(self.first) - 1

    def read(self, blocks: np.ndarray) -> Batch:
        """The blocks of those numbers [B]; padding counts as one more document, without labels."""
        places = np.full((len(blocks), self.block_size), -1)  # [B,T] in the text; -1 = padding
        document_ids = np.zeros_like(places)
        for row, block in enumerate(blocks.tolist()):
            begin = 0
            first = self.first[block]
            last = self.first[block + 1]
            for document in range(first, last):
                start = self.starts[document]
                length = self.lengths[document]
                end = begin + length
                places[row, begin:end] = np.arange(start, start + length)
                document_ids[row, end:] += 1
                begin = end

        ids = self.tokens[places].astype(np.int64)
        ids[places < 0] = self.pad
        labels = self.tokens[places + 1].astype(np.int64)
        labels[self.mask[places + 1] != IN_LOSS] = IGNORE  # nor is a text's first token a label
        tensors = map(torch.from_numpy, (ids, labels, blocks, document_ids))
        return Batch(*tensors)


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
