"""What the benchmark times: one problem, and the losses on it by our ops, by plain PyTorch and by peers.

N rows, D width, V vocabulary, K teacher entries a row, T temperature, z logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pkgutil import resolve_name

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import linear_cross_entropy, linear_full_kl, linear_topk, linear_topk_kl
from ..experimental import linear_topk_kl_exp


class Problem:
    """A student's hidden states [N,D] and head [V,D], labels [N], and what its teacher says.

    The teacher: ids, log_probs [N,K] and log_norm [N] at T=2, or hidden states and a head of the
    student's size. Frequencies are Zipf's over a random order of the vocabulary, in the student too.
    """

    def __init__(self, N: int, D: int, V: int, K: int, dtype: torch.dtype, device: torch.device):
        random = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        log_p = (1 / torch.arange(1, V + 1, device=device)).log().log_softmax(0)  # [V] by rank
        id_of_rank = torch.randperm(V, **random)
        hidden = torch.randn(N, D, **random)
        weight = torch.randn(V, D, **random) * D**-0.5
        hidden[:, 0] = 1.0
        weight[id_of_rank, 0] = log_p - log_p.mean()
        # K draws without replacement a row, by Gumbel's trick; repeated after 256 rows
        uniform = torch.rand(min(N, 256), V, **random).clamp(min=1e-30)
        ranks = (log_p - uniform.log().neg().log()).topk(K).indices
        repeats = -(-N // 256)
        self.ids = id_of_rank[ranks].repeat(repeats, 1)[:N].int()
        self.log_probs = log_p[:K].expand(N, K).contiguous()
        log_norm = (log_p / 2).logsumexp(0) - log_p.logsumexp(0) / 2
        self.log_norm = log_norm.expand(N).contiguous()
        draws = torch.multinomial(log_p.exp(), N, replacement=True, generator=random["generator"])
        self.labels = id_of_rank[draws]
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
        """The bare products' outputs, made once: no page of them is faulted in while it is timed."""
        logits = self.hidden.new_empty(len(self.hidden), len(self.weight))
        return [logits, *map(torch.empty_like, self.leaves)]


@torch.no_grad()
def gemms(p: Problem, count: int = 3) -> None:
    """Logits, d_hidden, d_weight (or the first `count` of them), and nothing else."""
    z = p.buffers[0]
    factors = [(p.hidden, p.weight.t()), (z, p.weight), (z.t(), p.hidden)]
    for pair, out in zip(factors[:count], p.buffers, strict=False):
        torch.mm(*pair, out=out)


def plain(p: Problem, T: float = 1.0, twice: bool = False) -> Tensor:
    """CE + ghost KL in PyTorch: whole logits in fp32, log_softmax once (twice, as most code has it)."""
    z = F.linear(p.hidden, p.weight).float()
    log_p = z.log_softmax(1) if T == 1 else (z / T).log_softmax(1)
    lt = p.log_probs if T == 1 else p.log_probs / T - p.log_norm[:, None]
    ls = log_p.gather(1, p.ids.long())
    tail = (1 - lt.exp().sum(1)).clamp(min=1e-7)
    student_tail = (1 - ls.exp().sum(1)).clamp(min=1e-7)
    kl = (lt.exp() * (lt - ls)).sum(1) + tail * (tail / student_tail).log()
    if twice or T != 1:
        ce = F.cross_entropy(z, p.labels)
    else:
        ce = F.nll_loss(log_p, p.labels)
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


def ours_exp(p: Problem) -> Tensor:
    return linear_topk_kl_exp(p.hidden, p.weight, p.ids, p.log_probs, p.labels).loss


def liger_ce(p: Problem) -> Tensor:
    op = resolve_name("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")
    return op()(p.weight, p.hidden, p.labels)


def liger_jsd(p: Problem) -> Tensor:
    op = resolve_name("liger_kernel.transformers:LigerFusedLinearJSD")
    return op()(p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.labels)


def cut_ce(p: Problem, **options) -> Tensor:
    op = resolve_name("cut_cross_entropy:linear_cross_entropy")
    return op(p.hidden, p.weight, p.labels, **options)


