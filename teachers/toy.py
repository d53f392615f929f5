"""What each access to a teacher is worth, where its probabilities are known.

python train.py experiment=toy

The teacher is t_i ~ 1/i over V tokens, the same at each of R positions. For each access: what a
student that fits its targets perfectly would say, and how much a target varies from draw to draw,
by the very function that training uses.
"""

import torch
from rich.console import Console
from rich.table import Table

from model.loss import SparseTargets
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


def draw_targets(kind: str, t: torch.Tensor, generator: torch.Generator) -> SparseTargets:
    """The targets [R,slots] that training would see; one position where all of t [V] is shown."""
    access = ACCESS_KINDS[kind]
    num_positions = 1 if access.entries == "all" else R

    def draw(probs: torch.Tensor, count: int) -> torch.Tensor:
        return torch.multinomial(probs, count, replacement=True, generator=generator)

    labels = draw(t, num_positions)  # [R]
    ids = torch.arange(access.num_entries(K, V)).expand(num_positions, -1)  # [R,K]
    log_probs = t[ids].log().float()  # [R,K]
    draws = None  # [R,N]
    num_draws = R * access.num_draws(N)
    if access.draws == "any":
        draws = draw(t, num_draws).view(R, -1)
    elif access.draws == "tail":
        draws = K + draw(t[K:], num_draws).view(R, -1)
    output = TeacherOutput(ids, log_probs, None, draws)
    return to_sparse_targets(kind, output, labels)


def measure(kind: str, t: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, float]:
    """The mean target [V], and its variance at one position, summed over tokens."""
    targets = draw_targets(kind, t, generator)
    tokens = targets.ids.clamp(min=0).long()  # [R,slots]
    weights = targets.log_probs.double().exp()  # [R,slots]
    weights = weights.masked_fill(targets.ids < 0, 0)
    num_positions = len(tokens)

    mean = torch.zeros(V, dtype=torch.float64)
    mean.index_add_(0, tokens.flatten(), weights.flatten() / num_positions)

    # A token that was drawn twice at a position adds up there.
    positions = torch.arange(num_positions)[:, None]
    _, places = (positions * V + tokens).unique(return_inverse=True)
    summed = torch.zeros_like(weights).flatten()
    summed.index_add_(0, places.flatten(), weights.flatten())
    variance = summed.square().sum() / num_positions - mean.square().sum()
    return mean, max(0.0, variance.item())


def rows(t: torch.Tensor) -> list[tuple]:
    """For each of SHOWN: access, tail, the perfect student's p_1, p_2 and mass off the top K,
    the variance, bytes a token, and the note."""
    generator = torch.Generator().manual_seed(0)
    measured = {}
    for kind in ACCESS_KINDS:
        measured[kind] = measure(kind, t, generator)
    table = []
    for kind, tail, note in SHOWN:
        mean, variance = measured[kind]
        p = mean / mean.sum()
        if tail in ("ghost", "smooth"):
            p = t
        elif tail == "renormalize_both":
            p = torch.full_like(t, torch.nan)
        student = [p[0].item(), p[1].item(), 1 - p[:K].sum().item()]
        spec = CacheSpec(
            kind,
            V,
            block_size=1,
            blocks={"train": 1},
            teacher="",
            tokenizer="",
            tokens="",
            k=K,
            n=N,
        )
        table.append((kind, tail, *student, variance, spec.row.itemsize, note))
    return table


def show() -> None:
    """Prints the table."""
    t = zipf()
    title = (
        f"A teacher with t_i ~ 1/i, V={V:,}, k={K}, n={N}:"
        f" p_1 = {t[0]:.4f}, p_2 = {t[1]:.4f},"
        f" off the top k {1 - t[:K].sum():.4f};"
        f" {R:,} positions"
    )
    table = Table("access", "tail", title=title, title_justify="left")
    for name in ("p_1", "p_2", "off top k", "variance", "bytes a token"):
        table.add_column(name, justify="right")
    table.add_column("a perfect student is")
    for kind, tail, *values, size, note in rows(t):
        cells = [f"{value:.4f}".replace("nan", "") for value in values]
        table.add_row(kind, tail, *cells, f"{size:,}", note)
    Console(width=150).print(table)
