"""What the tests of the losses share: inputs with every trap, calls, and comparisons.

N rows, D width, V vocabulary, K teacher entries a row, T temperature. Inputs are float64 numbers
that the dtype under test holds exactly: an op differs from the reference by its arithmetic alone.
"""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import linear_cross_entropy, topk_kl
from kernels.checks import DIVERGENCES, TAILS
from tests.helpers import assert_close

MODES = [{"tail": "ghost", "divergence": kind} for kind in DIVERGENCES]
MODES += [{"tail": tail} for tail in TAILS[1:]]
TEMPERATURES = [1.0, 2.0, 0.1, 10.0]
HALVES = [torch.bfloat16, torch.float16]
NUM_FIELDS = 5
MIXED = {"labels": True, "kl_weight": 0.3}


class Target(NamedTuple):
    """What computes an op. On CUDA each new combination of a kernel's constants compiles."""

    backend: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def move(self, part):
        """An argument as this target takes it: floats in the dtype of losses, the rest as it is."""
        if not isinstance(part, Tensor):
            return part
        dtype = self.wide if part.is_floating_point() else part.dtype
        return part.to(self.device, dtype)


REFERENCE = Target("reference", dtype=torch.float64)
TORCH = pytest.param(Target("torch", dtype=torch.float64), id="torch")
TORCH_FP32 = pytest.param(Target("torch"), id="torch-fp32")
INTERPRETER = pytest.param(
    Target("triton"),
    id="interpreter",
    marks=pytest.mark.skipif(
        torch.cuda.is_available(),
        reason="on a GPU machine it is off",
    ),
)
CUDA = pytest.param(Target("triton", "cuda"), id="cuda", marks=pytest.mark.gpu)
TRITON = [INTERPRETER, CUDA]
FP32 = [TORCH_FP32, *TRITON]
TARGETS = [TORCH, *TRITON]
all_targets = pytest.mark.parametrize("target", TARGETS)
fp32_targets = pytest.mark.parametrize("target", FP32)


class Case(NamedTuple):
    """A loss's inputs, floats in float64."""

    hidden: Tensor  # [N,D]
    weight: Tensor  # [V,D]
    logits: Tensor  # [N,V] for topk_kl
    ids: Tensor  # [N,K]
    log_probs: Tensor  # [N,K]
    log_norm: Tensor  # [N]
    labels: Tensor  # [N]

    def rows(self, rows) -> "Case":
        parts = [part if part is self.weight else part[rows] for part in self]
        return Case(*parts)

    def on(self, target: Target) -> "Case":
        return Case(*map(target.move, self))


