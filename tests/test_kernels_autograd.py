"""The ops as PyTorch's citizens: fakes, compilers, autograd, autocast, memory, layouts.

Also `linear_log_probs`, whose gradients are its users' own.
"""

import contextlib
import math
import mmap
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import (
    chunks,
    linear_full_kl,
    linear_log_probs,
    linear_sample,
    linear_topk,
    linear_topk_kl,
    log_probs,
    losses,
    sample,
    topk,
    topk_kl,
    triton_dense,
    triton_loss,
)
from tests import kernel_cases as cases
from tests.helpers import assert_close
from tests.kernel_cases import NUM_FIELDS, problem, run, traps

fp32_targets = pytest.mark.parametrize("target", cases.FP32)
all_dtypes = pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES])
aten = torch.ops.aten

# Every loss as a scalar of hidden states and a head.


def sparse(hidden, weight, case, **options):
    options = {
        "labels": case.labels,
        "kl_weight": 0.5,
        **options,
    }
    targets = case.ids, case.log_probs
    return linear_topk_kl(hidden, weight, *targets, **options).loss.sum()


def rows(hidden, weight, case, **options):
    return sparse(hidden, weight, case, reduction="none", **options)


def of_columns(hidden, weight, case, **options):
    """Of transposed logits: their gradient is contiguous all the same."""
    z = (weight @ hidden.T).T
    options |= {"labels": case.labels, "tail": "smooth", "softcap": 9.0}
    return topk_kl(z, case.ids, case.log_probs, **options).loss


def of_whole_logits(hidden, weight, case, **options):
    z = hidden @ weight.T
    options |= {"labels": case.labels, "divergence": "jsd"}
    log_p = torch.zeros_like(case.logits)
    return topk_kl(z, None, log_p, **options).loss


def full(hidden, weight, case, **options):
    teacher = (
        case.hidden.to(hidden.dtype),
        case.weight.flip(0).to(hidden.dtype),
    )
    options |= {"labels": case.labels, "kl_weight": 0.5}
    return linear_full_kl(hidden, weight, *teacher, **options).loss


def chosen(hidden, weight, case, **options):
    log_p, lse = linear_log_probs(hidden, weight, case.ids, softcap=9.0, **options)
    return log_p.sum() + lse.sum()


CHUNKED = [sparse, rows, full, chosen]
OPS = [*CHUNKED, of_columns, of_whole_logits]
all_ops = pytest.mark.parametrize("op", OPS)


def everything(hidden, weight, case, backend, kl_weight=0.5):
    """The sum of all ops, the teacher's too."""
    K = case.ids.shape[1]
    _, likeliest, _ = linear_topk(hidden, weight, K, backend=backend)
    _, drawn = linear_sample(
        hidden,
        weight,
        K,
        seed=K,
        exclude=case.ids,
        backend=backend,
    )
    inputs = hidden, weight, case
    total = sparse(*inputs, backend=backend, kl_weight=kl_weight)
    total = total + likeliest.sum() + drawn.sum()
    return total + sum(op(*inputs, backend=backend) for op in OPS)


def student(case, target):
    """hidden and weight with a gradient, and all else as the target takes it."""
    leaves = [part.to(target.device, target.dtype, copy=True) for part in case[:2]]
    return [part.requires_grad_() for part in leaves], case.on(target)


def with_gradients(op, leaves, case, target, **options):
    loss = op(*leaves, case, backend=target.backend, **options)
    return [
        loss.detach(),
        *torch.autograd.grad(loss, leaves),
    ]


def loss_and_gradients(op, case, target, **options):
    return with_gradients(op, *student(case, target), target, **options)


def all_close(ours, right, **tolerances):
    for mine, theirs in zip(ours, right, strict=True):
        assert_close(mine, theirs, **tolerances)


def as_leaf(argument):
    """A tensor detached, and without a gradient in the backward pass."""
    if not isinstance(argument, Tensor):
        return argument
    return argument.detach().requires_grad_(argument.requires_grad and torch.is_grad_enabled())


