"""The two products around a tile: hidden states and head weight to logits, and a tile's gradient back to both.

d_hidden = factor * (tile @ weight)          d_weight += tile^T @ (factor * hidden)
"""

import torch
from torch import Tensor

from .chunked import chunk_rows
from .common import compute_dtype

UPCAST_BYTES = 16 * 2**20  # a half-precision weight is widened on a CPU in blocks of this size


class Head:
    """One op's products for hidden [N,D] and weight [V,D] in their own dtype, logits and sums in fp32 (fp64 for fp64)."""

    def __init__(self, hidden: Tensor, weight: Tensor, need: tuple[bool, bool], rows: int | None, softcap: bool = False):
        self.hidden, self.weight = hidden, weight
        (N, D), V = hidden.shape, len(weight)
        self.dtype = compute_dtype(hidden)
        self.rows = rows or chunk_rows(N, D, V, self.dtype, hidden.device, softcap)
        self.narrow = hidden.dtype != self.dtype
        self.cuda = hidden.device.type == "cuda"
        self.tile = None if self.narrow and self.cuda else self.empty(min(self.rows, N), V)
        self.d_hidden = self.empty(N, D) if need[0] else None
        self.d_weight = torch.zeros(V, D, dtype=self.dtype, device=hidden.device) if need[1] else None

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=self.dtype, device=self.hidden.device)

    def pieces(self):
        """Slices of the vocabulary whose widened weight stays small; all of it where nothing is widened."""
        V, D = self.weight.shape
        size = max(1, UPCAST_BYTES // (4 * D)) if self.narrow else V
        return [slice(start, start + size) for start in range(0, V, size)]

    def logits(self, rows: slice) -> Tensor:
        """[c,V], fp32 whatever the inputs: half-precision logits cost 3.6% of the gradient."""
        hidden = self.hidden[rows]
        if self.narrow and self.cuda:
            return torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
        tile = self.tile[: len(hidden)]
        if not self.narrow:
            return torch.mm(hidden, self.weight.t(), out=tile)
        for piece in self.pieces():
            tile[:, piece] = hidden.to(self.dtype) @ self.weight[piece].to(self.dtype).t()
        return tile

    def sink(self, rows: slice, tile: Tensor, factor: Tensor) -> None:
        """Adds a chunk's share of d_hidden and d_weight; tile [c,V] is spent, factor [c,1]."""
        hidden = self.hidden[rows]
        if self.narrow and self.cuda:
            tile = tile.mul_(factor).to(hidden.dtype)
            if self.d_hidden is not None:
                self.d_hidden[rows] = tile @ self.weight
            if self.d_weight is not None:
                self.d_weight.add_(torch.mm(tile.t(), hidden, out_dtype=torch.float32))
            return
        if self.d_hidden is not None:
            out = self.d_hidden[rows]
            if self.narrow:
                out.zero_()
                for piece in self.pieces():
                    out.addmm_(tile[:, piece], self.weight[piece].to(self.dtype))
            else:
                torch.mm(tile, self.weight, out=out)
            out.mul_(factor)
        if self.d_weight is not None:
            self.d_weight.addmm_(tile.t(), hidden.to(self.dtype) * factor)


def scaled(gradient: Tensor | None, by: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * by in `dtype`, in place: the buffer is handed over. On a CPU a factor of 1 costs nothing."""
    if gradient is None:
        return None
    if not (by.device.type == "cpu" and by.item() == 1):
        gradient.mul_(by)
    return gradient.to(dtype)