def held(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Float64 numbers that `dtype` holds."""
    return tensor.to(dtype).double()


def capped(z, softcap):
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def problem(
    N=4,
    D=6,
    V=37,
    K=3,
    T=1.0,
    dtype=torch.float32,
    seed=0,
) -> Case:
    """A random student, and a random teacher's top K. At T neither is flat or sharp."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = 2 * min(T, 1.0)
    hidden = held(normal(N, D), dtype)
    weight = held(spread * normal(V, D) / D**0.5, dtype)
    z = spread * normal(N, V)
    ids = z.topk(K).indices
    log_probs = held(z.log_softmax(1).gather(1, ids))
    log_norm = held((z / T).logsumexp(1) - z.logsumexp(1) / T)
    labels = torch.randint(V, (N,), generator=generator)
    logits = held(hidden @ weight.T, dtype)
    return Case(
        hidden,
        weight,
        logits,
        ids,
        log_probs,
        log_norm,
        labels,
    )


def traps(T=1.0, V=37, dtype=torch.float32) -> Case:
    """Seven rows, one trap or more in each."""
    case = problem(7, 6, V, 5, T, dtype)
    ids = case.ids
    log_probs = case.log_probs
    labels = case.labels
    labels[0] = ids[0, 2]  # a label in S
    ids[1, 3] = ids[1, 0]  # two pairs of equal ids
    ids[1, 4] = ids[1, 2]
    ids[2, 1:3] = -7  # empty slots, whatever stands there, and a label outside
    log_probs[2, 1] = math.nan
    log_probs[2, 2] = 3.0
    labels[2] = next(token for token in range(V) if token not in ids[2])
    ids[3] = -1  # nothing at all
    log_probs[3] = math.nan
    labels[4] = -100  # ignored, whatever it holds
    ids[4, :2] = -1
    ids[4, 3] = ids[4, 2]
    for part in (case.hidden, case.logits, log_probs):
        part[4] = math.nan
    ids[5, 2] = ids[5, 4] = labels[5] = ids[5, 1]  # three equal ids, one without mass
    log_probs[5, 2] = -math.inf
    ids[6, 1] = ids[6, 0]  # entries without mass
    log_probs[6] = -math.inf
    return case


def on_support(logits: Tensor, K: int, mass: float) -> Case:
    """A teacher that spreads `mass` evenly over the first K tokens of logits [N,V]."""
    N = len(logits)
    case = problem(N, 1, logits.shape[1], K)
    return case._replace(
        logits=held(logits),
        ids=torch.arange(K).repeat(N, 1),
        log_probs=held(torch.full((N, K), math.log(mass / K))),
        labels=torch.zeros(N, dtype=torch.int64),
    )


def differentiate(
    op,
    sources,
    others,
    target: Target,
    upstream=None,
    **options,
) -> list[Tensor]:
    """The fields of op(*sources, *others, **options), then the gradient of each source."""
    sources = [part.to(target.device, target.dtype, copy=True) for part in sources]
    sources = [part.requires_grad_() for part in sources]
    others = [target.move(part) for part in others]
    options = {name: target.move(part) for name, part in options.items()}
    out = op(*sources, *others, backend=target.backend, **options)
    assert [part.requires_grad for part in out] == [True] + [False] * 4
    if upstream is None:
        upstream = torch.tensor(1.7)
        if out.loss.dim():
            upstream = torch.linspace(-1, 2, len(out.loss))
    gradients = torch.autograd.grad(out.loss, sources, target.move(upstream))
    return [*(part.detach() for part in out), *gradients]


def run(op, case: Case, target: Target, labels=False, **options) -> list[Tensor]:
    """`differentiate` of a sparse loss. Without labels an ignored row is no row."""
    if op is linear_cross_entropy:
        return differentiate(op, case[:2], [case.labels], target, **options)
    if not labels:
        case = case.rows(case.labels != -100)
    sources = [case.logits] if op is topk_kl else case[:2]
    if options.get("temperature", 1) != 1 and options.get("tail") != "renormalize":
        options["log_norm"] = case.log_norm
    options["labels"] = case.labels if labels else None
    return differentiate(op, sources, [case.ids, case.log_probs], target, **options)


def check(
    ours,
    exact,
    target: Target,
    T=1.0,
    rtol=1e-5,
    atol=1e-6,
):
    """Fields to within `atol` near 0, gradients to within twice `atol` of their largest number.

    A GPU's exp2 and log are approximate: four times the floor there, a guess until measured.
    """
    if target.dtype == torch.float64:
        rtol = min(rtol, 1e-8)
        atol = min(atol, 1e-11)
    if target.device == "cuda":
        atol *= 4
    for place, (mine, right) in enumerate(zip(ours, exact, strict=True)):
        finite = right[right.isfinite()].abs()
        largest = finite.max().item() if len(finite) else 0.0
        dtype = target.wide
        floor = atol * (max(1, T * T) + largest)
        if place >= NUM_FIELDS:
            dtype = target.dtype
            floor = 2 * atol * largest
        assert_close(mine.cpu(), right.to(dtype), rtol=rtol, atol=floor)


def agree(
    op,
    case: Case,
    target: Target,
    rtol=1e-5,
    atol=1e-6,
    **options,
) -> list[Tensor]:
    """Runs the op, and checks it against the reference in float64."""
    ours = run(op, case, target, **options)
    exact = run(op, case, REFERENCE, **options)
    check(
        ours,
        exact,
        target,
        options.get("temperature", 1.0),
        rtol,
        atol,
    )
    return ours


def no_worse(ours, plain, exact, times=2.0):
    """Each error is at most `times` that of plain PyTorch in the same dtype; as norms."""
    for mine, other, right in zip(ours, plain, exact, strict=True):
        error = (mine.cpu().double() - right).norm()
        allowed = times * (other.cpu().double() - right).norm()
        assert error <= allowed + 1e-6 * right.abs().max()


def check_rounded(gradient: Tensor, exact: Tensor, target: Target, rtol=1e-5):
    """The exact gradient rounded once. Triton's interpreter rounds to bf16 toward zero."""
    once = {
        torch.float32: 0.0,
        torch.float16: 2**-11,
        torch.bfloat16: 2**-8,
    }[target.dtype]
    if target == Target("triton", "cpu", torch.bfloat16):
        once = 2**-7
    assert gradient.dtype == target.dtype
    floor = 1e-7 * (1 + exact.abs().max().item())
    assert_close(gradient.cpu().double(), exact, rtol=rtol + once, atol=floor)