CUSTOM_OPS = [
    (losses, "fused_loss_op"),
    (log_probs, "log_probs_op"),
    (log_probs, "log_probs_backward_op"),
    (topk, "topk_op"),
    (sample, "sample_op"),
]


def calls_of_custom_ops(target):
    """With their arguments, in the forward and in the backward pass."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for module, name in CUSTOM_OPS:
            real = getattr(module, name)

            def recorded(*arguments, real=real):
                calls.append((real, tuple(map(as_leaf, arguments))))
                return real(*arguments)

            patch.setattr(module, name, recorded)
        loss_and_gradients(everything, problem(2, V=20), target)
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
def test_ops_are_registered_as_they_behave(backend, dtype, small_blocks):
    """Their fakes' shapes and dtypes, their autograd, and that they change none of their inputs."""
    if backend == "triton" and dtype == torch.float64:
        return
    target = cases.Target(backend, dtype=dtype)
    for custom_op, arguments in calls_of_custom_ops(target):
        torch.library.opcheck(custom_op, arguments, test_utils=CHECKS)


COMPILERS = [
    "eager",
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("target", [cases.TORCH_FP32, cases.CUDA])
def test_compiled_ops_equal_eager_ones(target, compiler):
    """Without a graph break, and when sizes and a scheduled kl_weight become symbols."""
    torch._dynamo.reset()
    compiled = torch.compile(everything, backend=compiler, fullgraph=True)
    for case, kl_weight in (
        (problem(), 0.5),
        (problem(3, V=20, K=2), 0.25),
    ):
        right = loss_and_gradients(everything, case, target, kl_weight=kl_weight)
        ours = loss_and_gradients(compiled, case, target, kl_weight=kl_weight)
        all_close(ours, right, rtol=1e-5, atol=1e-5)


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
def test_host_code_of_the_triton_path_stalls_no_stream(dtype, monkeypatch):
    """Launches and a CPU's range checks are left out."""
    target = cases.Target("triton", dtype=dtype)
    calls = calls_of_custom_ops(target)
    monkeypatch.setattr("kernels.checks.check_range", MagicMock())
    for module, name in (
        (triton_loss, "loss_kernel"),
        (triton_loss, "log_probs_kernel"),
        (triton_loss, "log_probs_grad_kernel"),
        (triton_dense, "dense_kernel"),
        (topk, "topk_kernel"),
    ):
        monkeypatch.setattr(module, name, MagicMock())
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
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    first = [part.clone() for part in first]
    for factor in (1, 3, 3):
        try:
            again = torch.autograd.grad(factor * loss, leaves, retain_graph=True)
        except RuntimeError as error:
            assert factor == 3 or target.device == "cuda"  # there every backward works in place
            assert "modified by an inplace operation" in str(error)
            continue
        right = [factor * part for part in first]
        all_close(again, right, atol=1e-6)
    loss = op(*leaves, case, backend=target.backend)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@fp32_targets
def test_an_upstream_gradient_that_is_no_number_stays_in_its_row(target, wrong, small_blocks):
    """An ignored row has none."""
    case = problem(3, V=20)
    case.labels[2] = -100
    options = {
        "labels": True,
        "reduction": "none",
        "upstream": torch.tensor([1.0, wrong, wrong]),
    }
    for op in (topk_kl, linear_topk_kl):
        gradients = run(op, case, target, **options)[NUM_FIELDS:]
        bad = ~gradients[0].isfinite()
        assert bad[1].all()
        assert not bad[[0, 2]].any()
    assert not gradients[1].isfinite().any()


@pytest.mark.parametrize("dtype", cases.HALVES)
@all_ops
@pytest.mark.parametrize("target", [*cases.FP32, cases.Target("reference")])
def test_autocast_takes_its_own_dtype(target, op, dtype, small_blocks):
    """It rounds what the caller would have rounded."""
    case = problem(2, V=20)
    narrow = target._replace(dtype=dtype)
    loss, *by_hand = loss_and_gradients(op, case, narrow)
    with torch.autocast(target.device, dtype):
        ours, *gradients = loss_and_gradients(op, case, target)
    assert_close(ours, loss, rtol=1e-6)
    by_hand = [part.float() for part in by_hand]
    all_close(gradients, by_hand, rtol=2e-2, atol=1e-3)


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


NEEDS = [
    (True, True),
    (True, False),
    (False, True),
]


@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize("target", [cases.TORCH_FP32, cases.INTERPRETER])
def test_only_what_is_needed_is_made_and_no_whole_logits(target, op, needs, inside, chunks_of):
    """A tile, and no product for a gradient that nobody needs."""
    chunks_of(2)
    leaves, case = student(problem(6, 4, 300), target)
    both = with_gradients(op, leaves, case, target)[1:]
    for part, need in zip(leaves, needs, strict=True):
        part.requires_grad_(need)
    inside.products = 0
    op(*leaves, case, backend=target.backend).backward()
    d_weight = 4 * 300 * 4
    assert inside.largest == d_weight
    makes_logits = 1 if op is sparse else 2
    assert inside.products == 3 * (makes_logits + sum(needs))
    for part, right in zip(leaves, both, strict=True):
        if part.requires_grad:
            assert_close(part.grad, right)

    inside.products = 0
    with torch.no_grad():
        op(*leaves, case, backend=target.backend)
    assert inside.products == 3 * (2 if op is full else 1)


def test_the_backward_hands_the_gradient_over():
    """No zeros for outputs that need no gradient, and no copy of d_weight."""
    target = cases.Target("torch")
    leaves, case = student(problem(128, 8, 3000), target)
    loss = 2 * sparse(*leaves, case)
    with Watched() as seen:
        torch.autograd.grad(loss, leaves)
    assert seen.largest_new < leaves[0].nbytes


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


# Layouts.


def strided(part):
    """Every second number of a wider tensor."""
    wider = part.detach().repeat_interleave(2, dim=-1)
    return wider[..., ::2]


@all_ops
@fp32_targets
def test_inputs_in_any_layout_stay_as_they_are(target, op, small_blocks):
    leaves, case = student(problem(V=20), target)
    right = with_gradients(op, leaves, case, target)
    leaves = [strided(part).requires_grad_() for part in leaves]
    case = cases.Case(*map(strided, case))
    inputs = [*leaves, *case]
    before = [part.clone() for part in inputs]
    ours = with_gradients(op, leaves, case, target)
    all_close(ours, right, atol=1e-6)
    assert all(map(torch.equal, inputs, before))


VIEWED = [  # V, dtype
    (37, torch.bfloat16),
    (40, torch.float32),
]


@pytest.mark.parametrize("V, dtype", VIEWED)
@fp32_targets
def test_logits_in_any_layout_stay_as_they_are(target, V, dtype, small_blocks):
    """Bit for bit, in every row and around them: one row, and views of it as three."""
    case = traps(1.0, V).rows([1, 4, 5]).on(target)
    row = case.logits[:1].to(dtype)
    row[0, 3] = -0.0
    row[0, 5] = -math.inf
    whole = row.repeat(3, 1)
    columns = row.T.repeat(1, 3)
    wide = row.repeat(6, 2)
    odd = row.repeat(5, 1).flatten()
    odd = odd.roll(3)
    views = [  # and the memory of each
        (whole, whole),
        (columns.T, columns),
        (row.expand(3, V), row),
        (wide[::2, V:], wide),
        (odd[V + 3 : 4 * V + 3].view(3, V), odd),
    ]
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    results = []
    for view, memory in views:
        before = memory.view(bits).clone()
        z = view.detach().requires_grad_()
        loss = topk_kl(
            z,
            case.ids,
            case.log_probs,
            labels=case.labels,
            softcap=9.0,
            reduction="none",
            backend=target.backend,
        ).loss
        gradient = torch.autograd.grad(loss.sum(), z)
        results.append([loss, *gradient])
        assert torch.equal(memory.view(bits), before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def far_tile(name, rows, V, dtype):
    """Rows 2^30 numbers apart: the third begins 2^31 numbers after the first.

    They lie in the second half of memory that nothing else touches, so that it takes no room: an
    offset that wraps finds the zeros of the first half.
    """
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 2**34 + 4 * V, flags=flags)
    numbers = torch.frombuffer(memory, dtype=dtype)
    return numbers.as_strided((rows, V), (2**30, 1), 2**31)


@pytest.mark.parametrize("op", CHUNKED)
@pytest.mark.parametrize("target", cases.TRITON)
def test_rows_more_than_two_to_the_31_elements_apart(target, op, monkeypatch):
    """The same bits as side by side; of linear_topk too."""
    case = problem(3, V=64)

    def outputs():
        hidden, weight, *_ = case.on(target)
        return [
            *linear_topk(hidden, weight, 3, backend=target.backend),
            *loss_and_gradients(op, case, target),
        ]

    near = outputs()
    monkeypatch.setattr(chunks.SCRATCH, "tile", far_tile)
    monkeypatch.setattr(chunks, "ALIGNMENT", 2**30)  # a GPU's tile
    assert all(map(torch.equal, outputs(), near))


# linear_log_probs.


SETTINGS = [  # T, softcap
    (1.0, None),
    (2.0, 5.0),
    (0.1, None),
]


@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)])
@pytest.mark.parametrize("T, softcap", SETTINGS)
@fp32_targets
def test_log_probs_and_their_gradients(target, T, softcap, used, small_blocks, chunks_of):
    """Equal ids read alike and their slopes add; an empty slot reads 0 and sends nothing."""
    chunks_of(3)
    case = problem(4, 6, 37, 5, T)
    ids = case.ids
    ids[0, 2] = ids[0, 0]
    ids[1, 4] = -5
    ids[2] = ids[2, 0]
    ids[3] = -1
    slopes = torch.randn(4, 5), torch.randn(4)

    def weighted(hidden, weight, case, **options):
        outputs = linear_log_probs(hidden, weight, case.ids, **options)
        assert (outputs[0][case.ids < 0] == 0).all()
        total = 0
        for place in used:
            output = outputs[place].cpu().double()
            total += (output * slopes[place]).sum()
        return total

    options = {"temperature": T, "softcap": softcap}
    exact = loss_and_gradients(weighted, case, cases.REFERENCE, **options)
    ours = loss_and_gradients(weighted, case, target, **options)
    for mine, right in zip(ours, exact, strict=True):
        floor = 2e-6 * (1 + right.abs().max().item())
        assert_close(mine.cpu().double(), right, atol=floor)


