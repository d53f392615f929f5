"""Logits a chunk of rows at a time: made, used, and overwritten by their own gradient.

    for rows in head.chunks():
        z = head.logits(rows)            [C,V] fp32, whatever the inputs
        ...the rows' losses; z becomes its own gradient...
        head.accumulate(rows, grad)      d_hidden[rows] = grad @ weight
                                         d_weight += grad^T @ hidden[rows]

N rows, D width, V vocabulary, C rows of a chunk. N*V numbers never exist.
"""

import math
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .backends import wide_dtype

CPU_TILE_BYTES = 136 * 2**20  # a chunk of logits on a CPU; all scratch stays within 256 MiB
CPU_ROWS = 1024  # more rows in a chunk gain nothing on a CPU
GPU_TILE_BYTES = 5 * 2**29  # 2.5 GiB
GPU_ROWS = 4096  # twice as many gain 2-4%, half as many lose 3-6% [measured]
CPU_BLOCK_BYTES = 16 * 2**20  # rows worked on together: few calls, and near the caches [measured]
GPU_BLOCK_BYTES = 2**28
UPCAST_BYTES = 16 * 2**20  # a half-precision weight is widened on a CPU in pieces of this size
ALIGNMENT = 16  # rows of a GPU's tile start at multiples of 16 numbers: 16-byte loads for any V