@dataclass(frozen=True)
class Case:
    """Something to time. Cases of one `work` are rivals; `floor` is the case that its ratio is to."""

    call: Callable[[Problem], Tensor | None]
    work: str  # CE+KL | CE+KL, T=2 | CE | full KL | top-k
    group: str  # floor | ours | experiment | torch | peer
    floor: str = "three GEMMs"


LOSSES = {
    "three GEMMs": Case(gemms, "", "floor"),
    "linear_topk_kl": Case(ours, "CE+KL", "ours"),
    "linear_topk_kl exp": Case(ours_exp, "CE+KL", "experiment"),
    "plain": Case(plain, "CE+KL", "torch"),
    "plain, log_softmax twice": Case(partial(plain, twice=True), "CE+KL", "torch"),
    "plain compiled": Case(lambda p: compiled()(p), "CE+KL", "torch"),
    "linear_topk_kl T=2": Case(partial(ours, T=2.0), "CE+KL, T=2", "ours"),
    "plain T=2": Case(partial(plain, T=2.0), "CE+KL, T=2", "torch"),
    "linear_topk_kl none": Case(partial(ours, reduction="none"), "CE+KL, none", "ours"),
    "linear_cross_entropy": Case(ours_ce, "CE", "ours"),
    "plain CE": Case(plain_ce, "CE", "torch"),
    "Liger CE": Case(liger_ce, "CE", "peer"),
    "cut-cross-entropy": Case(cut_ce, "CE", "peer"),  # its default drops small gradients
    "cut-cross-entropy exact": Case(partial(cut_ce, filter_eps=None), "CE", "peer"),
    "linear_full_kl": Case(ours_full, "full KL", "ours"),
    "plain full KL": Case(plain_full, "full KL", "torch"),
    "Liger JSD": Case(liger_jsd, "full KL", "peer"),  # no CE
}
TEACHER = {
    "one GEMM": Case(partial(gemms, count=1), "", "floor", "one GEMM"),
    "linear_topk": Case(ours_topk, "top-k", "ours", "one GEMM"),
    "linear_topk T=2": Case(
        partial(ours_topk, temperatures=(2.0,)), "top-k, T=2", "ours", "one GEMM"
    ),
    "GEMM + topk + logsumexp": Case(plain_topk, "top-k", "torch", "one GEMM"),
}
EXACT = {  # work -> the op whose fp64 reference tells the gradients
    "CE+KL": ours,
    "CE+KL, T=2": partial(ours, T=2.0),
    "CE+KL, none": ours,
    "CE": ours_ce,
    "full KL": ours_full,
}


@cache
def compiled() -> Callable[[Problem], Tensor]:
    return torch.compile(plain, dynamic=False, fullgraph=True)


def chunk_cases(rows: list[int]) -> dict[str, Case]:
    """The loss with chunks of other sizes."""
    cases = {"three GEMMs": LOSSES["three GEMMs"], "linear_topk_kl": LOSSES["linear_topk_kl"]}
    for count in rows:
        cases[f"linear_topk_kl rows={count}"] = Case(
            partial(ours, _rows=count), "CE+KL", "experiment"
        )
    return cases


def gradient_error(case: Case, dtype: torch.dtype, device: torch.device) -> float:
    """The larger error of the two gradients, relative to their norms, against the fp64 reference.

    nan where there is nothing to compare with, as for a loss of another definition (Liger's JSD).
    """
    if case.work not in EXACT or case.call is liger_jsd:
        return float("nan")
    p = Problem(512, 256, 2048, 8, dtype, device)
    found = torch.autograd.grad(case.call(p), p.leaves)
    p.hidden = p.hidden.detach().double().requires_grad_()
    p.weight = p.weight.detach().double().requires_grad_()
    exact = torch.autograd.grad(EXACT[case.work](p, backend="reference"), p.leaves)
    errors = [(one - other).norm() / other.norm() for one, other in zip(found, exact, strict=True)]
    return max(errors).item()
