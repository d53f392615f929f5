"""The losses as PyTorch's citizens: fakes, compilers, autograd, memory, autocast, layouts, DDP.

Also `linear_log_probs`, whose gradients are its users' own.
"""

import contextlib
import math
import mmap
import os
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import (
    chunks,
    linear_full_kl,
    linear_log_probs,
    linear_topk_kl,
    log_probs,
    losses,
    topk_kl,
    torch_loss,
    triton_dense,
    triton_loss,
)
from kernels.checks import LossSpec
from tests import kernel_cases as cases
from tests.helpers import assert_close
from tests.kernel_cases import (
    NUM_FIELDS,
    REFERENCE,
    check,
    problem,
    run,
    traps,
)

fp32_targets = pytest.mark.parametrize("target", cases.FP32)
triton_targets = pytest.mark.parametrize("target", cases.TRITON)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES])
aten = torch.ops.aten

# Every op as a scalar of hidden states and a head.


def topk(hidden, weight, case, **options):
    targets = case.ids, case.log_probs
    options = {
        "labels": case.labels,
        "kl_weight": 0.5,
        **options,
    }
    return linear_topk_kl(hidden, weight, *targets, **options).loss.sum()


def rows(hidden, weight, case, **options):
    return topk(hidden, weight, case, reduction="none", **options)


def of_logits(hidden, weight, case, **options):
    z = hidden @ weight.T
    options |= {"labels": case.labels, "tail": "smooth", "softcap": 9.0}
    return topk_kl(z, case.ids, case.log_probs, **options).loss


def of_whole_logits(hidden, weight, case, **options):
    z = hidden @ weight.T
    options |= {"labels": case.labels, "divergence": "jsd"}
    return topk_kl(z, None, torch.zeros_like(case.logits), **options).loss


def full(hidden, weight, case, **options):
    teacher = (
        case.hidden,
        case.weight.flip(0),
    )
    labels = {"labels": case.labels, "kl_weight": 0.5}
    return linear_full_kl(hidden, weight, *teacher, **labels, **options).loss


def chosen(hidden, weight, case, **options):
    log_p, lse = linear_log_probs(hidden, weight, case.ids, softcap=9.0, **options)
    return log_p.sum() + lse.sum()


OPS = [topk, rows, of_logits, of_whole_logits, full, chosen]
CHUNKED = [topk, rows, full, chosen]
all_ops = pytest.mark.parametrize("op", OPS)


def student(case, target):
    """hidden and weight with a gradient, and all else as the target takes it."""
    leaves = [part.to(target.device, target.dtype, copy=True) for part in case[:2]]
    return [part.requires_grad_() for part in leaves], case.on(target)


def loss_and_gradients(op, case, target, **options):
    leaves, case = student(case, target)
    loss = op(*leaves, case, backend=target.backend, **options)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, leaves),
    ]


def as_leaf(argument):
    """A tensor detached, and without a gradient in the backward pass."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad and torch.is_grad_enabled())


def calls_of(op, case, target):
    """The custom ops that a loss and its backward call, with their arguments."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (losses, "fused_loss_op"),
            (log_probs, "log_probs_op"),
            (log_probs, "log_probs_backward_op"),
        ):
            real = getattr(module, name)

            def recorded(*arguments, real=real):
                calls.append((real, list(map(as_leaf, arguments))))
                return real(*arguments)

            patch.setattr(module, name, recorded)
        loss_and_gradients(op, case, target)
    return calls


# Fakes and compilers.


# Not test_aot_dispatch_dynamic: in fp16 the backward scales in place what it compares.
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
)


@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES, torch.float64])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@all_ops
def test_ops_are_registered_as_they_behave(op, backend, dtype, small_blocks):
    """Their fakes' shapes and dtypes, their autograd, and that they change none of their inputs."""
    if backend == "triton" and dtype == torch.float64:
        return
    calls = calls_of(
        op,
        problem(1, V=20),
        cases.Target(backend, dtype=dtype),
    )
    for custom_op, arguments in calls:
        torch.library.opcheck(custom_op, tuple(arguments), test_utils=CHECKS)


