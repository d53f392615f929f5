"""What kernels/bench.py times: shapes, losses in our ops, in plain PyTorch and in the peers, and their check against fp64.

N rows, D width, V vocabulary, K teacher entries a row, T temperature, z logits.
"""

import functools
from collections.abc import Callable
from functools import cached_property, partial
from pkgutil import resolve_name
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import linear_cross_entropy, linear_log_probs, linear_topk, linear_topk_kl, topk_kl

GRAD_ERROR = {
    torch.bfloat16: 5e-3,
    torch.float32: 1e-5,
}  # of the norm, against fp64; and at most twice plain PyTorch's


class Plan:
    """What is measured, and how large. Shapes are (N, D, V, K)."""

    def __init__(self, device: torch.device, quick: bool):
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        # sweeps over ks, ns and vs, the last at `wide` (N, D, K); `chunks`: rows; logits: N and the Vs of the row kernel
        # step: layers, heads, width, block, sequences, V, K
        if device.type == "cuda":
            self.rounds, self.sweep_rounds = (4, 2) if quick else (12, 5)
            self.shapes = (
                (16384, 768, 50304, 64),
                (8192, 2048, 128256, 64),
                (8192, 4096, 151936, 128),
            )
            ks, ns, vs = (
                (1, 4, 16, 64, 256, 1024),
                (512, 2048, 8192, 32768, 65536),
                (32768, 65536, 131072, 262144),
            )
            if quick:
                ks, ns, vs = ks[::3], ns[:3:2], vs[::2]
            wide, self.chunks = (8192, 2048, 64), (256, 512, 1024, 2048, 4096, 8192)
            logits, self.step = (
                (8192, (50304, 128256, 151936, 50257)),
                (12, 12, 768, 1024, 16, 50304, 64),
            )
        elif quick:
            self.rounds, self.sweep_rounds, self.shapes = 2, 1, ((256, 64, 1031, 8),)
            ks, ns, vs, wide, self.chunks = (1, 64), (64,), (512, 2048), (64, 32, 8), (16, 64)
            logits, self.step = (64, (1031,)), (2, 2, 32, 16, 4, 1031, 8)
        else:
            self.rounds, self.sweep_rounds, self.shapes = 7, 3, ((2048, 384, 50304, 32),)
            ks, ns, vs, wide, self.chunks = (
                (1, 256),
                (128, 512),
                (8192, 32768),
                (512, 384, 32),
                (256, 683, 1024),
            )
            logits, self.step = (512, (50304, 50257)), (2, 2, 64, 64, 8, 50304, 32)
        N, D, V, K = self.shapes[0]
        self.logits = [(logits[0], 8, v, K) for v in logits[1]]
        self.sweeps = {"V": [(*wide[:2], v, wide[2]) for v in vs], "K": [(N, D, V, k) for k in ks]}
        self.sweeps["N"] = [(n, D, V, K) for n in ns]


