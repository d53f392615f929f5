"""What the benchmark times: one problem, and the losses on it by us, by PyTorch and by peers.

N rows, D width, V vocabulary, K teacher entries a row, T temperature, z logits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pkgutil import resolve_name

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import linear_cross_entropy, linear_full_kl, linear_topk, linear_topk_kl


class Problem:
    """A student's hidden states [N,D] and head [V,D], labels [N], and what its teacher says.

    The teacher: ids, log_probs [N,K] and log_norm [N] at T=2, or hidden states and a head of the
    student's size. Frequencies are Zipf's over a random order of the vocabulary, in the student
    too.
    """

    def __init__(
        self,
        N: int,
        D: int,
        V: int,
        K: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        generator = torch.Generator(device).manual_seed(0)
        random = {"generator": generator, "device": device}
        ranks = torch.arange(1, V + 1, device=device)
        log_p = (1 / ranks).log().log_softmax(0)  # [V] by rank
        id_of_rank = torch.randperm(V, **random)
        hidden = torch.randn(N, D, **random)
        weight = torch.randn(V, D, **random) * D**-0.5
        hidden[:, 0] = 1.0
        weight[id_of_rank, 0] = log_p - log_p.mean()

        # K draws without replacement a row, by Gumbel's trick; repeated after 256 rows
        uniform = torch.rand(min(N, 256), V, **random)
        gumbel = -uniform.clamp(min=1e-30).log().neg().log()
        drawn = (log_p + gumbel).topk(K).indices
        drawn = drawn.repeat(math.ceil(N / 256), 1)[:N]
        self.ids = id_of_rank[drawn].int()
        self.log_probs = log_p[:K].expand(N, K).contiguous()
        log_norm = (log_p / 2).logsumexp(0) - log_p.logsumexp(0) / 2
        self.log_norm = log_norm.expand(N).contiguous()
        labels = torch.multinomial(log_p.exp(), N, replacement=True, generator=generator)
        self.labels = id_of_rank[labels]
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()
        self.teacher_hidden = self.hidden.detach().roll(1, 0)
        self.teacher_weight = self.weight.detach().clone()
        self.K = K

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @cached_property
    def buffers(self) -> list[Tensor]:
        """Outputs of the bare products, made once: their pages are there when they are timed."""
        logits = self.hidden.new_empty(len(self.hidden), len(self.weight))
        return [logits, *map(torch.empty_like, self.leaves)]


@torch.no_grad()
def gemms(p: Problem, count: int = 3) -> None:
    """Logits, d_hidden, d_weight (or the first `count` of them), and nothing else."""
    z = p.buffers[0]
    factors = [
        (p.hidden, p.weight.t()),
        (z, p.weight),
        (z.t(), p.hidden),
    ]
    for pair, out in zip(factors[:count], p.buffers, strict=False):
        torch.mm(*pair, out=out)


def plain(p: Problem, T: float = 1.0) -> Tensor:
    """CE + ghost KL in PyTorch: whole logits in fp32, log_softmax once (most code: twice)."""
    z = F.linear(p.hidden, p.weight).float()
    lt = p.log_probs
    log_p = z
    if T != 1:
        lt = lt / T - p.log_norm[:, None]
        log_p = z / T
    log_p = log_p.log_softmax(1)
    ls = log_p.gather(1, p.ids.long())
    tail = 1 - lt.exp().sum(1)
    tail = tail.clamp(min=1e-7)
    student_tail = 1 - ls.exp().sum(1)
    student_tail = student_tail.clamp(min=1e-7)
    kl = (lt.exp() * (lt - ls)).sum(1)
    kl = kl + tail * (tail / student_tail).log()
    if T == 1:
        ce = F.nll_loss(log_p, p.labels)
    else:
        ce = F.cross_entropy(z, p.labels)
    return 0.5 * ce + 0.5 * T * T * kl.mean()


def plain_ce(p: Problem) -> Tensor:
    return F.cross_entropy(F.linear(p.hidden, p.weight).float(), p.labels)


def plain_full(p: Problem) -> Tensor:
    """CE + full KL from both sides' whole logits."""
    log_p = F.linear(p.hidden, p.weight).float().log_softmax(1)
    lt = F.linear(p.teacher_hidden, p.teacher_weight).float().log_softmax(1)
    kl = F.kl_div(log_p, lt, reduction="batchmean", log_target=True)
    return 0.5 * F.nll_loss(log_p, p.labels) + 0.5 * kl


def plain_topk(p: Problem) -> None:
    z = F.linear(p.hidden.detach(), p.weight.detach()).float()
    z.topk(p.K)
    z.logsumexp(1)


def ours(p: Problem, T: float = 1.0, **options) -> Tensor:
    if T != 1:
        options |= {"temperature": T, "log_norm": p.log_norm}
    options = {"labels": p.labels, "kl_weight": 0.5} | options
    return linear_topk_kl(p.hidden, p.weight, p.ids, p.log_probs, **options).loss.mean()