def every_op(hidden, weight, case, backend, kl_weight=0.5):
    total = topk(
        hidden,
        weight,
        case,
        backend=backend,
        kl_weight=kl_weight,
    )
    for op in OPS:
        total = total + op(hidden, weight, case, backend=backend)
    return total


def check_compiled(compiled, target, kl_weight=0.5, **sizes):
    results = []
    for function in (every_op, compiled):
        leaves, case = student(problem(**sizes), target)
        loss = function(*leaves, case, target.backend, kl_weight)
        results.append(
            [
                loss.detach(),
                *torch.autograd.grad(loss, leaves),
            ]
        )
    for ours, right in zip(*results, strict=True):
        assert_close(ours, right, rtol=1e-5, atol=1e-5)


COMPILERS = [
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("target", [cases.TORCH_FP32, cases.CUDA])
def test_compiled_ops_equal_eager_ones(target, compiler):
    """Without a graph break, and when sizes and a scheduled kl_weight become symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(every_op, backend=compiler, fullgraph=True)
    check_compiled(compiled, target)
    check_compiled(compiled, target, kl_weight=0.25, N=3, V=20, K=2)


@pytest.mark.slow
@all_dtypes
@fp32_targets
def test_inductors_gradient_of_logits_in_any_dtype(target, dtype):
    """It was NaN in bf16, whose fake said fp32."""
    torch._dynamo.reset()
    case = problem(4, dtype=dtype).on(target)
    results = []
    for compiled in (False, True):
        logits = case.logits.to(dtype).requires_grad_()
        function = torch.compile(topk_kl, fullgraph=True) if compiled else topk_kl
        loss = function(
            logits * 2,
            case.ids,
            case.log_probs,
            backend=target.backend,
        ).loss
        results.append(torch.autograd.grad(loss, logits)[0])
    assert_close(*results, rtol=1e-2, atol=1e-4)


# Streams.


class NoStall(TorchDispatchMode):
    """Refuses what stalls a CUDA stream: the host reads a value, or sends one it has just made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        stalls = func in (
            aten._local_scalar_dense.default,
            aten.lift_fresh.default,
            aten.nonzero.default,
            aten.masked_select.default,
        )
        if func is aten.index.Tensor:
            stalls = any(index.dtype == torch.bool for index in args[1] if index is not None)
        assert not stalls, f"{func} stalls the stream"
        return func(*args, **(kwargs or {}))


@all_dtypes
@all_ops
def test_host_code_of_the_triton_path_stalls_no_stream(op, dtype, monkeypatch):
    """Launches and a CPU's range checks are left out."""
    calls = calls_of(
        op,
        problem(2, V=20),
        cases.Target("triton", dtype=dtype),
    )
    monkeypatch.setattr("kernels.checks.check_range", MagicMock())
    for name in (
        "loss_kernel",
        "log_probs_kernel",
        "log_probs_grad_kernel",
    ):
        monkeypatch.setattr(triton_loss, name, MagicMock())
    monkeypatch.setattr(triton_dense, "dense_kernel", MagicMock())
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, None)
    for custom_op, arguments in calls:
        with torch.no_grad(), NoStall():
            custom_op._init_fn(*arguments)


@pytest.mark.gpu
@all_dtypes
@all_ops
def test_no_op_stalls_a_stream(op, dtype):
    target = cases.Target("triton", "cuda", dtype)
    leaves, case = student(problem(), target)
    op(*leaves, case, backend="triton").backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*leaves, case, backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Autograd.