class Problem:
    """A student's hidden states [N,D] and head [V,D], what its teacher says (ids, log_probs [N,K]; log_norm [N] at T=2),
    and labels [N]. Frequencies are Zipf's over a random order of the vocabulary, in the student too."""

    def __init__(self, N: int, D: int, V: int, K: int, dtype=torch.float32, device="cpu"):
        options = {"generator": torch.Generator(device).manual_seed(0), "device": device}
        log_p = (1 / torch.arange(1, V + 1, device=device)).log().log_softmax(0)  # [V] by rank
        order = torch.randperm(V, **options)  # rank -> id
        hidden, weight = torch.randn(N, D, **options), torch.randn(V, D, **options) * D**-0.5
        hidden[:, 0], weight[order, 0] = 1.0, log_p - log_p.mean()
        gumbel = -torch.rand(min(N, 256), V, **options).clamp(min=1e-30).log().neg().log()
        ranks = (
            (log_p + gumbel).topk(K).indices
        )  # K draws without replacement a row, repeated after 256 rows
        self.ids = order[ranks].repeat(-(-N // 256), 1)[:N]
        self.log_probs = log_p[:K].expand(N, K).contiguous()
        self.log_norm = ((log_p / 2).logsumexp(0) - log_p.logsumexp(0) / 2).expand(N).contiguous()
        self.labels = order[
            torch.multinomial(log_p.exp(), N, replacement=True, generator=options["generator"])
        ]
        self.hidden, self.weight = self.leaves = [
            part.to(dtype).requires_grad_() for part in (hidden, weight)
        ]
        self.inputs, self.K = (self.hidden, self.weight, self.labels), K
        self.both = {"labels": self.labels, "kl_weight": 0.5}

    @cached_property
    def buffers(self) -> list[Tensor]:
        """The floor's outputs, made once: no page of them is faulted in while it is timed."""
        return [
            self.hidden.new_empty(len(self.hidden), len(self.weight)),
            *map(torch.empty_like, self.leaves),
        ]

    @cached_property
    def logits(self) -> Tensor:
        return torch.randn_like(self.buffers[0]).requires_grad_()

    @cached_property
    def teacher(self) -> tuple[Tensor, Tensor]:
        """Hidden states and head of a dense teacher, of the student's size."""
        return self.hidden.detach().roll(1, 0), self.weight.detach().clone()

    @cached_property
    def teacher_probs(self) -> Tensor:
        """[N,V] of that teacher."""
        hidden, weight = self.teacher
        return torch.cat(
            [
                F.linear(rows, weight).float().softmax(1).to(rows.dtype)
                for rows in hidden.split(1024)
            ]
        )


@torch.no_grad()
def gemms(p: Problem, count: int = 3) -> None:
    """The floor: logits, d_hidden, d_weight (or the first `count` of them), and nothing else."""
    z = p.buffers[0]
    factors = (p.hidden, p.weight.t()), (z, p.weight), (z.t(), p.hidden)
    for pair, out in zip(factors[:count], p.buffers[:count], strict=True):
        torch.mm(*pair, out=out)


def ghost(log_probs: Tensor, ls: Tensor) -> Tensor:
    """Mean ghost KL of log-probabilities [N,K] on both sides, as one writes it in PyTorch."""
    tail, student_tail = (
        (1 - log_probs.exp().sum(1)).clamp(min=1e-7),
        (1 - ls.exp().sum(1)).clamp(min=1e-7),
    )
    return (
        (log_probs.exp() * (log_probs - ls)).sum(1) + tail * (tail.log() - student_tail.log())
    ).mean()


def plain(
    p: Problem, T: float = 1.0, share: float = 0.5, frozen: bool = False, twice: bool = False
) -> Tensor:
    """CE + ghost KL in PyTorch: whole logits, widened to fp32, log_softmax once (twice as most code has it)."""
    logits = F.linear(p.hidden, p.weight.detach() if frozen else p.weight).float()
    if share == 0:
        return F.cross_entropy(logits, p.labels)
    log_p = (logits if T == 1 else logits / T).log_softmax(1)
    log_probs = p.log_probs if T == 1 else p.log_probs / T - p.log_norm[:, None]
    kl = T * T * ghost(log_probs, log_p.gather(1, p.ids))
    if share == 1:
        return kl
    ce = F.cross_entropy(logits, p.labels) if twice or T != 1 else F.nll_loss(log_p, p.labels)
    return (1 - share) * ce + share * kl


def composed(p: Problem) -> Tensor:
    """The same on `linear_log_probs`: what an op that returns log-probabilities leaves its user to write."""
    ls, _ = linear_log_probs(p.hidden, p.weight, torch.cat([p.ids, p.labels[:, None]], 1))
    return 0.5 * -ls[:, -1].mean() + 0.5 * ghost(p.log_probs, ls[:, :-1])


def ours(p: Problem, T: float = 1.0, frozen: bool = False, **options) -> Tensor:
    options |= {"temperature": T, "log_norm": p.log_norm} if T != 1 else {}
    options |= {} if frozen else p.both
    weight = p.weight.detach() if frozen else p.weight
    return linear_topk_kl(p.hidden, weight, p.ids, p.log_probs, **options).loss.mean()


def given(p: Problem, logits: Tensor | None = None, backend: str = "auto") -> Tensor:
    return topk_kl(
        p.logits if logits is None else logits, p.ids, p.log_probs, backend=backend, **p.both
    ).loss


def top(p: Problem, **options):
    return linear_topk(p.hidden, p.weight, p.K, **options)


def plain_top(p: Problem):
    z = F.linear(p.hidden.detach(), p.weight.detach()).float()
    return z.topk(p.K), z.logsumexp(1)


@functools.cache
def compiled() -> Callable[[Problem], Tensor]:
    return torch.compile(plain, dynamic=False, fullgraph=True)


def orda(op, p: Problem) -> Tensor:
    return op.distillation_loss(
        *p.inputs, op.SeparateTeacher(*p.teacher), student_ce_weight=0.5, kl_weight=0.5
    ).loss


class Case(NamedTuple):
    call: Callable  # Problem -> the loss to go backward from, or anything else
    loss: str = (
        "both"  # a name of LOSSES; dense: a teacher's whole distribution; else another kind of work
    )
    group: str = "ours"  # ours, floor, torch, peer
    floor: str = "three GEMMs"
    note: str = ""


LOSSES = {  # -> (its case among ours, that op, which has the fp64 reference, and the same in plain PyTorch)
    "both": ("linear_topk_kl", ours, plain),
    "T=2": ("linear_topk_kl T=2", partial(ours, T=2.0), partial(plain, T=2.0)),
    "kl": (
        "linear_topk_kl KL, frozen head",
        partial(ours, frozen=True),
        partial(plain, share=1.0, frozen=True),
    ),
    "ce": (
        "linear_cross_entropy",
        lambda p, **how: linear_cross_entropy(*p.inputs, **how).loss,
        partial(plain, share=0.0),
    ),
}
DENSE = "dense teacher's hidden states and head, a fourth GEMM"
PROBS = "dense teacher's [N,V] probabilities, counted in its memory, no CE"
LIGER, CUT = "liger_kernel.transformers:LigerFusedLinear", "cut_cross_entropy:linear_cross_entropy"
TORCH, QUACK = (
    "torch.nn:LinearCrossEntropyOptions",
    "quack.linear_cross_entropy:chunked_linear_cross_entropy",
)
PEERS = {  # name -> (what is imported as `op`, its call, loss, note)
    "F.linear_cross_entropy chunked": (
        TORCH,
        lambda op, p: F.linear_cross_entropy(*p.inputs, options=op()),
        "ce",
        "",
    ),
    "Liger CE": (
        LIGER + "CrossEntropyLoss",
        lambda op, p: op()(p.weight, p.hidden, p.labels),
        "ce",
        "",
    ),
    "Liger JSD": (
        LIGER + "JSD",
        lambda op, p: op()(p.hidden, p.weight, *p.teacher, p.labels),
        "dense",
        DENSE + ", no CE",
    ),
    "Liger KL": (
        LIGER + "KLDivLoss",
        lambda op, p: op()(p.hidden, p.weight, p.teacher_probs, p.labels),
        "dense",
        PROBS,
    ),
    "ORDA CE + KL": ("orda_kernel", orda, "dense", DENSE),
    "cut-cross-entropy": (
        CUT,
        lambda op, p: op(*p.inputs),
        "ce",
        "its default: drops small gradients",
    ),
    "cut-cross-entropy exact": (CUT, lambda op, p: op(*p.inputs, filter_eps=None), "ce", ""),
    "QuACK CE": (QUACK, lambda op, p: op(*p.inputs), "ce", ""),
}
CASES = {
    "three GEMMs": Case(gemms, "", "floor"),
    "two GEMMs": Case(partial(gemms, count=2), "", "floor", "two GEMMs"),
    **{
        name: Case(op, loss, "ours", "two GEMMs" if loss == "kl" else "three GEMMs")
        for loss, (name, op, _) in LOSSES.items()
    },
    **{f"linear_topk_kl _path={path}": Case(partial(ours, _path=path)) for path in (1, 2)},
    **{
        f"linear_cross_entropy _path={path}": Case(partial(LOSSES["ce"][1], _path=path), "ce")
        for path in (1, 2)
    },
    "linear_topk_kl none": Case(partial(ours, reduction="none")),
    "linear_log_probs + torch": Case(composed),
    "plain PyTorch": Case(plain, group="torch"),
    "plain PyTorch, log_softmax twice": Case(partial(plain, twice=True), group="torch"),
    "plain PyTorch compiled": Case(lambda p: compiled()(p), group="torch"),
    "plain PyTorch T=2": Case(LOSSES["T=2"][2], "T=2", "torch"),
    "plain PyTorch KL, frozen head": Case(LOSSES["kl"][2], "kl", "torch", "two GEMMs"),
    "plain PyTorch CE": Case(LOSSES["ce"][2], "ce", "torch"),
    **{
        name: Case(lambda p, it=it: it[1](resolve_name(it[0]), p), it[2], "peer", note=it[3])
        for name, it in PEERS.items()
    },
}
TEACHER = {  # no gradient
    "one GEMM": Case(partial(gemms, count=1), "topk", "floor", "one GEMM"),
    "linear_topk": Case(top, "topk", "ours", "one GEMM"),
    "linear_topk T=1,2": Case(
        partial(top, temperatures=(1.0, 2.0)), "topk T=1,2", "ours", "one GEMM"
    ),
    "GEMM + topk + logsumexp": Case(plain_top, "topk", "torch", "one GEMM"),
}
NOTE = "logits read once, gradient written once"  # their least bytes; a second read is ours to pay
GIVEN = {  # loss and gradient of given logits over a copy of them
    "device copy": Case(
        lambda p: p.buffers[0].copy_(p.logits.detach()), "copy", "floor", "device copy", NOTE
    ),
    "topk_kl": Case(
        lambda p: torch.autograd.grad(given(p), p.logits), "logits", "ours", "device copy", NOTE
    ),
}


def gradients(call: Callable, p: Problem) -> list[Tensor]:
    """The loss, d_hidden, and d_weight where the head is not frozen."""
    loss = call(p)
    parts = loss.detach(), *torch.autograd.grad(loss, p.leaves, allow_unused=True)
    return [part.double() for part in parts if part is not None]


def relative(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [
        ((mine - its).norm() / its.norm()).item() for mine, its in zip(found, exact, strict=True)
    ]


def check(device: torch.device, dtype: torch.dtype, cases: dict[str, Case]) -> dict[str, float]:
    """Every op of ours against the fp64 reference, or SystemExit. Returns the larger gradient error of each case, peers too."""
    worst, bound = {}, GRAD_ERROR[dtype]
    for shape, group in (
        ((512, 256, 2048, 8), "others"),
        ((251, 72, 1031, 8), "ours"),
    ):  # peers want multiples; ours must not
        p, exact = Problem(*shape, dtype, device), Problem(*shape, dtype, device)
        exact.hidden, exact.weight = exact.leaves = [
            part.detach().double().requires_grad_() for part in exact.leaves
        ]
        exact.inputs = *exact.leaves, exact.labels
        truth = {
            loss: gradients(partial(op, backend="reference"), exact)
            for loss, (_, op, _) in LOSSES.items()
        }
        usual = {
            loss: relative(gradients(torchs, p), truth[loss])
            for loss, (_, _, torchs) in LOSSES.items()
        }
        for name, case in cases.items():
            if case.loss not in LOSSES or (case.group == "ours") != (group == "ours"):
                continue
            try:
                found = relative(gradients(case.call, p), truth[case.loss])
            except Exception as error:  # not passed over: its row in the table says so again
                if group == "ours":
                    raise
                print(f"not checked: {name}: {error!r:.150}")
                continue
            worst[name] = max(found[1:])
            allowed = [min(bound, 2 * its + bound / 10) for its in usual[case.loss]]
            if group == "ours" and not all(
                mine <= most for mine, most in zip(found, allowed, strict=True)
            ):
                raise SystemExit(
                    f"{name}: relative errors {found}, at most {allowed}: nothing is timed"
                )
    check_logits(p, exact)
    return worst


def check_logits(p: Problem, exact: Problem) -> None:
    """linear_topk against fp64 logits, nats; topk_kl on given logits against itself in fp64, relative."""
    z = exact.hidden.detach() @ exact.weight.detach().t()
    log_p, norm = z.log_softmax(1), (z / 2).logsumexp(1) - z.logsumexp(1) / 2
    ids, top, norms = linear_topk(p.hidden, p.weight, p.K, temperatures=(1.0, 2.0))
    gaps = (
        top - log_p.topk(p.K).values,
        top - log_p.gather(1, ids.long()),
        norms - torch.stack([0 * norm, norm], 1),
    )
    found = [("linear_topk", gap.abs().max().item(), 1e-3) for gap in gaps]
    for dtype, bound in GRAD_ERROR.items():
        both = []
        for leaf, backend in ((z.to(dtype), "auto"), (z.to(dtype).double(), "reference")):
            loss = given(p, leaf.requires_grad_(), backend)
            both.append([loss.detach().double(), torch.autograd.grad(loss, leaf)[0].double()])
        found += [(f"topk_kl {dtype}", error, bound) for error in relative(*both)]
    for name, error, most in found:
        if not error <= most:
            raise SystemExit(
                f"{name}: error {error:.1e} against fp64, at most {most:.0e}: nothing is timed"
            )