HALF_PRECISION = [  # dtype, V, K, T, scale of the slopes, error
    (torch.bfloat16, 137, 8, 1.0, 1.0, 4e-3),
    (torch.float16, 137, 8, 1.0, 1.0, 1e-3),
    (torch.float16, 300, 4, 1.0, 2.0**-17, 1e-3),
    (torch.float16, 600, 500, 0.005, 2.0**-14, 1e-3),
]


@pytest.mark.parametrize("dtype, V, K, T, scale, error", HALF_PRECISION)
@fp32_targets
def test_log_probs_gradients_in_half_precision(target, dtype, V, K, T, scale, error):
    """In fp16 neither small slopes vanish nor many overflow: their size goes on the sums."""
    case = problem(4, 16, V, K, dtype=dtype)

    def scaled(hidden, weight, case, **options):
        options["temperature"] = T
        log_p, lse = linear_log_probs(hidden, weight, case.ids, **options)
        return scale * (log_p.sum() + lse.sum())

    exact = loss_and_gradients(scaled, case, cases.REFERENCE)
    with torch.autocast(target.device, dtype):
        ours = loss_and_gradients(scaled, case, target)
    assert_close(ours[0].cpu(), exact[0].float())
    for mine, right in zip(ours[1:], exact[1:], strict=True):
        assert (mine.cpu() - right).norm() < error * right.norm()
