"""Path 2 (exp_kernel.py) against the fp64 reference: the modes that it serves, and the rows that leave its number range.

In the interpreter it runs on fp32, whose products Triton's interpreter gets right; on a GPU on bf16 too.
"""

import contextlib
import importlib
import math
import os

import pytest
import torch
import triton
import triton.language as tl

from kernels import exp_kernel, linear_cross_entropy, linear_topk_kl, row_kernel
from kernels.common import DIVERGENCES, TAILS
from tests.helpers import assert_close
from tests.test_kernels import plain, problem

MODES = [("ghost", kind) for kind in DIVERGENCES] + [(tail, "forward_kl") for tail in TAILS[1:] if tail != "smooth"]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: Triton's interpreter is off")
DEVICES = [pytest.param("cpu", marks=interpreted), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks even of a small vocabulary, the last one ragged."""
    if not torch.cuda.is_available():
        small = {(4, True): (16, 16, 16, 4, 2), (4, False): (16, 32, 16, 4, 2)}
        monkeypatch.setattr(exp_kernel, "TUNING", small)
        monkeypatch.setattr(row_kernel, "TUNING", ((2**40, 16, 4),))


def losses(hidden, weight, up, **options):
    """Every field, and both gradients, in fp64."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = linear_topk_kl(hidden, weight, **options)
    return [part.detach().double() for part in (*out, *torch.autograd.grad(out.loss, (hidden, weight), up.to(out.loss)))]


def both(N, D, V, K, T, scale, device, edit=lambda *parts: None, **options):
    """What path 2, plain fp32 code (the chunked torch backend) and the fp64 reference say of one problem."""
    hidden, weight, ids, log_probs, log_norm, labels = problem(N, D, V, K, T, torch.float32)
    hidden = hidden * scale
    edit(hidden, ids, log_probs, labels)
    hidden, weight, ids, log_probs, log_norm, labels = (
        part.to(device) for part in (hidden, weight, ids, log_probs, log_norm, labels)
    )
    labels = labels if options.pop("with_labels") else None
    options |= {"ids": ids, "labels": labels, "temperature": T, "kl_weight": 0.7 if labels is not None else 1.0}
    up = torch.tensor(1.7, device=device)
    narrow = {"log_probs": log_probs, "log_norm": log_norm} | options
    wide = narrow | {"log_probs": log_probs.double(), "log_norm": log_norm.double()}
    ours = losses(hidden, weight, up, **narrow, backend="triton", _path=2, _rows=3)
    plainly = losses(hidden, weight, up, **narrow, backend="torch")
    exact = losses(hidden.double(), weight.double(), up, **wide, backend="reference")
    return ours, plainly, exact


def agree(ours, plainly, exact, rtol=2e-4):
    """Within rtol (the difference total - S is trusted to a thousandth of it), or twice what plain fp32 code loses."""
    for mine, theirs, true in zip(ours, plainly, exact, strict=True):
        assert mine.isfinite().all()
        assert (mine - true).norm() <= max(rtol * true.norm(), 2 * (theirs - true).norm(), 1e-9)


def troubled(hidden, ids, log_probs, labels):
    ids[0, 2] = ids[0, 0]  # a duplicate
    ids[1, 1:3], ids[2, :], ids[3, :] = -1, -1, ids[3, 0]  # empty slots, an empty row, one id alone
    log_probs[4, 1] = -math.inf
    labels[5], labels[6] = -100, ids[6, 1]
    hidden[5] = math.nan  # an ignored row may hold anything


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("T, with_labels", [(1.0, True), (1.0, False), (2.0, False)])
@pytest.mark.parametrize("tail, kind", MODES)
def test_path_2_is_the_same_loss(tail, kind, T, with_labels, device):
    for scale in (1.0, 40.0):  # at 40 most rows leave the range of exp(z/T - m) and are done anew
        edit = troubled if with_labels else lambda hidden, *rest: None
        agree(*both(7, 20, 37, 5, T, scale, device, edit, tail=tail, divergence=kind, with_labels=with_labels))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_that_leave_the_range_of_path_2(device):
    """A tail 2,000 nats below S, or above it; S itself spread over 200."""
    hidden, weight, ids, log_probs, _, labels = (part.to(device) for part in problem(4, 4, 40, 3, dtype=torch.float32))
    hidden[:] = torch.tensor([1.0, 0, 0, 0])
    for far, spread in ((2000.0, 100.0), (60.0, 0.0), (-2000.0, 0.0)):
        weight[:, 0] = -far
        ids[:] = torch.tensor([3, 30, 17], device=device)
        weight[[3, 30, 17], 0] = torch.tensor([0.0, spread, -spread], device=device)
        labels[:] = torch.tensor([3, 17, 5, 30], device=device)
        results = []
        for backend, path, cast in (("triton", 2, torch.float32), ("reference", None, torch.float64)):
            a, b = hidden.to(cast, copy=True).requires_grad_(), weight.to(cast, copy=True).requires_grad_()
            out = linear_topk_kl(a, b, ids, log_probs.to(cast), labels=labels, kl_weight=0.5, backend=backend, _path=path)
            results.append([part.double() for part in (*out, *torch.autograd.grad(out.loss, (a, b)))])
        for mine, true in zip(*results, strict=True):
            assert (mine - true).norm() <= 1e-4 * true.norm() + 1e-7


@pytest.mark.parametrize("device", DEVICES)
def test_cross_entropy_by_path_2_and_what_is_not_needed(device):
    hidden, weight, _, _, _, labels = (part.to(device) for part in problem(9, 20, 50, 1, dtype=torch.float32))
    labels[::4] = -100
    want = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    exact = torch.autograd.grad(torch.nn.functional.cross_entropy(a @ b.T, labels), (a, b))
    for need in ((True, True), (True, False), (False, True)):
        pair = [part.clone().requires_grad_(wanted) for part, wanted in zip((hidden, weight), need, strict=True)]
        out = linear_cross_entropy(*pair, labels, backend="triton", _path=2, _rows=4)
        assert_close(out.loss.detach(), want, rtol=1e-5)
        out.loss.backward()
        for part, wanted, true in zip(pair, need, exact, strict=True):
            assert (part.grad is not None) == wanted
            if wanted:
                assert_close(part.grad, true, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_of_path_2(device):
    hidden, weight, ids, log_probs, _, labels = (part.to(device) for part in problem(5, 20, 37, 4, dtype=torch.float32))
    found = []
    for strided in (False, True):
        pair = [(part.t().contiguous().t() if strided else part.clone()).requires_grad_() for part in (hidden, weight)]
        loss = linear_topk_kl(*pair, ids, log_probs, labels=labels, kl_weight=0.5, backend="triton", _path=2).loss
        found.append([loss.detach(), *torch.autograd.grad(loss, pair)])
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_an_ignore_index_beyond_the_vocabulary(device):
    hidden, weight, _, _, _, labels = (part.to(device) for part in problem(6, 20, 37, 1, dtype=torch.float32))
    labels[::2] = 99
    hidden.requires_grad_()
    out = linear_cross_entropy(hidden, weight, labels, ignore_index=99, backend="triton", _path=2)
    assert_close(out.loss.detach(), torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=99).detach())
    assert torch.autograd.grad(out.loss, hidden)[0][::2].abs().max() == 0


@triton.jit
def rounding_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    places = tl.arange(0, BLOCK)
    tl.store(out_ptr + places, exp_kernel.rounded(tl.load(in_ptr + places), DTYPE))


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_by_bits_is_bf16s(device):
    """Each value to a nearest bf16 number, halves either way; zero, the largest, inf and NaN too."""
    values = torch.randn(1024, device=device).exp() * 10.0 ** torch.randint(-35, 35, (1024,), device=device)
    values[:5] = torch.tensor([0.0, math.inf, math.nan, 3.4e38, 1.00390625], device=device)
    found = torch.empty_like(values)
    rounding_kernel[(1,)](values, found, BLOCK=1024, DTYPE=tl.bfloat16)
    assert torch.equal(found.bfloat16().float().nan_to_num(7), found.nan_to_num(7))  # bf16 numbers all
    want = values.bfloat16().float()
    assert found[2].isnan() and torch.equal(found.isinf(), want.isinf())
    finite = want.isfinite()
    assert torch.equal((found - values)[finite].abs(), (want - values)[finite].abs())


@pytest.mark.gpu
@pytest.mark.parametrize("path", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_bf16_on_tensor_cores_is_within_twice_plain_pytorchs_error(path, scale):
    hidden, weight, ids, log_probs, _, labels = problem(300, 256, 5003, 17)
    pair = [(part * factor).bfloat16().cuda() for part, factor in ((hidden, scale), (weight, 0.06))]
    ids, labels, log_probs = ids.cuda(), labels.cuda(), log_probs.cuda()
    found = []
    for dtype, run in ((torch.float64, None), (torch.bfloat16, plain), (torch.bfloat16, None)):
        a, b = (part.to(dtype).requires_grad_() for part in pair)
        options = {"backend": "reference"} if dtype == torch.float64 else {"backend": "triton", "_path": path}
        loss = (
            run(a, b, ids, log_probs.float(), labels)
            if run
            else linear_topk_kl(a, b, ids, log_probs.to(dtype), labels=labels, kl_weight=0.5, **options).loss
        )
        found.append([part.double() for part in (loss.detach(), *torch.autograd.grad(loss, (a, b)))])
    for exact, plainly, ours in zip(*found, strict=True):
        assert (ours - exact).norm() <= max(2 * (plainly - exact).norm(), 1e-6 * exact.norm())
        assert (ours - exact).norm() <= 5e-3 * exact.norm()


def test_every_row_of_the_tuning_tables_serves():
    """Tables are read by the first row that holds: none may be unreachable, and the last must hold for all."""
    topk = importlib.import_module("kernels.linear_topk")
    for table in (row_kernel.TUNING, exp_kernel.PATHS, topk.TUNING):
        bounds = [row[0] for row in table]
        assert bounds == sorted(set(bounds))
    assert row_kernel.TUNING[-1][0] >= 2**40 and exp_kernel.PATHS[-1][0] >= 2**31


class Student(torch.nn.Module):
    """Hidden states, head and loss in one module: what DDP wraps."""

    def __init__(self):
        super().__init__()
        self.trunk, self.head = torch.nn.Linear(6, 12), torch.nn.Linear(12, 37, bias=False)

    def forward(self, x, ids, log_probs, labels):
        hidden = self.trunk(x)
        options = {"labels": labels, "kl_weight": 0.5, "reduction": "sum", "backend": "triton"}
        return linear_topk_kl(hidden, self.head.weight, ids, log_probs, **options).loss


def ddp_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(0)
    student, (_, _, ids, log_probs, _, labels) = Student(), problem(8, 4, 37, 5, dtype=torch.float32)
    x, wrapped = torch.randn(8, 6), torch.nn.parallel.DistributedDataParallel(student)
    for turn in range(2):  # accumulation: the first half is not synchronised
        rows = slice(4 * rank + 2 * turn, 4 * rank + 2 * turn + 2)
        with wrapped.no_sync() if turn == 0 else contextlib.nullcontext():
            (wrapped(x[rows], ids[rows], log_probs[rows], labels[rows]) * 2).backward()  # DDP averages over 2 ranks
    if rank == 0:
        torch.save([part.grad for part in student.parameters()], f"{folder}/gradients.pt")
    torch.distributed.barrier()
    os._exit(0)  # as conf/cli.py's ranks: gloo's threads may abort an interpreter that ends (pytorch/pytorch#179291)


@interpreted
def test_two_ranks_that_accumulate_are_one_process(tmp_path):
    torch.multiprocessing.spawn(ddp_rank, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    student, (_, _, ids, log_probs, _, labels) = Student(), problem(8, 4, 37, 5, dtype=torch.float32)
    student(torch.randn(8, 6), ids, log_probs, labels).backward()
    for part, theirs in zip(student.parameters(), torch.load(tmp_path / "gradients.pt"), strict=True):
        assert_close(theirs, part.grad, rtol=1e-5, atol=1e-6)