@all_ops
@fp32_targets
def test_a_second_backward_works_or_raises(target, op, small_blocks):
    leaves, case = student(problem(2, V=20), target)
    loss = op(*leaves, case, backend=target.backend)
    first = [part.clone() for part in torch.autograd.grad(loss, leaves, retain_graph=True)]
    for factor in (1, 3, 3):
        try:
            again = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        except RuntimeError as error:
            assert factor == 3 or target.device == "cuda"  # there every backward works in place
            assert "modified by an inplace operation" in str(error)
            continue
        for one, other in zip(first, again, strict=True):
            assert_close(other, factor * one, atol=1e-6)
    loss = op(*leaves, case, backend=target.backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@all_ops
@fp32_targets
def test_only_what_is_needed_is_made(target, op, small_blocks):
    leaves, case = student(problem(2, V=20), target)
    both = torch.autograd.grad(op(*leaves, case, backend=target.backend), leaves)
    for place in (0, 1):
        inputs = [part.detach().requires_grad_(place == at) for at, part in enumerate(leaves)]
        loss = op(*inputs, case, backend=target.backend)
        assert_close(
            torch.autograd.grad(loss, inputs[place])[0],
            both[place],
        )
    with torch.no_grad():
        assert not op(*leaves, case, backend=target.backend).requires_grad


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@fp32_targets
def test_an_upstream_gradient_that_is_no_number_stays_in_its_row(target, wrong, small_blocks):
    upstream = torch.tensor([1.0, wrong, 1.0])
    for op in (topk_kl, linear_topk_kl):
        gradients = run(
            op,
            problem(3, V=20),
            target,
            reduction="none",
            upstream=upstream,
        )
        bad = gradients[NUM_FIELDS].isfinite().logical_not()
        assert bad[1].all() and not bad[[0, 2]].any()
    assert not gradients[-1].isfinite().any()


@pytest.mark.parametrize("dtype", cases.HALVES)
@all_ops
@pytest.mark.parametrize("target", [*cases.FP32, cases.Target("reference")])
def test_autocast_takes_its_own_dtype(target, op, dtype, small_blocks):
    case = problem(2, V=20, dtype=dtype)
    narrow = target._replace(dtype=dtype)
    by_hand = loss_and_gradients(op, case, narrow)
    with torch.autocast(target.device, dtype):
        ours = loss_and_gradients(op, case, target)
    assert_close(ours[0], by_hand[0], rtol=1e-6)
    for mine, right in zip(ours[1:], by_hand[1:], strict=True):
        assert mine.dtype == torch.float32 and right.dtype == dtype
        assert_close(mine, right.float(), rtol=2e-2, atol=1e-3)


class Student(torch.nn.Module):
    """Hidden states, head and loss in one module: what DDP wraps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 37, bias=False)

    def forward(self, case):
        hidden = self.trunk(case.hidden)
        return topk(hidden, self.head.weight, case, reduction="sum")


def ddp_rank(rank, folder):
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
    student = Student()
    wrapped = torch.nn.parallel.DistributedDataParallel(student)
    case = problem(8).on(cases.Target("torch"))
    for turn in range(2):  # the first half is accumulated and not synchronised
        start = 4 * rank + 2 * turn
        with wrapped.no_sync() if turn == 0 else contextlib.nullcontext():
            loss = wrapped(case.rows(slice(start, start + 2)))
            (2 * loss).backward()  # DDP averages over the ranks
    if rank == 0:
        gradients = [part.grad for part in student.parameters()]
        torch.save(gradients, f"{folder}/gradients.pt")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that ends (pytorch/pytorch#179291)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="two processes of the interpreter's machine",
)
def test_two_ranks_that_accumulate_are_one_process(tmp_path):
    folder = str(tmp_path)
    torch.multiprocessing.spawn(ddp_rank, (folder,), nprocs=2)  # a fork would lack OpenMP's threads
    student = Student()
    student(problem(8).on(cases.Target("torch"))).backward()
    gradients = torch.load(tmp_path / "gradients.pt")
    for part, ours in zip(student.parameters(), gradients, strict=True):
        assert_close(ours, part.grad, rtol=1e-5, atol=1e-6)


# Memory.


class Watched(TorchDispatchMode):
    """The largest storage that an operation returns, the largest new one, the matrix products."""

    def __init__(self):
        super().__init__()
        self.largest = self.largest_new = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (
            aten.mm,
            aten.addmm,
        )
        known = {part.untyped_storage().data_ptr() for part in args if isinstance(part, Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and func.namespace == "aten":
                storage = tensor.untyped_storage()
                self.largest = max(self.largest, storage.nbytes())
                if storage.data_ptr() not in known:
                    self.largest_new = max(self.largest_new, storage.nbytes())
        return out


@pytest.fixture
def inside(monkeypatch):
    """A `Watched` of what the ops do inside: a mode around a custom op sees the op alone."""
    monkeypatch.setattr(chunks.SCRATCH, "tiles", {})
    watched = Watched()
    computing = losses.computing

    @contextlib.contextmanager
    def computing_watched(like):
        with computing(like), watched:
            yield

    monkeypatch.setattr(losses, "computing", computing_watched)
    monkeypatch.setattr(log_probs, "computing", computing_watched)
    return watched


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize("target", [cases.TORCH_FP32, cases.INTERPRETER])
def test_logits_never_exist_whole(target, op, needs, inside, chunks_of):
    """A tile, and no product for a gradient that nobody needs."""
    chunks_of(2)
    leaves, case = student(problem(6, 4, 300), target)
    inputs = [part.detach().requires_grad_(need) for part, need in zip(leaves, needs, strict=True)]
    op(*inputs, case, backend=target.backend).backward()
    d_weight = 4 * 300 * 4
    assert inside.largest == d_weight
    makes_logits = 1 if op is topk else 2
    assert inside.products == 3 * (makes_logits + sum(needs))


def test_the_backward_hands_the_gradient_over():
    """No zeros for outputs that need no gradient, and no copy of d_weight."""
    leaves, case = student(problem(128, 8, 3000), cases.Target("torch"))
    loss = topk(*leaves, case)
    with Watched() as seen:
        torch.autograd.grad(loss, leaves)
    assert seen.largest_new < leaves[0].nbytes


@pytest.mark.parametrize("V", [257, 50257, 151_936, 262_144])
def test_scratch_on_a_cpu_stays_within_256_mib(V):
    rows = chunks.chunk_rows(65_536, 4 * V, torch.device("cpu"))
    assert rows * V * 4 <= 136 * 2**20 + 4 * V


@pytest.fixture
def poison(monkeypatch):
    """Call it, and fresh memory holds NaN, or in integers a number that is no id."""

    def poisoned(make):
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(math.nan if tensor.is_floating_point() else 2**30)

        return made

    def start():
        monkeypatch.setattr(chunks.SCRATCH, "tiles", {})
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
        monkeypatch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))

    return start


@all_ops
@fp32_targets
def test_unwritten_memory_would_show(target, op, small_blocks, poison, chunks_of):
    """The same bits, whatever fresh memory held."""
    chunks_of(2)
    case = traps().rows([1, 2, 4])
    case = case._replace(
        hidden=case.hidden.nan_to_num(0.0),
        log_probs=case.log_probs.nan_to_num(0.0),
    )
    before = loss_and_gradients(op, case, target)
    poison()
    after = loss_and_gradients(op, case, target)
    assert all(map(torch.equal, after, before))


@all_ops
@fp32_targets
def test_inputs_in_any_layout_stay_as_they_are(target, op, small_blocks):
    """Columns and every second number of wider tensors, read right and left alone."""
    right = loss_and_gradients(op, problem(V=20), target)
    leaves, case = student(problem(V=20), target)
    strided = [part.detach().repeat_interleave(2, dim=-1)[..., ::2] for part in (*leaves, *case)]
    before = [part.clone() for part in strided]
    leaves = [part.requires_grad_() for part in strided[:2]]
    loss = op(
        *leaves,
        cases.Case(*strided[2:]),
        backend=target.backend,
    )
    ours = [
        loss.detach(),
        *torch.autograd.grad(loss, leaves),
    ]
    for mine, theirs in zip(ours, right, strict=True):
        assert_close(mine, theirs, atol=1e-6)
    assert all(map(torch.equal, strided, before))


def layouts(logits):
    """The same logits [N,V] as callers have them, and the memory that holds them."""
    N, V = logits.shape
    wide = logits.new_full((2 * N, V + 5), math.nan)
    odd = logits.new_full((N * V + 8,), math.nan)
    guarded = logits.new_full((N + 16, V), math.nan)
    columns = torch.empty_like(logits.T.contiguous())
    views = [
        (columns, columns.T),
        (wide, wide[::2, 3 : 3 + V]),
        (odd, odd[1 : 1 + N * V].view(N, V)),
        (guarded, guarded[8:-8]),
    ]
    for memory, view in views:
        view.copy_(logits)
        yield memory, view


@pytest.mark.parametrize("V, dtype", [(37, torch.bfloat16), (40, torch.float32)])
@fp32_targets
def test_logits_in_any_layout_stay_as_they_are(target, V, dtype, small_blocks):
    """Bit for bit, in every row and around them, with a gradient and without."""
    case = traps(1.0, V).rows([1, 4, 5])
    case.logits[0, 3] = -0.0
    case.logits[0, 5] = -math.inf
    case = case.on(target)
    logits = case.logits.to(dtype)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    results = []
    for memory, view in [(logits, logits), *layouts(logits)]:
        before = memory.view(bits).clone()
        z = view.detach().requires_grad_()
        options = {
            "labels": case.labels,
            "softcap": 9.0,
            "backend": target.backend,
        }
        loss = topk_kl(
            z,
            case.ids,
            case.log_probs,
            reduction="none",
            **options,
        ).loss
        results.append([loss, *torch.autograd.grad(loss.sum(), z)])
        assert torch.equal(memory.view(bits), before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def far_apart(device, dtype):
    """Rows of 64 logits, 2^30 elements apart: the last begins 2^31 elements after the first.

    They lie in the second half of memory that nothing else touches (on a CPU only touched pages
    exist): an offset that wraps finds the zeros of the first half.
    """
    if device == "cpu":
        no_reserve = 0x4000
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        memory = mmap.mmap(-1, (2**32 + 64) * dtype.itemsize, flags=flags)
        memory = torch.frombuffer(memory, dtype=dtype)
    else:
        memory = torch.empty(2**32 + 64, dtype=dtype, device=device)
        memory[:64] = 0
    return memory.as_strided((3, 64), (2**30, 1), 2**31).copy_(torch.randn(3, 64))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@triton_targets
def test_rows_more_than_two_to_the_31_elements_apart(target, dtype, whole):
    z = far_apart(target.device, dtype)
    case = cases.on_support(z.cpu().double(), 4, 0.75)
    scores = case.logits.flip(0)
    tensors = [scores, None] if whole else [case.ids, case.log_probs]
    tensors = [target.move(part) for part in (*tensors, case.labels, torch.ones(3))]
    fields = torch.empty(3, 5, device=target.device)
    spec = LossSpec(kl_weight=0.5)
    if whole:
        triton_dense.dense_losses(
            z,
            torch_loss.DenseTargets(*tensors),
            spec,
            fields,
            z,
        )
        sources = [None, scores.log_softmax(1)]
    else:
        targets = torch_loss.Targets(*tensors)
        triton_loss.sparse_losses(z, targets, spec, fields, None, keep_logits=True)
        assert torch.equal(z.cpu().double(), case.logits)
        triton_loss.sparse_losses(z, targets, spec, fields, z)
        sources = [case.ids, case.log_probs]
    options = {
        "labels": case.labels,
        "kl_weight": 0.5,
        "reduction": "none",
    }
    options["upstream"] = torch.ones(3)
    exact = cases.differentiate(topk_kl, [case.logits], sources, REFERENCE, **options)
    check([*fields.T], exact[:NUM_FIELDS], target)
    cases.check_rounded(z, exact[-1], target._replace(dtype=dtype))


# linear_log_probs.


def plain_log_probs(case, ids, T=1.0, softcap=None, dtype=torch.float64):
    """log_probs [N,K] and lse [N] in plain PyTorch, and the leaves that they depend on."""
    leaves = [part.to(dtype).requires_grad_() for part in case[:2]]
    z = leaves[0] @ leaves[1].T
    z = z.double() if dtype == torch.float64 else z.float()
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    log_p = (z / T).log_softmax(1).gather(1, ids.clamp(min=0))
    return leaves, [log_p * (ids >= 0), (z / T).logsumexp(1)]


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("T, softcap", [(1.0, None), (2.0, 5.0), (0.1, None)])
@fp32_targets
def test_log_probs_and_their_gradients(target, T, softcap, used, small_blocks, chunks_of):
    """Equal ids read alike and their slopes add; an empty slot reads 0 and sends nothing."""
    chunks_of(3)
    case = problem(4, 6, 37, 5, T)
    ids = case.ids.clone()
    ids[0, 2] = ids[0, 0]
    ids[1, 4] = -5
    ids[2] = ids[2, 0]
    ids[3] = -1
    slopes = [
        torch.randn(4, 5).double(),
        torch.randn(4).double(),
    ]

    def with_gradients(leaves, outputs):
        total = sum((outputs[place].double().cpu() * slopes[place]).sum() for place in used)
        return [
            *(part.detach() for part in outputs),
            *torch.autograd.grad(total, leaves),
        ]

    exact = with_gradients(*plain_log_probs(case, ids, T, softcap))
    leaves, _ = student(case, target)
    options = {"temperature": T, "softcap": softcap, "backend": target.backend}
    ours = with_gradients(
        leaves,
        linear_log_probs(*leaves, ids.to(target.device), **options),
    )
    assert (ours[0].cpu()[ids < 0] == 0).all()
    for mine, right in zip(ours, exact, strict=True):
        floor = 2e-6 * (1 + right.abs().max().item())
        assert_close(mine.cpu(), right.float(), atol=floor)


@pytest.mark.parametrize("dtype", cases.HALVES)
@fp32_targets
def test_log_probs_error_is_at_most_twice_plain_pytorchs(target, dtype, small_blocks):
    case = problem(4, 32, 137, 8, dtype=dtype)
    results = []
    for kind in (None, dtype, torch.float64):
        if kind is None:
            leaves, _ = student(case, target._replace(dtype=dtype))
            ours = linear_log_probs(
                *leaves,
                case.ids.to(target.device),
                backend=target.backend,
            )
        else:
            leaves, ours = plain_log_probs(case, case.ids, dtype=kind)
        gradients = torch.autograd.grad(ours[0].sum() + ours[1].sum(), leaves)
        results.append([*(part.detach() for part in ours), *gradients])
    cases.no_worse(*results)


@fp32_targets
def test_one_row_expanded_over_many(target, small_blocks):
    """Stride 0: each program has a row of its own to write in."""
    case = problem(3, V=20).on(target)
    gradients = []
    for rows in (
        case.logits[:1].expand(3, 20),
        case.logits[:1].repeat(3, 1),
    ):
        z = rows.detach().requires_grad_()
        loss = topk_kl(
            z,
            case.ids,
            case.log_probs,
            backend=target.backend,
        ).loss
        gradients += torch.autograd.grad(loss, z)
    assert torch.equal(*gradients)


@fp32_targets
def test_small_slopes_of_log_probs_do_not_vanish_in_fp16(
    target,
):
    """2^-17 of a probability of 1/300 is below fp16's least number: it goes on the sums."""
    case = problem(4, 16, 300, 4, dtype=torch.float16)
    leaves, case = student(case, target)
    with torch.autocast(target.device, torch.float16):
        _, lse = linear_log_probs(
            leaves[0] / 16,
            leaves[1],
            case.ids,
            backend=target.backend,
        )
    right = torch.autograd.grad(lse.sum(), leaves, retain_graph=True)
    small = torch.autograd.grad(2.0**-17 * lse.sum(), leaves)
    for one, other in zip(right, small, strict=True):
        assert (other * 2.0**17 - one).norm() < 1e-3 * one.norm()


@pytest.mark.parametrize("target", cases.FP32)
def test_many_slopes_of_log_probs_stay_within_fp16(target):
    """500 slopes over T = .005 add up to more than fp16 holds: it goes on the sums."""
    case = problem(2, 16, 600, 500, dtype=torch.float16)
    hidden, weight = (part.to(target.device, torch.float16) for part in case[:2])
    hidden.requires_grad_()
    log_probs, _ = linear_log_probs(
        hidden,
        weight,
        case.ids.to(target.device),
        temperature=0.005,
        backend=target.backend,
    )
    (log_probs.sum() / 2**14).backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().max() > 0


def test_transposed_logits_are_registered_as_they_behave():
    """The gradient is contiguous, as the fake says, whatever the logits are."""
    logits = torch.randn(20, 4).t().requires_grad_()
    teacher = [
        torch.tensor([[1, 2]] * 4),
        torch.full((4, 2), -1.0),
        *[None] * 5,
    ]
    options = ["torch", torch.float32, [True, False]]
    torch.library.opcheck(
        torch.ops.nanodistill.loss,
        (logits, None, *teacher, *LossSpec(), *options),
        test_utils="test_faketensor",
    )
