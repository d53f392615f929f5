"""How many rows a chunk has, and what `Head` makes of them.

N rows, D width, V vocabulary.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import chunks, linear_cross_entropy, linear_full_kl, linear_topk
from tests.helpers import assert_close

MOST_BYTES = {"cpu": 136 * 2**20, "cuda": 5 * 2**29}  # of a tile
SIZES = [  # device, N, V, rows of a chunk
    ("cpu", 0, 257, 1),
    ("cpu", 100_000, 257, 14286),
    ("cpu", 2049, 2048, 1025),
    ("cpu", 100_000, 50257, 705),
    ("cpu", 2049, 262_144, 129),
    ("cuda", 0, 257, 1),
    ("cuda", 16384, 50304, 4096),
    ("cuda", 8192, 151_936, 4096),
    ("cuda", 8193, 151_936, 2731),
    ("cuda", 8192, 262_144, 2048),
]


@pytest.mark.parametrize("device, N, V, expected", SIZES)
def test_chunks_are_few_and_of_equal_size(device, N, V, expected):
    """On a CPU tiles leave room within 256 MiB; on a GPU they have 4,096 rows, or 2.5 GiB."""
    rows = chunks.chunk_rows(N, 4 * V, torch.device(device))
    assert rows == expected
    assert rows * 4 * V <= MOST_BYTES[device]


def test_two_heads_share_the_room_of_one(monkeypatch):
    """20 rows of both sides' logits fill it."""
    scratch = chunks.Scratch()
    monkeypatch.setattr(chunks, "SCRATCH", scratch)
    monkeypatch.setattr(chunks, "CPU_TILE_BYTES", 4 * 20 * 5000)
    student = torch.randn(60, 4), torch.randn(3000, 4)
    teacher = torch.randn(60, 4), torch.randn(2000, 4)
    linear_full_kl(*student, *teacher, backend="torch")
    sizes = [scratch.tiles[name].numel() for name in ("student", "teacher")]
    assert sizes == [20 * 3000, 20 * 2000]


def numbers(*shape, dtype=torch.float32):
    """Whose products are exact in any order."""
    return torch.randint(-3, 4, shape).to(dtype)


@pytest.fixture
def poison(monkeypatch):
    """Fresh memory holds NaN."""
    empty = torch.empty

    def poisoned(*shape, **options):
        return empty(*shape, **options).fill_(math.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(chunks, "SCRATCH", chunks.Scratch())


DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CHUNKS = [
    (0, 4),
    (13, 4),
    (13, 13),
    (13, None),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, rows", CHUNKS)
def test_logits_and_gradients_are_plain_products(N, rows, dtype, poison, monkeypatch):
    """And the inputs stay as they are: an ignored row of NaN counts as 0."""
    monkeypatch.setattr(chunks, "UPCAST_BYTES", 4 * 5 * 7)  # 7 rows of the weight
    hidden = numbers(N, 5, dtype=dtype)
    weight = numbers(37, 5, dtype=dtype)
    row_mask = torch.arange(N) % 3 > 0
    hidden[~row_mask] = math.nan
    head = chunks.Head(
        hidden,
        weight,
        dtype,
        row_mask=row_mask,
        needs=(True, True),
        rows=rows,
    )
    wide = torch.promote_types(dtype, torch.float32)
    grad = numbers(N, 37, dtype=wide)
    logits = torch.zeros_like(grad)

    def row_losses(z, place):
        logits[place] = z
        return grad[place]

    chunks.for_each_chunk(head, row_losses)
    assert hidden[~row_mask].isnan().all()
    hidden = hidden.nan_to_num(0.0).to(wide)
    weight = weight.to(wide)
    assert_close(logits, hidden @ weight.T)
    assert_close(head.d_hidden, grad @ weight)
    assert_close(head.d_weight, grad.T @ hidden)


class Watch(TorchDispatchMode):
    """What is called, and the bytes of each cast."""

    def __init__(self):
        super().__init__()
        self.cast_bytes = []
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.add(func.name())
        if func.name() == "aten::_to_copy":
            self.cast_bytes.append(out.nbytes)
        return out


def test_a_narrow_weight_is_widened_in_pieces_and_hidden_once(monkeypatch):
    piece = 4 * 8 * 100  # bytes of a tenth of the weight
    monkeypatch.setattr(chunks, "UPCAST_BYTES", piece)
    hidden = numbers(40, 8, dtype=torch.bfloat16)
    weight = numbers(1000, 8, dtype=torch.bfloat16)
    head = chunks.Head(
        hidden,
        weight,
        torch.bfloat16,
        needs=(True, True),
        rows=10,
    )
    with Watch() as watch:
        chunks.for_each_chunk(head, lambda z, rows: z)
    assert watch.cast_bytes == [piece] * 80  # 4 chunks, 10 pieces, for logits and for d_hidden
    made = {"aten::mm.out", "aten::addmm.out", "aten::_to_copy"}
    views = {"aten::slice.Tensor", "aten::t"}
    assert watch.names == made | views


def test_scratch_is_kept_from_call_to_call_by_each_thread():
    scratch = chunks.Scratch()
    first = scratch.tile("student", 10, 30, torch.float32)
    smaller = scratch.tile("student", 5, 20, torch.float32)
    teacher = scratch.tile("teacher", 5, 20, torch.float32)
    assert smaller.shape == (5, 20)
    assert smaller.data_ptr() == first.data_ptr()
    assert teacher.data_ptr() != first.data_ptr()
    larger = scratch.tile("teacher", 50, 20, torch.float32)
    assert larger.shape == (50, 20)
    wider = scratch.tile("teacher", 5, 20, torch.float64)
    assert wider.dtype == torch.float64
    with ThreadPoolExecutor() as pool:
        assert pool.submit(getattr, scratch, "tiles").result() == {}


def test_scratch_made_under_inference_mode_serves_training():
    hidden = numbers(4, 8)
    weight = numbers(40, 8)
    chunks.SCRATCH.tiles.clear()
    with torch.inference_mode():
        linear_topk(hidden, weight, 3)
    out = linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([1, 2, 3, 4]))
    out.loss.backward()
    assert hidden.grad.isfinite().all()
