"""What each access to a teacher is worth, where its probabilities are known.

python train.py experiment=toy

The teacher is t_i ~ 1/i over V tokens, the same at each of R positions. For each access: what a
student that fits its targets perfectly would say, and how much a target varies from draw to draw,
by the very function that training uses.
"""

import torch
from rich.console import Console
from rich.table import Table

from teachers.access import ACCESS_KINDS, TeacherOutput, to_sparse_targets
from teachers.cache import CacheSpec

V = 100_000  # vocabulary
K = 20  # top entries
N = 12  # draws
R = 20_000  # positions

SHOWN = (  # access, tail, what a perfect student is
    ("greedy", "", "biased: all on one token"),
    ("text", "", "unbiased"),
    ("sampled", "", "unbiased"),
    ("topk", "ghost", "head and tail's mass exact, its shape free"),
    ("topk", "smooth", "head and tail's mass exact, its shape flat"),
    ("topk", "truncate", "biased: no tail, the head 1/M too high"),
    ("topk", "renormalize", "biased: no tail, the head 1/M too high"),
    ("topk", "renormalize_both", "only ratios inside the top k; the rest is not identified"),
    ("residual_to_label", "", "biased: the head 2-M too high, the tail 1-M too low"),
    ("unbiased", "", "unbiased"),
    ("stratified", "", "unbiased, the least variance a byte"),
    ("full", "", "exact"),
)


def zipf() -> torch.Tensor:
    """[V] probabilities, the likeliest first."""
    weights = 1 / torch.arange(1, V + 1, dtype=torch.float64)
    return weights / weights.sum()


def measure(
    kind: str,
    t: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, float]:
    """The mean target [V] that training would see, and its variance at one position, summed."""
    access = ACCESS_KINDS[kind]
    num_positions = 1 if access.entries == "all" else R

    def draw(probs: torch.Tensor, count: int) -> torch.Tensor:
        draws = torch.multinomial(probs, count * R, replacement=True, generator=generator)
        return draws.view(R, count)

    labels = draw(t, 1)[:num_positions, 0]  # [R]
    ids = torch.arange(access.num_entries(K, V)).expand(num_positions, -1)  # [R,K]
    draws = None  # [R,N]
    if access.draws == "any":
        draws = draw(t, access.num_draws(N))
    elif access.draws == "tail":
        draws = K + draw(t[K:], access.num_draws(N))
    output = TeacherOutput(ids, t[ids].log().float(), None, draws)
    targets = to_sparse_targets(kind, output, labels)

    tokens = targets.ids.clamp(min=0).long()  # [R,slots]
    weights = targets.log_probs.double().exp()  # [R,slots]
    weights = weights.masked_fill(targets.ids < 0, 0)
    shares = weights.flatten() / num_positions
    mean = torch.bincount(tokens.flatten(), shares, minlength=V)

    # A token that was drawn twice at a position adds up there.
    positions = torch.arange(num_positions)[:, None]
    _, places = (positions * V + tokens).unique(return_inverse=True)
    summed = torch.bincount(places.flatten(), weights.flatten())
    variance = summed.square().sum() / num_positions - mean.square().sum()
    return mean, max(0.0, variance.item())


def rows(t: torch.Tensor) -> list[tuple]:
    """For each of SHOWN: access, tail, the perfect student's p_1, p_2 and mass off the top K,
    the variance, bytes a token, and the note."""
    generator = torch.Generator().manual_seed(0)
    measured = {kind: measure(kind, t, generator) for kind in ACCESS_KINDS}
    table = []
    for kind, tail, note in SHOWN:
        mean, variance = measured[kind]
        p = mean / mean.sum()
        if tail in ("ghost", "smooth"):
            p = t
        elif tail == "renormalize_both":
            p = torch.full_like(t, torch.nan)
        student = [p[0].item(), p[1].item(), 1 - p[:K].sum().item()]
        spec = CacheSpec(kind, V, 1, {}, "", "", "", K, N)
        table.append((kind, tail, *student, variance, spec.row.itemsize, note))
    return table


def show() -> None:
    """Prints the table."""
    t = zipf()
    table = Table(
        "access",
        "tail",
        "p_1",
        "p_2",
        "off top k",
        "variance",
        "bytes a token",
        "a perfect student is",
        title=f"A teacher with t_i ~ 1/i, V={V:,}, k={K}, n={N}: p_1 = {t[0]:.4f},"
        f" p_2 = {t[1]:.4f}, off the top k {1 - t[:K].sum():.4f}; {R:,} positions",
    )
    for kind, tail, *values, size, note in rows(t):
        cells = [f"{value:.4f}".replace("nan", "") for value in values]
        table.add_row(kind, tail, *cells, f"{size:,}", note)
    Console(width=150).print(table)