def chunk_rows(N: int, row_bytes: int, device: torch.device) -> int:
    """Rows in a chunk, given the bytes of one row of logits: few chunks, of equal size."""
    if device.type == "cuda":
        most = min(GPU_ROWS, GPU_TILE_BYTES // row_bytes)
    else:
        useful = max(CPU_ROWS, CPU_BLOCK_BYTES // row_bytes)
        most = min(useful, CPU_TILE_BYTES // row_bytes)
    num_chunks = max(1, math.ceil(N / max(16, most)))
    return max(1, math.ceil(N / num_chunks))


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def row_blocks(
    num_rows: int,
    width: int,
    device: torch.device,
) -> Iterator[slice]:
    """The rows of a chunk in blocks of `width` numbers a row that stay in the CPU's cache."""
    block_bytes = GPU_BLOCK_BYTES
    if device.type == "cpu":
        block_bytes = CPU_BLOCK_BYTES
    row_bytes = 4 * max(1, width)
    return slices(num_rows, max(1, block_bytes // row_bytes))


class Scratch(threading.local):
    """A CPU's tiles of logits, kept between calls: new pages would be 10% of a step [measured]."""

    def __init__(self):
        self.tiles: dict[str, Tensor] = {}

    def tile(
        self,
        name: str,
        rows: int,
        V: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """[rows,V], holding anything."""
        kept = self.tiles.get(name)
        if kept is None or kept.dtype != dtype or kept.numel() < rows * V:
            self.tiles.pop(name, None)  # freed before the larger one is made
            with torch.inference_mode(False):  # training may reuse it
                kept = torch.empty(rows * V, dtype=dtype, device="cpu")
            self.tiles[name] = kept
        return kept[: rows * V].view(rows, V)


SCRATCH = Scratch()


def scratch_like(z: Tensor) -> Tensor:
    """Memory for a block as large as z [B,V]; on a CPU the same in every call."""
    if z.device.type != "cpu":
        return torch.empty_like(z)
    return SCRATCH.tile("block", *z.shape, z.dtype)


class Head:
    """Hidden states [N,D] and a head's weight [V,D]: a source of logits, a sink of gradients.

    Both are rounded to `dtype`, which the products take; logits and gradients are fp32 (fp64 for
    fp64). On CUDA the products read `dtype` and write fp32; on a CPU, where no such product exists,
    both sides are widened, the weight piece by piece.

    Args:
        row_mask: [N] bool, False where a row is ignored and counts as 0 whatever it holds; or None.
        needs: whether d_hidden and d_weight are wanted.
        width_beside: numbers a row of the other tiles that a chunk has.
        rows: of a chunk, where another head decides; else `chunk_rows`.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        dtype: torch.dtype,
        *,
        row_mask: Tensor | None = None,
        needs: tuple[bool, bool] = (False, False),
        width_beside: int = 0,
        rows: int | None = None,
        name: str = "student",
    ):
        N, D = hidden.shape
        V = len(weight)
        device = hidden.device
        self.dtype = dtype
        self.wide = wide_dtype(dtype)
        self.on_cuda = device.type == "cuda"
        self.needs_grad = any(needs)

        hidden = hidden.to(dtype)
        if row_mask is not None:
            ignored = ~row_mask[:, None]
            hidden = hidden.masked_fill(ignored, 0)
        self.mixed = {}  # options of a product of `dtype` that writes `wide`
        if self.on_cuda:
            weight = weight.to(dtype).contiguous()
            if dtype != self.wide:
                self.mixed = {"out_dtype": self.wide}
        else:
            hidden = hidden.to(self.wide)
        self.hidden = hidden  # [N,D]
        self.weight = weight  # [V,D]
        self.pieces = [slice(0, V)]
        as_it_is = weight.dtype == dtype == self.wide
        if not self.on_cuda and not as_it_is:
            rows_of_piece = max(1, UPCAST_BYTES // (4 * D))
            self.pieces = list(slices(V, rows_of_piece))

        if rows is None:
            row_bytes = (V + width_beside) * self.wide.itemsize
            rows = chunk_rows(N, row_bytes, device)
        self.rows = rows
        C = min(rows, N)
        options = {"dtype": self.wide, "device": device}
        if self.on_cuda:
            padded = math.ceil(V / ALIGNMENT) * ALIGNMENT
            tile = torch.empty(C, padded, **options)
            self.tile = tile[:, :V]
        else:
            self.tile = SCRATCH.tile(name, C, V, self.wide)

        self.d_hidden = None
        self.d_weight = None
        if needs[0]:
            self.d_hidden = torch.empty(N, D, **options)
        if needs[1]:
            # The first chunk writes it, later ones add to it; without any it stays zero.
            make = torch.empty if N else torch.zeros
            self.d_weight = make(V, D, **options)

    def chunks(self) -> Iterator[slice]:
        return slices(len(self.hidden), self.rows)

    def weight_piece(self, piece: slice) -> Tensor:
        """[piece,D] as it enters a product."""
        if self.on_cuda:
            return self.weight
        weight = self.weight[piece].to(self.dtype)
        return weight.to(self.wide)

    def logits(self, rows: slice) -> Tensor:
        """[C,V], in fp32 whatever the inputs: half-precision logits cost 3.6% of the gradient."""
        hidden = self.hidden[rows]
        z = self.tile[: len(hidden)]
        for piece in self.pieces:
            weight = self.weight_piece(piece)
            torch.mm(hidden, weight.t(), out=z[:, piece], **self.mixed)
        return z

    def accumulate(self, rows: slice, grad: Tensor) -> None:
        """Adds a chunk's share of both gradients; grad [C,V] is the loss's for its logits."""
        hidden = self.hidden[rows]
        grad = grad.to(hidden.dtype)
        if self.d_hidden is not None:
            out = self.d_hidden[rows]
            for piece in self.pieces:
                weight = self.weight_piece(piece)
                add_product(out, grad[:, piece], weight, piece.start > 0, self.mixed)
        if self.d_weight is not None:
            add_product(self.d_weight, grad.t(), hidden, rows.start > 0, self.mixed)


def add_product(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    add: bool,
    mixed: dict,
) -> None:
    """out += left @ right, or without `add` =, whatever stood there, NaN too."""
    torch.addmm(out, left, right, beta=int(add), out=out, **mixed)


def for_each_chunk(head: Head, row_losses: Callable[[Tensor, slice], Tensor]) -> None:
    """Calls row_losses(z, rows) on each chunk's logits; it returns their gradient, if any."""
    for rows in head.chunks():
        grad = row_losses(head.logits(rows), rows)
        if head.needs_grad:
            head.accumulate(rows, grad)
