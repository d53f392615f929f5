"""How many rows a chunk has, and what `Head` makes of them.

N rows, D width, V vocabulary.
"""

import math
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunks
from kernels.chunks import Head, chunk_rows, for_each_chunk, gpu_chunk_rows
from tests.helpers import assert_close

MIB = 2**20
CPU = torch.device("cpu")


# The size of a chunk.


@pytest.mark.parametrize("V", [257, 2048, 50257, 131_072, 262_144])
@pytest.mark.parametrize("tiles", [1, 2])
@pytest.mark.parametrize("N", [0, 1, 100, 2049, 100_000])
def test_chunks_on_a_cpu(N, tiles, V):
    """The tiles leave room within 256 MiB; chunks are of equal size, and no more than are needed."""
    row_bytes = 4 * V * tiles
    rows = chunk_rows(N, 64, row_bytes, CPU)
    assert 1 <= rows <= max(N, 1)
    assert rows * row_bytes <= 136 * MIB
    most = min(136 * MIB // row_bytes, max(1024, 4 * MIB // row_bytes))
    num_chunks = math.ceil(N / rows)
    assert num_chunks == math.ceil(N / most)
    assert rows * num_chunks - N < max(num_chunks, 1)


def waves(N, D, rows, num_sms):
    """Of 128 x 256 tiles, which the d_hidden products of all chunks take."""
    total = 0
    for start in range(0, N, rows):
        row_tiles = math.ceil(min(rows, N - start) / 128)
        total += math.ceil(row_tiles * math.ceil(D / 256) / num_sms)
    return total


# N, D, V, SMs and the waves that it takes.
GPU_SHAPES = [
    (16384, 768, 50304, 132, 3),
    (8192, 2048, 128256, 132, 4),
    (8192, 4096, 151936, 132, 8),
    (16384, 768, 50304, 108, 4),
    (4096, 768, 50304, 132, 1),
    (100, 64, 257, 132, 1),
    (1, 64, 257, 132, 1),
]


@pytest.mark.parametrize("N, D, V, num_sms, wanted", GPU_SHAPES)
def test_chunks_on_a_gpu_fill_its_waves(N, D, V, num_sms, wanted):
    rows = gpu_chunk_rows(N, D, 4 * V, num_sms)
    assert 1 <= rows <= N
    assert rows * 4 * V <= 5 * 2**29
    most = min(6144, 5 * 2**29 // (4 * V))
    best = min(waves(N, D, chunk, num_sms) for chunk in range(1, min(most, N) + 1))
    print(rows, waves(N, D, rows, num_sms), best)
    assert waves(N, D, rows, num_sms) == best == wanted


# A head.


class Watch(TorchDispatchMode):
    """The largest tensor that is made anew, in bytes, and the operations."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if "out" not in func._overloadname and not func.is_view:
            self.largest = max(self.largest, out.nbytes)
        return out


def numbers(*shape, dtype=torch.float32):
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN."""
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: make(*shape, **options).fill_(math.nan))
    monkeypatch.setattr(chunks, "SCRATCH", chunks.Scratch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False), (False, False)])
@pytest.mark.parametrize("N, rows", [(0, 4), (13, 4), (13, 13), (13, None)])
def test_logits_and_gradients_are_plain_products(N, rows, needs, dtype, poison, monkeypatch):
    monkeypatch.setattr(chunks, "UPCAST_BYTES", 4 * 5 * 7)  # 7 of 37 rows of the weight
    hidden, weight = numbers(N, 5, dtype=dtype), numbers(37, 5, dtype=dtype)
    kept = torch.arange(N) % 3 > 0
    hidden[~kept] = math.nan
    grad = numbers(N, 37, dtype=torch.promote_types(dtype, torch.float32))
    head = Head(hidden, weight, dtype, row_mask=kept, needs=needs, rows=rows)
    logits = torch.zeros_like(grad)

    def row_losses(z, place):
        logits[place] = z
        return grad[place]

    for_each_chunk(head, row_losses)
    clean = hidden.nan_to_num(0.0).to(grad.dtype)
    assert_close(logits, clean @ weight.to(grad.dtype).T)
    for made, wanted, need in (
        (head.d_hidden, grad @ weight.to(grad.dtype), needs[0]),
        (head.d_weight, grad.T @ clean, needs[1]),
    ):
        assert (made is not None) == need
        if need:
            assert_close(made, wanted)


def test_a_narrow_weight_is_widened_in_pieces_and_hidden_once(monkeypatch):
    monkeypatch.setattr(chunks, "UPCAST_BYTES", 4 * 8 * 100)
    hidden, weight = numbers(40, 8, dtype=torch.bfloat16), numbers(1000, 8, dtype=torch.bfloat16)
    head = Head(hidden, weight, torch.bfloat16, row_mask=torch.ones(40).bool(), needs=(True, True), rows=10)
    watch = Watch()
    with watch:
        for_each_chunk(head, lambda z, rows: z)
    assert watch.largest == 4 * 8 * 100
    assert watch.names.count("_to_copy") == 2 * 4 * 10  # chunks x pieces, for logits and d_hidden
    assert "masked_fill" not in watch.names


def test_scratch_is_kept_from_call_to_call_by_each_thread():
    scratch = chunks.Scratch()
    first = scratch.tile("student", 10, 30, torch.float32)
    assert first.shape == (10, 30)
    again = scratch.tile("student", 5, 20, torch.float32)
    assert again.shape == (5, 20) and again.data_ptr() == first.data_ptr()
    teacher = scratch.tile("teacher", 5, 20, torch.float32)
    assert teacher.data_ptr() != first.data_ptr()
    assert scratch.tile("student", 5, 20, torch.float64).dtype == torch.float64
    assert scratch.tile("teacher", 50, 20, torch.float32).shape == (50, 20)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(scratch.tiles))
    thread.start()
    thread.join()
    assert seen == [{}]