def ours_ce(p: Problem, **options) -> Tensor:
    return linear_cross_entropy(p.hidden, p.weight, p.labels, **options).loss


def ours_full(p: Problem, **options) -> Tensor:
    teacher = p.teacher_hidden.to(p.hidden.dtype), p.teacher_weight.to(p.hidden.dtype)
    options = {"labels": p.labels, "kl_weight": 0.5} | options
    return linear_full_kl(p.hidden, p.weight, *teacher, **options).loss


def ours_topk(p: Problem, **options) -> None:
    linear_topk(p.hidden, p.weight, p.K, **options)


def liger_ce(p: Problem) -> Tensor:
    op = resolve_name("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")
    return op()(p.weight, p.hidden, p.labels)


def liger_jsd(p: Problem) -> Tensor:
    op = resolve_name("liger_kernel.transformers:LigerFusedLinearJSD")
    return op()(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.labels)


def cut_ce(p: Problem, **options) -> Tensor:
    op = resolve_name("cut_cross_entropy:linear_cross_entropy")
    return op(p.hidden, p.weight, p.labels, **options)


@cache
def compiled() -> Callable[[Problem], Tensor]:
    return torch.compile(plain, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class Case:
    """Something to time. Cases of one `work` are rivals; the ratio is to `floor`'s time."""

    name: str
    call: Callable[[Problem], Tensor | None]
    work: str
    group: str  # floor | ours | torch | peer
    floor: str = "three GEMMs"


# cut-cross-entropy's default drops small gradients; Liger's JSD has no cross-entropy.
LOSSES = [
    Case(
        "three GEMMs",
        gemms,
        work="",
        group="floor",
    ),
    Case(
        "linear_topk_kl",
        ours,
        work="CE+KL",
        group="ours",
    ),
    Case(
        "plain",
        plain,
        work="CE+KL",
        group="torch",
    ),
    Case(
        "plain compiled",
        lambda p: compiled()(p),
        work="CE+KL",
        group="torch",
    ),
    Case(
        "linear_topk_kl T=2",
        partial(ours, T=2.0),
        work="CE+KL, T=2",
        group="ours",
    ),
    Case(
        "plain T=2",
        partial(plain, T=2.0),
        work="CE+KL, T=2",
        group="torch",
    ),
    Case(
        "linear_topk_kl none",
        partial(ours, reduction="none"),
        work="CE+KL, none",
        group="ours",
    ),
    Case(
        "linear_cross_entropy",
        ours_ce,
        work="CE",
        group="ours",
    ),
    Case(
        "plain CE",
        plain_ce,
        work="CE",
        group="torch",
    ),
    Case(
        "Liger CE",
        liger_ce,
        work="CE",
        group="peer",
    ),
    Case(
        "cut-cross-entropy",
        cut_ce,
        work="CE",
        group="peer",
    ),
    Case(
        "cut-cross-entropy exact",
        partial(cut_ce, filter_eps=None),
        work="CE",
        group="peer",
    ),
    Case(
        "linear_full_kl",
        ours_full,
        work="full KL",
        group="ours",
    ),
    Case(
        "plain full KL",
        plain_full,
        work="full KL",
        group="torch",
    ),
    Case(
        "Liger JSD",
        liger_jsd,
        work="full KL",
        group="peer",
    ),
]
TEACHER = [
    Case(
        "one GEMM",
        partial(gemms, count=1),
        work="",
        group="floor",
        floor="one GEMM",
    ),
    Case(
        "linear_topk",
        ours_topk,
        work="top-k",
        group="ours",
        floor="one GEMM",
    ),
    Case(
        "linear_topk T=2",
        partial(ours_topk, temperatures=(2.0,)),
        work="top-k, T=2",
        group="ours",
        floor="one GEMM",
    ),
    Case(
        "GEMM + topk + logsumexp",
        plain_topk,
        work="top-k",
        group="torch",
        floor="one GEMM",
    ),
]
EXACT = {  # work -> the op whose fp64 reference tells the gradients
    "CE+KL": ours,
    "CE+KL, T=2": partial(ours, T=2.0),
    "CE+KL, none": ours,
    "CE": ours_ce,
    "full KL": ours_full,
}


@cache
def gradient_error(
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """The larger error of the two gradients, relative to their norms, against the fp64 reference.

    nan where there is nothing to compare with, and for what would only cost time: compiling.
    """
    if case.work not in EXACT or case.name in ("Liger JSD", "plain compiled"):
        return math.nan
    p = Problem(512, 256, 2048, 8, dtype, device)
    found = torch.autograd.grad(case.call(p), p.leaves)
    p.hidden = p.hidden.detach().double().requires_grad_()
    p.weight = p.weight.detach().double().requires_grad_()
    loss = EXACT[case.work](p, backend="reference")
    exact = torch.autograd.grad(loss, p.leaves)
    errors = []
    for ours, right in zip(found, exact, strict=True):
        error = (ours - right).norm() / right.norm()
        errors.append(error.item())
    return max(errors)
